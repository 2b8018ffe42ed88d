"""The report of a finished sweep: its table, its pictures, its page and its text."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import rich.console
import rich.table

from .. import figures
from ..play import METRICS, shown
from ..runs import RunFolder, parquet
from .cells import Cells, agreement, best_table, collect
from .halves import halve, halves_table
from .parts import GameSweep, Job, SweepSettings


def report(folder: RunFolder, sweep: GameSweep, jobs: Sequence[Job], maps: Mapping[str, np.ndarray]) -> None:
    """Reports a finished sweep: writes results.parquet, pictures, report.txt and sweep.html, and prints the text.

    Args:
        folder: The run folder.
        sweep: The sweep.
        jobs: Its jobs, all finished.
        maps: The maps W by game. Games that have none are not in it.

    Raises:
        ValueError: A chunk is missing or damaged.
        OSError: A file cannot be written.
    """
    metric = shown(sweep.b, sweep.settings.wording, sweep.settings.examples)[0]
    table, cells = collect(folder, jobs, sweep.games, metric)
    folder.put("results.parquet", parquet(table))
    # Where nothing is written, the maps show the exact match of the answers' tokens.
    on_map = metric if sweep.settings.decode else "exact"
    groups = draw_maps(folder, sweep.settings, cells, on_map)
    parts, text = list(paragraphs(sweep, cells, maps, on_map)), io.StringIO()
    for file in (sys.stdout, text):
        console = rich.console.Console(file=file, width=None if file.isatty() else 150, emoji=False, markup=False)
        for part in parts:
            console.print(part, highlight=False)
    folder.put("report.txt", text.getvalue().encode())
    folder.put("sweep.html", figures.page(f"{sweep.a.name} -> {sweep.b.name}", groups, text.getvalue()).encode())
    print(f"\n{folder.path}: results.parquet, accuracy-*.png, logprob-*.png, sweep.html, report.txt")


def draw_maps(
    folder: RunFolder, settings: SweepSettings, cells: Mapping[str, Cells], metric: str
) -> dict[str, tuple[str, list[figures.LayerMap]]]:
    """Draws accuracy and log-probability over the layers, and writes one picture for each measure and graft.

    Args:
        folder: The run folder.
        settings: The settings of the sweep.
        cells: The cells of each game.
        metric: The metric of the accuracy, a key of `play.METRICS`.

    Returns:
        The maps, as `figures.page` takes them.
    """
    # To the next ten above the best cell: of a small real model that is far below 100.
    top = 10.0 * np.ceil(max(1.0, *(100 * found.hits.mean(axis=-1).max() for found in cells.values())) / 10)
    measures = {
        "accuracy": (f"{metric} match, %", (0.0, float(top)), lambda found, g: 100 * found.hits[g].mean(axis=-1)),
        "logprob": ("mean log-probability of the answer", None, lambda found, g: found.logprob[g].mean(axis=-1)),
    }
    groups = {}
    for (measure, (label, limits, value)), (g, graft) in itertools.product(
        measures.items(), enumerate(settings.grafts)
    ):
        drawn = []
        for game, found in cells.items():
            values = value(found, g)
            k, j = found.best(g) if measure == "accuracy" else np.unravel_index(np.argmax(values), values.shape)
            title, best = f"{game.replace('_', ' ')}, {graft}", (settings.ks[k], settings.js[j])
            drawn.append(figures.LayerMap(title, values, settings.ks, settings.js, best))
        groups[f"{label}, {graft}"] = label, drawn
        folder.put(f"{measure}-{graft}.png", figures.contours(drawn, label=label, columns=len(drawn), limits=limits))
    return groups


def paragraphs(
    sweep: GameSweep, cells: Mapping[str, Cells], maps: Mapping[str, np.ndarray], on_map: str
) -> Iterator[str | rich.table.Table]:
    """Writes the text of the report: the set-up, the best cells, and how cells chosen on one half do on the other.

    Args:
        sweep: The sweep.
        cells: The cells of each game.
        maps: The maps W by game. Games that have none are not in it.
        on_map: The metric that the maps of accuracy show.

    Yields:
        Paragraphs and tables.
    """
    settings = sweep.settings
    metric, why = shown(sweep.b, settings.wording, settings.examples)
    size = f"{len(settings.grafts)} x {len(settings.ks)} x {len(settings.js)}"
    yield f"{sweep.a.name} -> {sweep.b.name}, {size} cells\n"
    yield f"Hits are of {METRICS[metric]} ({why})."
    if on_map != metric:
        yield "Maps and best cells: exact match of the answer's tokens, since nothing was written (--decode)."
    yield f"A reads: {settings.wording.reads}.\n"
    yield "Best cells on all questions, % [95 % interval]. The best of many look better than they are:"
    yield best_table(settings, cells)
    yield "\nLayers chosen on one half of the questions, reported on the other, %. +: points above, paired; p by sign flips:"
    yield halves_table(halve(sweep, cells, maps))
    yield from agreement(cells)
