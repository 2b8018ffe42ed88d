"""`jaxcomm report`: finished runs, pair by pair and task by task, beside what was published on the same tasks.

report.md, report.html   tables with intervals, paired differences and controls; how the set-ups differ; pictures
report.csv               a line for every run, protocol, task, metric and filter, and for every published number beside them
pair*-*.png              accuracy against compute

published.json holds the published numbers as our specifications re-tell them. Its `setting`s use the names of `SETUP`
and, where there are any, our words, so that a difference in set-up is a difference between two texts.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rich.box
import rich.console
import rich.table
import rich.text

from jaxcomm.evals import biographies, figures
from jaxcomm.evals.evaluate import PROTOCOLS
from jaxcomm.evals.play import write_whole
from jaxcomm.evals.scores import Interval, difference, sign_flip
from jaxcomm.evals.tasks import OWN

PUBLISHED = Path(__file__).with_name("published.json")
VERSIONS = ("jaxcomm", "jax", "jaxlib", "transformers", "lm_eval", "numpy", "python")
GRAFTS = ("activation", "activation-w", "exchange")
"""What needs controls beside it."""
NEEDED = (
    "protocol", "task", "metric", "filter", "value", "low", "high", "n", "unparsed", "flops", "tokens_read",
    "tokens_written", "message_tokens", "seconds", "truncated",
)  # fmt: skip
"""What is read of a line of results.jsonl."""
CONFIG = (
    "a", "b", "others", "data", "chat", "temperature", "top_p", "max_message_tokens", "rounds", "temperatures", "k", "j",
    "graft", "where", "think",
)  # fmt: skip
"""What is read of run.json's config."""

Key = tuple[str, str, str, str]
"""protocol, task, metric, filter"""
T = TypeVar("T")
K = TypeVar("K")


# Runs -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished `jaxcomm eval`. scores: every question's, of the metrics that are one number per question."""

    name: str
    path: Path
    command: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    scores: Mapping[Key, Mapping[int, float]]

    @property
    def pair(self) -> str:
        return f"{' + '.join((self.config['a'], *self.config['others']))} → {self.config['b']}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A finished `jaxcomm sweep`, which has written its own report."""

    name: str
    path: Path
    command: str
    config: Mapping[str, Any]
    text: str


def read_runs(paths: Sequence[Path]) -> list[Run | Sweep]:
    """Run folders, named "run 1", "run 2" and so on. ValueError, OSError: `read_run`'s; none, or one of them twice."""
    if not paths:
        raise ValueError("name at least one run folder: jaxcomm report RUN... --out FOLDER")
    places = [path.resolve() for path in paths]
    if twice := [path for n, path in enumerate(paths) if places[n] in places[:n]]:
        raise ValueError(f"{twice[0]} is named twice")
    return [read_run(f"run {n}", path) for n, path in enumerate(paths, 1)]


def read_run(name: str, path: Path) -> Run | Sweep:
    """ValueError: no run folder, not finished, or damaged (the message says where). FileNotFoundError: not there."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    record = path / "run.json"
    if not record.is_file():
        raise ValueError(f"{path} is no run folder: it has no run.json, which jaxcomm eval and jaxcomm sweep write")
    kept = read_json(record, record.read_bytes(), ("command", "config"))
    command, config = kept["command"], kept["config"]
    if "games" in config:
        check_finished(path, command, "results.parquet", "report.txt")
        return Sweep(name, path, command, config, (path / "report.txt").read_text(encoding="utf-8"))
    if lacking := [name for name in CONFIG if name not in config]:
        raise ValueError(f"{record} is not of a run of jaxcomm eval or jaxcomm sweep: its config has no {lacking[0]!r}")
    check_finished(path, command, "results.jsonl", "items.parquet")
    results = path / "results.jsonl"
    texts = results.read_bytes().splitlines()
    mend = f" (remove the file and go on with {command} --resume)"
    lines = [read_json(f"{results} line {n}", text, NEEDED, mend) for n, text in enumerate(texts, 1)]
    try:
        return Run(name, path, command, config, lines, read_scores(path / "items.parquet"))
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / 'items.parquet'} is damaged: {error}{mend}") from error


def read_json(where: object, text: bytes, needed: Iterable[str], mend: str = "") -> dict[str, Any]:
    """An object with these keys. ValueError: it is none; the message says where, and how to mend it."""
    try:
        found = json.loads(text)
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{where} is damaged: {error}{mend}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: no object{mend}")
    if lacking := [key for key in needed if key not in found]:
        raise ValueError(f"{where} is damaged: it has no {lacking[0]!r}{mend}")
    return found


def check_finished(path: Path, command: str, *files: str) -> None:
    if missing := [name for name in files if not (path / name).is_file()]:
        raise ValueError(f"{path} is not finished (no {missing[0]}): go on with {command} --resume")


def read_scores(path: Path) -> dict[Key, dict[int, float]]:
    """items.parquet's metrics. Arrow's errors, OSError, ValueError, KeyError, AttributeError: it is damaged."""
    scores: dict[Key, dict[int, float]] = {}
    for row in pq.read_table(path, columns=["protocol", "task", "question", "filter", "metrics"]).to_pylist():
        for metric, score in json.loads(row["metrics"]).items():
            if isinstance(score, int | float) and score == score:
                key = row["protocol"], row["task"], metric, row["filter"]
                scores.setdefault(key, {})[row["question"]] = float(score)
    return scores


# Comparisons ----------------------------------------------------------------------------------------------------------


class Above(NamedTuple):
    """How much better one protocol is than another on the questions that both have a score for."""

    points: Interval
    p: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of results.jsonl with its comparisons; None: not a mean over questions, or the other one was not run.

    best: the control with the highest value, among those that were run in place of this row's activation.
    """

    run: Run
    line: Mapping[str, Any]
    single: Above | None
    best: Mapping[str, Any] | None
    control: Above | None

    @property
    def protocol(self) -> str:
        return self.line["protocol"]


def interval(line: Mapping[str, Any]) -> Interval | None:
    """None: the metric is not a mean over questions."""
    return None if line["low"] is None else Interval(line["value"], line["low"], line["high"])


def key(line: Mapping[str, Any]) -> Key:
    return line["protocol"], line["task"], line["metric"], line["filter"]


def above(run: Run, line: Mapping[str, Any], other: str) -> Above | None:
    """Of a line over another protocol's, question by question (`scores.difference`, `scores.sign_flip`)."""
    ours, theirs = run.scores.get(key(line), {}), run.scores.get((other, *key(line)[1:]), {})
    both = sorted(set(ours) & set(theirs))
    if not both or line["protocol"] == other:
        return None
    pair = [ours[q] for q in both], [theirs[q] for q in both]
    return Above(difference(*pair), sign_flip(*pair), len(both))


def compare(run: Run) -> Iterator[Row]:
    """Every line of a run."""
    for line in run.lines:
        alike = [other for other in run.lines if key(other)[1:] == key(line)[1:] and other["value"] is not None]
        controls = [other for other in alike if other["protocol"].startswith(f"{line['protocol']}, ")]
        best = max(controls, key=lambda other: other["value"], default=None)
        control = None if best is None else above(run, line, best["protocol"])
        yield Row(run, line, above(run, line, "single"), best, control)


# Published numbers ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published number. protocol: ours, None where we have none like it. variant: what sets it apart from the table's
    other numbers of this protocol. setting: by `SETUP`'s names; what is not there, or None, our source does not say."""

    source: str
    about: str
    a: str
    b: str
    protocol: str | None
    variant: str
    task: str
    value: float
    error: float | None
    unit: str
    setting: Mapping[str, Any]

    @property
    def pair(self) -> str:
        return f"{self.a} → {self.b}"

    @property
    def text(self) -> str:
        digits = 1 if self.unit == "%" else 2
        return f"{self.value:.{digits}f}" + ("" if self.error is None else f" ± {self.error:.{digits}f}")

    @property
    def share(self) -> float:
        return round(self.value / 100, 6) if self.unit == "%" else self.value


def read_published() -> tuple[dict[str, str], list[Entry]]:
    """Which published metric each of ours is ("metric, filter" -> the entries' word), and every entry."""
    found = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    entries = []
    for table in found["tables"]:
        paper = found["papers"][table["paper"]]
        number, section, arxiv = table["table"], table["section"], paper["arxiv"]
        source = f"{paper['name']}, " + (f"Table {number}" if number else table["about"])
        details = (
            number and table["about"],
            section and f"section {section}",
            paper["title"],
            arxiv and f"arXiv {arxiv}",
        )
        about = f"{', '.join(d for d in details if d)}{'; ' if 'note' in table else ''}{table.get('note', '')}"
        for row in table["rows"]:
            for task, value in row["values"].items():
                setting = {k: at(v, task) for k, v in (table["setting"] | row.get("setting", {})).items()}
                models, error = ((table | row)["a"], (table | row)["b"]), row.get("errors", {}).get(task)
                what = (row["protocol"], row.get("variant", ""), task, value, error, table["unit"], setting)
                entries.append(Entry(source, about, *models, *what))
    return found["metrics"], entries


def at(value: Any, task: str) -> Any:
    """A setting that may be given per task, "*" standing for the others."""
    return value.get(task, value.get("*")) if isinstance(value, dict) else value


# Set-ups: how it was in a run, in published.json's words ---------------------------------------------------------------


def prompts(run: Run, line: Mapping[str, Any]) -> str:
    local = ", questions from a local file" if line["task"] in run.config["data"] else ""
    ours = line["task"] in (*OWN, biographies.TASK)
    return ("this package's" if ours else "lm-evaluation-harness's") + local


def decoding(run: Run, line: Mapping[str, Any]) -> str:
    temperature, top_p = run.config["temperature"], run.config["top_p"]
    if line["metric"].startswith("acc"):
        return "likelihood of the choices"
    if temperature:
        return f"temperature {temperature:g}" + (f", p = {top_p:g}" if top_p < 1 else "")
    return "greedy" if line["task"] in (*OWN, biographies.TASK) else "the task's own, mostly greedy"


def layers(run: Run, line: Mapping[str, Any]) -> str:
    into = run.config.get("into") if line["protocol"] == "activation-w" else None
    where = f"k = {', '.join(map(str, run.config['k']))}, j = {run.config['j']}"
    return where if into is None else f"{where} (W into {into})"


def rounds(run: Run, line: Mapping[str, Any]) -> int:
    return run.config["rounds"] or {"debate": 2, "cipher": 3}[line["protocol"]]


def judge(run: Run, line: Mapping[str, Any]) -> str | None:
    if line["task"] != biographies.TASK or "judge" not in run.config:
        return None
    return run.config["judge"] or run.config["b"]


SPEAKING, DEBATES = ("message", "debate", "cipher"), ("debate", "cipher")
SETUP: dict[str, tuple[Sequence[str], Callable[[Run, Mapping[str, Any]], Any]]] = {
    "questions": ((), lambda run, line: line["n"]),
    "prompts": ((), prompts),
    "prompt format": ((), lambda run, line: "chat template" if run.config["chat"] else "raw text"),
    "few-shot examples": ((), lambda run, line: line.get("few_shot")),
    "metric": ((), lambda run, line: f"{line['metric']}, {line['filter']}".removesuffix(", none")),
    "judge": ((), judge),
    "decoding": (tuple(p for p in PROTOCOLS if p != "cipher"), decoding),
    "message tokens": (SPEAKING, lambda run, line: run.config["max_message_tokens"]),
    "agents": (DEBATES, lambda run, line: 2 + len(run.config["others"])),
    "rounds": (DEBATES, rounds),
    "temperatures": (("cipher",), lambda run, line: ", ".join(f"{t:g}" for t in run.config["temperatures"])),
    "layers": (GRAFTS, layers),
    "graft": (GRAFTS, lambda run, line: run.config["graft"]),
    "edited": (GRAFTS, lambda run, line: "all tokens" if run.config["where"] == "all" else "last token"),
    "A writes first": (GRAFTS, lambda run, line: f"{run.config['think']} tokens" if run.config["think"] else "nothing"),
}
"""What makes a number what it is -> the protocols it matters to (none: to all), and how it was in a run."""


def differences(
    run: Run, lines: Sequence[Mapping[str, Any]], entries: Sequence[Entry], metrics: Mapping[str, str]
) -> list[str]:
    """What differs between a run's lines on a task and published numbers for it, in words; at the end, what is not known.

    Where the published ones differ among each other, one like ours is enough."""
    found, unknown = [], []
    theirs = list(dict.fromkeys(e.pair for e in entries))
    if run.pair not in theirs:
        found.append(f"models: {run.pair} here, {listed(theirs)} there")
    for name, (protocols, ours) in SETUP.items():
        matters = lambda protocol, own=protocols: not own or protocol in own
        mine = [ours(run, line) for line in lines if matters(line["protocol"])]
        here = list(dict.fromkeys(metrics.get(str(x), str(x)) for x in mine if x is not None))
        told = [e.setting.get(name) for e in entries if matters(e.protocol)]
        there = list(dict.fromkeys(str(x) for x in told if x is not None))
        if here and there and not set(here) & set(there):
            found.append(f"{name}: {listed(here)} here, {listed(there)} there")
        if here and told and not there:
            unknown.append(name)
    return found + ([f"not said there: {', '.join(unknown)}"] if unknown else [])


def listed(texts: Sequence[str], most: int = 3) -> str:
    shown = " or ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown}, and {len(texts) - most} more"


# The report -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Commands, or what is set in columns."""

    text: str
    columns: bool = False


@dataclasses.dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """left: so many first columns are text; the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    file: str
    png: bytes
    text: str


Block = Heading | Code | Items | Table | Picture | str
"""A part of the report; a string is a paragraph."""

HOW_TO_READ = (
    "Values are per cent with 95 % intervals (bootstrap over the questions). “Above single” and “above it” are points of "
    "difference on the same questions, paired, with their intervals; p is by sign flips. Unparsed: answers in which the "
    "task's filter found nothing; cut: prompts that lost their first tokens. FLOPs and tokens (read + written) are means "
    "over questions, seconds are sums."
)


def report(paths: Sequence[Path], out: Path, console: rich.console.Console) -> None:
    """Reads the runs, writes the report and prints its tables.

    ValueError, OSError: `read_runs`'; OSError: `out` is a file or cannot be written.
    """
    if out.is_file():
        raise NotADirectoryError(f"{out} is a file: name a folder")
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
    found: Sequence[Run | Sweep], rows: Sequence[Row], metrics: Mapping[str, str], entries: Sequence[Entry]
) -> Iterator[Block]:
    """The runs; then for every pair and task its results, the published ones, how they differ, and a picture; sweeps."""
    yield Heading(1, "What was run, and what was published")
    yield Heading(2, "Runs")
    yield Table(("run", "folder", "models", "device", "versions"), [about_run(run) for run in found], left=5)
    yield Code("\n".join(f"# {run.name}\n{run.command}" for run in found))
    if rows:
        yield HOW_TO_READ
    for number, (pair, own) in enumerate(grouped(rows, lambda row: row.run.pair).items(), 1):
        yield Heading(2, pair)
        for task, those in grouped(own, lambda row: row.line["task"]).items():
            yield Heading(3, task)
            yield results(those)
            yield from notes(those)
            yield from published(those, [e for e in entries if e.task == task], metrics)
            yield from picture(f"pair{number}-{re.sub(r'[^A-Za-z0-9_.-]', '-', task)}.png", f"{pair}, {task}", those)
    for sweep in found:
        if isinstance(sweep, Sweep):
            yield Heading(2, f"{sweep.config['a']} → {sweep.config['b']}, layer sweep, {sweep.name}")
            yield f"The sweep's own report ({sweep.path / 'report.txt'}); its pictures are in {sweep.path / 'sweep.html'}."
            yield Code(sweep.text.strip("\n"), columns=True)


def grouped(things: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """In the order in which groups first appear."""
    groups: dict[K, list[T]] = {}
    for thing in things:
        groups.setdefault(by(thing), []).append(thing)
    return groups


def about_run(run: Run | Sweep) -> tuple[str, ...]:
    models = run.pair if isinstance(run, Run) else f"{run.config['a']} → {run.config['b']}, sweep"
    count, device = run.config.get("devices", 1), run.config.get("device", "not recorded")
    versions = ", ".join(f"{name} {run.config[name]}" for name in VERSIONS if name in run.config)
    return run.name, str(run.path), models, device if count == 1 else f"{count} x {device}", versions


def results(rows: Sequence[Row]) -> Table:
    """One task between one pair; runs, and metrics with their filters, are named where there are several."""
    run = lambda row: row.run.name
    metric = lambda row: SETUP["metric"][1](row.run, row.line)
    names = [(name, of) for name, of in (("run", run), ("metric", metric)) if len({of(row) for row in rows}) > 1]
    columns = (
        *(name for name, _ in names), "protocol", "value", "n", "above single", "p", "best control", "above it", "p",
        "unparsed", "cut", "MFLOPs", "tokens", "seconds",
    )  # fmt: skip
    order = [metric(row) for row in rows]
    ordered = sorted(rows, key=lambda row: order.index(metric(row)))
    return Table(columns, [(*(of(row) for _, of in names), *cells(row)) for row in ordered], left=len(names) + 1)


def cells(row: Row) -> tuple[str, ...]:
    line = row.line
    single = told(row.single)
    if row.single is None and all(other["protocol"] != "single" for other in row.run.lines):
        single = "single was not run", ""
    best = "no control was run" if row.protocol in GRAFTS else ""
    if any(other["protocol"].startswith(f"{row.protocol}, ") for other in row.run.lines):
        best = "none scored"
    if row.best is not None:
        name = row.best["protocol"].removeprefix(f"{row.protocol}, ")
        best = f"{name} {score(row.best['value'], interval(row.best))}"
    tokens = f"{line['tokens_read']:.0f} + {line['tokens_written'] + line['message_tokens']:.0f}"
    return (
        row.protocol, score(line["value"], interval(row.line)), str(line["n"]), *single, best, *told(row.control),
        str(line["unparsed"]), str(line["truncated"]), f"{line['flops'] / 1e6:.0f}", tokens, f"{line['seconds']:.1f}",
    )  # fmt: skip


def score(x: float | None, interval: Interval | None) -> str:
    """Per cent; a number as it is where it has no interval."""
    if interval is None:
        return "none scored" if x is None else f"{x:.4g} (no interval)"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def told(found: Above | None) -> tuple[str, str]:
    """Points with their interval, and p."""
    if found is None:
        return "", ""
    x = found.points
    return f"{100 * x.value:+.1f} [{100 * x.low:+.1f}, {100 * x.high:+.1f}]", f"{found.p:.4f}"


def notes(rows: Sequence[Row]) -> Iterator[Block]:
    """What the numbers of a table do not say by themselves."""
    if any(interval(row.line) is None and row.line["value"] is not None for row in rows):
        yield "No interval and no pairing: the metric is not a mean over questions."
    fewer = [row for row in rows if row.single is not None and row.single.pairs < row.line["n"]]
    if fewer:
        least = min(row.single.pairs for row in fewer if row.single is not None)
        yield f"Not every question has a score under every protocol: differences are over {least} to {fewer[0].line['n']} questions."
    means = [(row.line["value"], row.run.scores.get(key(row.line))) for row in rows if interval(row.line) is not None]
    if any(own and abs(x - float(np.mean(list(own.values())))) > 1e-9 for x, own in means):
        yield "Values are over all that was scored, differences are means over questions: they need not add up."


def published(rows: Sequence[Row], entries: Sequence[Entry], metrics: Mapping[str, str]) -> Iterator[Block]:
    """Our values and every published one of the task, protocol by protocol, and how the set-ups differ."""
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
    yield "Published on this task, per cent where not said otherwise, beside what was measured here:"
    yield Table(("source", "models", *columns, *others), table, left=2)
    yield "How the set-ups differ:"
    yield Items(list(set_ups(rows, entries, metrics)))


def set_ups(rows: Sequence[Row], entries: Sequence[Entry], metrics: Mapping[str, str]) -> Iterator[str]:
    """For every published table, what differs; run by run where the runs differ in it."""
    runs = grouped(rows, lambda row: row.run.name)
    for source, own in grouped(entries, lambda e: e.source).items():
        said: dict[str, list[str]] = {}
        for name, those in runs.items():
            found = differences(those[0].run, [row.line for row in those], own, metrics)
            said.setdefault("; ".join(found) or "nothing that is recorded", []).append(name)
        parts = [text if len(said) == 1 else f"{', '.join(names)}: {text}" for text, names in said.items()]
        yield f"{source} ({own[0].about}): {'. '.join(parts)}."


def picture(file: str, title: str, rows: Sequence[Row]) -> Iterator[Picture]:
    """Accuracy against compute, a panel for every metric that has intervals."""
    several = len({row.run.name for row in rows}) > 1
    panels: dict[str, list[figures.Cost]] = {}
    for row in rows:
        measured = interval(row.line)
        if measured is not None and row.line["flops"] > 0:
            name = f"{row.protocol} ({row.run.name})" if several else row.protocol
            metric = SETUP["metric"][1](row.run, row.line)
            cost = figures.Cost(name, row.line["flops"], *measured, control=", " in row.protocol)
            panels.setdefault(f"{row.line['task']}, {metric}", []).append(cost)
    if panels:
        yield Picture(file, figures.costs(panels, label="%, with 95 % intervals"), f"Accuracy against compute: {title}")


# Its forms ------------------------------------------------------------------------------------------------------------


def markdown(blocks: Iterable[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {plain(text)}")
            case Code(text):
                parts.append(f"```\n{text}\n```")
            case Items(texts):
                parts.append("\n".join(f"- {plain(text)}" for text in texts))
            case Table(columns, rows, left):
                rule = [":--" if n < left else "--:" for n in range(len(columns))]
                lines = [[plain(cell) for cell in columns], rule, *([plain(cell) for cell in row] for row in rows)]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            case Picture(file, _, text):
                parts.append(f"![{plain(text)}]({file})")
            case str():
                parts.append(plain(block))
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text as Markdown, which reads marks and tags, shows it unchanged."""
    return re.sub(r"([\\`*|])", r"\\\1", html.escape(text, quote=False)).replace("\n", "<br>")


STYLE = (
    figures.STYLE
    + """
body { max-width: 1320px }
h2 { margin-top: 2em; padding-top: .4em; border-top: 1px solid #ccc }
pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 12px 0 }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35 }
th, td { padding: 4px 9px; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
td { font-variant-numeric: tabular-nums }
td.number { white-space: nowrap }
th { vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid #888 }
.text { text-align: left }
td.text:nth-child(-n+2) { min-width: 5em }
tr.here td { background: #f2f6fb }
img { max-width: 100%; height: auto }
li { margin: 4px 0; font-size: 13px }
"""
)


def page(title: str, blocks: Iterable[Block]) -> str:
    """One page that needs nothing but itself."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Code(text, columns):
                parts.append(f"<pre{'' if columns else ' class=wrapped'}>{html.escape(text)}</pre>")
            case Items(texts):
                parts += ["<ul>", *(f"<li>{html.escape(text)}</li>" for text in texts), "</ul>"]
            case Table():
                parts.append(html_table(block))
            case Picture(_, png, text):
                data = base64.b64encode(png).decode()
                parts.append(f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>')
            case str():
                parts.append(f"<p>{html.escape(block)}</p>")
    return figures.document(title, STYLE, parts)


def html_table(table: Table) -> str:
    side = lambda n: "text" if n < table.left else "number"
    lined = lambda text: html.escape(text).replace("\n", "<br>")
    head = "".join(f'<th class="{side(n)}">{html.escape(name)}</th>' for n, name in enumerate(table.columns))
    lines = [f"<tr>{head}</tr>"]
    for row in table.rows:
        own = "".join(f'<td class="{side(n)}">{lined(cell)}</td>' for n, cell in enumerate(row))
        lines.append(f'<tr class="here">{own}</tr>' if row[0].startswith("here, ") else f"<tr>{own}</tr>")
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def show(blocks: Iterable[Block], console: rich.console.Console) -> None:
    """Prints all but the pictures."""
    say = lambda text, **how: console.print(text, markup=False, highlight=False, emoji=False, **how)
    for block in blocks:
        match block:
            case Heading(level, text):
                say(f"\n{text}", style="bold" if level < 3 else "bold italic")
            case Code(text):
                say(text, soft_wrap=True)
            case Items(texts):
                say("\n".join(f"- {text}" for text in texts))
            case Table(columns, rows, left):
                table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
                for n, name in enumerate(columns):
                    table.add_column(rich.text.Text(name), justify="left" if n < left else "right")
                for row in rows:
                    table.add_row(*(rich.text.Text(cell) for cell in row))
                console.print(table)
            case str():
                say(block)


def tidy(rows: Sequence[Row], entries: Sequence[Entry]) -> str:
    """CSV; accuracies are shares. as_published: the number as its source prints it."""
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
    """A row of `tidy`."""
    config = row.run.config
    who = {"a": config["a"], "b": config["b"], "others": " ".join(config["others"])}
    line = {"kind": "run", "source": str(row.run.path)} | who | {"variant": ""} | dict(row.line)
    for name, found in (("above_single", row.single), ("above_control", row.control)):
        value, low, high = found.points if found else (None, None, None)
        line |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_p": found and found.p}
        line |= {f"{name}_pairs": found and found.pairs}
    best = row.best or {}
    line |= {"best_control": best.get("protocol"), "best_control_value": best.get("value")}
    return line | {"best_control_low": best.get("low"), "best_control_high": best.get("high")}
