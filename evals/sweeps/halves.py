"""Choose cells on one half of the questions, and report them on the other half.

The best of many cells is partly luck. So a cell that is chosen and reported on the same questions looks better than it is.
Here the chosen cell is compared with B alone and with every control on the other questions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import rich.table

from jaxcomm.protocols import Control

from ..conditions import Readings
from ..effects import split, split_rows
from ..play import PlaySettings, play, shown
from ..scores import accuracy, percent
from .cells import Cells
from .parts import GameSweep

SPARE = 4
"""Extra tokens beyond the longest answer, for replies that spell the answer in more tokens."""


@dataclasses.dataclass(frozen=True)
class Halved:
    """A cell chosen on one half of a game's questions and played on the other half.

    Attributes:
        game: Name of the game.
        graft: The graft.
        k: Layer of A.
        j: Layer of B.
        chosen_on: Indices of the questions for choosing the cell.
        flattering: The cell's hits on these questions, which are optimistically biased.
        reported: Indices of the other questions.
        ours: The cell's hits on `reported`, for decoded replies.
        silent: Hits of B alone on `reported`.
        controls: Hits of each control on `reported`, by name (`jaxcomm.protocols.CONTROLS`).
    """

    game: str
    graft: str
    k: int
    j: int
    chosen_on: np.ndarray
    flattering: np.ndarray
    reported: np.ndarray
    ours: list[bool]
    silent: list[bool]
    controls: dict[str, list[bool]]


def halve(sweep: GameSweep, cells: Mapping[str, Cells], maps: Mapping[str, np.ndarray]) -> Iterator[Halved]:
    """Chooses the best layers on one half of the questions, and plays the other half with them.

    Args:
        sweep: The sweep.
        cells: The cells of each game.
        maps: The maps W by game, [K, J, D_B, D_A] or [K, 1, D_B, D_A], for games that have maps.

    Yields:
        The result for each game and graft.
    """
    settings, a, b = sweep.settings, sweep.a, sweep.b
    metric = shown(b, settings.wording, settings.examples)[0]
    for game, found in cells.items():
        how = PlaySettings(settings.wording, max_new_tokens=settings.decode or _room(sweep, game, metric))
        order = np.random.default_rng([settings.seed, 4]).permutation(len(sweep.games[game].items))
        chosen_on, reported = np.split(order, [len(order) // 2])
        half = sweep.games[game].part(reported)
        played = lambda protocol, half=half, how=how, **at: play(half, protocol, a, b, how, **at).scored(metric)
        silent, readings = played("silent"), Readings(half, a, b, settings.wording)
        for g, graft in enumerate(settings.grafts):
            k, j = found.best(g, chosen_on)
            W = None if game not in maps else maps[game][k, j if maps[game].shape[1] > 1 else 0]
            at: dict[str, Any] = dict(k=settings.ks[k], j=settings.js[j], graft=graft, W=W)
            at = readings.add(at) | {"protocol": "activation"}
            controls = {name: played(**at, control=name) for name in get_args(Control)}
            yield Halved(
                game, graft, settings.ks[k], settings.js[j], chosen_on, found.hits[g, k, j, chosen_on], reported,
                played(**at), silent, controls,
            )  # fmt: skip


def _room(sweep: GameSweep, game: str, metric: str) -> int:
    """Number of tokens of a reply. A reply that is much longer than every answer cannot be an exact match."""
    if metric != "exact":
        return 16
    return max(len(sweep.b.tokenizer.encode(f" {item.answer}")) for item in sweep.games[game].items) + SPARE


def halves_table(halves: Sequence[Halved]) -> rich.table.Table:
    """Makes the table of both halves: hits of each chosen cell, and the effect of its message on the reported half.

    Args:
        halves: The results of `halve`.

    Returns:
        Hits in % with 95 % intervals on both halves; presence and content on the reported half, in points, with p-values
        corrected over the table (`effects.split_rows`).
    """
    found = {}
    for h in halves:
        cells = h.game, h.graft, str(h.k), str(h.j), percent(accuracy(h.flattering)), percent(accuracy(h.ours))
        found[cells] = split(h.ours, h.controls["other"], h.silent), "points"
    columns, rows = split_rows(found)
    table = rich.table.Table("game", "graft", "k", "j", "half chosen on", "other half", *columns)
    for row in rows:
        table.add_row(*row)
    return table


def controls_table(halves: Sequence[Halved]) -> rich.table.Table:
    """Makes the table of all controls of the chosen cells, on the reported half.

    Args:
        halves: The results of `halve`.

    Returns:
        One row for each control, and B alone: hits in % with 95 % intervals, a column for each cell.
    """
    table = rich.table.Table("instead of the message", *(f"{h.game}, {h.graft}, {h.k}, {h.j}" for h in halves))
    table.add_row("the message itself", *(percent(accuracy(h.ours)) for h in halves))
    table.add_row("none", *(percent(accuracy(h.silent)) for h in halves))
    for name in halves[0].controls:
        table.add_row(name, *(percent(accuracy(h.controls[name])) for h in halves))
    return table
