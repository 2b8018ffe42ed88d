"""Activation communication between agents: the text-level twin of `jaxcomm.communicate`, and its controls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, row_keys
from jaxcomm.communicate import Where, read_prompt, receive, resume, send
from jaxcomm.flops import blocks_flops, graft_flops
from jaxcomm.generate import Generation, Sampling, decode
from jaxcomm.graft import Graft, apply_graft, carry
from jaxcomm.model import check_layer
from jaxcomm.protocols.base import Reply, replies

Control = Literal["unrelated", "shuffled", "zero", "noise", "self"]
"""What B gets instead of A's activation: A's on an unrelated sentence, A's of another game, zeros, Gaussian noise of
the same norm as A's, or B's own state h_B[j], which with `replace` must change nothing."""

UNRELATED = "Water boils at one hundred degrees."

_send = jax.jit(send, static_argnames="where")
_read = jax.jit(read_prompt)


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _resume(params, prompt, h, j, keys, stop_tokens, sampling, max_new_tokens) -> Generation:
    """Where the last token is edited: what f(a, b) was does not matter here, so one program serves every f."""
    logits, cache = resume(params, prompt, h, j)
    return decode(
        params, logits, cache, past=(prompt.earlier,), max_new_tokens=max_new_tokens,
        sampling=sampling, keys=keys, stop_tokens=stop_tokens,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("graft", "max_new_tokens"))
def _receive_all(params, tokens, mask, message, j, keys, stop_tokens, sampling, graft, max_new_tokens) -> Generation:
    """Where all tokens are."""
    logits, cache = receive(params, tokens, message, j, graft=graft, mask=mask, where="all")
    return decode(
        params, logits, cache, max_new_tokens=max_new_tokens, sampling=sampling, keys=keys, stop_tokens=stop_tokens
    )


def _stand_in(control: str, message: jax.Array, own: jax.Array, seed: int) -> jax.Array:
    match control:
        case "shuffled":
            return jnp.roll(message, 1, axis=0)
        case "zero":
            return jnp.zeros_like(message)
        case "noise":
            noise = jax.random.normal(jax.random.key(seed), message.shape, message.dtype)
            norm = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
            return noise / norm(noise) * norm(message)
        case "self":
            return own
    raise ValueError(f"unknown control {control!r}: choose one of {', '.join(get_args(Control))}")


def activation(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[str],
    prompts_b: Sequence[str],
    *,
    k: int,
    j: int,
    graft: Graft = "replace",
    W=None,
    where: Where = "last",
    control: str | None = None,
    unrelated: str = UNRELATED,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Reply]:
    """A reads its prompts up to layer k, B its own with A's states grafted in after layer j, and answers.

    The control unrelated takes A's place before W, the others stand in for what arrives at B, after W. Details of a Reply: the token and position that was read in A and
    the one edited in B; the norms of what arrived, of B's state before and of B's state after the edit. ValueError: `jaxcomm.communicate`'s, or a control that needs more games.
    """
    check_layer(a.params, k)
    check_layer(b.params, j, "j")
    if control is not None and where != "last":
        raise ValueError('controls stand in for one state per game: use where="last"')
    if len(prompts_a) != len(prompts_b):
        raise ValueError(f"A has {len(prompts_a)} prompts, B has {len(prompts_b)}: give one of each per game")
    if control == "shuffled" and len(prompts_a) < 2:
        raise ValueError("the control shuffled needs at least two games")
    tokens_a, mask_a = a.read([unrelated] if control == "unrelated" else prompts_a)
    tokens_b, mask_b = b.read(prompts_b, max_new_tokens)
    message = _send(a.params, tokens_a, k, mask=mask_a, where=where)
    prompt = _read(b.params, tokens_b, mask=mask_b)
    own = prompt.states[j]
    if control == "unrelated":  # one sentence for every game
        rows = len(prompts_b)
        tokens_a, mask_a = (np.broadcast_to(x, (rows, x.shape[1])) for x in (tokens_a, mask_a))
        message = jnp.broadcast_to(message, (rows, message.shape[1]))
    if W is not None:
        message = carry(message, W, b.params.config.width)
    if control not in (None, "unrelated"):
        message = _stand_in(control, message, own, seed)
    sent = message if where == "last" else message[:, -1]
    edited = apply_graft(graft, sent, own)
    writing = (row_keys(seed, len(tokens_b)), jnp.asarray(b.stop_tokens, jnp.int32), sampling)
    if where == "last":
        out = _resume(b.params, prompt, edited, j, *writing, max_new_tokens=max_new_tokens)
    else:
        out = _receive_all(b.params, tokens_b, mask_b, message, j, *writing, graft=graft, max_new_tokens=max_new_tokens)
    norms = [np.linalg.norm(np.asarray(x, np.float32), axis=-1) for x in (sent, own, edited)]
    lengths_a, lengths_b = mask_a.sum(axis=1), mask_b.sum(axis=1)
    details = [
        {
            "k": int(k),
            "j": int(j),
            "graft": graft if isinstance(graft, str) else getattr(graft, "__name__", "callable"),
            "control": control,
            "sent_token": a.tokens(tokens_a[i, -1:])[0],
            "sent_position": int(lengths_a[i]) - 1,
            "edited_token": b.tokens(tokens_b[i, -1:])[0],
            "edited_position": int(lengths_b[i]) - 1,
            "norm_sent": float(norms[0][i]),
            "norm_before": float(norms[1][i]),
            "norm_after": float(norms[2][i]),
        }
        for i in range(len(tokens_b))
    ]
    edits = [int(n) if where == "all" else 1 for n in np.minimum(lengths_a, lengths_b)]
    each = graft_flops(a.params.config, b.params.config, W is not None)
    cost = [
        blocks_flops(a.params.config, int(n), blocks=int(k)) + each * m for n, m in zip(lengths_a, edits, strict=True)
    ]
    return replies(b, tokens_b, mask_b, jax.device_get(out), details, cost)
