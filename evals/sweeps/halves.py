"""Cells that are chosen on one half of the questions and reported on the other.

The best of many cells is partly luck, so a cell that is chosen and reported on the same questions looks better than it
is. Here it stands beside silence and every control, on questions it was not chosen on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import numpy as np
import rich.table

from jaxcomm.protocols import Control

from ..play import PlaySettings, play, shown
from ..scores import accuracy, difference, percent, sign_flip
from .cells import Cells
from .parts import GameSweep


@dataclasses.dataclass(frozen=True)
class Halved:
    """A cell that was chosen on one half of a game's questions, and played on the other half.

    Attributes:
        game: Name of the game.
        graft: The graft.
        k: Layer of A.
        j: Layer of B.
        chosen_on: Indices of the questions that the cell was chosen on.
        flattering: The cell's hits on these questions, which are too good on average.
        reported: Indices of the other questions.
        ours: The cell's hits on `reported`, of decoded replies.
        silent: Hits of B alone on `reported`.
        controls: Hits of each control on `reported`.
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
        maps: The maps W by game, [K, J, D_B, D_A] or [K, 1, D_B, D_A]. Games that have none are not in it.

    Yields:
        The result for each game and graft.
    """
    settings, a, b = sweep.settings, sweep.a, sweep.b
    metric = shown(b, settings.wording, settings.examples)[0]
    how = PlaySettings(settings.wording, max_new_tokens=settings.decode or 16)
    for game, found in cells.items():
        order = np.random.default_rng([settings.seed, 4]).permutation(len(sweep.games[game].items))
        chosen_on, reported = np.split(order, [len(order) // 2])
        half = sweep.games[game].part(reported)
        played = lambda protocol, half=half, **at: play(half, protocol, a, b, how, **at).scored(metric)
        silent = played("silent")
        for g, graft in enumerate(settings.grafts):
            k, j = found.best(g, chosen_on)
            W = None if game not in maps else maps[game][k, j if maps[game].shape[1] > 1 else 0]
            at: dict[str, Any] = dict(protocol="activation", k=settings.ks[k], j=settings.js[j], graft=graft, W=W)
            controls = {name: played(**at, control=name) for name in get_args(Control)}
            yield Halved(
                game, graft, settings.ks[k], settings.js[j], chosen_on, found.hits[g, k, j, chosen_on], reported,
                played(**at), silent, controls,
            )  # fmt: skip


def halves_table(halves: Iterable[Halved]) -> rich.table.Table:
    """Makes the table of both halves.

    Args:
        halves: The results of `halve`.

    Returns:
        Hits in % with 95 % intervals on both halves. On the half that is reported: how many points the cell is above
        silence and above the best control, with p-values by sign flips.
    """
    columns = "game, graft, k, j, half chosen on, other half, silent, +, p, best control, +, p"
    table = rich.table.Table(*columns.split(", "))
    for h in halves:
        name = max(h.controls, key=lambda name: np.mean(h.controls[name]))
        above = lambda others, h=h: (percent(difference(h.ours, others)), f"{sign_flip(h.ours, others):.4f}")
        score = lambda hits: percent(accuracy(hits))
        table.add_row(
            h.game, h.graft, str(h.k), str(h.j), score(h.flattering), score(h.ours), score(h.silent), *above(h.silent),
            f"{name} {score(h.controls[name])}", *above(h.controls[name]),
        )  # fmt: skip
    return table
