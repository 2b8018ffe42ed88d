"""Compute the chunks of a sweep, and save them as tables with one row per cell and question."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import pyarrow as pa
import tqdm

from jaxcomm.layer_sweep import Chunk

from .. import processes
from ..runs import RunFolder
from .grid import right, texts
from .parts import GameSweep, Job

T = TypeVar("T")


def columns(sweep: GameSweep, job: Job, chunk: Chunk, result: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns a finished chunk into a table.

    Args:
        sweep: The sweep.
        job: The job of the chunk.
        chunk: The chunk: a range of cells and a range of games.
        result: Arrays [cells, games, ..] of the chunk (`Job.run`).

    Returns:
        The columns of the table, by name. It has one row for each cell and question.
    """
    plan, part, games = job.plan, job.part, list(chunk.games)
    questions = part.questions[games]
    g, k, j = np.repeat(plan.grid.cells[chunk.cells.start : chunk.cells.stop], len(games), axis=0).T
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    rows = {
        "game": pa.array([part.game] * len(g)),
        "sender_reads": pa.array([sweep.settings.wording.reads] * len(g)),
        "graft": pa.array([f if isinstance(f, str) else "none" for f in (plan.grid.grafts[n] for n in g)]),
        "k": pa.array(np.array(plan.grid.ks, np.int32)[k]),
        "j": pa.array(np.array(plan.grid.js, np.int32)[j]),
        "question": pa.array(np.tile(questions.astype(np.int32), len(chunk.cells))),
    }
    logprobs = flat(result["logprobs"])
    if plan.answers is not None:
        answers, ends = plan.answers
        used = ((answers >= 0) | ends)[np.tile(games, len(chunk.cells))]
        rows["exact"] = pa.array(flat(result["exact"]))
        rows["logprob"] = pa.array(logprobs.sum(axis=-1))
        rows["token_logprobs"] = pa.array(
            [row[u].tolist() for row, u in zip(logprobs, used, strict=True)], pa.list_(pa.float32())
        )
        return rows
    tokens = flat(result["tokens"])
    said = texts(sweep.b, result["tokens"])
    written = tokens >= 0
    rows["text"] = pa.array(flat(said).tolist())
    for name, metric in (("hit", "exact"), ("found", "found")):
        rows[name] = pa.array(flat(right(said, sweep.games[part.game], questions, metric)))
    rows["tokens"] = pa.array([row[w].tolist() for row, w in zip(tokens, written, strict=True)], pa.list_(pa.int32()))
    rows["token_logprobs"] = pa.array(
        [row[w].tolist() for row, w in zip(logprobs, written, strict=True)], pa.list_(pa.float32())
    )
    return rows


@functools.cache
def _compiling() -> list[float]:
    """Seconds that this process has spent compiling since the first call, in a list with one element."""
    spent = [0.0]

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        spent[0] += duration_secs * event.startswith("/jax/core/compile")

    jax.monitoring.register_event_duration_secs_listener(add)
    return spent


def compute(folder: RunFolder, sweep: GameSweep, jobs: Sequence[Job]) -> dict[str, float]:
    """Computes the unfinished chunks of this process's share.

    A bar shows the time left: the work left at the median speed of this process's chunks of the same kind, without
    compiling. The bar shows "?" until every kind has a finished chunk.

    Args:
        folder: The run folder.
        sweep: The sweep.
        jobs: The jobs of the sweep.

    Returns:
        Seconds of this computation without compiling, by the kind of message that B got (`Part.message`).

    Raises:
        OSError: A chunk cannot be written.
    """
    every = [(job, i, chunk) for job in jobs for i, chunk in enumerate(job.chunks)]
    work = {job.name(i): job.plan.work(chunk) for job, i, chunk in every}
    todo = processes.mine([(job, i, chunk) for job, i, chunk in every if not folder.done(job.name(i))])
    left, paces, compiling = collections.Counter(), collections.defaultdict(list), _compiling()
    took: dict[str, float] = collections.defaultdict(float)
    for job, i, _ in todo:
        left[job.part.kind] += work[job.name(i)]
    bar = tqdm.tqdm(
        total=len(every),
        initial=len(every) - len(todo),
        disable=not processes.first(),
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} chunks{postfix}",
    )
    with bar:
        for job, i, chunk in todo:
            name, kind = job.name(i), job.part.kind
            bar.set_description(f"{job.part.game}, {kind}{'' if job.part.message == 'own' else ', control'}")
            start, compiled = time.perf_counter(), compiling[0]
            result = job.run(chunk)
            seconds = time.perf_counter() - start - (compiling[0] - compiled)
            took[job.part.message] += seconds
            folder.write(name, columns(sweep, job, chunk, result))
            left[kind] -= work[name]
            paces[kind].append(seconds / work[name])
            known = all(paces[kind] for kind in +left)
            still = sum(left[kind] * float(np.median(paces[kind])) for kind in +left if known)
            bar.set_postfix_str(f"{tqdm.tqdm.format_interval(still) if known else '?'} left", refresh=False)
            bar.update()
    return dict(took)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Runs a function, and measures its seconds without compiling.

    Args:
        work: The function.

    Returns:
        Its result, and the seconds.
    """
    compiling, start = _compiling(), time.perf_counter()
    compiled = compiling[0]
    made = work()
    return made, time.perf_counter() - start - (compiling[0] - compiled)
