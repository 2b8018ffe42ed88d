"""Activation communication (Ramesh & Li, ICML 2025, section 3.1): A is paused after layer k, B after layer j,
B's state becomes f(A's, B's), and B goes on.

`communicate` is `send` (A's side) then `receive` (B's side) then `decoding.decode`. The edit happens once, in B's
prefill; the K/V it leads to stay, so every later token reads them. Whoever tries many edits of one prompt reads it once
(`read_prompt`) and goes on from each (`resume`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcomm.cache import KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Generation, Sampling, decode
from jaxcomm.graft import Graft, apply_graft
from jaxcomm.model import (
    Params,
    check_room,
    embed,
    positions_of,
    prefill_edited,
    prefix,
    recorder,
    run_blocks,
    run_edited,
    unembed,
)
from jaxcomm.sharding import deliver

Where = str
"""Which tokens are edited: the prompt's last (default), or all of them (appendix B.1), the two prompts aligned at their
ends; tokens of the longer prompt without a counterpart stay as they are."""
WHERE = ("last", "all")
"""The values of `Where`."""


_SHAPES = {"last": "a vector per prompt, [B, D_A]", "all": "a vector per token, [B, P, D_A]"}


def _check_where(where: str) -> None:
    if where not in WHERE:
        raise ValueError(f"unknown where {where!r}: choose one of {', '.join(WHERE)}")


@compiled(prompts=(("params_a", "tokens_a", "mask"),), layers={"k": "params_a"}, static=("where",))
def send(
    params_a: Params,
    tokens_a: Int[AnyArray, "B P"],
    k,
    *,
    mask: Bool[AnyArray, "B P"] | None = None,
    past: tuple[KVCache, ...] = (),
    where: Where = "last",
) -> Array:
    """A's message: h_A[k] at the last token, [B, D_A], or with where="all" at every token, [B, P, D_A] (0 on padding).
    Blocks above k are not run. `past`: caches of what stands before (`prefix`)."""
    _check_where(where)
    h = prefix(params_a, tokens_a, k, mask=mask, past=past)
    if where == "last":
        return h[:, -1]
    return h if mask is None else jnp.where(mask[..., None], h, 0)


def _editor(graft: Graft, message: Array, W, mask_b, where: Where):
    """The function h_B[j] -> edited h_B[j], on the prompt's columns. ValueError: `receive`'s, but for j."""
    _check_where(where)
    if message.ndim != {"last": 2, "all": 3}[where]:
        raise ValueError(f"the message is {message.shape}: with where={where!r} it is {_SHAPES[where]}")
    if where == "last":
        return lambda h: h.at[:, -1].set(apply_graft(graft, message, h[:, -1], W))
    if graft != "sum":
        raise ValueError(f'where="all" needs graft="sum": {graft!r} would overwrite the whole prompt')

    def edit(h):
        width = message.shape[-1] if W is None else W.shape[0]
        if width != h.shape[-1]:
            raise ValueError(
                f'where="all" needs equal widths, got {width} and {h.shape[-1]}: pass W, or edit the last token'
            )
        n = min(message.shape[1], h.shape[1])
        old = h[:, h.shape[1] - n :]
        new = apply_graft(graft, message[:, message.shape[1] - n :], old, W)
        if mask_b is not None:
            new = jnp.where(mask_b[:, mask_b.shape[1] - n :, None], new, old)
        return h.at[:, h.shape[1] - n :].set(new)

    return edit


def _check_rows(message: Array, tokens_b: Int[AnyArray, "B P"]) -> None:
    if len(message) != len(tokens_b):
        raise ValueError(f"{len(message)} messages for {len(tokens_b)} prompts of B: give one for each")


_AT_B: Any = dict(prompts=(("params_b", "tokens_b", "mask"),), layers={"j": "params_b"})


@compiled(**_AT_B, static=("graft", "where"))
def receive(
    params_b: Params,
    tokens_b: Int[AnyArray, "B P"],
    message: Array,
    j,
    *,
    graft: Graft = "replace",
    W: Float[AnyArray, "_ _"] | None = None,
    mask: Bool[AnyArray, "B P"] | None = None,
    where: Where = "last",
) -> tuple[Float[Array, "B V"], KVCache]:
    """B reads its prompt with the message grafted in after block j: logits of the next token, and the cache to go on
    from.

    ValueError: j out of range, unknown graft or where, W of a wrong shape, where="all" with another graft than sum or unequal
    widths, not one message for each prompt.
    """
    _check_rows(message, tokens_b)
    return prefill_edited(params_b, tokens_b, (j, _editor(graft, message, W, mask, where)), mask=mask)


class Prompt(struct.PyTreeNode):
    """B's prompt, read once: all that an edit of its last token leaves as it was.

    states [L_B + 1, B, D_B]: the last token's h[0] .. h[L_B]. earlier: keys and values of the tokens before it (its own
    column is marked empty). last: its own, one column.
    """

    states: Any
    earlier: KVCache
    last: KVCache


@compiled(prompts=(("params_b", "tokens_b", "mask"),))
def read_prompt(
    params_b: Params,
    tokens_b: Int[AnyArray, "B P"],
    *,
    mask: Bool[AnyArray, "B P"] | None = None,
    past: tuple[KVCache, ...] = (),
) -> Prompt:
    """B reads left-padded prompts, after what `past` holds (`prefix`). ValueError: no or too many tokens."""
    check_room(params_b, tokens_b)
    positions = positions_of(tokens_b.shape, mask, past)
    h = embed(params_b, tokens_b, positions)
    cache = params_b.empty_cache(*tokens_b.shape)
    visit = recorder(params_b, h, last=True)
    _, cache, states = run_blocks(params_b, h, positions, past=past, cache=cache, visit=visit, last=True)
    column = lambda tree: jax.tree.map(lambda a: a[..., -1:, :], tree)
    last = KVCache(column(cache.k), column(cache.v), positions[:, -1:])
    return Prompt(states, cache.replace(positions=positions.at[:, -1].set(-1)), last)


@compiled(prompts=(), layers={"j": "params_b"})
def resume(
    params_b: Params, prompt: Prompt, h: Float[Array, "B D"], j, *, past: tuple[KVCache, ...] = ()
) -> tuple[Float[Array, "B V"], KVCache]:
    """B goes on from an edited h_B[j] of its prompt's last token: logits of the next token, and the cache of the edited
    token, to `decode` after past=(*past, prompt.earlier). Blocks j + 1 .. L_B run, on one token.

    `receive` with the same edit gives the same logits. ValueError: j out of range.
    """
    past = (*past, prompt.earlier)
    h, cache, _ = run_blocks(params_b, h[:, None], prompt.last.positions, j, past=past, cache=prompt.last, column=0)
    return unembed(params_b, h)[:, 0], cache


def communicate(
    params_a: Params,
    params_b: Params,
    tokens_a: Int[AnyArray, "_ PA"],
    tokens_b: Int[AnyArray, "B PB"],
    *,
    k,
    j,
    graft: Graft = "replace",
    W: Float[AnyArray, "_ _"] | None = None,
    where: Where = "last",
    mask_a: Bool[AnyArray, "_ PA"] | None = None,
    mask_b: Bool[AnyArray, "B PB"] | None = None,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    keys: Key[Array, "B"] | None = None,
    stop_tokens: Sequence[Any] | AnyArray = (),
) -> Generation:
    """What B says after its prompt once A's activation has been grafted into it.

    k in 0 .. L_A and j in 0 .. L_B may be ints or traced; masks are False on left padding. A's side and B's are compiled
    programs (on devices of their own, if the models are); other prompts of these shapes, and another k and j, compile nothing.
    A function `graft` is part of B's program, so define it once. Pure: it goes under jit, vmap (over a further axis of games,
    k or j) and scan.

    ValueError: k or j out of range, an empty or too long prompt, unequal numbers of prompts, and `receive`'s.
    """
    if tokens_a.shape[0] != tokens_b.shape[0]:
        raise ValueError(f"A has {tokens_a.shape[0]} prompts, B has {tokens_b.shape[0]}: give one of each per game")
    message = deliver(send(params_a, tokens_a, k, mask=mask_a, where=where), params_b)
    return answer(
        params_b, tokens_b, message, j, graft=graft, W=W, mask=mask_b, where=where, max_new_tokens=max_new_tokens,
        sampling=sampling, keys=keys, stop_tokens=stop_tokens,
    )  # fmt: skip


@compiled(**_AT_B, static=("graft", "where", "max_new_tokens"))
def answer(
    params_b: Params,
    tokens_b: Int[AnyArray, "B P"],
    message: Array,
    j,
    *,
    graft: Graft = "replace",
    W: Float[AnyArray, "_ _"] | None = None,
    mask: Bool[AnyArray, "B P"] | None = None,
    where: Where = "last",
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    keys: Key[Array, "B"] | None = None,
    stop_tokens: Sequence[Any] | AnyArray = (),
) -> Generation:
    """B's side of `communicate`: `receive`, then `decode`.

    ValueError: `receive`'s, or no room for so many tokens.
    """
    check_room(params_b, tokens_b, max_new_tokens)
    logits, cache = receive(params_b, tokens_b, message, j, graft=graft, W=W, mask=mask, where=where)
    return decode(
        params_b, logits, cache, max_new_tokens=max_new_tokens, sampling=sampling, keys=keys, stop_tokens=stop_tokens
    )


@compiled(
    prompts=(("params_a", "tokens_a", "mask_a"), ("params_b", "tokens_b", "mask_b")),
    layers={"k": "params_a", "j": "params_b"},
    texts={"answers": "params_b"},
    static=("graft", "where"),
)
def communicate_logits(
    params_a: Params,
    params_b: Params,
    tokens_a: Int[AnyArray, "_ PA"],
    tokens_b: Int[AnyArray, "B PB"],
    answers: Int[AnyArray, "B T"],
    *,
    k,
    j,
    graft: Graft = "replace",
    W: Float[AnyArray, "_ _"] | None = None,
    where: Where = "last",
    mask_a: Bool[AnyArray, "_ PA"] | None = None,
    mask_b: Bool[AnyArray, "B PB"] | None = None,
) -> Float[Array, "B T V"]:
    """Teacher-forced twin of `communicate`: logits that predict each token of given answers (-1 after the end of one), in one
    pass, no loop.

    Differentiable in everything continuous, in reverse too when k and j are ints: a loss on B's answer reaches W, A and B.

    ValueError: `communicate`'s, answers that are not one for each prompt, a token outside the vocabulary or after an end.
    """
    if len(answers) != len(tokens_b):
        raise ValueError(f"{len(answers)} answers for {len(tokens_b)} prompts of B: give one for each")
    tokens = jnp.concatenate([tokens_b, answers], axis=1)
    check_room(params_b, tokens)
    prompt = tokens_b.shape[1]
    message = send(params_a, tokens_a, k, mask=mask_a, where=where)
    _check_rows(message, tokens_b)
    edit = _editor(graft, message, W, mask_b, where)
    places = positions_of(tokens_b.shape, mask_b)
    following = jnp.max(places, axis=1, keepdims=True) + 1 + jnp.arange(answers.shape[1], dtype=jnp.int32)
    positions = jnp.concatenate([places, jnp.where(answers < 0, -1, following)], axis=1)
    grafted = lambda h: jnp.concatenate([edit(h[:, :prompt]), h[:, prompt:]], axis=1)
    h, *_ = run_edited(params_b, embed(params_b, tokens, positions), positions, (j, grafted))
    return unembed(params_b, h[:, prompt - 1 : -1])
