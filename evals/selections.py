"""Sweep selections of layers: play a game behind A's keys and values, for every scheme of choosing B's layers, every ratio,
and every number of A's thoughts.

A's prompts are read once. One program reads B's prompts under all selections (`jaxcomm.selection_logprobs`); the number
of visible thoughts is data too. Every cell is also played with another item's prefix, so its content is known.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxcomm.agent import Agent
from jaxcomm.controls import derange
from jaxcomm.prefixes import Scheme, choose_layers, hide_last, selection_logprobs
from jaxcomm.protocols import Prefixing

from . import figures
from .documents import Block, Heading, Items, Picture, Table
from .effects import effect, holm, p_written, written
from .games import Game, Wording
from .prefixes import CALIBRATED, calibrate, laid_out
from .runs import RunFolder
from .scores import accuracy, percent

WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "only the chosen layers see the prefix; B's prompt follows it"),
    "own": (dict(positions="own"), "as plain, but B's prompt begins at position 0"),
    "sink": (
        dict(sink=True),
        "all layers see the first token, and the first layer sees all tokens, as in KVComm's code",
    ),
    "published": (
        dict(sink=True, future=True),
        "as sink, and in layers that do not see the prefix, B's prompt also sees its own later tokens: the mask of KVComm's code",
    ),
}
"""Ways to read a selection: options of `jaxcomm.select`, with a description."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a sweep over selections.

    Attributes:
        schemes: Schemes of choosing layers.
        ratios: Shares of the layers, 0 to 1.
        ways: Ways to read a selection (`WAYS`).
        scores: For each scheme with calibration items, one number for each layer.
        layers: Number of B's layers.
        seed: Seed of the scheme "random".
        steps: Numbers of thoughts that B sees.
    """

    schemes: tuple[Scheme, ...]
    ratios: tuple[float, ...]
    ways: tuple[str, ...]
    scores: dict[str, Sequence[float]]
    layers: int
    seed: int = 0
    steps: tuple[int, ...] = (0,)

    def chosen(self, scheme: Scheme, ratio: float) -> np.ndarray:
        """Chooses the layers of a cell.

        Args:
            scheme: The scheme.
            ratio: Share of the layers.

        Returns:
            Bool [L].
        """
        return choose_layers(scheme, ratio, self.layers, scores=self.scores.get(scheme), seed=self.seed)

    @functools.cached_property
    def selections(self) -> np.ndarray:
        """All selections, each once, bool [C, L]."""
        return np.unique([self.chosen(s, r) for s in self.schemes for r in self.ratios], axis=0)

    @property
    def cells(self) -> list[tuple[int, Scheme, float, int]]:
        """All combinations of number of steps, scheme and ratio, each with its column in `Swept`."""
        count = len(self.selections)
        return [
            (m, s, r, n * count + self.index(s, r))
            for n, m in enumerate(self.steps)
            for s in self.schemes
            for r in self.ratios
        ]

    def index(self, scheme: Scheme, ratio: float) -> int:
        """Finds the selection of a cell.

        Args:
            scheme: The scheme.
            ratio: Share of the layers.

        Returns:
            Its index in `selections`.
        """
        return int(np.flatnonzero((self.selections == self.chosen(scheme, ratio)).all(axis=1))[0])


@dataclasses.dataclass(frozen=True)
class Swept:
    """Results of one way. All arrays are [items, steps x selections].

    Attributes:
        logprobs: Log-probability of each right answer with the item's own prefix, in nats.
        hits: Whether it is the likeliest, with the item's own prefix.
        other_logprobs: Log-probability with another item's prefix, in nats.
        other_hits: Whether it is the likeliest, with another item's prefix.
    """

    logprobs: np.ndarray
    hits: np.ndarray
    other_logprobs: np.ndarray
    other_hits: np.ndarray


def scored_layers(
    schemes: Sequence[str],
    items: Game | None,
    agents: tuple[Agent, Agent],
    wording: Wording,
    how: Prefixing,
    alpha: float,
) -> dict[str, list[float]]:
    """Scores B's layers for the schemes that need calibration items.

    Args:
        schemes: The schemes.
        items: The calibration items. None: no scheme needs any.
        agents: The sender and the receiver.
        wording: How games are put to the agents.
        how: Options of the prefix, such as its place.
        alpha: Weight of the attention in KVComm's score.

    Returns:
        The scores, by scheme.
    """
    wanted = [scheme for scheme in schemes if scheme in CALIBRATED] if items is not None else []
    return {scheme: [float(x) for x in calibrate(scheme, items, agents, wording, how, alpha)] for scheme in wanted}  # pyright: ignore


def sweep(
    game: Game,
    agents: tuple[Agent, Agent],
    wording: Wording,
    how: Prefixing,
    grid: Grid,
    folder: RunFolder,
    progress: Callable[[str], None],
) -> dict[str, Swept]:
    """Plays a game under every selection, piece by piece, in a run folder.

    Args:
        game: The game.
        agents: The sender and the receiver.
        wording: How the game is put to the agents.
        how: Options of the prefix, such as its place.
        grid: The cells.
        folder: The run folder. Finished pieces are read from it.
        progress: Called with the name of every piece that is computed.

    Returns:
        The results, by way.
    """
    a, b = agents
    order = derange([item.answer for item in game.items], grid.seed)
    laid = functools.cache(lambda: laid_out(game, a, b, wording, how))
    found = {}
    shape = len(game.items), len(grid.selections)
    for way in grid.ways:
        parts = []
        for whose, steps in itertools.product(("own", "other"), grid.steps):
            name = f"{way}-{whose}" + (f"-{steps}" if how.steps else "")
            if not folder.done(name):
                progress(name)
                before, cache, prompts, answers = laid()
                cache = hide_last(cache if whose == "own" else cache.take(order), how.steps - steps)
                told = dict(WAYS[way][0], before=before)
                logprobs, hits = selection_logprobs(b.single, prompts, cache, grid.selections, answers, **told)
                item, selection = np.indices(logprobs.shape)
                columns = {"item": item, "selection": selection, "logprob": logprobs, "hit": hits}
                folder.write(name, {key: pa.array(x.ravel()) for key, x in columns.items()})
            table = folder.read(name)
            parts.append([table[key].to_numpy(zero_copy_only=False).reshape(shape) for key in ("logprob", "hit")])
        own, other = parts[: len(grid.steps)], parts[len(grid.steps) :]
        found[way] = Swept(*(np.concatenate(x, axis=1) for side in (own, other) for x in zip(*side, strict=True)))
    return found


@dataclasses.dataclass(frozen=True)
class Weight:
    """Size of keys and values.

    Attributes:
        tokens: Mean number of tokens of an item's prefix.
        one: Bytes of one token's keys and values in each layer, [L], or in every layer.
    """

    tokens: float
    one: int | np.ndarray

    def of(self, chosen: np.ndarray, way: str, steps: int = 0) -> float:
        """Computes the number of visible bytes of an item's prefix.

        Args:
            chosen: Which layers see the prefix, [L].
            way: Way to read the selection (`WAYS`).
            steps: Number of thoughts after it.

        Returns:
            The number of bytes, as a mean over the items.
        """
        tokens = self.tokens + steps
        if not WAYS[way][0].get("sink"):
            return tokens * float((self.one * chosen).sum())
        whole = chosen | (np.arange(len(chosen)) == 0)
        return tokens * float((self.one * whole).sum()) + float((self.one * ~whole).sum())


def weight(game: Game, a: Agent, b: Agent, wording: Wording) -> Weight:
    """Computes the size of an item's keys and values, without running a model.

    Args:
        game: The game.
        a: The sender.
        b: The receiver. Keys and values arrive in its dtype.
        wording: How the game is put to the agents.

    Returns:
        The size.
    """
    c, tokens = a.single.config, [len(row) for row in a.rows(wording.prompts_a(game, a))]
    return Weight(float(np.mean(tokens)), 2 * np.array(c.kv_sizes) * b.params.dtype.itemsize)


def records(game: Game, grid: Grid, found: dict[str, Swept]) -> list[dict[str, Any]]:
    """Makes a record of every cell, for results files.

    Args:
        game: The game.
        grid: The cells of the sweep.
        found: The results, by way.

    Returns:
        One record for each way, number of steps, scheme and ratio.
    """
    made = []
    for way, swept in found.items():
        for steps, scheme, ratio, c in grid.cells:
            mean = lambda x, c=c: float(x[:, c].mean())
            made.append(
                {
                    "game": game.name, "way": way, "steps": steps, "scheme": scheme, "ratio": ratio, "n": len(game.items),
                    "layers": (np.flatnonzero(grid.chosen(scheme, ratio)) + 1).tolist(), "accuracy": mean(swept.hits),
                    "logprob": mean(swept.logprobs), "other_accuracy": mean(swept.other_hits),
                    "other_logprob": mean(swept.other_logprobs),
                }
            )  # fmt: skip
    return made


def blocks(game: Game, grid: Grid, found: dict[str, Swept], heavy: Weight, told: Sequence[str]) -> list[Block]:
    """Writes the report.

    Args:
        game: The game.
        grid: The cells of the sweep.
        found: The results, by way.
        heavy: Size of an item's keys and values.
        told: Facts about the set-up.

    Returns:
        The blocks of a document.
    """
    made: list[Block] = [
        Heading(1, f"{game.name.replace('_', ' ')}: which layers see the prefix"),
        Items([*told, *(f"Way {way}: {WAYS[way][1]}." for way in grid.ways)]),
        "Exact match: the right answer is the likeliest, token by token. Content: the item's own prefix minus another item's. "
        "p is exact for hits, and by random signs for nats. It is corrected by Holm's method over all selections of a table.",
        *pictures(grid, found),
    ]
    for way in grid.ways:
        columns, each = COLUMNS, list(rows(grid, found[way], way, heavy))
        if grid.steps == (0,):
            columns, each = columns[1:], [row[1:] for row in each]
        made += [Heading(2, f"Way {way}"), Table(columns, each, left=1)]
    if "sink" in found and "published" in found:
        made += [
            Heading(2, "What the published mask does"),
            "Way published minus way sink, at the same layers. They differ only in the mask.",
            Table(
                ["thoughts", "scheme", "ratio", "exact match, points", "p", "log p(right), nats", "p"],
                list(compared(grid, found["published"], found["sink"])),
                left=1,
            ),
        ]
    return made


COLUMNS = (
    "thoughts", "scheme", "ratio", "layers", "bytes", "exact match, %", "content, points", "p", "log p(right)", "content, nats", "p",
)  # fmt: skip


def rows(grid: Grid, swept: Swept, way: str, heavy: Weight) -> Iterator[list[str]]:
    """Writes the rows of a way's table, one for each scheme and ratio.

    Args:
        grid: The cells of the sweep.
        swept: The results.
        way: The way.
        heavy: Size of an item's keys and values.

    Yields:
        The cells.
    """
    told = _effects(grid, (swept.hits, swept.logprobs), (swept.other_hits, swept.other_logprobs))
    for steps, scheme, ratio, c in grid.cells:
        chosen = grid.chosen(scheme, ratio)
        yield [
            str(steps), scheme, f"{ratio:g}", str(chosen.sum()), f"{heavy.of(chosen, way, steps):,.0f}",
            percent(accuracy([bool(x) for x in swept.hits[:, c]])), *told[c][:2],
            f"{swept.logprobs[:, c].mean():.2f}", *told[c][2:],
        ]  # fmt: skip


def compared(grid: Grid, some: Swept, others: Swept) -> Iterator[list[str]]:
    """Writes the rows of a table that compares two ways, cell by cell.

    Args:
        grid: The cells of the sweep.
        some: The results of one way.
        others: The results of the other.

    Yields:
        The cells.
    """
    told = _effects(grid, (some.hits, some.logprobs), (others.hits, others.logprobs))
    for steps, scheme, ratio, c in grid.cells:
        yield [str(steps), scheme, f"{ratio:g}", *told[c]]


def _effects(grid: Grid, some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[tuple[str, str, str, str]]:
    """For every selection: points with p-value, nats with p-value, after Holm's correction over all selections. The
    selection without layers is not a test."""
    tested = np.flatnonzero(np.tile(grid.selections.any(axis=1), len(grid.steps)))
    count = some[0].shape[1]
    each = [[effect(x[:, c], y[:, c]) for c in range(count)] for x, y in zip(some, others, strict=True)]
    corrected = iter(holm([found[c].p for found in each for c in tested]))
    ps = [dict(zip(tested.tolist(), [next(corrected) for _ in tested], strict=True)) for _ in each]
    told = lambda n, c, unit: (written(each[n][c].value, unit), p_written(ps[n][c]) if c in ps[n] else "")
    return [(*told(0, c, "points"), *told(1, c, "nats")) for c in range(count)]


def pictures(grid: Grid, found: dict[str, Swept]) -> Iterator[Picture]:
    """Draws exact match and log-probability with a line for each scheme: against the share of layers, and against the number
    of thoughts if there are several.

    Args:
        grid: The cells of the sweep.
        found: The results, by way.

    Yields:
        The pictures.
    """
    column = {cell[:3]: cell[3] for cell in grid.cells}
    most, last = max(grid.ratios), max(grid.steps)
    against = (
        ("ratios", grid.ratios, lambda s, x: column[last, s, x], "share of B's layers that see the prefix"),
        ("steps", grid.steps, lambda s, x: column[x, s, most], "thoughts that B sees"),
    )
    for name, xs, at, label in against:
        if len(xs) == 1 and not (name == "ratios" and len(grid.steps) == 1):
            continue
        panels = {}
        for way, swept in found.items():
            for what, own, other, scale in (
                ("exact match, %", swept.hits, swept.other_hits, 100),
                ("log p(right answer), nats", swept.logprobs, swept.other_logprobs, 1),
            ):
                mean = lambda values, s, at=at, xs=xs, k=scale: [k * values[:, at(s, x)].mean() for x in xs]
                panels[way, what] = {s: (mean(own, s), mean(other, s)) for s in grid.schemes}
        yield Picture(
            f"{name}.png", figures.lines(xs, panels, x=label), f"Accuracy and log-probability against the {label}"
        )
