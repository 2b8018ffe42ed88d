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
    """A cell chosen on one half of a game's questions and played, decoded, on the other; hits are question by question."""

    game: str
    graft: str
    k: int
    j: int
    chosen_on: np.ndarray
    """Which questions; there, `flattering` are its hits."""
    flattering: np.ndarray
    reported: np.ndarray
    """Which questions; there, `ours` are its hits, and those of silence and of each control."""
    ours: list[bool]
    silent: list[bool]
    controls: dict[str, list[bool]]


def halve(sweep: GameSweep, cells: Mapping[str, Cells], maps: Mapping[str, np.ndarray]) -> Iterator[Halved]:
    """For every game and graft: the layers that are best on half of the questions, on the other half. maps: W, by game."""
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
    """Both halves, and on the reported one how far the cell is above silence and above the best control."""
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
