"""State deltas (Tang et al., EMNLP 2025, arXiv 2506.19209): a text message together with the changes of A's state.

A generates a message. s_i = h_i - h_(i-1) is the change of A's state after a given layer, from the token before the
message's i-th token to that token (h_0: the last token of A's prompt). The message's tokens are pasted into B's prompt.
At the i-th of them, s_i is added to B's state after the same layer.

An independent study found no effect of the deltas' content (docs/channels.md): another question's deltas help as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.compiled import check_layer
from jaxcomm.decoding import bucket
from jaxcomm.flops import blocks_flops
from jaxcomm.layer_sweep import patch
from jaxcomm.messages import Message, read_message, receive
from jaxcomm.prompts import left_pad
from jaxcomm.protocols.base import Input, Reply, Sent, Spent, Turn, start_turn
from jaxcomm.protocols.cipher import check_vocabularies
from jaxcomm.protocols.controls import Link, StandIn, worst_of_others
from jaxcomm.protocols.text import Conversation, likelihoods, put
from jaxcomm.reading import prefill
from jaxcomm.sharding import by_rows, deliver
from jaxcomm.sites import Site

MARK = "\u27e6message\u27e7"
"""Placeholder for the message while a prompt is rendered. Afterwards A's own tokens are pasted in its place."""


def deltas(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    j: int | Sequence[int],
    sent: Sent | None = None,
    **how: Any,
) -> Turn:
    """A writes a message. B reads its tokens, plus the change of A's state at each (State Delta Encoding, arXiv 2506.19209).

    Args:
        a: The agent that writes.
        b: The agent that reads. It has A's vocabulary and width.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts (the questions), one for each item.
        j: Layer of both models after which states are read and added, 0 (embedding) .. L; or several layers.
        sent: Result of `send_deltas` for the same prompts and layers. Default: A writes now.
        **how: Options of `Conversation`, with a single turn. A `control` replaces the deltas; the tokens stay A's.

    Returns:
        B's turn. `Reply.details` holds the message and the mean norm of its deltas.

    Raises:
        ValueError: The vocabularies or widths differ; a layer is out of range; an option is invalid.

    Example:
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> protocols.deltas(agent, agent, told, asked, j=4, max_message_tokens=8).write(4)[0].text
        'Jordan'
    """
    talk = Conversation(**how)
    layers = delta_layers(a, b, j, talk)
    plain = dataclasses.replace(talk, control=None)
    written = send_deltas(a, prompts_a, plain, layers=layers) if sent is None else sent
    if talk.control is None:
        return receive_deltas(b, prompts_b, written, talk, layers=layers)
    again = lambda who, prompts: send_deltas(who, prompts, plain, layers=layers).message

    def likely(message: Message, answers: Sequence[str]) -> np.ndarray:
        other = dataclasses.replace(written, message=_with(written.message, message))
        return likelihoods(receive_deltas(b, prompts_b, other, plain, layers=layers), answers)

    assert isinstance(talk.control, StandIn)
    link = Link(
        a,
        generated=lambda: again(b, prompts_b),
        unrelated=lambda sentence: again(a, [sentence] * len(prompts_b)),
        own=lambda: _own(b, prompts_b, written, plain, layers),
        worst=lambda message, answers: worst_of_others(message, answers, lambda m: likely(m, answers), talk.seed),
    )
    states = Message(written.message.states, written.message.valid)
    message = _with(written.message, talk.control(states, link, talk.seed))
    return receive_deltas(b, prompts_b, dataclasses.replace(written, message=message), talk, layers=layers)


def send_deltas(a: Agent, prompts: Sequence[Prompt], talk: Conversation, *, layers: Sequence[int]) -> Sent:
    """Lets an agent generate messages, and computes the change of its state at each of their tokens.

    Args:
        a: The agent that writes.
        prompts: Its prompts, one for each item.
        talk: How it writes.
        layers: Layers after which its states are read.

    Returns:
        Messages of text and states: deltas [B, n, M, D] of n tokens after M layers. The details hold each text's tokens.

    Raises:
        ValueError: A prompt is empty, or leaves no room.

    Example:
        >>> talk = protocols.Conversation(max_message_tokens=8)
        >>> sent = protocols.send_deltas(agent, ["Bob is at Petra."], talk, layers=[4])
        >>> sent.message.states.shape[1] == len(sent.details[0]["ids"])
        True
    """
    turn = start_turn(a, [put(talk.ask, prompt) for prompt in prompts])
    written = talk.write(turn, 1)
    ids = [list(reply.ids) for reply in written]
    rows = [[*row, *said] for row, said in zip(turn.rows, ids, strict=True)]
    states, valid = _read(a, rows, [len(said) + 1 for said in ids], layers)
    both = valid[:, 1:] & valid[:, :-1]
    moved = jnp.where(jnp.asarray(both)[..., None, None], states[:, 1:] - states[:, :-1], 0)
    texts = tuple(reply.text for reply in written)
    size = moved.nbytes // max(1, moved.shape[0] * moved.shape[1])
    spent = [
        reply.spent + Spent(_again(a, reply, max(layers)), sent=len(x.encode()) + size * len(said))
        for reply, x, said in zip(written, texts, ids, strict=True)
    ]
    details = [{"message": x, "ids": said} for x, said in zip(texts, ids, strict=True)]
    return Sent(Message(moved, jnp.asarray(both), text=texts), details, spent)


def receive_deltas(
    b: Agent, prompts_b: Sequence[Prompt], sent: Sent, talk: Conversation, *, layers: Sequence[int]
) -> Turn:
    """Lets an agent read messages, with their deltas added, and its own prompts.

    Args:
        b: The agent that reads.
        prompts_b: Its own prompts, one for each item.
        sent: Result of `send_deltas`.
        talk: How the message is put to the agent.
        layers: Layers after which the deltas are added.

    Returns:
        The agent's turn.

    Raises:
        ValueError: There is not one message for each prompt; a prompt is empty, or leaves no room.

    Example:
        >>> talk = protocols.Conversation(max_message_tokens=8)
        >>> sent = protocols.send_deltas(agent, ["Bob is at Petra."], talk, layers=[4])
        >>> asked = ["Which country is Bob located in?"]
        >>> protocols.receive_deltas(agent, asked, sent, talk, layers=[4]).write(4)[0].text
        'Jordan'
    """
    if len(sent.message) != len(prompts_b):
        raise ValueError(f"{len(sent.message)} messages for {len(prompts_b)} prompts: give one for each")
    rows, there = _pasted(b, prompts_b, [told["ids"] for told in sent.details], talk)
    b.check_room(rows, 1)
    prompts = by_rows(b.params, left_pad(rows, bucket(max(map(len, rows)), b.params.config.max_positions)))
    columns = prompts.shape[1]
    mask = np.stack([np.pad(x, (columns - len(x), 0)) for x in there])
    wrote = np.array([x.any() for x in there])
    mask[:, -1] |= ~wrote  # every row needs one position; without a message, zero is added there
    message = deliver(sent.message, b.params)
    moved, valid = jnp.asarray(message.state_array()), jnp.asarray(message.valid) & wrote[:, None]
    edits = []
    for m, layer in enumerate(layers if moved.shape[1] else ()):
        site = Site("resid_post", layer, jnp.asarray(mask))
        edits.append(receive(Message(moved[:, :, m], valid), site, "sum"))
    logits, cache = prefill(b.single, prompts, edits=edits)
    control = None if talk.control is None else talk.control.name  # pyright: ignore
    size = np.asarray(message.norms).sum(axis=1) / np.maximum(1, np.asarray(message.valid).sum(axis=1))
    details = [
        {**told, "j": list(layers), "control": control, "norm_sent": float(norm)}
        for told, norm in zip(sent.details, size, strict=True)
    ]
    told = [put(talk.tell, x, message=m) for x, m in zip(prompts_b, message.text or (), strict=True)]
    given = Input(prompts, edits=tuple(edits))
    return Turn(b, told, rows, logits, cache, (), details, sent.spent, message, given=given)


class DeltaSweep(NamedTuple):
    """Scores of the right answers after messages with deltas, for each layer, and after the text alone.

    Attributes:
        logprobs: Log-probability of each answer in nats, [orders, B, layers].
        exact: Whether greedy decoding would generate it, [orders, B, layers].
        text_logprobs: Log-probability after the text alone, in nats, [B].
        text_exact: Whether greedy decoding would generate it after the text alone, [B].
    """

    logprobs: np.ndarray
    exact: np.ndarray
    text_logprobs: np.ndarray
    text_exact: np.ndarray


def sweep_deltas(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    answers: Sequence[str],
    *,
    layers: Sequence[int],
    orders: Sequence[Sequence[int] | None] = (None,),
    **how: Any,
) -> DeltaSweep:
    """Scores answers after messages with deltas, for each of many layers. A writes once; prompts are read once (`patch`).

    Args:
        a: The agent that writes. It has B's shape.
        b: The agent that reads.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts (the questions), one for each item.
        answers: The right answers.
        layers: The layers. Deltas are added after one layer at a time.
        orders: For each run, the index of the game whose deltas each game gets, aligned at the messages' ends. The text
            stays the game's own. None: its own deltas.
        **how: Options of `Conversation`, with a single turn.

    Returns:
        The scores of the answers.

    Raises:
        ValueError: As for `deltas`; the models differ in shape.

    Example:
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> found = protocols.sweep_deltas(agent, agent, told, asked, ["Jordan"], layers=[2, 4, 6], max_message_tokens=8)
        >>> found.exact
        array([[[ True,  True,  True]]])
    """
    talk = Conversation(**how)
    layers = delta_layers(a, b, layers, talk)
    if talk.control is not None:
        raise ValueError("orders say whose deltas each game gets: leave out control")
    sent = send_deltas(a, prompts_a, talk, layers=layers[:1])
    ids = [list(told["ids"]) for told in sent.details]
    read, (own, there) = a.rows([put(talk.ask, x) for x in prompts_a]), _pasted(b, prompts_b, ids, talk)
    after = [row[int(np.flatnonzero(x)[-1]) + 1 :] if x.any() else [] for row, x in zip(own, there, strict=True)]
    told = [put(talk.tell, x, message=m) for x, m in zip(prompts_b, sent.message.text or (), strict=True)]
    spelled, found, nothing = b.spell(told, answers), [], []
    for order in orders:
        order = range(len(own)) if order is None else order
        rows = [[*read[o], *ids[o], *end] for o, end in zip(order, after, strict=True)]
        a.check_room(rows, 0)
        columns = bucket(max(map(len, (*own, *rows))), b.params.config.max_positions)
        mask = np.zeros((len(own), columns), bool)
        for i, o in enumerate(order):
            end = columns - len(after[i])
            mask[i, end - min(len(ids[i]), len(ids[o])) : end] = True
        nothing.append(~mask.any(axis=1))
        mask[nothing[-1], -1] = True  # any token will do: these rows are scored with the text alone
        both = left_pad(rows, columns), left_pad(own, columns)
        where = dict(layers=layers, positions=[mask])
        found.append(patch(a.single, b.single, *both, spelled, change=_add, sent=_moved, **where))  # pyright: ignore
    still = sent.message.replace(states=jnp.zeros_like(sent.message.state_array()))
    alone = receive_deltas(b, prompts_b, dataclasses.replace(sent, message=still), talk, layers=layers[:1])
    scored = alone.score_tokens([[[int(t) for t in row if t >= 0]] for row in spelled])
    text = [np.array([getattr(x, name)[0] for x in scored]) for name in ("logprobs", "greedy")]
    behind = (
        np.stack([x.logprobs[0, :, 0].sum(axis=-1).T for x in found]),
        np.stack([x.exact[0, :, 0].T for x in found]),
    )
    unmoved = np.stack(nothing)[..., None]
    return DeltaSweep(*(np.where(unmoved, x[:, None], y) for x, y in zip(text, behind, strict=True)), *text)


def _add(state: jax.Array, message: jax.Array, context: Any) -> jax.Array:
    return state + message


def _moved(states: jax.Array) -> jax.Array:
    """Change of the state at each token from the token before it, [layers, G, P, D]."""
    return jnp.diff(states, axis=2, prepend=states[:, :, :1])


def delta_layers(a: Agent, b: Agent, j: int | Sequence[int], talk: Conversation | None = None) -> list[int]:
    """Checks that two agents can send each other deltas.

    Args:
        a: The agent that writes.
        b: The agent that reads.
        j: A layer, or several.
        talk: How A writes. None: not known yet.

    Returns:
        The layers.

    Raises:
        ValueError: The vocabularies or widths differ; a layer is out of range or named twice; no layer is named; `talk`
            has several turns.
    """
    if talk is not None and talk.turns > 1:
        raise ValueError(f"turns = {talk.turns}: deltas are sent with a single message")
    layers = [j] if isinstance(j, int) else list(j)
    check_vocabularies([a, b])
    if (own := a.single.config.width) != (width := b.single.config.width):
        raise ValueError(f"deltas of width {own} cannot be added to states of width {width}: use message or activation")
    for agent in (a, b):
        for layer in layers:
            check_layer(agent.params, layer, "j")
    if not layers:
        raise ValueError("j names no layer: name the one after which states are read and added")
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise ValueError(f"j names layer {twice[0]} twice, and deltas are added there once: name each layer once")
    return layers


def _read(
    agent: Agent, rows: Sequence[Sequence[int]], counts: Sequence[int], layers: Sequence[int]
) -> tuple[Any, np.ndarray]:
    """States [B, n, M, D] after these layers at the last tokens of each row, and which of them are present, [B, n]."""
    agent.check_room(rows, 0)
    prompts = by_rows(agent.params, left_pad(rows, bucket(max(map(len, rows)), agent.params.config.max_positions)))
    columns, n = prompts.shape[1], max(counts)
    last = np.arange(columns) >= columns - np.array(counts)[:, None]
    read = lambda layer: read_message(agent.single, prompts, site=Site("resid_post", layer, jnp.asarray(last)))
    states = jnp.stack([jnp.asarray(read(layer).state_array())[:, -n:] for layer in layers], axis=2)
    return states, last[:, -n:]


def _again(a: Agent, reply: Reply, layer: int) -> int:
    """FLOPs of reading the message again, up to the highest layer. (A decoder that stored states would not need this.)"""
    return blocks_flops(a.params.config, len(reply.ids), context=len(reply.read), blocks=layer)


def _pasted(
    b: Agent, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], talk: Conversation
) -> tuple[list[list[int]], list[np.ndarray]]:
    """B's prompts with the messages' tokens pasted in, and the positions of these tokens."""
    rows, there = [], []
    for prompt, said in zip(prompts, ids, strict=True):
        before, _, after = b.render(put(talk.tell, prompt, message=MARK)).partition(MARK)
        if MARK in after:
            raise ValueError(f"tell {talk.tell!r}: deltas are added to one message, write {{message}} once")
        begin = b.spelled(before)
        end = b.tokenizer.encode(after, add_special_tokens=False)
        rows.append([*begin, *said, *end])
        there.append(np.repeat([False, True, False], [len(begin), len(said), len(end)]))
    return rows, there


def _own(b: Agent, prompts_b: Sequence[Prompt], sent: Sent, talk: Conversation, layers: Sequence[int]) -> Message:
    """The deltas of B's own states when B reads the message's tokens."""
    ids = [told["ids"] for told in sent.details]
    rows, there = _pasted(b, prompts_b, ids, talk)
    until = [row[: int(np.flatnonzero(x)[-1]) + 1] if x.any() else row for row, x in zip(rows, there, strict=True)]
    counts = [min(len(said) + 1, len(row)) for said, row in zip(ids, until, strict=True)]
    states, valid = _read(b, until, counts, layers)
    both = valid[:, 1:] & valid[:, :-1]
    return Message(jnp.where(jnp.asarray(both)[..., None, None], states[:, 1:] - states[:, :-1], 0), jnp.asarray(both))


def _with(message: Message, states: Message) -> Message:
    """A message with the same text and other deltas."""
    return message.replace(states=states.states, valid=states.valid)
