"""Trained bridges as a protocol: what a sender made of a text reaches the receiver through `C2C` or `Gated`.

The message is the sender's keys and values, as they are. What a control puts in its place goes through the same bridge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.bridges import C2C, Gated, check_bridge, fuse, remember, sources
from jaxcomm.cache import KVCache
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.flops import c2c_flops, gated_flops, keys_flops
from jaxcomm.messages import Message, send_cache
from jaxcomm.prompts import left_pad
from jaxcomm.protocols.base import Sent, Spent, Turn, dropped, total
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in, worst_of_others
from jaxcomm.protocols.text import likelihoods
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed
from jaxcomm.sharding import by_rows, deliver


@dataclasses.dataclass(frozen=True)
class Bridging:
    """Options of `bridge`.

    Attributes:
        bridge: The trained bridge; with several senders a list of fusers, one for each.
        control: What B gets in place of the message: a name in `CONTROLS`, or a `StandIn`. None: the message.
        seed: Seed of noise, for all games or one for each.
        align: C2C between agents whose tokens differ: each token of B gets the token of A that stands for it
            (`Agent.align`). Otherwise such agents are refused.
        sampling: As in other protocols. Nothing is drawn before B's turn, so it changes nothing.
        until: Likewise.

    Raises:
        ValueError: There is no such control; several bridges are not all fusers.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> protocols.Bridging(made).kind
        'gated'
    """

    bridge: C2C | Gated | Sequence[C2C]
    control: Control | StandIn | None = None
    seed: Seed = 0
    align: bool = False
    sampling: Sampling | None = None
    until: Sequence[str] = ()

    def __post_init__(self):
        object.__setattr__(self, "control", as_stand_in(self.control))
        wrong = [type(x).__name__ for x in self.bridges if not isinstance(x, C2C | Gated)]
        if wrong or not self.bridges:
            raise ValueError(f"a bridge is a C2C or a Gated, got {wrong[0] if wrong else 'none'}: train one")
        if len(self.bridges) > 1 and any(isinstance(x, Gated) for x in self.bridges):
            raise ValueError("only fusers (C2C) add up: give a Gated alone")

    @property
    def bridges(self) -> list[Any]:
        """All bridges."""
        return [self.bridge] if isinstance(self.bridge, C2C | Gated) else list(self.bridge)

    @property
    def kind(self) -> str:
        """What the bridges are: "c2c" or "gated"."""
        return "c2c" if isinstance(self.bridges[0], C2C) else "gated"


def bridge(
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    sent: Sequence[Sent] | None = None,
    **how: Any,
) -> Turn:
    """What A made of a text reaches B through a trained bridge.

    With a `C2C`, A reads what B reads, and B's keys and values of all but the last token of its prompt are moved. With a
    `Gated`, A reads its own prompt, and B attends to what the bridge makes of A's keys and values beside its own prompt.

    Args:
        a: The sender; with several fusers a list of as many.
        b: The receiver.
        prompts_a: What A reads, one prompt for each game. C2C does not use it.
        prompts_b: What B reads, one prompt for each game.
        sent: What `send_bridged` returned for the same prompts, so that many controls read A's prompts once. Default: A
            reads them now.
        **how: Options of `Bridging`; `bridge` at least.

    Returns:
        B's turn. Details of a `Reply`: the kind of bridge, and which gates are open.

    Raises:
        ValueError: A bridge is of another pair; under C2C, A and B read prompts as different tokens, or a prompt has one
            token; a prompt is too long; an option is invalid.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> told, asked = ["Alice is at the Louvre."], ["Bob is at Petra. Which country is Bob located in?"]
        >>> protocols.bridge(agent, agent, told, asked, bridge=made).write(4)[0].text
        'Jordan'
    """
    settings = Bridging(**how)
    agents = [a] if isinstance(a, Agent) else list(a)
    if sent is None:
        sent = send_bridged(agents, b, prompts_a, prompts_b, settings)
    if settings.control is not None:
        sent = _replaced(sent, agents, b, prompts_b, settings)
    return receive_bridged(b, prompts_b, sent, settings)


def send_bridged(
    a: Sequence[Agent], b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], settings: Bridging
) -> list[Sent]:
    """Lets every sender read, and takes its keys and values for a message.

    Args:
        a: The senders, one for each bridge.
        b: The receiver.
        prompts_a: What the sender of a `Gated` reads, one prompt for each game.
        prompts_b: What B reads, and the sender of a `C2C`.
        settings: The bridges.

    Returns:
        One message of keys and values for each sender, and what it cost. Layers that the bridge does not read are not
        sent.

    Raises:
        ValueError: As for `bridge`.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> sent = protocols.send_bridged([agent], agent, ["Bob is at Petra."], ["Who?"], protocols.Bridging(made))
        >>> sent[0].spent[0].sent == sent[0].message.bytes
        True
    """
    if len(a) != len(settings.bridges):
        raise ValueError(f"{len(a)} senders, {len(settings.bridges)} bridges: give one of each")
    for agent, made in zip(a, settings.bridges, strict=True):
        check_bridge(made, agent.single, b.single)
    made = []
    for agent, one in zip(a, settings.bridges, strict=True):
        if settings.kind == "gated":
            prompts, rows = prompts_a, agent.rows(prompts_a)
        else:
            prompts, rows = prompts_b, _read_together(agent, b, prompts_b, settings)
        made.append(_send(agent, b, prompts, rows, one))
    return made


def receive_bridged(b: Agent, prompts_b: Sequence[Prompt], sent: Sequence[Sent], settings: Bridging) -> Turn:
    """Lets the receiver read its prompts with what comes over the bridges.

    Args:
        b: The receiver.
        prompts_b: What it reads, one prompt for each game.
        sent: The messages of each sender.
        settings: The bridges, and what the control is called in the details.

    Returns:
        The receiver's turn.

    Raises:
        ValueError: There is not one message for each prompt; a prompt is too long.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> how, asked = protocols.Bridging(made), ["Bob is at Petra. Which country is Bob located in?"]
        >>> sent = protocols.send_bridged([agent], agent, ["Bob is at Petra."], asked, how)
        >>> protocols.receive_bridged(agent, asked, sent, how).write(4)[0].text
        'Jordan'
    """
    rows = b.rows(prompts_b, 1)
    for one in sent:
        if len(one.message) != len(rows):
            raise ValueError(f"{len(one.message)} messages for {len(rows)} prompts: give one for each")
    control = None if settings.control is None else settings.control.name  # pyright: ignore
    told = {"kind": settings.kind, **_open(settings), "control": control}
    details = [{**told, **one} for one in sent[0].details]
    before = [total(one.spent[i] for one in sent) for i in range(len(rows))]
    read = _read_fused if settings.kind == "c2c" else _read_beside
    return read(b, prompts_b, rows, sent, settings, (details, before))


def _read_together(agent: Agent, b: Agent, prompts: Sequence[Prompt], settings: Bridging) -> list[list[int]]:
    """What the sender of a fuser reads: the receiver's tokens but the last; or, aligned, all of its own."""
    rows, own = b.rows(prompts, 1), agent.rows(prompts)
    if min(map(len, rows)) < 2:
        raise ValueError("a prompt of one token has nothing to fuse before it: C2C needs two")
    if settings.align:
        return own
    if any(x != y for x, y in zip(rows, own, strict=True)):
        raise ValueError(
            f"{agent.name} and {b.name} read the prompts as different tokens: align them (align=True), or give agents that "
            "read alike"
        )
    return [row[:-1] for row in rows]


def _send(agent: Agent, b: Agent, prompts: Sequence[Prompt], rows: list[list[int]], one: C2C | Gated) -> Sent:
    """A sender's keys and values of these rows, and what they and the bridge cost."""
    params, layers = agent.single, np.zeros(agent.single.config.layers, bool)
    message = send_cache(params, by_rows(params, left_pad(rows, bucket(max(map(len, rows)), params.config.max_positions))))
    layers[sources(one.shape) if isinstance(one, Gated) else slice(-min(one.shape.layers), None)] = True
    cache: Any = message.states
    message = message.replace(states=cache.replace(seen=jnp.asarray(layers)[:, None, None]))
    spent, configs = [], (params.config, b.single.config)
    for row, lost, sent in zip(rows, dropped(agent, prompts, rows), message.states.bytes.tolist(), strict=True):
        flops = keys_flops(params.config, len(row)) + (
            c2c_flops(*configs, one.hidden, len(row)) if isinstance(one, C2C) else gated_flops(*configs, one.rank, len(row))
        )
        spent.append(Spent(flops, len(row), 0, max(lost, 0), int(sent)))
    return Sent(message, [{"sent_tokens": len(row)} for row in rows], spent)


def _open(settings: Bridging) -> dict[str, Any]:
    """Which gates of the (first) bridge are open: numbers of B's layers, from 1."""
    one = settings.bridges[0]
    opened = np.asarray(one.open)
    if isinstance(one, C2C):
        first = one.shape.layers[1] - opened.shape[1] + 1
        return {f"open_{name}": (np.flatnonzero(row) + first).tolist() for name, row in zip(("keys", "values"), opened)}
    return {"open": (np.flatnonzero(opened.any(axis=1)) + 1).tolist()}


def _heard(sent: Sent, b: Agent) -> KVCache:
    """A message's keys and values, where the receiver is."""
    cache: Any = deliver(sent.message.states, b.params)
    return cache.replace(seen=None)


def _read_fused(
    b: Agent, prompts_b: Sequence[Prompt], rows: Any, sent: Sequence[Sent], settings: Bridging, told: tuple[Any, Any]
) -> Turn:
    params, heads = b.single, [row[:-1] for row in rows]
    padded = by_rows(params, left_pad(heads, bucket(max(map(len, heads)), params.config.max_positions)))
    own = prefill(params, padded)[1]
    others = [_heard(one, b) for one in sent]
    columns = [one.details[0].get("columns") for one in sent]
    if settings.align:
        columns = [
            _columns([x["aligned"] for x in one.details], own.positions.shape[1], other.positions.shape[1])
            for one, other in zip(sent, others, strict=True)
        ]
    fused = fuse(settings.bridges, own, others, columns)
    logits, cache = prefill(params, by_rows(params, left_pad([row[-1:] for row in rows])), past=(fused,))
    details, before = told
    return Turn(b, prompts_b, rows, logits, cache, (fused,), details, before, sent[0].message)


def _read_beside(
    b: Agent, prompts_b: Sequence[Prompt], rows: Any, sent: Sequence[Sent], settings: Bridging, told: tuple[Any, Any]
) -> Turn:
    params, (one,), (made,) = b.single, sent, settings.bridges
    memory = remember(made, _heard(one, b))
    if params.unrolled:
        memory = memory.replace(k=tuple(memory.k), v=tuple(memory.v))
    seen = np.asarray(made.open).any(axis=1) * np.asarray((memory.positions >= 0).sum(axis=1))[:, None]
    details, before = told
    padded = by_rows(params, left_pad(rows, bucket(max(map(len, rows)), params.config.max_positions)))
    logits, cache = prefill(params, padded, past=(memory,))
    return Turn(b, prompts_b, rows, logits, cache, (memory,), details, before, one.message, seen)
