"""Finished runs, read back: their lines, their scores question by question, and what compares within a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .scores import Interval, difference, sign_flip

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
