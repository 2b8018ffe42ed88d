"""CIPHER (Pham et al., ICLR 2024, section 3): a model that writes expected embeddings instead of tokens.

At every step the next input is sum_v p[v] E[v], p the tempered next-token distribution and E the embedding matrix, so
what is said stays in the convex hull of the vocabulary and nothing is drawn. With temperature 0 it is greedy text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxcomm.cache import KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Sampling, warp
from jaxcomm.model import Attended, LanguageModel

Stop = Literal["argmax", "nearest", "none"]
"""A response ends where the likeliest token is a stop token (Zhang et al.'s StateDelta), where the token nearest to the
expected embedding is one (the paper's), or never (the authors' code, which cuts afterwards)."""

Partial = Literal["off", "entropy", "maxprob"]
"""Expected embeddings always, or only where the model is unsure, by the entropy of its distribution or by 1 - max p, and
the argmax's embedding elsewhere (the paper's ablation)."""

THRESHOLDS = {"off": 0.0, "entropy": 1.869, "maxprob": 0.2}
"""The authors' (their code says p < 0.8)."""


class Vectors(struct.PyTreeNode):
    """A response. own [B, T, D]: as its writer reads it; sent: tuple of [B, T, D_r], the same distributions through each
    receiver's embedding matrix; tokens [B, T]: nearest in the writer's own, -1 after the end; lengths [B]: vectors
    before the one that stopped it. Vectors after the end are 0."""

    own: Any
    sent: tuple[Any, ...]
    tokens: Any
    lengths: Any


class _State(struct.PyTreeNode):
    t: Any
    e: Any
    done: Any
    out: Vectors
    cache: KVCache


def nearest(vectors: Float[Array, "*n D"], table: Float[Array, "V D"]) -> Int[Array, "*n"]:
    """The token whose embedding has the largest cosine with each vector (as the authors' code; the paper says nearest)."""
    norm = jnp.linalg.norm(table.astype(jnp.float32), axis=-1)
    products = jnp.einsum("...d,vd->...v", vectors, table, preferred_element_type=jnp.float32)
    return jnp.argmax(products / jnp.maximum(norm, 1e-15), axis=-1).astype(jnp.int32)


class Mixing(struct.PyTreeNode):
    """How a distribution becomes a vector, and when a response ends.

    Attributes:
        sampling: Temperature, a number or [B], and cuts of p before it is averaged.
        threshold: Of `partial`; None: the authors'.
        stop: When it ends.
        partial: Whether sure steps are mixed, too.
        reverse: Mix where the model is sure instead.
        vocab: How many tokens are meant (matrices may be padded); None: the smallest matrix has no others.
    """

    sampling: Sampling
    threshold: Any = None
    stop: Stop = struct.field(pytree_node=False, default="argmax")
    partial: Partial = struct.field(pytree_node=False, default="off")
    reverse: bool = struct.field(pytree_node=False, default=False)
    vocab: int | None = struct.field(pytree_node=False, default=None)


def mixture(logits: Float[Array, "B V"], how: Mixing) -> Float[Array, "B V"]:
    """The distribution p whose mean embedding is said; its temperature may be [B], and 0 is the argmax."""
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
    past: tuple[KVCache, ...] = (),
    max_new_tokens: int,
    stop_tokens: Sequence[Any] | AnyArray = (),
) -> Vectors:
    """Writes vectors after prefilled prompts, all rows in one `while_loop`.

    Args:
        params: The model, or a network.
        logits: After the prompts, as `prefill` returned them.
        cache: The prompts' keys and values, likewise.
        how: How distributions become vectors.
        tables: Embedding matrices [V_r, D_r] of the receivers, over the same vocabulary. Rows are averaged raw; a model that
            scales its embeddings scales the mean, once.
        past: Caches of what was read before, which are only read.
        max_new_tokens: At most so many vectors.
        stop_tokens: A response ends with any of them (`Stop`).

    Returns:
        The response.

    Raises:
        ValueError: max_new_tokens below 1.
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
    """The next vector, which is not kept if it ends the response."""
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
