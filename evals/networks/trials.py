"""Common parts of comparisons of trained arms. Each arm is trained at several learning rates with several seeds. The rate is
chosen on the first half of the questions, and accuracy is reported on the other half."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from jaxcomm.agent import Agent
from jaxcomm.protocols.base import start_turn

from ..runs import RunFolder
from .texts import Text, questions

Run = Mapping[str, Any]
"""A finished training with its answers: the contents of a file in chunks/."""
Done = Mapping[tuple[str, float, int], Run]
"""By arm, learning rate and seed."""


def asked_by(command: Any, known: Mapping[str, Callable[..., Text]], purpose: str) -> list[Text]:
    """The test questions of a command: those of its `text` if that is `known`, else all of its file `test`. There must be at
    least twice as many as its `questions`.

    Raises:
        ValueError: There are no questions (the error names the `purpose`), too few, or they are invalid.
        OSError: The file does not exist.
    """
    n = 2 * command.questions
    if command.test is None:
        if command.text not in known:
            raise ValueError(f"{command.text} has no questions of its own to {purpose}")
        return [known[command.text](command.seeds, i, test=True) for i in range(n)]
    found = questions(str(command.test))
    if len(found) < n:
        raise ValueError(
            f"{command.test} has {len(found)} questions, twice {command.questions} are needed: lower --questions"
        )
    return found


def answers(agent: Agent, asked: Sequence[Text], rows: int = 50) -> list[str]:
    """Lets an agent answer questions, greedily.

    An answer may have as many tokens as the longest right answer, and one more to stop.

    Args:
        agent: The agent.
        asked: The questions, with their right answers.
        rows: Number of questions in a batch.

    Returns:
        The answers.
    """
    said, room = [], 1 + max(len(agent.follow(q.prompt, f" {q.answer}")) for q in asked)
    for at in range(0, len(asked), rows):
        turn = start_turn(agent, [q.prompt for q in asked[at : at + rows]])
        said += [reply.text for reply in turn.write(room)]
    return said


def best(done: Done, arm: str, trained: bool, right: Callable[[Run], Sequence[bool]]) -> tuple[list[Run], dict, dict]:
    """Choose the learning rate at which most answers of an arm are `right`. Returns its runs, one for each seed, and for
    results.jsonl the choice and the cost. An untrained arm has no rate."""
    at: dict[float, list[Run]] = {}
    for (kind, rate, _), run in sorted(done.items(), key=lambda x: x[0]):
        if kind == arm:
            at.setdefault(rate, []).append(run)
    rate = max(at, key=lambda rate: np.mean([right(run) for run in at[rate]]))
    runs, last = at[rate], [loss for run in at[rate] for loss in run["losses"][-20:]]
    chosen = {"learning_rate": rate if trained else None, "rates": [*at] if trained else [], "seeds": len(runs)}
    seconds = float(np.mean([run["seconds"] for run in runs])) if trained else None
    return runs, chosen, {"loss": float(np.mean(last)) if last else None, "seconds": seconds}


def shown(value: Any, form: str) -> str:
    """Format a number for a table; an empty text for a missing number."""
    return "" if value is None else format(value, form)


def print_table(folder: RunFolder, table: rich.table.Table, note: str, width: int) -> None:
    """Prints a table and a note on it, and writes both to report.txt."""
    sink = io.StringIO()
    for console in (
        rich.console.Console(width=None if sys.stdout.isatty() else width, emoji=False),
        rich.console.Console(file=sink, width=width, emoji=False),
    ):
        console.print(table)
        console.print(note)
    folder.put("report.txt", sink.getvalue().encode())
