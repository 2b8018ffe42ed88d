"""Run an evaluation in a run folder, from its settings to its result lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from ..runs import RunFolder, agent_fingerprint, parquet, surroundings
from .arms import Team, arms
from .questions import Questions, read_questions
from .results import arm_results, biography_lines, biography_rows
from .settings import EvalSettings, check_layers


def run(
    settings: EvalSettings, team: Team, out: Path, *, resume: bool, command: str, recorded: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Asks every question under every protocol, in a run folder.

    Args:
        settings: The settings of the evaluation.
        team: The agents.
        out: The run folder.
        resume: Whether to resume the run in the folder.
        command: The command line that runs it again.
        recorded: Further facts that identify this run.

    Returns:
        The lines of results.jsonl.

    Raises:
        ValueError: The settings are inconsistent; the questions cannot be read (`read_questions`); an agent has no
            such layer; a prompt is too long for an agent; the folder holds another run; jaxcomm[eval] is not installed.
        OSError: A file does not exist, or the folder cannot be written.
    """
    try:
        from lm_eval.tasks import TaskManager

        from ..harness import Decoding, ProtocolLM, generation
    except ImportError as error:
        raise ValueError(
            f"evaluation needs the extra: pip install 'jaxcomm[eval]' ({error.name} is not installed)"
        ) from error
    every = list(arms(settings, team))
    check_layers(settings, team.senders, team.b)
    questions = read_questions(settings)
    _check_calibration(team, questions)
    config = _config(settings, team, recorded)
    decoding = Decoding(
        settings.seed, settings.batch_size, settings.max_new_tokens, settings.sampling, settings.truncate
    )
    for name, task in questions.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            generation(name, task.config.generation_kwargs or {}, decoding)
    # A control that uses other questions' messages takes them from the batch.
    free = () if any(arm.pooled for arm in every) else ("batch_size",)
    with RunFolder(out, config, dict, command=command, resume=resume, free=free) as folder:
        lines, rows = [], []
        manager = TaskManager(include_defaults=False)  # the index of all tasks takes seconds, once per protocol
        for arm in every:
            lm = ProtocolLM(arm, folder, decoding, questions.tasks)
            if questions.people:
                written = lm.biographies(questions.people, team.checker, settings.judge_by)
                lines += biography_lines(arm.name, written)
                rows += biography_rows(arm.name, written)
            if questions.tasks:
                scored = _scored(lm, questions, settings, task_manager=manager, apply_chat_template=team.b.chat)
                own_lines, own_rows = arm_results(lm, scored, questions, settings)
                lines += own_lines
                rows += own_rows
        folder.put("results.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        folder.put("items.parquet", parquet(pa.Table.from_pylist(rows)))
        return lines


def _check_calibration(team: Team, questions: Questions) -> None:
    """Raises ValueError if layers were chosen on questions that are asked."""
    known = {*team.calibrated}
    for name, task in questions.tasks.items() if known else ():
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
        if twice := [doc["prompt_a"] for doc in docs if doc.get("prompt_a") in known]:
            raise ValueError(
                f"{name}: {twice[0][:60]!r} is also a calibration item; layers would be chosen on what is reported: "
                "calibrate on other items (--calibration)"
            )


def _config(settings: EvalSettings, team: Team, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run, for its config."""
    files = {task: sorted(p.glob("*.jsonl")) if p.is_dir() else [p] for task, p in settings.data.items()}
    sha = lambda *parts: hashlib.sha256(b"".join(parts)).hexdigest()
    config = dataclasses.asdict(settings) | dict(recorded)
    config |= {"data": {task: sha(*(f.read_bytes() for f in own)) for task, own in files.items()}}
    if own := [sha(Path(name).read_bytes()) for name in settings.tasks if name.endswith(".jsonl")]:
        config |= {"games_sha256": own}
    kv = [] if team.kv_maps is None else [np.asarray(W).tobytes() for W in (team.kv_maps.k.W, team.kv_maps.v.W)]
    config |= {"kv_map": sha(*kv) if kv else None}
    config |= {"maps": None if team.maps is None else sha(*(np.asarray(W).tobytes() for W in team.maps))}
    if team.bridge is not None:
        config |= {"bridge_sha256": sha(*(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(team.bridge)))}
    agents = (team.a, team.b, *team.others, team.checker)
    prints = {id(agent): agent_fingerprint(agent) for agent in agents}
    return config | {"fingerprints": [prints[id(agent)] for agent in agents]} | surroundings("lm_eval")


def _scored(lm: Any, questions: Questions, settings: EvalSettings, **how: Any) -> Any:
    """Let the harness score an arm's answers."""
    from lm_eval.evaluator import simple_evaluate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return simple_evaluate(
            model=lm, tasks=list(questions.tasks.values()), samples=questions.chosen, num_fewshot=settings.few_shot,
            bootstrap_iters=0, fewshot_random_seed=1234 + settings.seed, **how,
        )  # fmt: skip
