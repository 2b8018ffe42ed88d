"""Activation communication between agents: `jaxcomm.communicate` for text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.communication import ReadPrompt, read_prompt, resume
from jaxcomm.compiled import check_layer
from jaxcomm.config import AnyArray
from jaxcomm.controls import adversary
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.edits import Graft, GraftFunction, apply_graft, through_map
from jaxcomm.flops import blocks_flops, graft_flops
from jaxcomm.messages import Message, read_message, receive
from jaxcomm.prompts import left_pad
from jaxcomm.protocols.answers import ANSWERS
from jaxcomm.protocols.base import Input, Sent, Spent, Turn, dropped, share, start_turn, total
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in
from jaxcomm.protocols.debates import Panel, lookup
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed, derive_seed
from jaxcomm.sharding import by_rows, deliver
from jaxcomm.sites import SITES, Site, check_site


@dataclasses.dataclass(frozen=True)
class Grafting:
    """Options of `activation`: how A's state reaches B.

    Attributes:
        graft: "sum", "mean", "replace", or a function f(a, b).
        W: The map [D_B, D_A], or a list with one for each sender. None: no map.
        where: Tokens to read at layer k and edit at layer j: the "last" one, or "all" (Ramesh & Li 2025, appendix B.1),
            with the two prompts aligned at their ends. If k or j is a `Site`, its own positions count.
        control: Stand-in that B gets instead of A's states: a name in `CONTROLS`, or a `StandIn`. It replaces the states
            as they arrive at B, after W. None: A's states.
        think: Largest number of tokens that A generates first. The state at the last of them is sent: chain of thought
            (appendix B.2), or a sampled completion (appendix B.5: temperature 0.7, 512 tokens). 0: A generates nothing.
        until: Stop strings for A's text.
        sampling: How to sample A's tokens. None: greedy decoding.
        seed: Random seed for this sampling and for noise: one for all items, or one for each.

    Raises:
        ValueError: There is no such graft, control or `where`; `where` is "all" and the graft is not "sum".

    Example:
        >>> how = protocols.Grafting(graft="sum", where="all")
        >>> sent = protocols.send_states(agent, agent, ["Bob is at Petra."], how, k=5, games=1)
        >>> sent.message.states.shape[-1]
        128
    """

    graft: GraftFunction = "replace"
    W: AnyArray | Sequence[AnyArray | None] | None = None
    where: Literal["last", "all"] = "last"
    control: Control | StandIn | None = None
    think: int = 0
    until: Sequence[str] = ()
    sampling: Sampling | None = None
    seed: Seed = 0

    def __post_init__(self):
        if self.where not in ("last", "all"):
            raise ValueError(f"unknown where {self.where!r}: choose last or all")
        object.__setattr__(self, "control", as_stand_in(self.control))
        if self.where == "all" and self.graft != "sum":
            raise ValueError(f'where="all" needs graft="sum": {self.graft!r} would overwrite the whole prompt')
        Graft(self.graft)


class Sender(NamedTuple):
    """One sender.

    Attributes:
        agent: The agent.
        prompts: Its prompts, one for each item.
        site: The site at which its states are read.
        W: Its map, or None.
    """

    agent: Agent
    prompts: Sequence[Prompt]
    site: Site
    W: AnyArray | None


def activation(
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Prompt] | Asked,
    *,
    k: Any,
    j: Any,
    sent: Sent | None = None,
    **how: Any,
) -> Turn:
    """A reads its prompts up to layer k. B reads its own, with A's states grafted in after layer j.

    It is the protocol of Ramesh & Li (2025, section 3.1).

    Args:
        a: The sender, or a list of several. Then `a`, `prompts_a`, `k` (and `W`) are lists with one entry for each
            sender, and B gets the mean of their messages.
        b: The receiver.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item. Or B's reading of them (`read_receiver`): with it, many edits of the last
            token after a layer need only one reading.
        k: A is read after this layer, 0 .. L_A. Or any `Site`.
        j: B is edited after this layer, 0 .. L_B. Or any `Site`.
        sent: Result of `send_states` for the same prompts and k. With it, many controls need only one reading of A's
            prompts. Default: A reads them now.
        **how: Options of `Grafting`.

    Returns:
        B's turn. `Reply.details` holds the token and position that was read in A and the one that was edited in B, and
        the norm of the message as it arrived. If the last token's residual stream was edited, it also holds the norm of
        B's state before and after.

    Raises:
        ValueError: As for `communicate`; a control needs other games' messages, and there are none; an option is
            invalid.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> protocols.activation(agent, agent, told, asked, k=5, j=2).write(4)[0].text
        'Greece'
    """
    settings = Grafting(**how)
    _site(b, j, settings.where, "j")
    if sent is None:
        sent = send_states(a, b, prompts_a, settings, k=k, games=len(prompts_of(prompts_b)))
    if settings.control is not None:
        sent = _replaced(sent, a, b, prompts_of(prompts_b), settings, k=k, j=j)
    return receive_states(b, prompts_b, sent, settings, j=j)


def send_states(
    a: Agent | Sequence[Agent], b: Agent, prompts_a: Sequence[Any], settings: Grafting, *, k: Any, games: int
) -> Sent:
    """Lets one or several senders read their prompts, and moves their states to the receiver's devices.

    Args:
        a: The sender, or a list of several.
        b: The receiver.
        prompts_a: The sender's prompts, one for each item; with several senders, one list for each.
        settings: Maps, tokens, thinking.
        k: The sender is read after this layer, or at this `Site`; with several senders, one for each.
        games: Number of messages.

    Returns:
        Messages of states [B, D], or of several tokens [B, n, D]. With several senders, the mean of their mapped states.

    Raises:
        ValueError: A layer is out of range; the numbers of senders, prompts, layers and maps differ; the senders'
            states differ in width; a prompt is empty or too long.

    Example:
        >>> sent = protocols.send_states(agent, agent, ["Bob is at Petra."], protocols.Grafting(), k=5, games=1)
        >>> sent.message.states.shape
        (1, 128)
    """
    senders = _senders(a, prompts_a, k, settings, games)
    heard = [_read(sender, settings, n, b) for n, sender in enumerate(senders)]
    site = senders[0].site
    message = Message(_joined(heard, senders, b.params.config.width), heard[0].valid, site)
    layers = [sender.site.layer for sender in senders]
    details = [
        {
            "k": layers[0] if isinstance(a, Agent) else layers,
            **_told("sent", site),
            "sent_token": senders[-1].agent.tokens(heard[-1].rows[i][-1:])[0],
            "sent_position": len(heard[-1].rows[i]) - 1,
            **({"thought": [x.thoughts[i] for x in heard]} if settings.think else {}),
        }
        for i in range(games)
    ]
    return Sent(message, details, [_cost(senders, heard, b, i) for i in range(games)])


class Asked(NamedTuple):
    """A receiver's prompts, read once for many edits of their last tokens.

    Attributes:
        prompts: The prompts.
        rows: The tokens of each prompt.
        given: The prompts as arrays, and the first tokens that they share.
        prompt: What `resume` continues from.
        reader: The receiver.

    Example:
        >>> protocols.read_receiver(agent, ["Which country is Alice located in?"]).prompt.earlier.positions.shape[0]
        1
    """

    prompts: Sequence[Prompt]
    rows: Sequence[Sequence[int]]
    given: Input
    prompt: ReadPrompt
    reader: Agent


def prompts_of(asked: Sequence[Prompt] | Asked) -> Sequence[Prompt]:
    """The prompts of a reading, or the prompts themselves."""
    return asked.prompts if isinstance(asked, Asked) else asked


def read_receiver(b: Agent, prompts_b: Sequence[Prompt]) -> Asked:
    """Lets the receiver read its prompts, before any message arrives.

    Args:
        b: The receiver.
        prompts_b: Its prompts, one for each item.

    Returns:
        The reading. `activation` and `receive_states` take it in the place of the prompts.

    Raises:
        ValueError: A prompt is empty or too long.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> asked = protocols.read_receiver(agent, asked)
        >>> [protocols.activation(agent, agent, told, asked, k=5, j=j).write(4)[0].text for j in (1, 2)]
        ['Greece', 'Greece']
    """
    rows = b.rows(prompts_b, 1)
    given = share(b, rows)
    return Asked(prompts_b, rows, given, read_prompt(b.single, given.prompts, past=given.past), b)


def receive_states(b: Agent, prompts_b: Sequence[Prompt] | Asked, sent: Sent, settings: Grafting, *, j: Any) -> Turn:
    """Lets the receiver read its prompts, with the states grafted in.

    Args:
        b: The receiver.
        prompts_b: Its prompts, one for each item, or its reading of them (`read_receiver`).
        sent: Messages of states, one for each prompt.
        settings: Graft and tokens.
        j: The receiver is edited after this layer, or at this `Site`.

    Returns:
        The receiver's turn.

    Raises:
        ValueError: States for several tokens have another width than the receiver; a prompt is empty or too long; another
            model has read the prompts.

    Example:
        >>> how = protocols.Grafting()
        >>> sent = protocols.send_states(agent, agent, ["Alice is at the Acropolis of Athens."], how, k=5, games=1)
        >>> protocols.receive_states(agent, ["Which country is Alice located in?"], sent, how, j=2).write(4)[0].text
        'Greece'
    """
    if isinstance(prompts_b, Asked) and prompts_b.reader.params is not b.params:
        raise ValueError(f"{prompts_b.reader.name} has read the prompts, the receiver is {b.name}: let it read them")
    message, site = sent.message, _site(b, j, settings.where, "j")
    states, asked, prompts = jnp.asarray(message.state_array()), None, prompts_of(prompts_b)
    if site.name == "resid_post" and site.last and states.ndim == 2:
        asked = prompts_b if isinstance(prompts_b, Asked) else read_receiver(b, prompts)
    rows = b.rows(prompts, 1) if asked is None else asked.rows
    shared = _lay_out(b, rows, site) if asked is None else asked.given
    past, given = shared.past, shared._replace(edits=(receive(message.anonymous(), site, settings.graft),))
    if asked is not None:
        # The edited state is an argument of the program, so one program serves every f(a, b).
        prompt = asked.prompt
        own = prompt.states[site.layer]
        edited = apply_graft(settings.graft, states, own)
        logits, cache = resume(b.single, prompt, edited, site.layer, past=past)
        past = (*past, prompt.earlier)
        norms = {"norm_sent": states, "norm_before": own, "norm_after": edited}
        norms = {name: np.linalg.norm(np.asarray(x, np.float32), axis=-1) for name, x in norms.items()}
    elif SITES[site.name].axes.endswith("D") and states.shape[-1] != b.params.config.width:
        raise ValueError(
            f"several tokens need equal widths, got {states.shape[-1]} and {b.params.config.width}: pass W, or edit the last token"
        )
    else:
        logits, cache = prefill(b.single, shared.prompts, edits=given.edits, past=past)
        sizes = np.asarray(message.norms)
        norms = {"norm_sent": sizes if sizes.ndim == 1 else sizes[:, -1]}
    graft = settings.graft if isinstance(settings.graft, str) else getattr(settings.graft, "__name__", "callable")
    details = [
        {
            **told,
            "j": site.layer,
            **_told("edited", site),
            "graft": graft,
            "control": None if settings.control is None else settings.control.name,  # pyright: ignore
            "edited_token": b.tokens(row[-1:])[0],
            "edited_position": len(row) - 1,
            **{name: float(norm[i]) for name, norm in norms.items()},
        }
        for i, (told, row) in enumerate(zip(sent.details, rows, strict=True))
    ]
    return Turn(b, prompts, rows, logits, cache, past, details, sent.spent, message, given=given)


def _replaced(
    sent: Sent,
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_b: Sequence[Prompt],
    settings: Grafting,
    *,
    k: Any,
    j: Any,
) -> Sent:
    """Replace the states by the control's stand-in."""
    agents, games = (a,) if isinstance(a, Agent) else tuple(a), len(prompts_b)
    site, there = _site(b, j, settings.where, "j"), sent.message.site
    assert isinstance(settings.control, StandIn) and there is not None

    def generated() -> Message:
        # Read B at the same relative depth as A.
        layers = b.single.config.layers / agents[0].single.config.layers
        own = there if there.layer is None else dataclasses.replace(there, layer=round(int(there.layer) * layers))
        read = _read(Sender(b, prompts_b, own, None), settings, 0, b)
        return Message(read.states, read.valid, own)

    def unrelated(sentence: str) -> Message:
        told: Any = [sentence] * games if isinstance(a, Agent) else [[sentence] * games] * len(agents)
        return send_states(a, b, told, settings, k=k, games=games).message

    shared = _lay_out(b, b.rows(prompts_b, 1), site)
    link = Link(
        agents[0],
        generated,
        unrelated,
        own=lambda: read_message(b.single, shared.prompts, site=site, past=shared.past),
        worst=lambda message, answers: adversary(
            b.single, shared.prompts, b.spell(prompts_b, answers), message, site, settings.graft, past=shared.past
        ),
    )
    return dataclasses.replace(sent, message=settings.control(sent.message, link, settings.seed))


def _site(agent: Agent, place: Any, where: str, name: str) -> Site:
    """The site at which an agent is read or edited. ValueError: its model has no such site."""
    if isinstance(place, Site):
        config: Any = agent.params.config  # check_site refuses a network's
        check_site(config, place)
        return place
    check_layer(agent.params, place, name)
    return Site("resid_post", int(place), where)


def _told(what: str, site: Site) -> dict[str, str]:
    """A site's entry in the details of a reply. Empty if the site is the residual stream after a layer."""
    return {} if site.name == "resid_post" and isinstance(site.positions, str) else {f"{what}_site": str(site)}


def _senders(
    a: Agent | Sequence[Agent], prompts: Sequence[Any], k: Any, settings: Grafting, games: int
) -> list[Sender]:
    """All senders. ValueError: their numbers of prompts, layers or maps differ, or a layer is out of range."""
    agents, W = (a,) if isinstance(a, Agent) else tuple(a), settings.W

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) and not isinstance(a, Agent) else [value]

    reads, ks, maps = each(prompts), each(k), [None] * len(agents) if W is None else each(W)
    if not len(agents) == len(reads) == len(ks) == len(maps):
        raise ValueError(f"{len(agents)} senders, {len(reads)} lists of prompts, {len(ks)} layers k: give one of each")
    sites = [_site(agent, place, settings.where, "k") for agent, place in zip(agents, ks, strict=True)]
    for own in reads:
        if len(own) != games:
            raise ValueError(f"A has {len(own)} prompts, B has {games}: give one of each per item")
    return list(itertools.starmap(Sender, zip(agents, reads, sites, maps, strict=True)))


def _lay_out(agent: Agent, rows: Sequence[Sequence[int]], site: Site) -> Input:
    """Lay out prompts as arrays. Shared first tokens are read once if the site is the last token's residual stream."""
    if site.name == "resid_post" and site.last:
        return share(agent, rows)
    prompts = left_pad(rows, bucket(max(map(len, rows)), agent.params.config.max_positions))
    return Input(by_rows(agent.params, prompts))


class _Read(NamedTuple):
    """A sender's states at the last token of each of `rows` (or at several), its text before them, and the cost."""

    states: jax.Array
    valid: jax.Array | None
    rows: Sequence[Sequence[int]]
    thoughts: Sequence[str]
    spent: Sequence[Spent]


def _read(sender: Sender, settings: Grafting, n: int, home: Agent) -> _Read:
    """Let the n-th sender read and think, and read its states. They are moved to the devices of the agent `home`."""
    agent, prompts, site = sender.agent, sender.prompts, sender.site
    rows, thoughts, config = agent.rows(prompts), [], agent.params.config
    spent = [Spent(0, len(row), 0, lost) for row, lost in zip(rows, dropped(agent, prompts, rows), strict=True)]
    if settings.think:
        # Derive separate seeds: senders and answers must not share random draws.
        seed, until = derive_seed(settings.seed, 1001 + n), settings.until
        said = start_turn(agent, prompts).write(settings.think, until=until, sampling=settings.sampling, seed=seed)
        rows = [[*row, *reply.ids] for row, reply in zip(rows, said, strict=True)]
        thoughts, spent = [reply.text for reply in said], [reply.spent for reply in said]
    shared = _lay_out(agent, rows, site)
    message = deliver(read_message(agent.single, shared.prompts, site=site, past=shared.past), home.params)
    blocks = agent.single.config.layers if site.name == "logits" else int(site.layer or 0)
    one = message.state_array().nbytes // max(1, math.prod(message.norms.shape))
    held = np.ones(len(rows), int) if message.valid is None else np.asarray(message.valid).sum(axis=1)
    read = [
        Spent(blocks_flops(config, len(row), blocks=blocks), sent=one * int(m))
        for row, m in zip(rows, held, strict=True)
    ]
    return _Read(
        message.state_array(), message.valid, rows, thoughts, [x + y for x, y in zip(spent, read, strict=True)]
    )


def _joined(heard: Sequence[_Read], senders: Sequence[Sender], width: int) -> jax.Array:
    """The message as it arrives at B: the mean of all senders' states, after their maps."""
    through = lambda x, W: x.states if W is None else through_map(x.states, W, width)
    messages = [through(x, sender.W) for x, sender in zip(heard, senders, strict=True)]
    if len({m.shape[1:] for m in messages}) > 1:
        raise ValueError(
            "the senders' states differ in width or length: give every sender a W, and edit the last token"
        )
    return messages[0] if len(messages) == 1 else jnp.mean(jnp.stack(messages), axis=0)


def _cost(senders: Sequence[Sender], heard: Sequence[_Read], b: Agent, i: int) -> Spent:
    """Cost of the i-th game's messages: reading, maps and edits."""
    each = []
    for sender, x in zip(senders, heard, strict=True):
        states = 1 if x.valid is None else int(np.asarray(x.valid[i]).sum())
        graft = graft_flops(sender.agent.single.config, b.single.config, sender.W is not None)
        each.append(x.spent[i] + Spent(states * graft))
    return total(each)


class Back(NamedTuple):
    """Layers and map for the direction from B to A in an `exchange`.

    Attributes:
        k: B is read after this layer. None: the same k as from A to B.
        j: A is edited after this layer. None: the same j as from A to B.
        W: The map from B to A. None: no map.

    Example:
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> panel = protocols.exchange(agent, agent, told, asked, k=5, j=2, back=protocols.Back(k=4))
        >>> [turn.details[0]["k"] for turn in panel.turns]
        [5, 4]
    """

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
    """Grafts in both directions at once, and lets both agents answer, B first.

    A's state after layer k is grafted into B after layer j. B's state after layer back.k is grafted into A after layer
    back.j. Both states are read before either agent is edited.

    Args:
        a: The first agent.
        b: The second agent.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        k: A is read after this layer, 0 .. L_A.
        j: B is edited after this layer, 0 .. L_B.
        back: Layers and map for the direction from B to A. Default: the same layers, and no map.
        **how: Options of `Grafting`, and `answer` and `tie` of `debate`.

    Returns:
        Both agents' turns.

    Raises:
        ValueError: As for `activation`; there is no such `answer`.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> panel = protocols.exchange(agent, agent, told, asked, k=5, j=2)
        >>> panel.turns[0].write(4)[0].text
        'Greece'
    """
    parse, tie = lookup(how.pop("answer", "text"), ANSWERS, "answer"), how.pop("tie", "first")
    back = back or Back()
    there = activation(a, b, prompts_a, prompts_b, k=k, j=j, **how)
    k_back, j_back = k if back.k is None else back.k, j if back.j is None else back.j
    returned = activation(b, a, prompts_b, prompts_a, k=k_back, j=j_back, **{**how, "W": back.W})
    return Panel((there, returned), parse, tie, [Spent() for _ in prompts_b], [{} for _ in prompts_b], receiver=0)
