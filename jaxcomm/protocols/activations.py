"""Activation communication between agents: the text-level twin of `jaxcomm.communicate`, and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt, Seed, row_keys, vary
from jaxcomm.communication import Where, read_prompt, receive, resume, send
from jaxcomm.compiled import check_layer
from jaxcomm.decoding import Sampling, bucket, left_pad
from jaxcomm.flops import blocks_flops, graft_flops
from jaxcomm.graft import Graft, apply_graft, carry
from jaxcomm.protocols.answers import ANSWERS, Parse, Tie
from jaxcomm.protocols.base import Shared, Spent, Turn, dropped, hear, share
from jaxcomm.protocols.debates import Panel, lookup
from jaxcomm.sharding import by_rows, deliver

Control = Literal["unrelated", "shuffled", "zero", "noise", "self"]
"""What B gets instead of A's activation: A's on an unrelated sentence, A's of another game, zeros, Gaussian noise of
the same norm as A's, or B's own state h_B[j], which with `replace` must change nothing."""

UNRELATED = "Water boils at one hundred degrees."


def _stand_in(control: str, message: jax.Array, own: jax.Array, seed: Seed) -> jax.Array:
    match control:
        case "shuffled":
            return jnp.roll(message, 1, axis=0)
        case "zero":
            return jnp.zeros_like(message)
        case "noise":
            draw = lambda key: jax.random.normal(key, message.shape[1:], message.dtype)
            noise = jax.vmap(draw)(row_keys(seed, len(message)))
            norm = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
            return noise / norm(noise) * norm(message)
        case "self":
            return own
    raise ValueError(f"unknown control {control!r}: choose one of {', '.join(get_args(Control))}")


def _lay_out(agent: Agent, rows: Sequence[Sequence[int]], where: Where) -> Shared:
    """Where all tokens are edited, what prompts have in common is too, so it is not read apart."""
    if where == "last":
        return share(agent, rows)
    prompts = left_pad(rows, bucket(max(map(len, rows)), agent.params.config.max_positions))
    tokens, mask = by_rows(agent.params, prompts)
    return Shared(tokens, mask, ())


def activation(
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Prompt],
    *,
    k: Any,
    j: int,
    graft: Graft = "replace",
    W: Any = None,
    where: Where = "last",
    control: str | None = None,
    unrelated: str = UNRELATED,
    think: int = 0,
    until: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> Turn:
    """A reads its prompts up to layer k, B its own with A's states grafted in after layer j.

    Several senders: give `a`, `prompts_a`, `k` (and `W`) one of each; B gets the mean of what they send.
    think: A first writes up to so many tokens after its prompt (with `sampling`, to one of the strings `until`), and its
    state at the last of them is sent: chain of thought (appendix B.2), or a sampled completion (B.5: temperature 0.7, 512
    tokens).

    The control unrelated takes A's place before W, the others stand in for what arrives at B, after W. Details of a
    Reply: the token and position that was read in A and the one edited in B; the norms of what arrived, of B's state
    before and of B's state after the edit. ValueError: `jaxcomm.communicate`'s, or a control that needs more games.
    """
    senders = (a,) if isinstance(a, Agent) else tuple(a)

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) and not isinstance(a, Agent) else [value]

    reads, ks, maps = each(prompts_a), each(k), [None] * len(senders) if W is None else each(W)
    if not len(senders) == len(reads) == len(ks) == len(maps):
        raise ValueError(f"{len(senders)} senders, {len(reads)} lists of prompts, {len(ks)} layers k: give one of each")
    check_layer(b.params, j, "j")
    if control is not None and where != "last":
        raise ValueError('controls stand in for one state per game: use where="last"')
    for sender, prompts, layer in zip(senders, reads, ks, strict=True):
        check_layer(sender.params, layer)
        if len(prompts) != len(prompts_b):
            raise ValueError(f"A has {len(prompts)} prompts, B has {len(prompts_b)}: give one of each per game")
    if control == "shuffled" and len(prompts_b) < 2:
        raise ValueError("the control shuffled needs at least two games")

    rows_b = b.rows(prompts_b, 1)
    tokens_b, mask_b, past_b = _lay_out(b, rows_b, where)
    prompt = read_prompt(b.params, tokens_b, mask=mask_b, past=past_b)
    own, spent, heard = prompt.states[j], [Spent() for _ in rows_b], []
    for n, (sender, prompts, layer, matrix) in enumerate(zip(senders, reads, ks, maps, strict=True)):
        prompts = [unrelated] * len(rows_b) if control == "unrelated" else prompts  # one sentence for every game
        # Seeds of their own: not those of other senders, nor of the answers.
        own_seed = vary(seed, 1001 + n)
        heard.append(
            _send_all(
                sender, prompts, int(layer), where, b.params, think=think, until=until, sampling=sampling, seed=own_seed
            )
        )
        fit = graft_flops(sender.params.config, b.params.config, matrix is not None)
        for i, row in enumerate(heard[-1].rows):
            edits = min(len(row), len(rows_b[i])) if where == "all" else 1
            spent[i] += heard[-1].spent[i] + Spent(fit * edits)
    width = b.params.config.width
    messages = [x.message if W is None else carry(x.message, W, width) for x, W in zip(heard, maps, strict=True)]
    if len({m.shape[1:] for m in messages}) > 1:
        raise ValueError(
            "the senders' states differ in width or length: give every sender a W, and edit the last token"
        )
    message = messages[0] if len(messages) == 1 else jnp.mean(jnp.stack(messages), axis=0)
    if control not in (None, "unrelated"):
        message = _stand_in(control, message, own, seed)
    sent = message if where == "last" else message[:, -1]
    edited = apply_graft(graft, sent, own)
    if where == "last":
        # The last token's edit is an argument, so one program serves every f(a, b).
        logits, cache = resume(b.params, prompt, edited, j, past=past_b)
        past_b = (*past_b, prompt.earlier)
    else:
        logits, cache = receive(b.params, tokens_b, message, j, graft=graft, mask=mask_b, where=where)
    norms = [np.linalg.norm(np.asarray(x, np.float32), axis=-1) for x in (sent, own, edited)]
    details = [
        {
            "k": int(k) if isinstance(a, Agent) else [int(layer) for layer in ks],
            "j": int(j),
            "graft": graft if isinstance(graft, str) else getattr(graft, "__name__", "callable"),
            "control": control,
            "sent_token": senders[-1].tokens(heard[-1].rows[i][-1:])[0],
            "sent_position": len(heard[-1].rows[i]) - 1,
            "edited_token": b.tokens(row[-1:])[0],
            "edited_position": len(row) - 1,
            "norm_sent": float(norms[0][i]),
            "norm_before": float(norms[1][i]),
            "norm_after": float(norms[2][i]),
            **({"thought": [x.thoughts[i] for x in heard]} if think else {}),
        }
        for i, row in enumerate(rows_b)
    ]
    return Turn(b, prompts_b, rows_b, logits, cache, past_b, details, spent)


class _Sent(NamedTuple):
    """What a sender sends, from the last tokens of `rows`; what it wrote before; what that cost."""

    message: jax.Array
    rows: Sequence[Sequence[int]]
    thoughts: Sequence[str]
    spent: Sequence[Spent]


def _send_all(
    sender: Agent, prompts: Sequence[Prompt], layer: int, where: Where, home, *, think: int, until, sampling, seed
) -> _Sent:
    """What arrives where the model `home` lives."""
    rows, thoughts, config = sender.rows(prompts), [], sender.params.config
    spent = [Spent(0, len(row), 0, lost) for row, lost in zip(rows, dropped(sender, prompts, rows), strict=True)]
    if think:
        said = hear(sender, prompts).write(think, until=until, sampling=sampling, seed=seed)
        rows = [[*row, *reply.ids] for row, reply in zip(rows, said, strict=True)]
        thoughts, spent = [reply.text for reply in said], [reply.spent for reply in said]
    tokens, mask, past = _lay_out(sender, rows, where)
    message = deliver(send(sender.params, tokens, layer, mask=mask, past=past, where=where), home)
    reading = [Spent(blocks_flops(config, len(row), blocks=layer)) for row in rows]
    return _Sent(message, rows, thoughts, [x + y for x, y in zip(spent, reading, strict=True)])


def exchange(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    k: int,
    j: int,
    k_back: int | None = None,
    j_back: int | None = None,
    W: Any = None,
    W_back: Any = None,
    answer: Parse | str = "text",
    tie: Tie = "first",
    **how: Any,
) -> Panel:
    """Both directions at once: B with A's state at k grafted in after its layer j, A with B's at k_back after its j_back
    (default: k and j), neither of them edited before it is sent. Both answer, B first. how: `activation`'s."""
    parse = lookup(answer, ANSWERS, "answer")
    there = activation(a, b, prompts_a, prompts_b, k=k, j=j, W=W, **how)
    k_back, j_back = k if k_back is None else k_back, j if j_back is None else j_back
    back = activation(b, a, prompts_b, prompts_a, k=k_back, j=j_back, W=W_back, **how)
    return Panel((there, back), parse, tie, [Spent() for _ in prompts_b], [{} for _ in prompts_b])
