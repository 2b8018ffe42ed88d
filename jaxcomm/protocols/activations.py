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
    """Options of `activation`: how A's state reaches B.

    Attributes:
        graft: "sum", "mean", "replace", or a function f(a, b).
        W: The map [D_B, D_A], or a list with one for each sender. None: no map.
        where: "last", the last token, or "all" tokens (Ramesh & Li 2025, appendix B.1), the two prompts aligned at
            their ends.
        control: What B gets instead of A's state (`Control`). "unrelated" takes A's place before W. The others stand in
            for what arrives at B, after W.
        unrelated: The sentence that A reads with the control "unrelated".
        think: Largest number of tokens that A writes first. The state at the last of them is sent: chain of thought
            (appendix B.2), or a sampled completion (appendix B.5: temperature 0.7, 512 tokens). 0: A writes nothing.
        until: Strings that end what A writes.
        sampling: How A's tokens are drawn. None takes the likeliest.
        seed: Seed of these draws and of noise, for all games or one for each.

    Raises:
        ValueError: There is no such graft, control or `where`; a control, or a graft other than "sum", goes with "all".

    Example:
        >>> how = protocols.Grafting(graft="sum", where="all")
        >>> sent = protocols.send_states(agent, agent, ["Bob is at Petra."], how, k=5, games=1)
        >>> sent.message.states.shape[-1]
        128
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
    """One of those who send.

    Attributes:
        agent: The agent.
        prompts: What it reads, one prompt for each game.
        k: It is read after this layer.
        W: Its map, or None.
    """

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
    """A reads its prompts up to layer k. B reads its own, with A's states grafted in after layer j.

    It is the protocol of Ramesh & Li (2025, section 3.1).

    Args:
        a: The sender, or a list of several. Then `a`, `prompts_a`, `k` (and `W`) are lists with one for each, and B
            gets the mean of what they send.
        b: The receiver.
        prompts_a: What A reads, one prompt for each game.
        prompts_b: What B reads, one prompt for each game.
        k: A is read after this layer, 0 .. L_A.
        j: B is edited after this layer, 0 .. L_B.
        **how: Options of `Grafting`.

    Returns:
        B's turn. Details of a `Reply`: the token and position that was read in A, and the one edited in B; the norms of
        what arrived, of B's state before, and of B's state after the edit.

    Raises:
        ValueError: As for `communicate`; the control "shuffled" has a single game; an option is invalid.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> protocols.activation(agent, agent, told, asked, k=5, j=2).write(4)[0].text
        'Greece'
    """
    settings = Grafting(**how)
    check_layer(b.params, j, "j")
    return receive_states(
        b, prompts_b, send_states(a, b, prompts_a, settings, k=k, games=len(prompts_b)), settings, j=j
    )


def send_states(
    a: Agent | Sequence[Agent], b: Agent, prompts_a: Sequence[Any], settings: Grafting, *, k: Any, games: int
) -> Sent:
    """Lets one sender or several read their prompts, and brings their states to where the receiver lives.

    Args:
        a: The sender, or a list of several.
        b: The receiver.
        prompts_a: What the sender reads, one prompt for each game; of several senders, a list for each.
        settings: Maps, tokens, thinking.
        k: The sender is read after this layer; of several senders, one for each.
        games: Number of messages.

    Returns:
        Messages of states [B, D], or of all tokens [B, n, D]. Of several senders it is the mean, through their maps.

    Raises:
        ValueError: A layer is out of range; the numbers of senders, prompts, layers and maps differ; the senders'
            states differ in width; a prompt is empty or too long.

    Example:
        >>> sent = protocols.send_states(agent, agent, ["Bob is at Petra."], protocols.Grafting(), k=5, games=1)
        >>> sent.message.states.shape
        (1, 128)
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
    """Lets the receiver read its prompts, with the states grafted in.

    Args:
        b: The receiver.
        prompts_b: What it reads, one prompt for each game.
        sent: Messages of states, one for each prompt.
        settings: Graft, tokens, control.
        j: The receiver is edited after this layer.

    Returns:
        The receiver's turn.

    Raises:
        ValueError: The control "shuffled" has a single game; states for all tokens have another width than the
            receiver; a prompt is empty or too long.

    Example:
        >>> how = protocols.Grafting()
        >>> sent = protocols.send_states(agent, agent, ["Alice is at the Acropolis of Athens."], how, k=5, games=1)
        >>> protocols.receive_states(agent, ["Which country is Alice located in?"], sent, how, j=2).write(4)[0].text
        'Greece'
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
    """The way back of an `exchange`.

    Attributes:
        k: B is read after this layer. None: that of the way there.
        j: A is edited after this layer. None: that of the way there.
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

    B gets A's state at k after its layer j, and A gets B's state at back.k after its layer back.j. Neither is edited
    before its own state is sent.

    Args:
        a: The first agent.
        b: The second agent.
        prompts_a: What A reads, one prompt for each game.
        prompts_b: What B reads, one prompt for each game.
        k: A is read after this layer, 0 .. L_A.
        j: B is edited after this layer, 0 .. L_B.
        back: Layers and map of the way back. Default: the same layers, and no map.
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
    return Panel((there, returned), parse, tie, [Spent() for _ in prompts_b], [{} for _ in prompts_b])
