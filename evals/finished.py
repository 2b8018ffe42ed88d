"""Read finished runs: their result lines, their scores per question, and comparisons within a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .effects import Effect, effect
from .scores import Interval

NEEDED = (
    "protocol", "task", "metric", "filter", "value", "low", "high", "n", "unparsed", "flops", "tokens_read",
    "tokens_written", "message_tokens", "seconds", "truncated",
)  # fmt: skip
"""Required keys of a line of results.jsonl."""
CONFIG = (
    "a", "b", "others", "data", "chat", "temperature", "top_p", "max_message_tokens", "rounds", "temperatures", "k", "j",
    "graft", "where", "think",
)  # fmt: skip
"""Required keys of run.json's config."""

Key = tuple[str, str, str, str]
"""protocol, task, metric, filter"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of `jaxcomm eval`.

    Attributes:
        name: Its name in the report, such as "run 1".
        path: Its folder.
        command: The command line that runs it again.
        config: The config in run.json.
        lines: The lines of results.jsonl.
        scores: The score of each question, for the metrics that have one number per question.
    """

    name: str
    path: Path
    command: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    scores: Mapping[Key, Mapping[int, float]]

    @property
    def pair(self) -> str:
        """Names of the senders and the receiver."""
        return f"{' + '.join((self.config['a'], *self.config['others']))} → {self.config['b']}"


@dataclasses.dataclass(frozen=True)
class FinishedSweep:
    """A finished run of `jaxcomm sweep`, with its own report.

    Attributes:
        name: Its name in the report, such as "run 1".
        path: Its folder.
        command: The command line that runs it again.
        config: The config in run.json.
        text: Its report.
    """

    name: str
    path: Path
    command: str
    config: Mapping[str, Any]
    text: str


def read_runs(paths: Sequence[Path]) -> list[Run | FinishedSweep]:
    """Reads run folders. They are named "run 1", "run 2" and so on.

    Args:
        paths: The folders.

    Returns:
        The runs, in the same order.

    Raises:
        ValueError: No folder is given, or one is given twice; a folder is not a finished run, or is damaged.
        FileNotFoundError: A folder does not exist.
    """
    if not paths:
        raise ValueError("name at least one run folder: jaxcomm report RUN... --out FOLDER")
    places = [path.resolve() for path in paths]
    if twice := [path for n, path in enumerate(paths) if places[n] in places[:n]]:
        raise ValueError(f"{twice[0]} is named twice")
    return [read_run(f"run {n}", path) for n, path in enumerate(paths, 1)]


def read_run(name: str, path: Path) -> Run | FinishedSweep:
    """Reads a run folder.

    Args:
        name: Name of the run in the report.
        path: The folder.

    Returns:
        The run.

    Raises:
        ValueError: It is not a run folder, the run is not finished, or a file is damaged. The message says which.
        FileNotFoundError: The folder does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    record = path / "run.json"
    if not record.is_file():
        raise ValueError(f"{path} is no run folder: it has no run.json, which jaxcomm eval and jaxcomm sweep write")
    kept = read_json(record, record.read_bytes(), ("command", "config"))
    command, config = kept["command"], kept["config"]
    if "games" in config:
        check_finished(path, command, "results.parquet", "report.txt")
        return FinishedSweep(name, path, command, config, (path / "report.txt").read_text(encoding="utf-8"))
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
    """Parses a JSON object that must have certain keys.

    Args:
        where: Description of the text, for error messages.
        text: The text.
        needed: The keys.
        mend: How to repair it if it is damaged, for error messages.

    Returns:
        The object.

    Raises:
        ValueError: It is not a JSON object, or lacks a key.
    """
    try:
        found = json.loads(text)
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"{where} is damaged: {error}{mend}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: no object{mend}")
    if lacking := [key for key in needed if key not in found]:
        raise ValueError(f"{where} is damaged: it has no {lacking[0]!r}{mend}")
    return found


def check_finished(path: Path, command: str, *files: str) -> None:
    """Checks that a run is finished.

    Args:
        path: The run folder.
        command: The command that runs it again, for messages.
        *files: Names of the files of a finished run.

    Raises:
        ValueError: A file is missing.
    """
    if missing := [name for name in files if not (path / name).is_file()]:
        raise ValueError(f"{path} is not finished (no {missing[0]}): go on with {command} --resume")


def read_scores(path: Path) -> dict[Key, dict[int, float]]:
    """Reads the score of each question from items.parquet.

    Args:
        path: The file.

    Returns:
        The scores, by (protocol, task, metric, filter) and number of the question. Metrics that are not numbers are left
        out.

    Raises:
        pyarrow.ArrowException: The file is damaged.
        OSError: The file is damaged, or cannot be read.
        ValueError: The file is damaged.
        KeyError: The file is damaged.
        AttributeError: The file is damaged.
    """
    scores: dict[Key, dict[int, float]] = {}
    for row in pq.read_table(path, columns=["protocol", "task", "question", "filter", "metrics"]).to_pylist():
        for metric, score in json.loads(row["metrics"]).items():
            if isinstance(score, int | float) and score == score:
                key = row["protocol"], row["task"], metric, row["filter"]
                scores.setdefault(key, {})[row["question"]] = float(score)
    return scores


# Comparisons ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of results.jsonl with its comparisons. Each uses the questions that have a score under both protocols.

    Attributes:
        run: The run.
        line: The line.
        total: Gain over the protocol "single". None: the line is "single" or a control, "single" was not run, or the
            metric is not a mean over questions.
        presence: Gain of another question's message over no message. None: as for `total`, or the control "other" was
            not run.
        content: Gain of the own message over another question's. None: as for `presence`.
    """

    run: Run
    line: Mapping[str, Any]
    total: Effect | None
    presence: Effect | None
    content: Effect | None

    @property
    def parts(self) -> tuple[Effect | None, ...]:
        """Total, presence and content."""
        return self.total, self.presence, self.content

    @property
    def is_control(self) -> bool:
        """Whether a control replaces the protocol's messages."""
        return ", " in self.protocol

    @property
    def protocol(self) -> str:
        """Name of the protocol."""
        return self.line["protocol"]


def interval(line: Mapping[str, Any]) -> Interval | None:
    """Reads the interval of a line.

    Args:
        line: A line of results.jsonl.

    Returns:
        The value with its 95 % interval, as shares. None: the metric is not a mean over questions.
    """
    return None if line["low"] is None else Interval(line["value"], line["low"], line["high"])


def key(line: Mapping[str, Any]) -> Key:
    """The protocol, task, metric and filter of a line."""
    return line["protocol"], line["task"], line["metric"], line["filter"]


def above(run: Run, line: Mapping[str, Any], protocol: str, other: str) -> Effect | None:
    """Compares two protocols, question by question.

    Args:
        run: The run.
        line: A line with the task, metric and filter.
        protocol: Name of the first protocol.
        other: Name of the second.

    Returns:
        The gain of the first over the second. None: no question has a score under both.
    """
    ours, theirs = (run.scores.get((name, *key(line)[1:]), {}) for name in (protocol, other))
    both = sorted(set(ours) & set(theirs))
    return effect([ours[q] for q in both], [theirs[q] for q in both]) if both else None


def compare(run: Run) -> Iterator[Row]:
    """Compares every line of a run with the protocol "single", and with another question's message.

    Args:
        run: The run.

    Yields:
        One row for each line.
    """
    for line in run.lines:
        name = line["protocol"]
        if name == "single" or ", " in name:
            yield Row(run, line, None, None, None)
            continue
        other = f"{name}, other"
        yield Row(
            run,
            line,
            above(run, line, name, "single"),
            above(run, line, other, "single"),
            above(run, line, name, other),
        )
