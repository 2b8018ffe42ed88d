"""Trained bridges as a protocol: a sender's keys and values reach the receiver through a `C2C` or a `Gated` bridge.

The message is the sender's keys and values, before the bridge. A control's stand-in goes through the same bridge.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.bridges import C2C, Gated, check_bridge, fuse, remember, sources
from jaxcomm.cache import KVCache
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.flops import c2c_flops, gated_flops, keys_flops
from jaxcomm.messages import Message, send_cache
from jaxcomm.prompts import left_pad
from jaxcomm.protocols.base import Input, Sent, Spent, Turn, dropped, total
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in, worst_of_others
from jaxcomm.protocols.text import likelihoods
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed
from jaxcomm.sharding import by_rows, deliver


@dataclasses.dataclass(frozen=True)
class Bridging:
    """Options of `bridge`.

    Attributes:
        bridge: The trained bridge; with several senders, a list of `C2C` bridges, one for each.
        control: Stand-in that B gets instead of the message: a name in `CONTROLS`, or a `StandIn`. None: the message.
        seed: Random seed for noise: one for all items, or one for each.
        sampling: As in other protocols. No effect: nothing is sampled before B's turn.
        until: As in other protocols. No effect, as for `sampling`.

    Raises:
        ValueError: There is no such control; one of several bridges is not a `C2C`.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> protocols.Bridging(made).kind
        'gated'
    """

    bridge: C2C | Gated | Sequence[C2C]
    control: Control | StandIn | None = None
    seed: Seed = 0
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
        """Type of the bridges: "c2c" or "gated"."""
        return "c2c" if isinstance(self.bridges[0], C2C) else "gated"


@dataclasses.dataclass(frozen=True)
class Crossing(Sent):
    """The messages of one sender over its bridge, one for every item.

    Attributes:
        message: The sender's keys and values.
        details: Facts about each message, for `Reply.details`.
        spent: Cost of each message.
        places: Which token of the sender each token of B's prompt (except the last) is fused with, [B, P], as a distance
            from the end of the sender's row; 0 if there is none. None: the token at the same distance from the end.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> sent = protocols.send_bridged([agent], agent, ["Bob is at Petra."], ["Who?"], protocols.Bridging(made))
        >>> sent[0].details[0]["sent_tokens"], sent[0].places
        (6, None)
    """

    places: AnyArray | None = None


def bridge(
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    sent: Sequence[Crossing] | None = None,
    **how: Any,
) -> Turn:
    """A's keys and values reach B through a trained bridge.

    With a `C2C`, A reads B's prompt. The bridge changes B's keys and values at all prompt tokens but the last. With a
    `Gated`, A reads its own prompt. The bridge maps A's keys and values, and B attends to them and to its own prompt.

    Args:
        a: The sender; with several `C2C` bridges, a list of as many senders.
        b: The receiver.
        prompts_a: A's prompts, one for each item. C2C does not use it.
        prompts_b: B's prompts, one for each item.
        sent: Result of `send_bridged` for the same prompts. With it, many controls need only one reading of A's prompts.
            Default: A reads them now.
        **how: Options of `Bridging`; `bridge` is required.

    Returns:
        B's turn. `Reply.details` holds the kind of bridge and the open gates.

    Raises:
        ValueError: A bridge belongs to another pair of models; with C2C, A and B tokenize prompts differently, or a
            prompt has one token; a prompt is too long; an option is invalid.

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
) -> list[Crossing]:
    """Lets every sender read, and makes messages of its keys and values.

    Args:
        a: The senders, one for each bridge.
        b: The receiver.
        prompts_a: Prompts for the sender of a `Gated`, one for each item.
        prompts_b: B's prompts. The sender of a `C2C` reads them too.
        settings: The bridges.

    Returns:
        Messages of keys and values for each sender, and their costs. Layers that the bridge does not use are not sent.

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
    together = settings.kind == "c2c"
    if together and min(map(len, b.rows(prompts_b, 1))) < 2:
        raise ValueError("a prompt of one token has nothing to fuse before it: C2C needs two")
    reads = prompts_b if together else prompts_a
    return [_send(agent, b, reads, settings, n) for n, agent in enumerate(a)]


def receive_bridged(b: Agent, prompts_b: Sequence[Prompt], sent: Sequence[Crossing], settings: Bridging) -> Turn:
    """Lets the receiver read its prompts with the messages that come over the bridges.

    Args:
        b: The receiver.
        prompts_b: Its prompts, one for each item.
        sent: The messages of each sender, as `send_bridged` returns them.
        settings: The bridges, and the name of the control for the details.

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
    seen = None
    if settings.kind == "gated":
        opened = np.asarray(settings.bridges[0].open).any(axis=1)
        seen = opened * np.asarray((sent[0].message.states.positions >= 0).sum(axis=1))[:, None]  # pyright: ignore
    given = (_fused if settings.kind == "c2c" else _beside)(b, rows, sent, settings)
    logits, cache = prefill(b.single, given.prompts, past=given.past)
    received, states = sent[0].message, sent[0].message.states
    if not np.any(np.asarray(states.positions) >= 0):  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        received = None
    return Turn(b, prompts_b, rows, logits, cache, given.past, details, before, received, seen, given=given)


def _send(agent: Agent, b: Agent, prompts: Sequence[Prompt], settings: Bridging, n: int) -> Crossing:
    """One sender's messages for these prompts, and their cost, including the bridge."""
    one, params, rows, places = settings.bridges[n], agent.single, agent.rows(prompts), None
    lost, configs = dropped(agent, prompts, rows), (params.config, b.single.config)
    if isinstance(one, C2C):
        own = b.rows(prompts, 1)
        if one.aligned:
            places = _places(agent, b, prompts)
        elif rows != own:
            raise ValueError(
                f"{agent.name} and {b.name} read the prompts as different tokens: train a bridge of aligned tokens "
                "(aligned=True), or give agents that read alike"
            )
        else:
            rows = [row[:-1] for row in rows]
        flops = [c2c_flops(*configs, one.hidden, len(row) - 1) for row in own]
        heard: Any = slice(-min(one.shape.layers), None)
    else:
        flops = [gated_flops(*configs, one.rank, len(row)) for row in rows]
        heard = sources(one.shape)
    columns = bucket(max(map(len, rows)), params.config.max_positions)
    message = send_cache(params, by_rows(params, left_pad(rows, columns)))
    layers = np.zeros(params.config.layers, bool)
    layers[heard] = True
    cache: Any = message.states
    cache = cache.replace(seen=jnp.asarray(layers)[:, None, None])
    costs = zip(rows, flops, lost, cache.bytes.tolist(), strict=True)
    spent = [
        Spent(keys_flops(params.config, len(row)) + more, len(row), 0, cut, sent) for row, more, cut, sent in costs
    ]
    return Crossing(message.replace(states=cache), [{"sent_tokens": len(row)} for row in rows], spent, places)


def _places(agent: Agent, b: Agent, prompts: Sequence[Prompt]) -> np.ndarray:
    """For each of B's tokens but the last, A's token to fuse it with, as a distance from the end of A's row."""
    found = agent.align(b, prompts)
    columns = agent.tokenize(prompts).shape[1]
    return np.where(found < 0, 0, columns - found)[:, :-1]


def _open(settings: Bridging) -> dict[str, Any]:
    """The open gates of the (first) bridge, as numbers of B's layers."""
    one = settings.bridges[0]
    opened = np.asarray(one.open)
    if isinstance(one, Gated):
        return {"open": (np.flatnonzero(opened.any(axis=1)) + 1).tolist()}
    first = one.shape.layers[1] - opened.shape[1] + 1
    keys, values = ((np.flatnonzero(row) + first).tolist() for row in opened)
    return {"open_keys": keys, "open_values": values}


def _arrived(one: Crossing, b: Agent) -> KVCache:
    """A message's keys and values, on the receiver's devices."""
    cache: Any = deliver(one.message.states, b.params)
    return cache.replace(seen=None)


def _fused(b: Agent, rows: Sequence[Sequence[int]], sent: Sequence[Crossing], settings: Bridging) -> Input:
    """Input with a C2C bridge: the last token of each prompt, and the fused cache of the tokens before it."""
    params, own = b.single, unfused(b, rows)
    columns = own.positions.shape[1]
    others, at = [_arrived(one, b) for one in sent], []
    for one, other in zip(sent, others, strict=True):
        if one.places is None:
            at.append(None)
            continue
        places = np.zeros((len(rows), max(columns, one.places.shape[1])), int)
        places[:, places.shape[1] - one.places.shape[1] :] = one.places
        places = places[:, places.shape[1] - columns :]
        at.append(np.where(places > 0, other.positions.shape[1] - places, -1))
    fused = fuse(settings.bridges, own, others, at)
    return Input(by_rows(params, left_pad([row[-1:] for row in rows])), (fused,))


def unfused(b: Agent, rows: Sequence[Sequence[int]]) -> KVCache:
    """Lets the receiver read all but the last token of its prompts, without a message.

    Args:
        b: The receiver.
        rows: Tokens of its prompts.

    Returns:
        Its keys and values, ready for a `C2C` bridge.
    """
    params, heads = b.single, [row[:-1] for row in rows]
    columns = bucket(max(map(len, heads)), params.config.max_positions)
    return prefill(params, by_rows(params, left_pad(heads, columns)))[1]


def _beside(b: Agent, rows: Sequence[Sequence[int]], sent: Sequence[Crossing], settings: Bridging) -> Input:
    """Input with a gated bridge: the prompts, and the memory that B attends to beside them."""
    params, (one,), (made,) = b.single, sent, settings.bridges
    memory = remember(made, _arrived(one, b))
    memory = memory.replace(k=memory.k.astype(params.dtype), v=memory.v.astype(params.dtype))  # A's may differ
    padded = by_rows(params, left_pad(rows, bucket(max(map(len, rows)), params.config.max_positions)))
    return Input(padded, (memory,))


def _replaced(
    sent: Sequence[Crossing], agents: Sequence[Agent], b: Agent, prompts_b: Sequence[Prompt], settings: Bridging
) -> list[Crossing]:
    """Replace each sender's messages by the control's stand-in.

    B's own keys and values do not fit a bridge from A. So "generated" is A's message for B's prompt alone, and "self" is
    the state of B without A: no message.
    """
    plain, games = dataclasses.replace(settings, control=None), len(prompts_b)
    assert isinstance(settings.control, StandIn)
    made = list(sent)

    def said(n: int, prompts: Sequence[Prompt]) -> Message:
        read = _send(agents[n], b, prompts, plain, n)
        return read.message

    def likely(n: int, answers: Sequence[str], message: Message) -> np.ndarray:
        tried = [*sent[:n], dataclasses.replace(sent[n], message=message), *sent[n + 1 :]]
        return likelihoods(receive_bridged(b, prompts_b, tried, plain), answers)

    for n, one in enumerate(sent):
        cache: Any = one.message.states
        nothing = one.message.replace(states=cache.replace(positions=jnp.full_like(cache.positions, -1)))
        link = Link(
            agents[n],
            generated=functools.partial(said, n, prompts_b),
            unrelated=lambda sentence, n=n: said(n, [sentence] * games),
            own=lambda nothing=nothing: nothing,
            worst=lambda message, answers, n=n: worst_of_others(
                message, answers, functools.partial(likely, n, answers), settings.seed
            ),
        )
        made[n] = dataclasses.replace(one, message=settings.control(one.message, link, settings.seed))
    return made
