"""Published numbers (published.json), and differences between their set-ups and a run's.

published.json holds the numbers as our specifications report them. Its `setting`s use the names of `SETUP` and our words
where they exist. So two set-ups differ if their texts differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import biographies
from .evaluation.options import PROTOCOLS
from .finished import Run
from .tasks import OWN

PUBLISHED = Path(__file__).with_name("published.json")
GRAFTS = ("activation", "activation-w", "exchange")
"""Protocols whose numbers need controls."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published number.

    Attributes:
        source: Paper and table.
        about: Contents of the table, and where it is published.
        a: The sender.
        b: The receiver.
        protocol: Our name of the protocol. None: we have no such protocol.
        variant: What distinguishes it from other numbers of this protocol in the table.
        task: Name of the task.
        value: The number.
        error: Its published error. None: there is none.
        unit: Unit of the number, such as "%".
        setting: The set-up, by the names in `SETUP`. A value that is missing or None is not known.
        digits: Number of published digits after the decimal point.
    """

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
    digits: int = 1

    @property
    def pair(self) -> str:
        """Names of the sender and the receiver."""
        return f"{self.a} → {self.b}"

    @property
    def text(self) -> str:
        """The number as its source prints it, with its error."""
        return f"{self.value:.{self.digits}f}" + ("" if self.error is None else f" ± {self.error:.{self.digits}f}")

    @property
    def share(self) -> float:
        """The number as a share, if it is published in %; otherwise the number itself."""
        return round(self.value / 100, 6) if self.unit == "%" else self.value


def read_published() -> tuple[dict[str, str], list[Entry]]:
    """Reads the published numbers from published.json.

    Returns:
        The published name of each of our metrics ("metric, filter"), and the numbers.
    """
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
        digits = table.get("digits", 1 if table["unit"] == "%" else 2)
        for row in table["rows"]:
            for task, value in row["values"].items():
                setting = {k: at(v, task) for k, v in (table["setting"] | row.get("setting", {})).items()}
                models, error = ((table | row)["a"], (table | row)["b"]), row.get("errors", {}).get(task)
                what = (row["protocol"], row.get("variant", ""), task, value, error, table["unit"], setting, digits)
                entries.append(Entry(source, about, *models, *what))
    return found["metrics"], entries


def at(value: Any, task: str) -> Any:
    """Selects a setting for a task.

    Args:
        value: The setting. If it is a dict, it maps tasks to their settings, and "*" stands for all other tasks.
        task: Name of the task.

    Returns:
        The setting of this task.
    """
    return value.get(task, value.get("*")) if isinstance(value, dict) else value


# Set-ups: how it was in a run, in published.json's words ---------------------------------------------------------------


def prompts(run: Run, line: Mapping[str, Any]) -> str:
    """Source of the prompts of a line of a run, in the words of published.json."""
    local = ", questions from a local file" if line["task"] in run.config["data"] else ""
    ours = line["task"] in (*OWN, biographies.TASK)
    return ("this package's" if ours else "lm-evaluation-harness's") + local


def decoding(run: Run, line: Mapping[str, Any]) -> str:
    """How a line of a run was decoded, in the words of published.json."""
    temperature, top_p = run.config["temperature"], run.config["top_p"]
    if line["metric"].startswith("acc"):
        return "likelihood of the choices"
    if temperature:
        return f"temperature {temperature:g}" + (f", p = {top_p:g}" if top_p < 1 else "")
    return "greedy" if line["task"] in (*OWN, biographies.TASK) else "the task's own, mostly greedy"


def layers(run: Run, line: Mapping[str, Any]) -> str:
    """The layers k and j of a line of a run, in the words of published.json."""
    into = run.config.get("into") if line["protocol"] == "activation-w" else None
    where = f"k = {', '.join(map(str, run.config['k']))}, j = {run.config['j']}"
    return where if into is None else f"{where} (W into {into})"


def rounds(run: Run, line: Mapping[str, Any]) -> int:
    """The number of rounds of a debate in a run."""
    return run.config["rounds"] or {"debate": 2, "cipher": 3}[line["protocol"]]


def judge(run: Run, line: Mapping[str, Any]) -> str | None:
    """The judge of a run's biographies. None: the line is of another task, or the run did not record its judge."""
    if line["task"] != biographies.TASK or "judge" not in run.config:
        return None
    return run.config["judge"] or run.config["b"]


def seen(run: Run, line: Mapping[str, Any]) -> str:
    """Which layers of the receiver see a prefix in a run."""
    config = run.config
    if config.get("scheme"):
        return f"{config['ratio']:g} by {config['scheme']}"
    return ", ".join(map(str, config.get("layers") or ())) or "all"


def mask(run: Run, line: Mapping[str, Any]) -> str:
    """The attention mask of a run in layers that do not see the prefix."""
    return "KVComm's published" if run.config.get("published_mask") else "what comes before"


SPEAKING, DEBATES, PREFIXES = ("message", "debate", "cipher", "deltas"), ("debate", "cipher"), ("kv", "latent")
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
    "layers that see the prefix": (PREFIXES, seen),
    "mask": (PREFIXES, mask),
    "steps": (("latent", "thinking"), lambda run, line: run.config["steps"]),
    "delta layers": (("deltas",), lambda run, line: ", ".join(map(str, run.config["delta_layers"]))),
    "A writes first": (GRAFTS, lambda run, line: f"{run.config['think']} tokens" if run.config["think"] else "nothing"),
}
"""Name of each setting that affects a number -> the protocols that it matters to (none: all), and a function that reads
it from a run."""


def differences(
    run: Run, lines: Sequence[Mapping[str, Any]], entries: Sequence[Entry], metrics: Mapping[str, str]
) -> list[str]:
    """Lists the differences between a run's set-up and the set-ups of published numbers for the same task.

    If the published numbers differ in a setting, a run agrees with them if it agrees with one of them.

    Args:
        run: The run.
        lines: Its lines for the task.
        entries: The published numbers for the task.
        metrics: The published name of each of our metrics.

    Returns:
        The differences in words. The last one lists the settings that the sources do not give.
    """
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
    return found + ([f"not stated there: {', '.join(unknown)}"] if unknown else [])


def listed(texts: Sequence[str], most: int = 3) -> str:
    """Joins texts with "or". If there are more than `most`, the others are only counted.

    Args:
        texts: The texts.
        most: Largest number of texts that are written.

    Returns:
        One text.

    Example:
        >>> listed(["2", "3", "4", "5"])
        '2 or 3 or 4, and 1 more'
    """
    shown = " or ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown}, and {len(texts) - most} more"
