"""`jaxcomm report`: finished runs, by pair and task, with the published numbers for the same tasks.

report.md, report.html   tables with intervals, paired differences and controls; how the set-ups differ; pictures
report.csv               a line for every run, protocol, task, metric and filter, and for every published number
pair*-*.png              accuracy against compute
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import rich.console

from . import figures
from .documents import Block, Code, Heading, Items, Picture, Table, markdown, page, show
from .effects import LIKELIHOOD, PARTS, Split, holm, meaning, p_written, written
from .evaluation.options import PROTOCOLS
from .evaluation.settings import SENDS
from .files import check_folder, write_whole
from .finished import FinishedSweep, Row, Run, compare, interval, key, read_runs
from .games import INFORMATION
from .published import SETUP, Entry, differences, read_published
from .scores import Interval

VERSIONS = ("jaxcomm", "jax", "jaxlib", "transformers", "lm_eval", "numpy", "python")
T = TypeVar("T")
K = TypeVar("K")
HOW_TO_READ = (
    "Values are in per cent, log p(right | choices) is in nats. Intervals are 95 % (bootstrap over the questions). Total, "
    "presence and content are differences in points or nats, paired by question. Total: the protocol minus B alone (single). "
    "Presence: another question's message minus B alone. Content: the protocol's message minus another question's. A row "
    "with a comma is a control: other messages replace the protocol's own. Unparsed: answers in which the task's filter found nothing. Cut: prompts that lost their first tokens. "
    "FLOPs and tokens (read + written) are means over questions, seconds are sums."
)


def report(paths: Sequence[Path], out: Path, console: rich.console.Console) -> None:
    """Reads finished runs, writes report.md, report.html, report.csv and pictures, and prints the tables.

    Args:
        paths: The run folders.
        out: Folder for the report.
        console: The console to print the tables on.

    Raises:
        ValueError: A folder is not a finished run, or is damaged; a folder is named twice; `out` is not local.
        OSError: A folder does not exist, or `out` cannot be written.
    """
    check_folder(out)
    found = read_runs(paths)
    rows = [row for run in found if isinstance(run, Run) for row in compare(run)]
    metrics, entries = read_published()
    blocks = list(document(found, rows, metrics, entries))
    title = blocks[0].text if isinstance(blocks[0], Heading) else ""
    for block in blocks:
        if isinstance(block, Picture):
            write_whole(out / block.file, block.png)
    write_whole(out / "report.md", markdown(blocks).encode())
    write_whole(out / "report.html", page(title, blocks).encode())
    write_whole(out / "report.csv", tidy(rows, entries).encode())
    show(blocks, console)
    console.print(f"{out}: report.md, report.html, report.csv, pictures", soft_wrap=True, markup=False, highlight=False)


def document(
    found: Sequence[Run | FinishedSweep], rows: Sequence[Row], metrics: Mapping[str, str], entries: Sequence[Entry]
) -> Iterator[Block]:
    """Writes the report.

    It lists the runs. Then it shows, for every pair of models and every task, the results, the published numbers, the
    differences between set-ups, and a picture. The reports of sweeps come last.

    Args:
        found: The runs.
        rows: Their lines with comparisons.
        metrics: The published name of each of our metrics.
        entries: The published numbers.

    Yields:
        The blocks of the document.
    """
    yield Heading(1, "Measured and published results")
    yield Heading(2, "Runs")
    yield Table(("run", "folder", "models", "device", "versions"), [about_run(run) for run in found], left=5)
    yield Code("\n".join(f"# {run.name}\n{run.command}" for run in found))
    if rows:
        yield HOW_TO_READ
    for number, (pair, own) in enumerate(grouped(rows, lambda row: row.run.pair).items(), 1):
        yield Heading(2, pair)
        for task, those in grouped(own, lambda row: row.line["task"]).items():
            yield from told_of(task, those)
            yield from notes(those)
            shares = [row for row in those if row.line["metric"] != LIKELIHOOD]
            yield from published(shares, [e for e in entries if e.task == task], metrics)
            file = f"pair{number}-{re.sub(r'[^A-Za-z0-9_.-]', '-', task)}"
            yield from picture(f"{file}.png", f"{pair}, {task}", those)
            yield from split_picture(f"{file}-effects.png", those)
    for sweep in found:
        if isinstance(sweep, FinishedSweep):
            yield Heading(2, f"{sweep.config['a']} → {sweep.config['b']}, layer sweep, {sweep.name}")
            yield f"The sweep's own report ({sweep.path / 'report.txt'}); its pictures are in {sweep.path / 'sweep.html'}."
            yield Code(sweep.text.strip("\n"), columns=True)


def grouped(things: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """Groups elements. Groups are in order of first appearance.

    Args:
        things: The elements.
        by: A function that returns the group of an element.

    Returns:
        The elements of each group.

    Example:
        >>> grouped([3, 1, 4, 1, 5], lambda n: "odd" if n % 2 else "even")
        {'odd': [3, 1, 1, 5], 'even': [4]}
    """
    groups: dict[K, list[T]] = {}
    for thing in things:
        groups.setdefault(by(thing), []).append(thing)
    return groups


def about_run(run: Run | FinishedSweep) -> tuple[str, ...]:
    """Describes a run: the cells of its row in the table of runs."""
    models = run.pair if isinstance(run, Run) else f"{run.config['a']} → {run.config['b']}, sweep"
    count, device = run.config.get("devices", 1), run.config.get("device", "not recorded")
    versions = ", ".join(f"{name} {run.config[name]}" for name in VERSIONS if name in run.config)
    return run.name, str(run.path), models, device if count == 1 else f"{count} x {device}", versions


def told_of(task: str, rows: Sequence[Row]) -> Iterator[Block]:
    """Writes the results of one task for one pair of models: a heading and a table.

    Args:
        task: Name of the task.
        rows: The lines with their comparisons.

    Yields:
        The blocks.
    """
    kinds = [str(kind) for kind in {row.line.get("information") for row in rows} - {None}]
    about = INFORMATION[kinds[0]] if len(kinds) == 1 else ""
    yield Heading(3, f"{task} ({about})" if about else task)
    yield results(rows)
    if tests := sum(part is not None for row in rows for part in row.parts):
        yield meaning(tests)
    if shared := [row for row in rows if row.line.get("overlap")]:
        most = max(row.line["overlap"] for row in shared)
        yield f"Under the control other, {most:.0%} of the questions get a message with their own answer, because so many questions have the same answer."


def results(rows: Sequence[Row]) -> Table:
    """Makes the table of one task and one pair of models.

    Runs are named if there are several. So are metrics with their filters.

    Args:
        rows: The lines with their comparisons.

    Returns:
        One row for each line. Values are in %, differences in points, with 95 % intervals; p-values are corrected over
        the table.
    """
    run = lambda row: row.run.name
    metric = lambda row: SETUP["metric"][1](row.run, row.line)
    names = [(name, of) for name, of in (("run", run), ("metric", metric)) if len({of(row) for row in rows}) > 1]
    columns = (
        *(name for name, _ in names), "protocol", "value", "n", *(x for part in PARTS for x in (part, "p")), "smallest",
        "unparsed", "cut", "MFLOPs", "bytes", "tokens", "seconds",
    )  # fmt: skip
    order = [metric(row) for row in rows]
    ordered = sorted(rows, key=lambda row: order.index(metric(row)))
    found = [part for row in ordered for part in row.parts if part is not None]
    corrected = iter(holm([part.p for part in found]))
    table = [(*(of(row) for _, of in names), *cells(row, corrected, len(found))) for row in ordered]
    told = [
        n for n, name in enumerate(columns) if name not in ("unparsed", "cut") or any(row[n] != "0" for row in table)
    ]
    select = lambda cells: tuple(cells[n] for n in told)
    return Table(select(columns), list(map(select, table)), left=len(names) + 1)


def cells(row: Row, corrected: Iterator[float], tests: int) -> tuple[str, ...]:
    """Writes the cells of a line in the table of results.

    Args:
        row: The line with its comparisons.
        corrected: Corrected p-values of the table's comparisons, in order. This function takes the line's own from it.
        tests: Number of the table's comparisons.

    Returns:
        The cells.
    """
    line, told, unit = row.line, [], "nats" if row.line["metric"] == LIKELIHOOD else "points"
    for part in row.parts:
        told += ["", ""] if part is None else [written(part.value, unit), p_written(next(corrected))]
    if row.protocol != "single" and not row.is_control and row.line["low"] is not None:
        ran = {other["protocol"] for other in row.run.lines}
        if row.total is None and "single" not in ran:
            told[0] = "single was not run"
        if row.protocol in SENDS and row.content is None and f"{row.protocol}, other" not in ran:
            told[4] = "the control other was not run"
    known = [part.smallest(tests) for part in row.parts if part is not None]
    tokens = f"{line['tokens_read']:.0f} + {line['tokens_written'] + line['message_tokens']:.0f}"
    return (
        row.protocol, score(line["value"], interval(row.line), unit), str(line["n"]), *told,
        (f"{max(known):.2f}" if unit == "nats" else f"{100 * max(known):.0f}") if known else "", str(line["unparsed"]), str(line["truncated"]),
        f"{line['flops'] / 1e6:.0f}", f"{line.get('bytes_sent', 0):,.0f}", tokens, f"{line['seconds']:.1f}",
    )  # fmt: skip


def score(x: float | None, interval: Interval | None, unit: str = "points") -> str:
    """Writes a value in per cent with its interval. A value without an interval is written as it is.

    Args:
        x: The value. None: nothing was scored.
        interval: The value with its interval, as shares. None: there is none.
        unit: "points", or "nats", which are written as they are.

    Returns:
        The text.
    """
    if interval is None:
        return "none scored" if x is None else f"{x:.4g} (no interval)"
    if unit == "nats":
        return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}] nats"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def notes(rows: Sequence[Row]) -> Iterator[Block]:
    """Writes notes on a table whose numbers could be misunderstood.

    Args:
        rows: The lines with their comparisons.

    Yields:
        One paragraph for each note.
    """
    if any(interval(row.line) is None and row.line["value"] is not None for row in rows):
        yield "No interval and no pairing: the metric is not a mean over questions."
    fewer = [row for row in rows if row.total is not None and row.total.n < row.line["n"]]
    if fewer:
        least = min(row.total.n for row in fewer if row.total is not None)
        yield f"Not every question has a score under every protocol: differences are over {least} to {fewer[0].line['n']} questions."
    means = [(row.line["value"], row.run.scores.get(key(row.line))) for row in rows if interval(row.line) is not None]
    if any(own and abs(x - float(np.mean(list(own.values())))) > 1e-9 for x, own in means):
        yield "Values are over all scored answers, differences are means over questions. So they need not add up."


def published(rows: Sequence[Row], entries: Sequence[Entry], metrics: Mapping[str, str]) -> Iterator[Block]:
    """Compares our values with all published numbers of the task, by protocol, and lists differences between set-ups.

    Args:
        rows: Our lines of the task.
        entries: The published numbers of the task.
        metrics: The published name of each of our metrics.

    Yields:
        The blocks. There are none if nothing is published.
    """
    if not entries:
        return
    named: set[Any] = {e.protocol for e in entries} | {row.protocol for row in rows}
    columns = [protocol for protocol in PROTOCOLS if protocol in named]
    others = ["others"] if None in named else []
    table = []
    for (run, metric), own in grouped(rows, lambda r: (r.run.name, SETUP["metric"][1](r.run, r.line))).items():
        values = {row.protocol: score(row.line["value"], interval(row.line)) for row in own}
        table.append(
            (f"here, {run}, {metric}", own[0].run.pair, *(values.get(c, "") for c in columns), *[""] * len(others))
        )
    for (source, models, unit), own in grouped(entries, lambda e: (e.source, e.pair, e.unit)).items():
        said = lambda column, own=own: "\n".join(
            f"{e.variant} {e.text}".strip() for e in own if e.protocol == (None if column == "others" else column)
        )
        source = source if unit == "%" else f"{source} ({unit}s)"
        table.append((source, models, *(said(column) for column in (*columns, *others))))
    yield "Published results on this task and results measured here, in per cent unless noted:"
    yield Table(("source", "models", *columns, *others), table, left=2)
    yield "How the set-ups differ:"
    yield Items(list(set_ups(rows, entries, metrics)))


def set_ups(rows: Sequence[Row], entries: Sequence[Entry], metrics: Mapping[str, str]) -> Iterator[str]:
    """Describes, for every published table, the differences between its set-up and ours. Names runs if they differ.

    Args:
        rows: Our lines of the task.
        entries: The published numbers of the task.
        metrics: The published name of each of our metrics.

    Yields:
        One sentence for each table.
    """
    runs = grouped(rows, lambda row: row.run.name)
    for source, own in grouped(entries, lambda e: e.source).items():
        said: dict[str, list[str]] = {}
        for name, those in runs.items():
            found = differences(those[0].run, [row.line for row in those], own, metrics)
            said.setdefault("; ".join(found) or "no recorded difference", []).append(name)
        parts = [text if len(said) == 1 else f"{', '.join(names)}: {text}" for text, names in said.items()]
        yield f"{source} ({own[0].about}): {'. '.join(parts)}."


def picture(file: str, title: str, rows: Sequence[Row]) -> Iterator[Picture]:
    """Draws accuracy against FLOPs and bytes, with a panel for every metric that has intervals.

    Args:
        file: Name of the file.
        title: Title of the picture.
        rows: The lines.

    Yields:
        The picture. There is none if no metric has intervals.
    """
    several = len({row.run.name for row in rows}) > 1
    panels: dict[str, list[tuple[str, float, float, Interval]]] = {}
    for row in rows:
        measured = interval(row.line)
        if measured is not None and row.line["metric"] != LIKELIHOOD:
            name = f"{row.protocol} ({row.run.name})" if several else row.protocol
            metric = SETUP["metric"][1](row.run, row.line)
            point = name, row.line["flops"], row.line.get("bytes_sent", 0), measured
            panels.setdefault(f"{row.line['task']}, {metric}", []).append(point)
    if (png := figures.every_cost(panels)) is not None:
        yield Picture(file, png, f"Accuracy against cost: {title}")


def split_picture(file: str, rows: Sequence[Row]) -> Iterator[Picture]:
    """Draws presence and content of every channel of a task, in the first metric that has them.

    Args:
        file: Name of the file.
        rows: The lines with their comparisons.

    Yields:
        The picture. There is none if no gain was split.
    """
    metric = lambda row: SETUP["metric"][1](row.run, row.line)
    parted = [row for row in rows if None not in row.parts and row.line["metric"] != LIKELIHOOD]
    if parted:
        first, several = metric(parted[0]), len({row.run.name for row in parted}) > 1
        name = lambda row: f"{row.protocol} ({row.run.name})" if several else row.protocol
        splits = {name(row): Split(*row.parts) for row in parted if metric(row) == first}  # pyright: ignore
        yield Picture(file, figures.effects(splits, label=f"{first}, points"), "Presence and content")


def tidy(rows: Sequence[Row], entries: Sequence[Entry]) -> str:
    """Writes report.csv: our lines and the published numbers of the same tasks.

    Args:
        rows: Our lines with their comparisons.
        entries: The published numbers.

    Returns:
        The CSV. Accuracies are shares; as_published is the number as its source prints it.
    """
    lines = [ours(row) for row in rows]
    tasks = {row.line["task"] for row in rows}
    for e in entries:
        if e.task in tasks:
            lines.append(
                {"kind": "published", "source": f"{e.source} ({e.about})", "a": e.a, "b": e.b, "protocol": e.protocol}
                | {"variant": e.variant, "task": e.task, "metric": e.setting.get("metric"), "value": e.share}
                | {"n": e.setting.get("questions"), "as_published": e.text, "unit": e.unit}
            )
    names = dict.fromkeys(itertools.chain.from_iterable(lines))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def ours(row: Row) -> dict[str, Any]:
    """Turns one of our lines into a record of `tidy`."""
    config = row.run.config
    who = {"a": config["a"], "b": config["b"], "others": " ".join(config["others"])}
    line = {"kind": "run", "source": str(row.run.path)} | who | {"variant": ""} | dict(row.line)
    for name, found in zip(PARTS, row.parts, strict=True):
        value, low, high = found.value if found else (None, None, None)
        line |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_p": found and found.p}
        line |= {f"{name}_pairs": found and found.n}
    return line
