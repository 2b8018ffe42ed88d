"""Customisation with little data: edges of a network against LoRA of the same size, everything else alike.

    chunks/ARM-RATE-SEED.parquet   of one finished training: losses, answers, seconds
    results.jsonl                  a line per arm: accuracy over the seeds on questions the rate was not chosen on
    report.txt, curves.png

Both learn the same texts in the same order, for as many steps, with as many numbers (LoRA's rank is the nearest), and each
with its own best learning rate, chosen on half of the questions and reported on the other half.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.table

from jaxcomm import lmnet, lora
from jaxcomm.agent import Agent

from ..files import write_lines
from ..runs import RunFolder, agent_fingerprint, surroundings
from ..scores import Interval, accuracy, exact_match, over_seeds
from .folders import build, identity
from .settings import Recipe, Shape, pick
from .texts import QUESTIONS, source
from .training import check, train
from .trials import Done, answers, asked_by, best, print_table, shown

EDGES, LORA, ALONE, NEW = "edges", "LoRA", "vertex alone", "network, new"
ARMS = {ALONE: False, NEW: False, LORA: True, EDGES: True}
"""Whether it is trained."""


def run(command: Any, agents: Sequence[Agent], *, words: str) -> list[dict[str, Any]]:
    """Compares the edges of a network with LoRA: trains and asks what is not done yet in the folder, and reports.

    Args:
        command: The settings (`evals.commands.lmnet.Compare`).
        agents: The vertices: one that all share, or one for each. LoRA adapts the last one.
        words: The command that runs it again.

    Returns:
        The lines of results.jsonl.

    Raises:
        ValueError: A setting, a text or the shape of the network is not as it should be (`texts.source`,
            `folders.build`), or the folder holds another run.
        OSError: A file does not exist, or the folder cannot be written.
    """
    shape, recipe, agent = pick(Shape, command), pick(Recipe, command), agents[-1]
    rates = command.learning_rates or (command.learning_rate,)
    if command.seeds < 2:
        raise ValueError(f"seeds = {command.seeds}: an interval over seeds needs at least 2")
    if command.questions < 1:
        raise ValueError(f"questions = {command.questions}: it must be at least 1")
    recipes = {rate: dataclasses.replace(recipe, learning_rate=rate) for rate in rates}
    purpose = "be tested on: name a file with --test"
    asked = asked_by(command, QUESTIONS, purpose)[: 2 * command.questions]
    wires = jax.eval_shape(lambda: build(shape, agents).split()[0])
    check(recipe, wires, min(a.params.config.max_positions for a in agents))
    rank = lora.rank_of_size(agent.single, lmnet.size(wires))
    config = identity(command) | {"rank": rank, "fingerprints": [agent_fingerprint(a) for a in agents]}
    config |= surroundings("optax")
    with RunFolder(command.out, config, dict, command=words, resume=command.resume, free=("every",)) as folder:
        sizes, done = {ALONE: 0, NEW: 0}, {}
        for arm, rate, seed in itertools.product(ARMS, rates, range(command.seeds)):
            if not ARMS[arm] and (rate != rates[0] or (arm == ALONE and seed)):
                continue
            name = f"{arm}-{rate:g}-{seed}".replace(" ", "_").replace(",", "")
            trained, frozen = _begin(arm, shape, agents, rank, seed)
            sizes[arm] = lmnet.size(trained) if ARMS[arm] else 0
            if not folder.done(name):
                clock, losses, model = time.perf_counter(), [], trained.join(frozen)
                if ARMS[arm]:
                    texts = source(command.text, agent, recipe.columns, n=command.examples, seed=seed)
                    try:
                        model = train(trained, frozen, texts, recipes[rate], title=name, losses=losses).trained.join(
                            frozen
                        )
                    except FloatingPointError as error:
                        print(f"{name}: {error}")
                        model = None
                seconds = time.perf_counter() - clock
                # At a rate that diverges nothing is answered.
                said = answers(dataclasses.replace(agent, params=model), asked) if model else [""] * len(asked)
                hits = [exact_match(text, q.answer) for text, q in zip(said, asked, strict=True)]
                folder.write(name, {"said": [said], "hits": [hits], "losses": [losses], "seconds": [seconds]})
            (done[arm, rate, seed],) = folder.read(name).to_pylist()
        lines = summary(done, sizes, len(asked) // 2, rank)
        write_lines(folder.path / "results.jsonl", lines)
        report(folder, lines, done, agents, shape, len(asked) // 2)
        return lines


def _begin(arm: str, shape: Shape, agents: Sequence[Agent], rank: int, seed: int) -> tuple[Any, Any]:
    """What is trained and what is not, as `jaxcomm.training` says."""
    if arm in (EDGES, NEW):
        return build(dataclasses.replace(shape, network_seed=shape.network_seed + seed), agents).split()
    return lora.init_lora(jax.random.key(seed), agents[-1].single, rank), agents[-1].single


def summary(done: Done, sizes: Mapping[str, int], n: int, rank: int) -> list[dict[str, Any]]:
    """Summarises the comparison, one line for each arm at its best learning rate.

    The learning rate is chosen on the first half of the questions; accuracy is reported on the second half.

    Args:
        done: The finished trainings, by arm, learning rate and seed.
        sizes: Number of trained numbers of each arm.
        n: Number of questions in the first half.
        rank: Rank of LoRA.

    Returns:
        The lines of results.jsonl. accuracy is the mean over the seeds, as a share; low and high are its 95 % interval
        over the seeds (over the questions if there is only one seed). The last line is the difference between edges and
        LoRA, paired by seed.
    """
    lines, values = [], {}
    for arm, trained in ARMS.items():
        runs, chosen, took = best(done, arm, trained, lambda row: row["hits"][:n])
        hits = np.array([row["hits"][n:] for row in runs], float)
        values[arm] = hits.mean(axis=1)
        interval = over_seeds(values[arm]) if len(hits) > 1 else accuracy(hits[0])
        lines.append(
            {"arm": arm, "numbers": sizes[arm], "rank": rank if arm == LORA else None}
            | chosen
            | dict(zip(("accuracy", "low", "high"), interval, strict=True))
            | {"each": values[arm].tolist()}
            | took
        )
    less = over_seeds(values[EDGES] - values[LORA])
    lines.append(
        {
            "arm": f"{EDGES} - {LORA}",
            "seeds": len(values[LORA]),
            **dict(zip(("accuracy", "low", "high"), less, strict=True)),
        }
    )
    return lines


def report(
    folder: RunFolder, lines: Sequence[Mapping[str, Any]], done: Done, agents: Sequence[Agent], shape: Shape, n: int
) -> None:
    """Prints the table of the comparison, and writes report.txt and curves.png.

    Args:
        folder: The run folder.
        lines: The lines of results.jsonl.
        done: The finished trainings, by arm, learning rate and seed.
        agents: The vertices.
        shape: The shape of the network.
        n: Number of questions that are reported.
    """
    widths = "-".join(map(str, shape.widths))
    table = rich.table.Table(
        title=f"{', '.join(a.name for a in agents)}: {widths}, {shape.edge} edges; {n} questions", title_justify="left"
    )
    for name in ("", "trained numbers", "rate", "loss, last 20 steps", "exact match, % [95 %]", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for line in lines:
        percent = Interval(*(100 * line[key] for key in ("accuracy", "low", "high")))
        name = f"{line['arm']}, rank {line['rank']}" if line.get("rank") else line["arm"]
        table.add_row(
            name, shown(line.get("numbers"), ",d"), shown(line.get("learning_rate"), "g"), shown(line.get("loss"), ".3f"),
            f"{percent.value:.1f} [{percent.low:.1f}, {percent.high:.1f}]", shown(line.get("seconds"), ".0f"),
        )  # fmt: skip
    note = (
        f"Mean and interval over {lines[-1]['seeds']} seeds (of {ALONE}: over the questions), at the learning rate that was best on {n} other "
        "questions. The last line is paired by seed."
    )
    print_table(folder, table, note, 120)
    folder.put("curves.png", curves(lines, done))
    print(f"{folder.path}: run.json, results.jsonl, report.txt, curves.png")


def curves(lines: Sequence[Mapping[str, Any]], done: Done, window: int = 20) -> bytes:
    """Draws the loss of edges and of LoRA against the step, smoothed over `window` steps.

    Thin lines are single seeds; the thick line is their mean.

    Args:
        lines: The lines of results.jsonl.
        done: The finished trainings, by arm, learning rate and seed.
        window: Largest number of steps in a running mean.

    Returns:
        The bytes of a PNG. The loss is in nats per token, on a logarithmic axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axis = figure.add_subplot()
    for color, line in zip(("#b8862b", "#1f5fa8"), [line for line in lines if line.get("learning_rate")], strict=True):
        own = [
            row["losses"]
            for (arm, rate, _), row in sorted(done.items(), key=lambda x: x[0])
            if (arm, rate) == (line["arm"], line["learning_rate"])
        ]
        shortest = min(map(len, own))  # one that diverged has fewer
        if not shortest:
            continue
        wide = min(window, shortest)
        smooth = [np.convolve(losses, np.ones(wide) / wide, "valid") for losses in own]
        steps = np.arange(shortest - wide + 1) + wide
        for one in smooth:
            axis.plot(np.arange(len(one)) + wide, one, color=color, linewidth=0.6, alpha=0.5)
        axis.plot(
            steps,
            np.mean([one[: len(steps)] for one in smooth], axis=0),
            color=color,
            linewidth=2,
            label=f"{line['arm']}, {line['numbers']:,} numbers, rate {line['learning_rate']:g}",
        )
    axis.set(xlabel="step", ylabel=f"loss, nats a token (mean of {window} steps)", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
