"""The report of a finished sweep: its table, its pictures, its page and its text."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import rich.console
import rich.table

from jaxcomm.controls import overlap

from .. import figures
from ..effects import meaning
from ..games import INFORMATION
from ..play import METRICS, shown
from ..runs import RunFolder, parquet
from .cells import Cells, agreement, best_table, collect
from .chunks import timed
from .halves import Halved, controls_table, halve, halves_table
from .parts import GameSweep, Job, SweepSettings


def report(
    folder: RunFolder,
    sweep: GameSweep,
    jobs: Sequence[Job],
    maps: Mapping[str, np.ndarray],
    took: Mapping[str, float] | None = None,
    style: figures.MapStyle = "cells",
) -> None:
    """Reports a finished sweep: writes results.parquet, pictures, report.txt and sweep.html, and prints the text.

    Args:
        folder: The run folder.
        sweep: The sweep.
        jobs: Its jobs, all finished.
        maps: The maps W by game, for games that have maps.
        took: Seconds of this computation (`chunks.compute`). The cost of controls relative to the sweep is printed, not
            stored.
        style: How maps are drawn in the PNG files. (sweep.html always shows cells.)

    Raises:
        ValueError: A chunk is missing or damaged.
        OSError: A file cannot be written.
    """
    metric = shown(sweep.b, sweep.settings.wording, sweep.settings.examples)[0]
    table, cells = collect(folder, jobs, sweep.games, metric)
    folder.put("results.parquet", parquet(table))
    # Without decoding, the maps show the exact match of the answers' tokens.
    on_map = metric if sweep.settings.decode else "exact"
    groups = draw_maps(folder, sweep.settings, cells, on_map, style)
    halves, seconds = timed(lambda: list(halve(sweep, cells, maps)))
    parts, text = list(paragraphs(sweep, cells, halves, on_map)), io.StringIO()
    for file in (sys.stdout, text):
        console = rich.console.Console(file=file, width=None if file.isatty() else 150, emoji=False, markup=False)
        for part in parts:
            console.print(part, highlight=False)
    folder.put("report.txt", text.getvalue().encode())
    folder.put("sweep.html", figures.page(f"{sweep.a.name} -> {sweep.b.name}", groups, text.getvalue()).encode())
    if took and (alone := took.get("own")):
        more = sum(took.values()) - alone + seconds
        print(
            f"\nControls took {more:.1f} s, {more / alone:.1f} times the sweep alone ({alone:.1f} s), without compiling."
        )
    print(f"\n{folder.path}: results.parquet, pictures of every map, sweep.html, report.txt")


def draw_maps(
    folder: RunFolder,
    settings: SweepSettings,
    cells: Mapping[str, Cells],
    metric: str,
    style: figures.MapStyle = "cells",
) -> dict[str, tuple[str, list[figures.LayerMap]]]:
    """Draws accuracy and log-probability over the layers, and writes one picture for each measure and graft.

    Args:
        folder: The run folder.
        settings: The settings of the sweep.
        cells: The cells of each game.
        metric: The metric of the accuracy, a key of `play.METRICS`.
        style: How the maps are drawn in the pictures.

    Returns:
        The maps, as input of `figures.page`.
    """
    # Round up to the next ten above the best cell: for a small real model this is far below 100.
    top = 10.0 * np.ceil(max(1.0, *(100 * found.hits.mean(axis=-1).max() for found in cells.values())) / 10)
    label, likely = f"{metric} match, %", "mean log-probability of the answer"
    hits, logprob = lambda found: 100 * found.hits.mean(axis=-1), lambda found: found.logprob.mean(axis=-1)
    measures: dict[str, tuple[str, tuple[float, float] | None, Callable[[Cells], np.ndarray]]] = {
        "accuracy": (label, (0.0, float(top)), hits),
        "content": (f"content: {metric} match, points", None, lambda found: hits(found) - hits(found.other)),
        "logprob": (likely, None, logprob),
        "content-logprob": (f"content: {likely}", None, lambda found: logprob(found) - logprob(found.other)),
    }
    groups = {}
    for (measure, (label, limits, value)), (g, graft) in itertools.product(
        measures.items(), enumerate(settings.grafts)
    ):
        if "content" in measure and not settings.content:
            continue
        drawn = []
        for game, found in cells.items():
            values = value(found)[g]
            k, j = found.best(g) if measure == "accuracy" else np.unravel_index(np.argmax(values), values.shape)
            title, best = f"{game.replace('_', ' ')}, {graft}", (settings.ks[k], settings.js[j])
            drawn.append(figures.LayerMap(title, values, settings.ks, settings.js, best))
        groups[f"{label}, {graft}"] = label, drawn
        png = figures.layer_maps(drawn, label=label, columns=len(drawn), limits=limits, style=style)
        folder.put(f"{measure}-{graft}.png", png)
    return groups


def paragraphs(
    sweep: GameSweep, cells: Mapping[str, Cells], halves: Sequence[Halved], on_map: str
) -> Iterator[str | rich.table.Table]:
    """Writes the text of the report: the set-up, the best cells, and the results of chosen cells on the other half.

    Args:
        sweep: The sweep.
        cells: The cells of each game.
        halves: Cells chosen on one half and played on the other.
        on_map: The metric that the maps of accuracy show.

    Yields:
        Paragraphs and tables.
    """
    settings = sweep.settings
    metric, why = shown(sweep.b, settings.wording, settings.examples)
    size = f"{len(settings.grafts)} x {len(settings.ks)} x {len(settings.js)}"
    yield f"{sweep.a.name} -> {sweep.b.name}, {size} cells\n"
    for name, game in sweep.games.items():
        yield f"{name}: {INFORMATION[game.information]}."
    yield f"Metric: {METRICS[metric]} ({why})."
    if on_map != metric:
        yield "Maps and best cells show the exact match of the answer's tokens, because nothing was decoded (--decode)."
    yield f"A reads: {settings.wording.reads}.\n"
    yield "Best cells (chosen and scored on the same items, so biased upwards), % [95 % interval]:"
    yield best_table(settings, cells)
    yield from content_told(sweep, cells)
    if halves:
        yield "\nLayers are chosen on one half of the items and reported on the other. In points, total: the message minus B alone; presence: another item's message minus B alone; content: the message minus another item's:"
        yield halves_table(halves)
        yield meaning(3 * len(halves))
        yield "\nThe same cells under the controls, %:"
        yield controls_table(halves)
    yield from agreement(cells)


def content_told(sweep: GameSweep, cells: Mapping[str, Cells]) -> Iterator[str]:
    """Says how much of the maps is content.

    Args:
        sweep: The sweep.
        cells: The cells of each game.

    Yields:
        One sentence for each game and graft, if the cells were also played with another item's message.
    """
    for game, found in cells.items():
        for g, graft in enumerate(sweep.settings.grafts):
            if found.other is not None and found.alone is not None:
                own, other, alone = (100 * x.hits.mean(axis=-1) for x in (found, found.other, found.alone))
                answers = [item.answer for item in sweep.games[game].items]
                shared = overlap(answers, sweep.others(game))
                k, j = np.unravel_index(np.argmax((own - other)[g]), other[g].shape)
                yield (
                    f"{game}, {graft}: mean over all cells: total {(own[g] - alone).mean():+.1f} = presence "
                    f"{(other[g] - alone).mean():+.1f} + content {(own - other)[g].mean():+.1f} points; most content at "
                    f"k = {sweep.settings.ks[k]}, j = {sweep.settings.js[j]}: {(own - other)[g, k, j]:+.1f}"
                    + (f" ({shared:.0%} of the items get a message with their own answer)" if shared else "")
                    + "."
                )
