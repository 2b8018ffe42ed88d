"""Inspect games: what A sent, what the logit lens shows in B's later layers, and what B replied.

    inspect_activation(a, b, prompts_a, prompts_b, answers, k=24, j=24)      a state
    inspect_prefix(a, b, prompts_a, prompts_b, answers, settings)            keys and values, thoughts
    inspect_deltas(a, b, prompts_a, prompts_b, answers, settings, layers=[20])
    inspect_bridge(a, b, prompts_a, prompts_b, answers, settings)

Every function returns `Inspection` objects. Only the type of `Inspection.sent` differs between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcomm.agent import TARGET, Agent, Prompt
from jaxcomm.bridges import Gated
from jaxcomm.config import NEW_TOKENS, AnyArray
from jaxcomm.edits import GraftFunction
from jaxcomm.latents import think
from jaxcomm.lenses import Lens, nearest_tokens
from jaxcomm.messages import send
from jaxcomm.prefixes import attention_onto
from jaxcomm.protocols.activations import activation
from jaxcomm.protocols.base import Reply, Turn, start_turn
from jaxcomm.protocols.bridges import Bridging, receive_bridged, send_bridged, unfused
from jaxcomm.protocols.prefixes import Prefixing, receive_prefix, send_prefix
from jaxcomm.protocols.state_deltas import delta_layers, receive_deltas, send_deltas
from jaxcomm.protocols.text import Conversation

NAMED = 3
"""Number of tokens to name for each thought and each delta."""


@dataclasses.dataclass(frozen=True)
class Inspecting:
    """Options of inspections. All but the first two are for `inspect_activation` only.

    Attributes:
        count: Number of tokens to name for each layer of B.
        max_new_tokens: Largest number of tokens of a reply, and of the patchscope's text.
        graft: "sum", "mean", "replace", or a function f(a, b).
        W: The map [D_B, D_A], or None.
        target: Target prompt of the patchscope (`Agent.patchscope`).
        placeholder: The word in it that the message replaces.

    Example:
        >>> protocols.Inspecting(graft="sum", target="Bob is in x").placeholder
        'x'
    """

    count: int = 5
    max_new_tokens: int = NEW_TOKENS
    graft: GraftFunction = "replace"
    W: AnyArray | None = None
    target: Prompt = TARGET
    placeholder: str = "x"


@dataclasses.dataclass(frozen=True)
class Named:
    """Tokens that are nearest to a state, the nearest first.

    Attributes:
        ids: Their ids.
        tokens: Their texts (`spell_out`).
        values: Their probabilities or cosines.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Heard:
    """Result of the logit lens after one layer of B, at the token before its answer.

    Attributes:
        layer: Number of the layer.
        likeliest: The likeliest tokens, and their probabilities.
        answer_logprob: Log-probability of the right answer's first token, in nats.
        answer_rank: Its rank among all tokens; 1 is the likeliest.
    """

    layer: int
    likeliest: Named
    answer_logprob: float
    answer_rank: int


@dataclasses.dataclass(frozen=True)
class SentState:
    """The message of `activation`.

    Attributes:
        k: A was read after this layer.
        j: B was edited after this layer.
        token: A's token at which the state was read.
        position: Its position.
        norm: Euclidean length of A's state.
        head: Tokens that A's own head predicts from the state, with probabilities.
        embedding: Tokens whose embeddings in A are nearest to the state, with cosines.
        patchscope: A's own description of the state (`Agent.patchscope`).
    """

    k: int
    j: int
    token: str
    position: int
    norm: float
    head: Named
    embedding: Named
    patchscope: str


@dataclasses.dataclass(frozen=True)
class Looks:
    """Attention of B's layers to A's tokens, which are before B's prompt or beside it.

    Attributes:
        tokens: A's tokens; a thought is "<thought n>".
        last: For each layer, the share of attention from B's last token to each of A's tokens, [L, S]. None for a layer
            with linear attention, which has no weights.
        prompt: For each layer, the share of attention from B's whole prompt to all of A's tokens, [L]. None likewise.
    """

    tokens: tuple[str, ...]
    last: tuple[tuple[float, ...] | None, ...]
    prompt: tuple[float | None, ...]

    def most(self, layer: int, count: int = NAMED) -> list[tuple[str, float]]:
        """Finds the tokens that get the most attention in a layer.

        Args:
            layer: The layer, from 1.
            count: Number of tokens.

        Returns:
            Tokens and their shares of attention, the largest first. An empty list for a layer with linear attention.
        """
        if (own := self.last[layer - 1]) is None:
            return []
        shares = np.array(own)
        return [(self.tokens[n], float(shares[n])) for n in np.argsort(-shares, kind="stable")[:count]]


@dataclasses.dataclass(frozen=True)
class SentPrefix:
    """The message of `kv` and `latent`.

    Attributes:
        layers: B's layers that see it.
        looks: B's attention to it.
        thoughts: For each of A's thoughts, the tokens that A's head predicts there, with probabilities.
    """

    layers: tuple[int, ...]
    looks: Looks
    thoughts: tuple[Named, ...]


@dataclasses.dataclass(frozen=True)
class SentDeltas:
    """The message of `deltas`.

    Attributes:
        j: The layers of both models.
        message: The text that A wrote.
        tokens: Its tokens.
        norms: Euclidean length of each token's delta, for each layer, [M, n].
        toward: For each token's delta after the last of these layers, the tokens that A's own head names for its direction.
    """

    j: tuple[int, ...]
    message: str
    tokens: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    toward: tuple[Named, ...]


@dataclasses.dataclass(frozen=True)
class SentBridge:
    """The message of `bridge`.

    Attributes:
        kind: "gated" or "c2c".
        keys: For each layer, how much of A enters through the keys, [L]. Gated: mean absolute gate over the heads, the same
            for keys and values. C2C: norm of the change that is added to B's keys, divided by the norm of B's keys.
        values: The same for the values, [L].
        looks: B's attention to the memory, before the gates weigh it. None for C2C, in which B attends to no token of A.
    """

    kind: str
    keys: tuple[float, ...]
    values: tuple[float, ...]
    looks: Looks | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Inspection of one game.

    Attributes:
        sent: The message: `SentState`, `SentPrefix`, `SentDeltas` or `SentBridge`.
        answer_token: First token of the right answer.
        answer_id: Its id.
        heard: The logit lens on B with the message, after each layer that the message can affect.
        alone: The logit lens on B without the message, after the same layers. (For deltas: with the text, no deltas.)
        reply: B's reply.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> found, = protocols.inspect_activation(agent, agent, told, asked, ["Greece"], k=5, j=2)
        >>> found.sent.token, found.sent.head.tokens[0], found.heard[-1].answer_rank, found.reply.text
        ('.', ' Greece', 1, 'Greece')
    """

    sent: Any
    answer_token: str
    answer_id: int
    heard: tuple[Heard, ...]
    alone: tuple[Heard, ...]
    reply: Reply

    def row(self) -> dict[str, Any]:
        """Makes a record of the game, in the format of results files.

        Returns:
            All fields by name, with the reply as its own record.
        """
        return dataclasses.asdict(self) | {"reply": self.reply.row()}


def inspect_activation(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    answers: Sequence[str],
    *,
    k: int,
    j: int,
    **how: Any,
) -> list[Inspection]:
    """Plays games of `activation`, and inspects each: the message, its effect in B's layers, and B's reply.

    Args:
        a: The sender.
        b: The receiver.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        answers: The right answer of each item. The lens ranks its first token in every layer of B.
        k: A is read after this layer, 0 .. L_A.
        j: B is edited after this layer, 0 .. L_B.
        **how: Options of `Inspecting`.

    Returns:
        What was sent, heard and said in each item.

    Raises:
        ValueError: As for `activation`, `Agent.spell`, `Agent.patchscope` and `logit_lens`.

    Example:
        >>> told, asked = ["Bob is at the Colosseum."], ["Which country is Bob located in?"]
        >>> found, = protocols.inspect_activation(agent, agent, told, asked, ["Italy"], k=4, j=1)
        >>> [layer.answer_rank for layer in found.heard]
        [2, 2, 2, 2, 2, 1]
    """
    settings = Inspecting(**how)
    turn = activation(a, b, prompts_a, prompts_b, k=k, j=j, graft=settings.graft, W=settings.W)
    message, rows = send(a.single, a.tokenize(prompts_a), k), a.rows(prompts_a)
    target, most = (settings.target, settings.placeholder), settings.max_new_tokens
    scoped, norms = a.patchscope(message, *target, max_new_tokens=most), np.asarray(message.norms)
    head, embedding = (nearest_tokens(a.single, message, by=by, count=settings.count) for by in ("head", "embedding"))
    sent = [
        SentState(
            int(k), int(j), spell_out(a, row[-1:])[0], len(row) - 1, float(norms[i]),
            _named(a, head[0][i], np.exp(head[1][i])), _named(a, embedding[0][i], embedding[1][i]), scoped[i],
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return _inspected(turn, start_turn(b, prompts_b), sent, answers, j, settings)


def inspect_prefix(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    answers: Sequence[str],
    prefix: Prefixing,
    **how: Any,
) -> list[Inspection]:
    """Plays games of `kv` or `latent`, and inspects each: A's thoughts, B's attention to the prefix, and its effect.

    Args:
        a: The sender.
        b: The receiver.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        answers: The right answer of each item.
        prefix: Layers, steps, and how A thinks. It must send keys and values, without a map between tokenizers.
        **how: Options of `Inspecting`.

    Returns:
        What was sent, heard and said in each item.

    Raises:
        ValueError: As for `kv`; `prefix` sends vectors, or tokens of another tokenizer.

    Example:
        >>> told, asked = ["Bob is at the Colosseum."], ["Which country is Bob located in?"]
        >>> found, = protocols.inspect_prefix(agent, agent, told, asked, ["Italy"], protocols.Prefixing())
        >>> found.sent.looks.most(6)[0][0], found.reply.text
        (' the', 'Italy')
    """
    settings = Inspecting(**how)
    _check_own(prefix.control)
    if prefix.sends == "thoughts" or (prefix.maps is not None and a.tokenizer.get_vocab() != b.tokenizer.get_vocab()):
        raise ValueError("an inspection shows A's tokens: send keys and values, between models with one tokenizer")
    turn = receive_prefix(b, prompts_b, send_prefix(a, b, prompts_a, prefix), prefix)
    looks, thoughts = _looks(turn, a, prompts_a, prefix.steps), _thoughts(a, prompts_a, prefix)
    layers = tuple((np.flatnonzero(prefix.chosen(b.single.config)) + 1).tolist())
    sent = [SentPrefix(layers, x, y) for x, y in zip(looks, thoughts, strict=True)]
    first = 1 if prefix.sink else layers[0]  # with a sink the first layer sees all
    return _inspected(turn, start_turn(b, prompts_b), sent, answers, first, settings)


def inspect_deltas(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    answers: Sequence[str],
    talk: Conversation,
    *,
    layers: Sequence[int],
    **how: Any,
) -> list[Inspection]:
    """Plays games of `deltas`, and inspects each: the deltas of A's message, and their effect in B's layers.

    Args:
        a: The agent that writes.
        b: The agent that reads.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts (the questions), one for each item.
        answers: The right answer of each item.
        talk: How A writes, and how B gets the message.
        layers: Layers after which states are read and added.
        **how: Options of `Inspecting`.

    Returns:
        What was sent, heard and said in each item. `alone` is B with the text but without the deltas.

    Raises:
        ValueError: As for `deltas`.

    Example:
        >>> told, asked = ["Bob is at the Colosseum."], ["Which country is Bob located in?"]
        >>> talk = protocols.Conversation(max_message_tokens=8)
        >>> found, = protocols.inspect_deltas(agent, agent, told, asked, ["Italy"], talk, layers=[4])
        >>> len(found.sent.tokens) == len(found.sent.norms[0]), found.heard[-1].answer_rank
        (True, 1)
    """
    settings, layers = Inspecting(**how), sorted(delta_layers(a, b, layers, talk))
    _check_own(talk.control)
    sent = send_deltas(a, prompts_a, talk, layers=layers)
    turn = receive_deltas(b, prompts_b, sent, talk, layers=layers)
    assert turn.given is not None
    states, valid = np.asarray(sent.message.state_array(), np.float32), np.asarray(sent.message.valid)
    toward = nearest_tokens(a.single, sent.message.state_array()[:, :, -1], count=NAMED)
    told = []
    for i, details in enumerate(sent.details):
        norms = np.linalg.norm(states[i][valid[i]], axis=-1).T
        each = [(x[i][valid[i]]) for x in map(np.asarray, toward)]
        named = tuple(_named(a, ids, np.exp(values)) for ids, values in zip(*each, strict=True))
        tokens = tuple(spell_out(a, details["ids"]))
        told.append(SentDeltas(tuple(layers), details["message"], tokens, tuple(map(tuple, norms.tolist())), named))
    alone = dataclasses.replace(turn, given=turn.given._replace(edits=()))
    return _inspected(turn, alone, told, answers, layers[0], settings)


def inspect_bridge(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    answers: Sequence[str],
    bridging: Bridging,
    **how: Any,
) -> list[Inspection]:
    """Plays games over a trained `bridge`, and inspects each: how much of A enters each layer, and its effect in B.

    Args:
        a: The sender.
        b: The receiver.
        prompts_a: A's prompts, one for each item. The sender of a C2C reads B's prompts.
        prompts_b: B's prompts, one for each item.
        answers: The right answer of each item.
        bridging: The bridge.
        **how: Options of `Inspecting`.

    Returns:
        What was sent, heard and said in each item.

    Raises:
        ValueError: As for `bridge`.

    Example:
        >>> made = jc.init_gated(jax.random.key(0), agent.params, agent.params)
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> how = protocols.Bridging(made)
        >>> found, = protocols.inspect_bridge(agent, agent, told, asked, ["Jordan"], how)
        >>> found.sent.kind, max(found.sent.values), found.heard == found.alone
        ('gated', 0.0, True)
    """
    settings = Inspecting(**how)
    _check_own(bridging.control)
    turn = receive_bridged(b, prompts_b, send_bridged([a], b, prompts_a, prompts_b, bridging), bridging)
    alone, games, made = start_turn(b, prompts_b), len(prompts_b), bridging.bridges[0]
    if isinstance(made, Gated):
        size = tuple(np.abs(np.asarray(turn.past[0].gate)).mean(axis=1).tolist())
        sent = [SentBridge("gated", size, size, looks) for looks in _looks(turn, a, prompts_a)]
    else:
        keys, values = (_moved(turn, name) for name in ("k", "v"))
        sent = [SentBridge("c2c", keys[i], values[i], None) for i in range(games)]
    return _inspected(turn, alone, sent, answers, 1, settings)


def spell_out(agent: Agent, ids: Sequence[int] | AnyArray) -> list[str]:
    """Decodes each token by itself.

    Args:
        agent: The agent whose tokenizer is used.
        ids: Token ids.

    Returns:
        The text of each token. A token without text, or one that is part of a character, is spelled as in the vocabulary.
    """
    texts = [agent.tokenizer.decode([int(i)]) for i in ids]
    spelled = agent.tokens(ids)
    return [mark if not text or "\ufffd" in text else text for text, mark in zip(texts, spelled, strict=True)]


def _check_own(control: Any) -> None:
    """Raises ValueError if a control replaces the message to inspect."""
    if control is not None:
        raise ValueError(f"control = {control.name!r}: an inspection shows A's own message, leave it out")


def _inspected(
    turn: Turn, alone: Turn, sent: Sequence[Any], answers: Sequence[str], first: int, settings: Inspecting
) -> list[Inspection]:
    """Run the logit lens on B with and without the message, from layer `first` on, and let B reply."""
    b, layers = turn.agent, range(first, turn.agent.single.config.layers + 1)
    spelled = b.spell(turn.prompts, answers)[:, 0]
    look = lambda turn: _by_game(b, turn.lens(layers, count=settings.count, answers=spelled), layers)
    token = lambda i: spell_out(b, spelled[i : i + 1])[0]
    games = zip(sent, look(turn), look(alone), turn.write(settings.max_new_tokens), strict=True)
    return [
        Inspection(x, token(i), int(spelled[i]), heard, without, reply)
        for i, (x, heard, without, reply) in enumerate(games)
    ]


def _looks(turn: Turn, a: Agent, prompts_a: Sequence[Prompt], steps: int = 0) -> list[Looks]:
    """Attention of B's layers to A's tokens, which are in the last cache before B's prompts."""
    assert turn.given is not None
    past, columns = turn.past, turn.past[-1].positions.shape[-1]
    onto = lambda last: np.asarray(attention_onto(turn.agent.single, turn.given.prompts, past=past, last=last))  # pyright: ignore
    last, prompt = (onto(x)[..., -columns:] for x in (True, False))
    real, found = np.asarray(past[-1].positions) >= 0, []
    for i, row in enumerate(a.rows(prompts_a)):
        tokens = (*spell_out(a, row), *(f"<thought {m + 1}>" for m in range(steps)))
        known = lambda x: None if np.isnan(x).any() else x.tolist()
        shares = tuple(row and tuple(row) for row in map(known, last[:, i, real[i]]))
        found.append(Looks(tokens, shares, tuple(map(known, prompt[:, i].sum(axis=-1)))))
    return found


def _thoughts(a: Agent, prompts: Sequence[Prompt], prefix: Prefixing) -> list[tuple[Named, ...]]:
    """For each game and thinking step, the tokens that A predicts after it. (A's input vectors show the step before.)"""
    found: list[list[Named]] = [[] for _ in prompts]
    for steps in range(1, prefix.steps + 1):
        W = a.realignment if prefix.thought == "aligned" else None
        logits = think(a.single, a.tokenize(prompts, steps), steps=steps, thought=prefix.thought, W=W).logits
        p, ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), NAMED)
        for own, *best in zip(found, ids, p, strict=True):
            own.append(_named(a, *best))
    return list(map(tuple, found))


def _moved(turn: Turn, name: str) -> list[tuple[float, ...]]:
    """For each game, the norm of a C2C's change of B's keys ("k") or values ("v"), relative to their own norm, [L]."""
    own, fused = unfused(turn.agent, turn.rows), turn.past[0]
    real = (np.asarray(own.positions) >= 0)[:, None, :, None]
    at = lambda cache: [np.where(real, np.asarray(x, np.float32), 0) for x in getattr(cache, name)]
    length = lambda x: np.sqrt((x**2).sum(axis=(1, 2, 3)))
    layers = [length(y - x) / length(x) for x, y in zip(at(own), at(fused), strict=True)]
    return list(map(tuple, np.stack(layers, axis=1).tolist()))


def _named(agent: Agent, ids: AnyArray, values: AnyArray) -> Named:
    return Named(tuple(map(int, ids)), tuple(spell_out(agent, ids)), tuple(float(x) for x in np.asarray(values)))


def _by_game(agent: Agent, lens: Lens, layers: Sequence[int]) -> list[tuple[Heard, ...]]:
    """Split a lens's result by game and by layer."""
    fields = lens.tokens, np.exp(lens.logprobs), lens.answer_logprobs, lens.answer_ranks
    tokens, values, logprobs, ranks = map(np.asarray, fields)
    return [
        tuple(
            Heard(layer, _named(agent, tokens[i, n], values[i, n]), float(logprobs[i, n]), int(ranks[i, n]))
            for n, layer in enumerate(layers)
        )
        for i in range(len(tokens))
    ]
