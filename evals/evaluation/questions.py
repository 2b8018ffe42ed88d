"""The questions of an evaluation: tasks, their chosen questions, and people for biographies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import biographies
from ..games import Wording
from ..tasks import load_tasks
from .settings import EvalSettings

SUBSET = 6
"""Seed of the random subset of the questions, together with the run's seed."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions for every arm.

    Attributes:
        tasks: The tasks of lm-evaluation-harness, by name.
        groups: Names of the tasks of each requested group.
        chosen: Numbers of the chosen questions of each task. None: all questions.
        people: Facts about each person in the task of biographies.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]
    chosen: dict[str, list[int]] | None
    people: Mapping[str, Sequence[str]]


def read_questions(settings: EvalSettings) -> Questions:
    """Loads all questions.

    Args:
        settings: The settings of the evaluation.

    Returns:
        The tasks, their chosen questions, and the people of biographies.

    Raises:
        ValueError: A task is unknown or its data cannot be reached (`tasks.load_tasks`); the people of biographies are
            missing or invalid (`biographies.read_people`).
        FileNotFoundError: A file of data does not exist.
    """
    names = [name for name in settings.tasks if name != biographies.TASK]
    data = {name: path for name, path in settings.data.items() if name != biographies.TASK}
    wording = Wording(settings.wording, settings.instruction)
    how: dict[str, Any] = dict(seed=settings.seed, n=settings.n, group=settings.names, wording=wording)
    found = load_tasks(names, data, **how) if names else {}
    tasks = {name: task for own in found.values() for name, task in own.items()}
    groups = {name: list(own) for name, own in found.items() if list(own) != [name]}
    return Questions(tasks, groups, subset(tasks, settings.n, settings.seed), _people(settings))


def subset(tasks: Mapping[str, Any], n: int | None, seed: int) -> dict[str, list[int]] | None:
    """Chooses n random questions of every task.

    Args:
        tasks: The tasks, by name.
        n: Number of questions of each task. None: all.
        seed: Seed of the choice.

    Returns:
        The numbers of the chosen questions of each task, ascending. None: all questions.
    """
    if n is None:
        return None
    draw = lambda size: np.random.default_rng([seed, SUBSET]).permutation(size)[:n]
    return {name: sorted(draw(len(task.eval_docs)).tolist()) for name, task in tasks.items()}


def _people(settings: EvalSettings) -> dict[str, list[str]]:
    """The people for biographies: n from the file, drawn with the seed."""
    if biographies.TASK not in settings.tasks:
        return {}
    if biographies.TASK not in settings.data:
        raise ValueError("biographies needs people and facts: --data biographies=FILE.json, {name: bullets}")
    people = biographies.read_people(settings.data[biographies.TASK])
    order = np.random.default_rng([settings.seed, SUBSET]).permutation(len(people))[: settings.n]
    return {name: people[name] for name in (list(people)[i] for i in sorted(order))}
