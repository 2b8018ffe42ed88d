"""Activation communication between agents: the text-level twin of `jaxcomm.communicate`, and its controls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt, Seed, derive_seed, row_keys
from jaxcomm.communication import read_prompt, resume
from jaxcomm.compiled import check_layer
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.edits import Graft, GraftFunction, apply_graft, through_map
from jaxcomm.flops import blocks_flops, graft_flops
from jaxcomm.messages import Message, read_message, receive
from jaxcomm.prompts import left_pad
from jaxcomm.protocols.answers import ANSWERS
from jaxcomm.protocols.base import Sent, Shared, Spent, Turn, dropped, share, start_turn, total
from jaxcomm.protocols.debates import Panel, lookup
from jaxcomm.reading import prefill
from jaxcomm.sharding import by_rows, deliver
from jaxcomm.sites import Site

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


@dataclasses.dataclass(frozen=True)
class Grafting:
    """How A's state reaches B: the options of `activation`.

    Attributes:
        graft: sum, mean, replace, or a function f(a, b).
        W: The map, or one for each sender.
        where: "last", or "all" tokens (appendix B.1), the two prompts aligned at their ends.
        control: What B gets instead. "unrelated" takes A's place before W, the others stand in for what arrives at B, after W.
        unrelated: The sentence that the control unrelated reads.
        think: A first writes up to so many tokens after its prompt, and its state at the last of them is sent: chain of thought
            (appendix B.2), or a sampled completion (B.5: temperature 0.7, 512 tokens).
        until: Strings that end what it thinks.
        sampling: Of what it thinks.
        seed: Likewise, and of noise: one, or one for each game.

    Raises:
        ValueError: There is no such control, `where`, or graft.
    """

    graft: GraftFunction = "replace"
    W: AnyArray | Sequence[AnyArray | None] | None = None
    where: Literal["last", "all"] = "last"
    control: Control | None = None
    unrelated: str = UNRELATED
    think: int = 0
    until: Sequence[str] = ()
    sampling: Sampling | None = None
    seed: Seed = 0

    def __post_init__(self):
        if self.where not in ("last", "all"):
            raise ValueError(f"unknown where {self.where!r}: choose last or all")
        if self.control is not None and self.control not in get_args(Control):
            raise ValueError(f"unknown control {self.control!r}: choose one of {', '.join(get_args(Control))}")
        if self.control is not None and self.where != "last":
            raise ValueError('controls stand in for one state per game: use where="last"')
        if self.where == "all" and self.graft != "sum":
            raise ValueError(f'where="all" needs graft="sum": {self.graft!r} would overwrite the whole prompt')
        Graft(self.graft)


class Sender(NamedTuple):
    """One of those who send: its prompts, its layer, and its map."""

    agent: Agent
    prompts: Sequence[Prompt]
    k: int
    W: AnyArray | None


def activation(
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Prompt],
    *,
    k: Any,
    j: int,
    **how: Any,
) -> Turn:
    """A reads its prompts up to layer k, B its own with A's states grafted in after layer j.

    Args:
        a: The sender. Several: give `a`, `prompts_a`, `k` (and `W`) one of each; B gets the mean of what they send.
        b: The receiver.
        prompts_a: What A reads, one for each game.
        prompts_b: What B reads.
        k: A is read after this layer.
        j: B is edited after this layer.
        **how: `Grafting`.

    Returns:
        B's turn. Details of a Reply: the token and position that was read in A and the one edited in B; the norms of what
        arrived, of B's state before and of B's state after the edit.

    Raises:
        ValueError: `jaxcomm.communicate`'s, or a control that needs more games.
    """
    settings = Grafting(**how)
    check_layer(b.params, j, "j")
    return receive_states(
        b, prompts_b, send_states(a, b, prompts_a, settings, k=k, games=len(prompts_b)), settings, j=j
    )


def send_states(
    a: Agent | Sequence[Agent], b: Agent, prompts_a: Sequence[Any], settings: Grafting, *, k: Any, games: int
) -> Sent:
    """One sender or several read their prompts, and send states to where the receiver lives.

    Args:
        a: Who sends.
        b: Who is to receive.
        prompts_a: What they read.
        settings: Maps, tokens, thinking.
        k: Each is read after this layer.
        games: How many messages there have to be.

    Returns:
        Messages of states [B, D] (of all tokens [B, n, D]); of several senders their mean, through their maps.

    Raises:
        ValueError: `activation`'s.
    """
    senders = _senders(a, prompts_a, k, settings.W, games)
    heard = [_read(sender, settings, n, b, games) for n, sender in enumerate(senders)]
    site = Site("resid_post", int(senders[0].k), settings.where)
    message = Message(_joined(heard, senders, b.params.config.width), heard[0].valid, site)
    layers = int(k) if isinstance(a, Agent) else [int(sender.k) for sender in senders]
    details = [
        {
            "k": layers,
            "sent_token": senders[-1].agent.tokens(heard[-1].rows[i][-1:])[0],
            "sent_position": len(heard[-1].rows[i]) - 1,
            **({"thought": [x.thoughts[i] for x in heard]} if settings.think else {}),
        }
        for i in range(games)
    ]
    return Sent(message, details, [_cost(senders, heard, b, settings.where, i) for i in range(games)])


def receive_states(b: Agent, prompts_b: Sequence[Prompt], sent: Sent, settings: Grafting, *, j: int) -> Turn:
    """The receiver reads its prompts, with the states grafted in.

    Args:
        b: Who receives.
        prompts_b: What it reads.
        sent: Messages of states, one for each prompt.
        settings: Graft, tokens, control.
        j: It is edited after this layer.

    Returns:
        Its turn.

    Raises:
        ValueError: A control that needs more games, states of another width at all tokens.
    """
    if settings.control == "shuffled" and len(prompts_b) < 2:
        raise ValueError("the control shuffled needs at least two games")
    rows_b = b.rows(prompts_b, 1)
    shared = _lay_out(b, rows_b, settings.where)
    prompt, past = read_prompt(b.single, shared.prompts, past=shared.past), shared.past
    message, own = jnp.asarray(sent.message.state_array()), prompt.states[j]
    if settings.control not in (None, "unrelated"):
        message = _stand_in(settings.control, message, own, settings.seed)
    last = message if settings.where == "last" else message[:, -1]
    edited = apply_graft(settings.graft, last, own)
    if settings.where == "last":
        # The last token's edit is an argument, so one program serves every f(a, b).
        logits, cache = resume(b.single, prompt, edited, j, past=past)
        past = (*past, prompt.earlier)
    elif last.shape[-1] != own.shape[-1]:
        raise ValueError(
            f'where="all" needs equal widths, got {last.shape[-1]} and {own.shape[-1]}: pass W, or edit the last token'
        )
    else:
        edit = receive(sent.message.anonymous(), Site("resid_post", j, "all"), settings.graft)
        logits, cache = prefill(b.single, shared.prompts, edits=[edit])
    norms = [np.linalg.norm(np.asarray(x, np.float32), axis=-1) for x in (last, own, edited)]
    graft = settings.graft if isinstance(settings.graft, str) else getattr(settings.graft, "__name__", "callable")
    details = [
        {
            **told,
            "j": int(j),
            "graft": graft,
            "control": settings.control,
            "edited_token": b.tokens(row[-1:])[0],
            "edited_position": len(row) - 1,
            **dict(zip(("norm_sent", "norm_before", "norm_after"), (float(norm[i]) for norm in norms), strict=True)),
        }
        for i, (told, row) in enumerate(zip(sent.details, rows_b, strict=True))
    ]
    return Turn(b, prompts_b, rows_b, logits, cache, past, details, sent.spent)


def _senders(a: Agent | Sequence[Agent], prompts: Sequence[Any], k: Any, W: Any, games: int) -> list[Sender]:
    """One or several. ValueError: not one of everything for each, or a layer out of range."""
    agents = (a,) if isinstance(a, Agent) else tuple(a)

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) and not isinstance(a, Agent) else [value]

    reads, ks, maps = each(prompts), each(k), [None] * len(agents) if W is None else each(W)
    if not len(agents) == len(reads) == len(ks) == len(maps):
        raise ValueError(f"{len(agents)} senders, {len(reads)} lists of prompts, {len(ks)} layers k: give one of each")
    for agent, own, layer in zip(agents, reads, ks, strict=True):
        check_layer(agent.params, layer)
        if len(own) != games:
            raise ValueError(f"A has {len(own)} prompts, B has {games}: give one of each per game")
    return list(itertools.starmap(Sender, zip(agents, reads, ks, maps, strict=True)))


def _lay_out(agent: Agent, rows: Sequence[Sequence[int]], where: str) -> Shared:
    """Where all tokens are edited, what prompts have in common is too, so it is not read apart."""
    if where == "last":
        return share(agent, rows)
    prompts = left_pad(rows, bucket(max(map(len, rows)), agent.params.config.max_positions))
    return Shared(by_rows(agent.params, prompts), ())


class _Read(NamedTuple):
    """What a sender read: its states, of the last tokens of `rows` or of all; what it wrote before; what that cost."""

    states: jax.Array
    valid: jax.Array | None
    rows: Sequence[Sequence[int]]
    thoughts: Sequence[str]
    spent: Sequence[Spent]


def _read(sender: Sender, settings: Grafting, n: int, home: Agent, games: int) -> _Read:
    """What the n-th sender reads, thinks and sends; it arrives where the agent `home` lives."""
    agent, layer = sender.agent, int(sender.k)
    prompts = [settings.unrelated] * games if settings.control == "unrelated" else sender.prompts
    rows, thoughts, config = agent.rows(prompts), [], agent.params.config
    spent = [Spent(0, len(row), 0, lost) for row, lost in zip(rows, dropped(agent, prompts, rows), strict=True)]
    if settings.think:
        # Seeds of their own: not those of other senders, nor of the answers.
        seed, until = derive_seed(settings.seed, 1001 + n), settings.until
        said = start_turn(agent, prompts).write(settings.think, until=until, sampling=settings.sampling, seed=seed)
        rows = [[*row, *reply.ids] for row, reply in zip(rows, said, strict=True)]
        thoughts, spent = [reply.text for reply in said], [reply.spent for reply in said]
    shared = _lay_out(agent, rows, settings.where)
    site = Site("resid_post", layer, settings.where)
    message = deliver(read_message(agent.single, shared.prompts, site=site, past=shared.past), home.params)
    reading = [Spent(blocks_flops(config, len(row), blocks=layer)) for row in rows]
    spent = [x + y for x, y in zip(spent, reading, strict=True)]
    return _Read(message.state_array(), message.valid, rows, thoughts, spent)


def _joined(heard: Sequence[_Read], senders: Sequence[Sender], width: int) -> jax.Array:
    """What arrives at B: the mean of what all send, through their maps."""
    through = lambda x, W: x.states if W is None else through_map(x.states, W, width)
    messages = [through(x, sender.W) for x, sender in zip(heard, senders, strict=True)]
    if len({m.shape[1:] for m in messages}) > 1:
        raise ValueError(
            "the senders' states differ in width or length: give every sender a W, and edit the last token"
        )
    return messages[0] if len(messages) == 1 else jnp.mean(jnp.stack(messages), axis=0)


def _cost(senders: Sequence[Sender], heard: Sequence[_Read], b: Agent, where: str, i: int) -> Spent:
    """Of the i-th game's messages: reading, maps and edits."""
    each = []
    for sender, x in zip(senders, heard, strict=True):
        states = len(x.rows[i]) if where == "all" else 1
        graft = graft_flops(sender.agent.single.config, b.single.config, sender.W is not None)
        each.append(x.spent[i] + Spent(states * graft))
    return total(each)


class Back(NamedTuple):
    """The way back of an `exchange`: layers and map, default those of the way there (no map)."""

    k: int | None = None
    j: int | None = None
    W: AnyArray | None = None


def exchange(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    k: int,
    j: int,
    back: Back | None = None,
    **how: Any,
) -> Panel:
    """Both directions at once: B with A's state at k grafted in after its layer j, A with B's at back.k after its back.j,
    neither of them edited before it is sent. Both answer, B first.

    Args:
        a: As all up to j: `activation`'s.
        back: The way back.
        **how: `Grafting`, and `answer` and `tie` as `debate` has them.

    Returns:
        Both agents' turns.
    """
    parse, tie = lookup(how.pop("answer", "text"), ANSWERS, "answer"), how.pop("tie", "first")
    back = back or Back()
    there = activation(a, b, prompts_a, prompts_b, k=k, j=j, **how)
    k_back, j_back = k if back.k is None else back.k, j if back.j is None else back.j
    returned = activation(b, a, prompts_b, prompts_a, k=k_back, j=j_back, **{**how, "W": back.W})
    return Panel((there, returned), parse, tie, [Spent() for _ in prompts_b], [{} for _ in prompts_b])
