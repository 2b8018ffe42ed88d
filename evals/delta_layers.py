"""Sweep the layer of state deltas: play a game with A's messages, adding their deltas after one layer of B at a time.

Each layer is played with each item's own deltas and with another item's; the text alone is played too. The text is always
the item's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.controls import derange
from jaxcomm.protocols import sweep_deltas
from jaxcomm.protocols.state_deltas import DeltaSweep

from . import figures
from .documents import Block, Heading, Items, Picture, Table
from .effects import meaning, split, split_rows
from .games import Game, Wording
from .runs import RunFolder
from .scores import accuracy, percent


def sweep(
    game: Game,
    agents: tuple[Agent, Agent],
    wording: Wording,
    layers: Sequence[int],
    talk: dict[str, Any],
    folder: RunFolder,
    progress: Callable[[str], None],
    seed: int = 0,
) -> DeltaSweep:
    """Plays a game with deltas after every layer, in a run folder.

    Args:
        game: The game.
        agents: The sender and the receiver.
        wording: How the game is put to the agents.
        layers: The layers.
        talk: How A writes and how B gets the message: options of `jaxcomm.protocols.Conversation`.
        folder: The run folder. Finished results are read from it.
        progress: Called with the name of each computation.
        seed: Random seed for the assignment of deltas to items.

    Returns:
        The results: first with own deltas, then with another item's.
    """
    (a, b), answers = agents, [item.answer for item in game.items]

    def made() -> dict[str, np.ndarray]:
        progress("deltas")
        prompts, orders = (wording.prompts_a(game, a), wording.prompts_b(game, b)), [None, derange(answers, seed)]
        return sweep_deltas(a, b, *prompts, answers, layers=layers, orders=orders, **talk)._asdict()

    return DeltaSweep(**folder.arrays("deltas", made))


def records(game: Game, layers: Sequence[int], found: DeltaSweep) -> list[dict[str, Any]]:
    """Makes a record of every layer, for results files.

    Args:
        game: The game.
        layers: The layers.
        found: The results.

    Returns:
        One record for each layer.
    """
    text = {"text_accuracy": float(found.text_exact.mean()), "text_logprob": float(found.text_logprobs.mean())}
    means = found.exact.mean(axis=1), found.logprobs.mean(axis=1)
    names = ("accuracy", "other_accuracy", "logprob", "other_logprob")
    return [
        {"game": game.name, "layer": layer, "n": len(game.items)}
        | dict(zip(names, (float(x) for mean in means for x in mean[:, n]), strict=True))
        | text
        for n, layer in enumerate(layers)
    ]


def blocks(game: Game, layers: Sequence[int], found: DeltaSweep, told: Sequence[str]) -> list[Block]:
    """Writes the report.

    Args:
        game: The game.
        layers: The layers.
        found: The results.
        told: Facts about the set-up.

    Returns:
        The blocks of a document.
    """
    alone = (
        f"{percent(accuracy([bool(x) for x in found.text_exact]))} exact match, {found.text_logprobs.mean():.2f} nats"
    )
    made: list[Block] = [
        Heading(1, f"{game.name.replace('_', ' ')}: after which layer deltas are added"),
        Items([*told, f"The text alone: {alone}."]),
        "Total: the item's own deltas minus the text alone. Presence: another item's deltas minus the text alone. Content: own "
        "deltas minus another item's. The text is always the item's own.",
        Picture("layers.png", picture(layers, found), "Accuracy and log-probability against the layer"),
    ]
    for unit, values, text, show in (
        ("points", found.exact, found.text_exact, lambda x: percent(accuracy([bool(hit) for hit in x]))),
        ("nats", found.logprobs, found.text_logprobs, lambda x: f"{x.mean():.2f}"),
    ):
        splits = {
            (str(layer), show(values[0, :, n])): (split(values[0, :, n], values[1, :, n], text), unit)
            for n, layer in enumerate(layers)
        }
        columns, rows = split_rows(splits)
        name = "exact match, %" if unit == "points" else "log p(right)"
        made += [Heading(2, name), Table(["layer", name, *columns], rows, left=1), meaning(3 * len(layers))]
    return made


def picture(layers: Sequence[int], found: DeltaSweep) -> bytes:
    """Draws exact match and log-probability against the layer, with own and another item's deltas, and the text alone.

    Args:
        layers: The layers.
        found: The results.

    Returns:
        The bytes of a PNG.
    """
    panels: dict[tuple[str, str], Any] = {}
    for what, values, text, scale in (
        ("exact match, %", found.exact, found.text_exact, 100),
        ("log p(right answer), nats", found.logprobs, found.text_logprobs, 1),
    ):
        own, other = scale * values.mean(axis=1)
        flat = [scale * float(text.mean())] * len(layers)
        panels["deltas", what] = {"deltas": (own.tolist(), other.tolist()), "the text alone": (flat, flat)}
    return figures.lines(layers, panels, x="layer after which deltas are added")
