"""Was the answer sent, and did B use it? Does the message contain the answer, and does B's next token depend on it?

sent    states: a linear probe, trained on other items, predicts the answer from the message; texts: the message names the
        answer. What the probe finds was sent. A better reader, such as B, might find more.
heard   how far B's next-token distribution moves: KL divergence of own message against none, own against another
        item's message, and another's against none. If B uses content, the second is far from 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.special

from jaxcomm.agent import Agent, Prompt
from jaxcomm.cache import KVCache
from jaxcomm.flops import generation_flops, head_flops, reading_flops
from jaxcomm.messages import Message
from jaxcomm.protocols import Panel, Turn
from jaxcomm.protocols.base import total

from .games import GAMES, Game, Item, draw
from .probes import solve

FOLDS, RIDGE = 10, 0.01
MORE = 200
"""Number of further items to train the probe on, if a game has them."""


class Heard(NamedTuple):
    """The message that arrived for one item, and B's prediction before it answers.

    Attributes:
        next: Log-probability of every token as B's next token, [V], in nats. None: not stored.
        states: The message as numbers, [F]: its mean and its last state. None: it holds no states.
        text: The message in words. None: it has no text.
        flops: FLOPs of all agents until B's answer begins.
        sent: Bytes sent until then.
    """

    next: np.ndarray | None
    states: np.ndarray | None
    text: str | None
    flops: int
    sent: int


def heard(turn: Turn | Panel) -> list[Heard]:
    """Records the messages that arrived at B, and B's next-token predictions.

    Args:
        turn: B's turn, or the turns of a panel.

    Returns:
        One record for each item.
    """
    b, every = (turn.turns[turn.receiver], turn.turns) if isinstance(turn, Panel) else (turn, [turn])
    likely = scipy.special.log_softmax(np.asarray(b.logits, np.float32), axis=-1)
    message, notes = b.received, []
    there = (
        message is not None
        and message.states is not None
        and any(leaf.size for leaf in jax.tree.leaves(message.states))
    )
    states = features(message) if there else None  # pyright: ignore[reportArgumentType]
    for i in range(len(likely)):
        spent = total(each.before[i] for each in every)
        spent += turn.before[i] if isinstance(turn, Panel) else total(())
        read = sum(each.flops(i) - head_flops(each.agent.params.config) for each in every)
        text = None if message is None or message.text is None else message.text[i]
        notes.append(Heard(likely[i], None if states is None else states[i], text, spent.flops + read, spent.sent))
    return notes


EQUAL = ("equal-flops", "equal-bytes")
"""Controls that are texts: a text message, truncated to a channel's FLOPs until B answers, or to its bytes."""


def fitting_tokens(
    a: Agent, b: Agent, prompts: tuple[Sequence[Prompt], Sequence[Prompt]], notes: Sequence[Heard], most: int
) -> list[int]:
    """Finds the largest number of tokens of a text message that costs no more FLOPs than a channel until B answers.

    Args:
        a: The sender.
        b: The receiver.
        prompts: For each item, A's prompt before it writes, and B's prompt without the message.
        notes: Records with the channel's costs.
        most: Largest number of tokens of a message.

    Returns:
        The number for each item. 0: reading alone costs more.
    """

    def fit(read_a: int, read_b: int, budget: int) -> int:
        costs = (
            generation_flops(a.params.config, read_a, m) + reading_flops(b.params.config, read_b + m)
            for m in range(1, most + 1)
        )
        return sum(cost <= budget for cost in costs)

    rows = zip(a.rows(prompts[0]), b.rows(prompts[1]), notes, strict=True)
    return [fit(len(x), len(y), note.flops) for x, y, note in rows]


def features(message: Message) -> np.ndarray:
    """Makes one vector from a message: from several states, their mean and the last one.

    Args:
        message: A message of states; or of keys and values, whose values are used, in all layers that see any. (The
            states of linear attention are too large for a probe, and are left out.)

    Returns:
        Vectors [items, F], float32.
    """
    if isinstance(message.states, KVCache):
        return _of_cache(message.states)
    x: Any = np.asarray(jax.device_get(message.state_array()), np.float32)
    if message.single:
        return x.reshape(len(x), -1)
    x = x.reshape(*x.shape[:2], -1)
    there: Any = np.ones(x.shape[:2], bool) if message.valid is None else np.asarray(message.valid)
    mean = (x * there[..., None]).sum(axis=1) / np.maximum(there.sum(axis=1, keepdims=True), 1)
    last = there.shape[1] - 1 - np.argmax(there[:, ::-1], axis=1)
    return np.concatenate([mean, x[np.arange(len(x)), last]], axis=1)


def _of_cache(cache: KVCache) -> np.ndarray:
    """The mean and the last of the visible values, layer by layer."""
    real = np.asarray(cache.positions) >= 0
    layers = np.flatnonzero(cache.columns_seen.any(axis=1))
    share = real / np.maximum(real.sum(axis=1, keepdims=True), 1)
    last = real.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    found = []
    for n in layers:
        v = np.asarray(jax.device_get(cache.v[n]), np.float32)  # [B, K, S, H]
        found += [np.einsum("bs,bksh->bkh", share, v), v[np.arange(len(v)), :, last]]
    return np.concatenate([x.reshape(len(x), -1) for x in found], axis=1).astype(np.float32)


def further(game: Game, n: int = MORE) -> Game | None:
    """Draws further items of a game. None of them is played, or is a worked example.

    Args:
        game: The game.
        n: Number of items to draw.

    Returns:
        The same game with these items, and its worked examples. None: it is from a file, and has no other items.
    """
    if game.name not in GAMES or n < 1:
        return None
    others = draw(game.name, game.source["games_seed"] + 1000003, n, names=game.source["names"])
    known = {item.prompt_a for item in (*game.items, *game.examples)}
    kept = others.part([i for i, item in enumerate(others.items) if item.prompt_a not in known])
    return dataclasses.replace(kept, examples=game.examples)


def probe(game: Game, b: Agent, states: np.ndarray, more: tuple[Game, np.ndarray] | None = None) -> list[bool]:
    """Predicts the answers from messages with a linear probe that was trained on other items' messages.

    The probe (ridge regression) predicts the mean embedding of the answer's tokens in B's matrix, minus the mean over the
    item's choices. The choice with the largest cosine is its prediction. So it can predict answers that no other item has.
    The probe for an item is trained on nine tenths of the items, without this item, and on all of `more`.

    Args:
        game: The game.
        b: The receiver. Its embeddings represent the answers.
        states: The messages [items, F] (`features`).
        more: Another game of the same kind with other items, and its messages.

    Returns:
        Whether the prediction for each item is right.
    """
    spelled: dict[str, np.ndarray] = {}
    table = b.params.embed

    def vector(text: str) -> np.ndarray:
        if text not in spelled:
            ids = b.tokenizer.encode(f" {text}", add_special_tokens=False)
            spelled[text] = np.asarray(table[np.array(ids)], np.float32).mean(axis=0)
        return spelled[text]

    def choices(game: Game, item: Item) -> np.ndarray:
        every = np.stack([vector(choice) for choice in game.choices(item)])
        return every - every.mean(axis=0)

    def target(game: Game, item: Item) -> np.ndarray:
        return choices(game, item)[game.choices(item).index(item.answer)]

    x, y = states, np.stack([target(game, item) for item in game.items])
    more_x = [] if more is None else [more[1]]
    more_y = [] if more is None else [np.stack([target(more[0], item) for item in more[0].items])]
    fold, hits = np.arange(len(x)) % min(FOLDS, len(x)), np.zeros(len(x), bool)
    for n in range(fold.max() + 1):
        train, test = fold != n, np.flatnonzero(fold == n)
        if not train.any() and not more_x:
            continue
        weight, bias = solve(np.concatenate([x[train], *more_x]), np.concatenate([y[train], *more_y]), RIDGE)
        for i, vec in zip(test, x[test] @ weight + bias, strict=True):
            every = choices(game, game.items[i])
            alike = every @ vec / np.maximum(np.linalg.norm(every, axis=1), 1e-30)
            hits[i] = int(np.argmax(alike)) == game.choices(game.items[i]).index(game.items[i].answer)
    return hits.tolist()


def named(game: Game, notes: Sequence[Heard]) -> list[bool]:
    """Tests whether messages in words name the right answer, and none of the other choices before it.

    Args:
        game: The game.
        notes: The records of all items.

    Returns:
        Whether each message does.
    """
    return [game.named(note.text or "", item) == item.answer for note, item in zip(notes, game.items, strict=True)]
