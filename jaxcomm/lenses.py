"""Lenses: express a state in the model's own tokens. The logit lens at every layer, nearest tokens, patchscopes.

logit_lens(params, prompts, edits=[receive(message, j)])   the receiver's prediction after each layer
nearest_tokens(params, message)                            tokens nearest to a message, by its own model
patchscope(params, prompt, message, at=..)                 its own model describes it in text: "x is ..."
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Decoding, Generation, generate
from jaxcomm.edits import Edit, Read, hook_of, replace
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.messages import Message
from jaxcomm.model import Params, enter, run_blocks
from jaxcomm.prompts import Prompts, as_prompts
from jaxcomm.sites import Layer, Positions, Site, check_site


class Lens(struct.PyTreeNode):
    """Predictions of a model's final norm and head from the residual stream after each layer, at the last token.

    Attributes:
        tokens: The likeliest tokens, the likeliest first, [B, layers, count]. -1 where the stream is NaN.
        logprobs: Their log-probabilities in nats, [B, layers, count].
        answer_logprobs: Log-probability of each prompt's answer, [B, layers]. None: no answers were given.
        answer_ranks: Its rank among all tokens, [B, layers]. 1 is the likeliest; 0: the answer is -1 or the stream NaN.

    Example:
        >>> jc.logit_lens(params, prompts, layers=[2, 4], answers=np.array([7, 8])).answer_ranks.shape
        (2, 2)
    """

    tokens: Int[Array, "B layers count"]
    logprobs: Float[Array, "B layers count"]
    answer_logprobs: Float[Array, "B layers"] | None = None
    answer_ranks: Int[Array, "B layers"] | None = None


@compiled(texts={"answers": "params"}, static=("layers", "count"))
def logit_lens(
    params: Params,
    prompts: Prompts,
    *,
    edits: Sequence[Edit] = (),
    past: Sequence[KVCache] = (),
    layers: Sequence[int] | None = None,
    count: int = 5,
    answers: Int[AnyArray, "B"] | None = None,
) -> Lens:
    """Applies the model's final norm and head to the residual stream after each layer, at each prompt's last token.

    This is nostalgebraist's logit lens (2020). The prompts are read once for all layers, and only one layer's logits are
    in memory at a time. With `edits=[receive(message, j)]` it shows the effect of a message in the receiver's layers. For
    the last layer the result is the model's own next-token distribution. Earlier layers may encode a token in a way that
    the head cannot read. So a token may be known to the model although the lens does not show it.

    Args:
        params: The model.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        edits: Edits of the model's states. The stream is read after them.
        past: Key/value caches of the tokens before the prompts, such as a prefix.
        layers: Numbers of the layers, 0 (what enters the first block) to L. Default: all.
        count: Number of tokens to name.
        answers: A token id for each prompt, [B]. Its rank and log-probability are reported.

    Returns:
        The predictions after each layer.

    Raises:
        ValueError: A layer is out of range; `count` is below 1 or beyond the vocabulary; there is not one answer for each
            prompt; the prompts or an edit are invalid.

    Example:
        >>> message = jc.send(params, prompts, 3)
        >>> heard = jc.logit_lens(params, prompts, edits=[jc.receive(message, 1)], layers=range(1, 5))
        >>> bool((heard.tokens[:, 0] == jc.nearest_tokens(params, message)[0]).all())
        True
    """
    check_room(params, prompts)
    _check_count(params, count)
    if answers is not None and answers.shape != (len(prompts),):
        raise ValueError(f"answers are {answers.shape} for {len(prompts)} prompts: give one token for each")
    check_site(params.config, Site("resid_post", 0))  # a network has none
    layers = range(params.config.layers + 1) if layers is None else layers
    for layer in layers:
        check_site(params.config, Site("resid_post", layer))
    positions = positions_of(prompts, past)
    hook = hook_of(params, positions, edits, [Read(Site("resid_post", 0, "last"), tuple(layers))])
    h, hook = enter(params, prompts.tokens, positions, hook)
    (streams,) = run_blocks(params, h, positions, attended=Attended(past), hook=hook)[2]
    streams = jnp.where(jnp.reshape(hook.valid, (-1, 1)), streams, jnp.nan)
    found = jax.lax.map(lambda h: _likeliest(params, h, count, answers), streams)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def _check_count(params: Params, count: int) -> None:
    if not 1 <= count <= params.config.vocab:
        raise ValueError(f"count = {count}: name at least 1 token, and at most the model's {params.config.vocab}")


def _likeliest(params: Params, h: Float[Array, "B D"], count: int, answers: AnyArray | None = None) -> Lens:
    """Apply norm and head to one state of each row. The result has no axis of layers."""
    logits = params.logits(h[:, None])[:, 0]
    every = jax.nn.log_softmax(logits, axis=-1)
    logprobs, tokens = jax.lax.top_k(every, count)
    tokens = jnp.where(jnp.isnan(logprobs), -1, tokens)
    if answers is None:
        return Lens(tokens, logprobs)
    known = answers[:, None] >= 0
    own = jnp.where(known, jnp.take_along_axis(every, jnp.where(known, answers[:, None], 0), axis=-1), jnp.nan)
    ranks = jnp.where(jnp.isnan(own[:, 0]), 0, 1 + jnp.sum(every > own, axis=-1, dtype=jnp.int32))
    return Lens(tokens, logprobs, own[:, 0], ranks)


def nearest_tokens(
    params: Params, message: Message | AnyArray, *, by: Literal["head", "embedding"] = "head", count: int = 5
) -> tuple[Int[Array, "*n count"], Float[Array, "*n count"]]:
    """Finds the tokens that are nearest to each state of a message.

    The head and the embedding give different answers. The head gives the tokens that the model would generate next if this
    were its final residual stream. The embedding gives the input tokens whose vectors point in the same direction. The
    head is more informative for states from late layers, the embedding for states from early layers.

    Args:
        params: The model to use: the sender, or a receiver of the states.
        message: A message, or states [.., D] of the residual stream.
        by: "head" (final norm and head), or "embedding" (cosine with the rows of the embedding matrix).
        count: Number of tokens.

    Returns:
        Token ids [.., count], the nearest first, and their log-probabilities in nats, or their cosines.

    Raises:
        ValueError: `by` has another value; `count` is below 1 or beyond the vocabulary; the states have another width;
            the message holds no states, or is from another model.

    Example:
        >>> tokens, cosines = jc.nearest_tokens(params, params.embed[:2], by="embedding", count=3)
        >>> tokens[:, 0], cosines.shape
        (Array([0, 1], dtype=int32), (2, 3))
    """
    if by not in ("head", "embedding"):
        raise ValueError(f"unknown by {by!r}: choose head or embedding")
    _check_count(params, count)
    if isinstance(message, Message):
        message.check_fits(params, None)
    states = message.state_array() if isinstance(message, Message) else message
    if states.shape[-1] != params.config.width:
        raise ValueError(
            f"states of width {states.shape[-1]} in a model of width {params.config.width}: map them first"
        )
    return _nearest(params, jnp.asarray(states), by, count)


@functools.partial(jax.jit, static_argnames=("by", "count"))
def _nearest(params: Params, states: Array, by: str, count: int) -> tuple[Array, Array]:
    rows = states.reshape(-1, states.shape[-1]).astype(params.dtype)
    if by == "head":
        found = _likeliest(params, rows, count)
        tokens, near = found.tokens, found.logprobs
    else:
        length = lambda x: jnp.maximum(jnp.linalg.norm(x.astype(jnp.float32), axis=-1), jnp.finfo(jnp.float32).tiny)
        products = jnp.einsum("nd,vd->nv", rows, params.embed, preferred_element_type=jnp.float32)
        near, tokens = jax.lax.top_k(products / length(rows)[:, None] / length(params.embed), count)
    return tokens.reshape(*states.shape[:-1], count), near.reshape(*states.shape[:-1], count)


def patchscope(
    params: Params,
    prompt: Prompts | AnyArray,
    message: Message | AnyArray,
    *,
    at: Positions,
    layer: Layer | None = None,
    norm: float | None = None,
    **decoding: Unpack[Decoding],
) -> Generation:
    """Puts a message at a placeholder of a target prompt, and lets the model continue: its description of the message.

    This is a patchscope (Ghandeharioun et al. 2024, arXiv 2401.06102). While the prompt is read, the message replaces the
    residual stream at the placeholder. Then the model decodes, greedily by default. All rows of the message are one batch.
    After the last layer, only a patch of the prompt's last token has an effect, since no later layer reads the stream. The
    authors' code skips the final norm there, because transformers' last hidden state is already normalised. Our h[L] is
    not, so the norm is applied as always.

    Args:
        params: The model.
        prompt: The target prompt: `Prompts` of one row, or tokens [1, P].
        message: A message of one state for each row, or states [B, D]. With several tokens, the last one's state is used.
        at: Position of the placeholder, or a mask [1, P] (`Agent.find`). If it has several tokens, each gets the message.
        layer: Layer after which the message is inserted. Default: the layer where it was read, the published choice.
        norm: Scale every state to this Euclidean length first. Default: keep its own.
        **decoding: Options of `Decoding`.

    Returns:
        The generated tokens for each row of the message.

    Raises:
        ValueError: The target prompt has several rows; the layer or position is out of range, or the layer is not known;
            `norm` is not above 0; the message is from another model, or holds no states.

    Example:
        >>> message = jc.send(params, prompts, 3)
        >>> jc.patchscope(params, np.array([[7, 8, 9]]), message, at=1, max_new_tokens=2).tokens.shape
        (2, 2)
    """
    prompt, site = as_prompts(prompt), message.site if isinstance(message, Message) else None
    if len(prompt) != 1:
        raise ValueError(f"the target prompt has {len(prompt)} rows: give one, it is read for each row of the message")
    if layer is None and site is None:
        raise ValueError("this message does not say after which layer it was read: give layer=")
    if norm is not None and not norm > 0:
        raise ValueError(f"norm = {norm}: a state is scaled to a length above 0")
    states = jnp.asarray(message.state_array() if isinstance(message, Message) else message)
    if norm is not None:
        wide = states.astype(jnp.float32)
        states = (wide * (norm / jnp.linalg.norm(wide, axis=-1, keepdims=True))).astype(states.dtype)
    several = lambda x: jnp.repeat(jnp.asarray(x), len(states), axis=0)
    at = several(at) if isinstance(at, jax.Array | np.ndarray) and at.ndim else at
    site = (
        Site("resid_post", layer, at) if site is None or layer is not None else dataclasses.replace(site, positions=at)
    )
    put = message.replace(states=states) if isinstance(message, Message) else states
    return generate(params, jax.tree.map(several, prompt), edits=[Edit(site, replace, put)], **decoding)
