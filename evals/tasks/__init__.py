"""Tasks of lm-evaluation-harness: its own tasks by name, with data from the hub or from local files, and our games."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import numpy as np

from ..files import json_lines
from ..games import GAMES, Game, Wording, countries, draw
from ..pair.text import statements

HERE = Path(__file__).parent
OWN = ("countries", "tip_sheets", "countries_choice", "statements")
"""The games as tasks: generated text, log-likelihood of given choices, and perplexity. A's prompt is the record's field
`prompt_a`, or else B's prompt."""
STATEMENTS_SEED = 3
PLAIN = Wording()


def records(name: str, seed: int, n: int | None, names: str) -> list[dict[str, Any]]:
    """Makes the records of our own tasks that are not games.

    Args:
        name: "countries_choice" or "statements".
        seed: Seed of the records.
        n: Number of records. None: 100.
        names: "seen" or "new" people.

    Returns:
        The records.
    """
    if name == "statements":
        each = (statements(game, STATEMENTS_SEED + seed) for game in GAMES)
        return [{"text": text} for _, *both in zip(range((n or 100) // 2 or 1), *each, strict=False) for text in both]
    every, rng = sorted({i.answer for i in countries(0)}), np.random.default_rng([seed, 5])
    found = []
    for item in draw("countries", seed, n, names=names).items:
        others = rng.choice([c for c in every if c != item.answer], 3, replace=False).tolist()
        choices = rng.permutation([item.answer, *others]).tolist()
        found.append(
            {
                "prompt_a": item.prompt_a,
                "prompt_b": item.prompt_b,
                "choices": choices,
                "answer": choices.index(item.answer),
            }
        )
    return found


def game_task(name: str, seed: int, n: int | None, names: str, wording: Wording) -> Any:
    """Makes a game into a task of lm-evaluation-harness. Its metrics are exact match and found match (`Game.named`).

    Args:
        name: A game, as for `games.draw`.
        seed: Seed of the items.
        n: Number of items. None: the game's own number.
        names: "seen" or "new" people and companies.
        wording: How the game is put to the agents.

    Returns:
        The task.

    Raises:
        ValueError: There is no such game, or its file is invalid.
        FileNotFoundError: There is no such file.
    """
    game = draw(name, seed, n, names=names)
    rows = [
        {"prompt_a": wording.told(game, item), "prompt_b": wording.asked(game, item), "answer": item.answer, "item": i}
        for i, item in enumerate(game.items)
    ]
    config = _config(HERE / f"{'countries' if 'file' in game.source else game.name}.yaml") | {"task": game.name}
    found = {"metric": "found_match", "aggregation": "mean", "higher_is_better": True}
    config |= {"metric_list": [*config["metric_list"], found], "process_results": functools.partial(_judge, game)}
    return _task(config, {"test": rows})


def _judge(game: Game, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    text, item = results[0], game.items[doc["item"]]
    return {
        "exact_match": float(text.strip() == item.answer),
        "found_match": float(game.named(text, item) == item.answer),
    }


def sample(name: str) -> Path:
    """Finds the package's made-up records of a task.

    Args:
        name: Name of the task.

    Returns:
        The file.

    Raises:
        ValueError: The task has no such records.
    """
    found = {path.stem: path for path in sorted((HERE / "sample").iterdir())}
    if name not in found:
        raise ValueError(f"{name} has no sample; there is one for {', '.join(found)}")
    return found[name]


def load_tasks(
    names: Sequence[str],
    data: Mapping[str, Path],
    *,
    seed: int,
    n: int | None,
    group: str = "seen",
    wording: Wording = PLAIN,
) -> dict[str, dict[str, Any]]:
    """Loads tasks of lm-evaluation-harness and our own tasks.

    Args:
        names: Names of tasks; of groups, for all their tasks (`mmlu`: 57); or files FILE.jsonl with games of your own.
        data: Local records instead of the hub's, by task: a JSONL file with the questions (then there are no few-shot
            examples), or a folder with one file for each split.
        seed: Seed of our own tasks.
        n: Number of questions of our own tasks. None: their own number.
        group: "seen" or "new" people and companies of our own tasks.
        wording: How games are put to the agents.

    Returns:
        For each name, its tasks by their own names.

    Raises:
        ValueError: A task is unknown (similar names are suggested), its data cannot be reached, or a record lacks a
            field.
        FileNotFoundError: A file does not exist.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if odd := sorted(set(data) - set(names)):
        raise ValueError(f"--data names {odd[0]}, which is not among --tasks {','.join(names)}")
    found = {}
    for name in names:
        if (name in GAMES or name.endswith(".jsonl")) and name not in data:
            made = game_task(name, seed, n, group, wording)
            found[made.config.task] = {made.config.task: made}
        elif name in OWN and name not in data:
            found[name] = {name: _task(_config(HERE / f"{name}.yaml"), {"test": records(name, seed, n, group)})}
        elif name in data:
            found[name] = {name: _local(name, data[name])}
        else:
            found[name] = _from_hub(name)
    return found


def _config(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=True)


def _task(config: dict[str, Any], splits: Mapping[str, Sequence[dict[str, Any]]] | None = None) -> Any:
    """Make a task. splits: records in memory, instead of the data set's."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    if splits is not None:
        made = {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}
        config = config | {"custom_dataset": lambda **_: made}
    return ConfigurableTask(config=config)


def _find(name: str) -> Path | None:
    """The file of a task of the harness. Try the file of the same name first, since the index of all tasks takes seconds."""
    import lm_eval.tasks

    if name in OWN:
        return HERE / f"{name}.yaml"
    for path in Path(lm_eval.tasks.__file__).parent.rglob(f"{name}.yaml"):
        if _named(path) == name:
            return path
    return None


def _named(path: Path) -> str | None:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False).get("task")


def _from_hub(name: str) -> dict[str, Any]:
    path = _find(name)
    config = None if path is None else _config(path)
    try:
        if config is not None:
            return {name: _task(config)}
        definitions = _definitions()  # a name that is in none of them is not a task; the index takes ten times as long
        if name not in definitions or name not in _index().all_tasks:
            known = re.findall(r"""^[ -]*["']?(?:task|group|tag)["']?: *["']?([\w.+-]+)""", definitions, re.MULTILINE)
            near = difflib.get_close_matches(name, sorted({*known, *OWN}), n=3)
            raise ValueError(
                f"unknown task {name!r}" + (f": did you mean {', '.join(near)}?" if near else "; see lm-eval ls tasks")
            )
        return _index().load([name])["tasks"]
    except (OSError, ImportError) as error:  # datasets raises several error types, all of them OSErrors
        where = f"{config['dataset_path']}" if config else "its data set"
        fields = f" with the fields {', '.join(sorted(_fields(config)))}" if config else ""
        raise ValueError(
            f"task {name} needs {where} from the hub, which cannot be reached ({type(error).__name__}): give a local JSONL file{fields}: --data {name}=FILE"
        ) from error


@functools.cache
def _definitions() -> str:
    """The text of all files that define the harness' tasks."""
    import lm_eval.tasks

    paths = sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@functools.cache
def _index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _fields(config: Mapping[str, Any]) -> set[str]:
    """Names of the record fields that a task's templates use."""
    used = set()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        value = config.get(key)
        if isinstance(value, str):
            used |= jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(value))
            used |= {value} if value.isidentifier() else set()
    return used


def _local(name: str, path: Path) -> Any:
    found = _find(name)
    if found is None:
        raise ValueError(f"--data {name}: no single task has this name; give the data of each task of a group")
    config = _config(found)
    test = str(config.get("test_split") or config.get("validation_split"))
    splits = (
        {f.stem: read_records(f) for f in sorted(path.glob("*.jsonl"))} if path.is_dir() else {test: read_records(path)}
    )
    if test not in splits:
        raise ValueError(f"{path} has no {test}.jsonl: {name} asks the questions of that split")
    for rows in splits.values():
        for line, record in enumerate(rows, 1):
            if lacking := sorted(_fields(config) - set(record)):
                raise ValueError(
                    f"{path}: record {line} has no field {lacking[0]!r}; {name} needs {', '.join(sorted(_fields(config)))}"
                )
    if not path.is_dir():  # no few-shot examples, since they would be taken from the questions
        config |= {"num_fewshot": 0, "training_split": None, "fewshot_split": None, "fewshot_config": None}
    return _task(config, splits)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a JSONL file.

    Args:
        path: The file.

    Returns:
        The records, in the order of the file.

    Raises:
        ValueError: A line is not a JSON object. The message has its number.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a JSONL file, or a folder with one per split")
    return [record for _, record in json_lines(path)]
