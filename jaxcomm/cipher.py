"""CIPHER (Pham et al., ICLR 2024, section 3): a model generates expected embeddings instead of tokens.

At every step the next input is sum_v p[v] E[v]. p is the next-token distribution at a temperature, E the embedding
matrix. So all vectors are in the convex hull of the vocabulary, and nothing is sampled. With temperature 0 it is greedy
text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Sampling, warp
from jaxcomm.language_model import LanguageModel
from jaxcomm.messages import Message
from jaxcomm.sites import Site

Stop = Literal["argmax", "nearest", "none"]
"""When a response ends: when the likeliest token is a stop token (Zhang et al.'s StateDelta), when the token nearest to
the expected embedding is one (the paper), or never (the authors' code, which truncates afterwards)."""

Partial = Literal["off", "entropy", "maxprob"]
"""Use expected embeddings always, or only if the model is unsure (by the entropy of its distribution or by 1 - max p),
with the argmax's embedding otherwise (the paper's ablation)."""

THRESHOLDS = {"off": 0.0, "entropy": 1.869, "maxprob": 0.2}
"""The authors' values (their code has p < 0.8)."""


class Vectors(struct.PyTreeNode):
    """A response as vectors. T is the largest number of vectors. Vectors after the end of a row are 0.

    Attributes:
        own: Vectors for the writer itself, [B, T, D].
        sent: Vectors for each receiver, [B, T, D_r] each: the same distributions, with the receiver's embedding matrix.
        tokens: Token [B, T] whose embedding in the writer's matrix is nearest to each vector; -1 after the end.
        lengths: Number of vectors of each row, [B]. The vector that ended the response is neither kept nor counted.
    """

    own: Float[Array, "B T D"]
    sent: tuple[Float[Array, "B T _"], ...]
    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]

    def message(self, receiver: int | None = None) -> Message:
        """The response as a message. `messages.receive` puts it in the place of embeddings.

        Args:
            receiver: Index into `sent`. None: the vectors for the writer itself.

        Returns:
            States [B, T, D] at the site `embed`.
        """
        vectors = self.own if receiver is None else self.sent[receiver]
        return Message(vectors, jnp.arange(vectors.shape[1]) < self.lengths[:, None], Site("embed"))


class _State(struct.PyTreeNode):
    t: Int[Array, ""]
    e: Float[Array, "B D"]
    done: Bool[Array, "B"]
    out: Vectors
    cache: KVCache


def nearest(vectors: Float[Array, "*n D"], table: Float[Array, "V D"]) -> Int[Array, "*n"]:
    """Finds the token whose embedding has the largest cosine with each vector.

    The authors' code uses the cosine; the paper says only "nearest" (Pham et al. 2024, section 3).

    Args:
        vectors: The vectors [.., D].
        table: The embedding matrix [V, D].

    Returns:
        Token ids [..].
    """
    norm = jnp.linalg.norm(table.astype(jnp.float32), axis=-1)
    products = jnp.einsum("...d,vd->...v", vectors, table, preferred_element_type=jnp.float32)
    return jnp.argmax(products / jnp.maximum(norm, 1e-15), axis=-1).astype(jnp.int32)


class Mixing(struct.PyTreeNode):
    """How to turn a distribution into a vector, and when a response ends.

    Attributes:
        sampling: Temperature, a number or [B], and top_k and top_p of the distribution. At temperature 0 the vector is
            the embedding of the likeliest token.
        threshold: Threshold for `partial`: in nats for "entropy", a probability for "maxprob". None: the authors' value
            (`THRESHOLDS`).
        stop: When a response ends. "argmax": when the likeliest token is a stop token. "nearest": when the token nearest
            to the vector is one. "none": never (`Stop`).
        partial: "off": every vector is a mixture. "entropy": only if the entropy of the distribution exceeds the
            threshold. "maxprob": only if 1 - max p does. Otherwise the vector is the embedding of the likeliest token.
        reverse: With `partial`, mix only where the measure does not exceed the threshold.
        vocab: Number of tokens in the vocabulary, if the embedding matrices are padded. None: the rows of the smallest
            matrix.
    """

    sampling: Sampling
    threshold: float | Array | None = None
    stop: Stop = struct.field(pytree_node=False, default="argmax")
    partial: Partial = struct.field(pytree_node=False, default="off")
    reverse: bool = struct.field(pytree_node=False, default=False)
    vocab: int | None = struct.field(pytree_node=False, default=None)


def mixture(logits: Float[Array, "B V"], how: Mixing) -> Float[Array, "B V"]:
    """Computes the distribution whose mean embedding is the next vector (Pham et al. 2024, section 3).

    Args:
        logits: Logits [B, V] of the next token.
        how: Temperature, top_k, top_p, and when to mix.

    Returns:
        Distribution p [B, V]: one-hot if the vector is not mixed; NaN if the temperature is negative.
    """
    sampling, partial = how.sampling, how.partial
    threshold = THRESHOLDS[partial] if how.threshold is None else how.threshold
    temperature = jnp.broadcast_to(jnp.asarray(sampling.temperature, jnp.float32), logits.shape[:1])[:, None]
    certain = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    p = jax.nn.softmax(warp(logits, sampling.replace(temperature=jnp.maximum(temperature, 1e-6))), axis=-1)
    mixed = temperature != 0
    if partial != "off":
        plain = jax.nn.softmax(logits, axis=-1)
        entropy = -jnp.sum(jnp.where(plain > 0, plain * jnp.log(plain), 0.0), axis=-1, keepdims=True)
        doubt = entropy if partial == "entropy" else 1 - jnp.max(plain, axis=-1, keepdims=True)
        mixed &= (doubt > threshold) != how.reverse
    return jnp.where(temperature < 0, jnp.nan, jnp.where(mixed, p, certain))


@compiled(prompts={}, static=("max_new_tokens",))
def cipher(
    params: LanguageModel,
    logits: Float[Array, "B V"],
    cache: KVCache,
    how: Mixing,
    *,
    tables: Sequence[Float[AnyArray, "_ _"]] = (),
    past: Sequence[KVCache] = (),
    max_new_tokens: int,
    stop_tokens: Sequence[Any] | AnyArray = (),
) -> Vectors:
    """Generates vectors after prefilled prompts (CIPHER, Pham et al. 2024, section 3). All rows run in one `while_loop`.

    At each step the model reads sum_v p[v] E[v], where p is the distribution of the next token and E the embedding
    matrix.

    Args:
        params: The model, or a network.
        logits: Logits [B, V] after the prompts, as `prefill` returned them.
        cache: Keys and values of the prompts, as `prefill` returned them.
        how: How to turn a distribution into a vector, and when a response ends.
        tables: Embedding matrices [V_r, D_r] of the receivers, over the same vocabulary. Their rows are averaged without
            scaling. A receiver that scales its embeddings scales the vectors when it reads them.
        past: Key/value caches of the tokens before the prompts. They are not changed.
        max_new_tokens: Largest number of vectors, T.
        stop_tokens: Tokens that end a response (`Mixing.stop`).

    Returns:
        The response.

    Raises:
        ValueError: `max_new_tokens` is below 1.

    Example:
        >>> from jaxcomm.cipher import Mixing, cipher
        >>> logits, cache = jc.prefill(params, prompts)
        >>> response = cipher(params, logits, cache, Mixing(jc.Sampling(temperature=0.7)), max_new_tokens=2)
        >>> response.own.shape
        (2, 2, 128)
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: it must be at least 1")
    tables = tuple(jnp.asarray(t) for t in (params.embed, *tables))
    tables = tuple(t[: how.vocab or min(map(len, tables))] for t in tables)
    rows, first = logits.shape[0], cache.positions.shape[-1]
    start = jnp.max(cache.positions, axis=-1) + 1
    say = functools.partial(_say, how=how, tables=tables, stops=jnp.asarray(stop_tokens, jnp.int32))

    def step(s: _State) -> _State:
        positions, column = (start + s.t - 1)[:, None], first + s.t - 1
        attended = Attended(past, s.cache.announce(positions, column), column)
        h, cache = params.read(s.e[:, None], positions, attended=attended)
        e, done, out = say(s.t, s.done, s.out, params.logits(h)[:, 0])
        return _State(s.t + 1, e, done, out, cache)

    own, *sent = (jnp.zeros((rows, max_new_tokens, t.shape[1]), t.dtype) for t in tables)
    none = jnp.full((rows, max_new_tokens), -1, jnp.int32)
    blank = Vectors(own, tuple(sent), none, jnp.zeros(rows, jnp.int32))
    e, done, out = say(jnp.int32(0), jnp.zeros(rows, bool), blank, logits)
    state = _State(jnp.int32(1), e, done, out, cache.extend(max_new_tokens - 1))
    out = jax.lax.while_loop(lambda s: (s.t < max_new_tokens) & ~jnp.all(s.done), step, state).out
    written = jnp.arange(max_new_tokens) < out.lengths[:, None]
    return out.replace(tokens=jnp.where(written, nearest(out.own, tables[0]), -1))


def _say(
    t: Any,
    done: Bool[Array, "B"],
    out: Vectors,
    logits: Float[Array, "B V"],
    *,
    how: Mixing,
    tables: tuple,
    stops: Array,
) -> tuple[Array, Bool[Array, "B"], Vectors]:
    """Compute the next vector. A vector that ends the response is not kept."""
    logits = logits[:, : len(tables[0])]
    p = mixture(logits, how)
    mean = lambda t: jnp.einsum("bv,vd->bd", p.astype(t.dtype), t, preferred_element_type=jnp.float32)
    said = [mean(t).astype(t.dtype) for t in tables]
    if how.stop == "nearest":
        done |= jnp.isin(nearest(said[0], tables[0]), stops)
    if how.stop == "argmax":
        done |= jnp.isin(jnp.argmax(logits, axis=-1), stops)
    keep = lambda old, new: old.at[:, t].set(jnp.where(done[:, None], 0, new).astype(old.dtype))
    own, *sent = (keep(old, new) for old, new in zip((out.own, *out.sent), said, strict=True))
    return said[0], done, out.replace(own=own, sent=tuple(sent), lengths=out.lengths + (~done).astype(jnp.int32))
