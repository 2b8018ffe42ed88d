"""Customisation: compare a network's edges with LoRA of the same size, with further training of the same model, and with a
larger model from scratch.

    chunks/ARM-EXAMPLES-RATE-SEED.parquet   of one finished training: losses, answers, seconds
    results.jsonl                           a line per number of training texts and arm
    report.txt, curves.png, learning.png

All arms learn the same texts in the same order, for the same number of tokens or FLOPs as the edges. Each has its own best
learning rate, chosen on half of the questions and reported on the other half. Questions that the model could answer before
are asked again afterwards.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.table

from jaxcomm import lmnet
from jaxcomm.agent import Agent

from ..files import write_lines
from ..games import draw
from ..runs import RunFolder, agent_fingerprint, surroundings
from ..scores import Interval, accuracy, exact_match, over_seeds
from . import pictures
from .arms import ALONE, EDGES, LORA, Arm, Field, arms
from .folders import identity
from .settings import Recipe, Shape, pick
from .texts import QUESTIONS, Text, questions, source
from .training import check, train
from .trials import Done, answers, asked_by, best, print_table, shown

FREE = ("every", "arms", "equal", "examples", "learning_rate", "learning_rates", "seeds")
"""Settings that may differ when a comparison is resumed: each finished training keeps its own."""
Every = dict[int | None, Done]
"""Finished trainings, by number of training texts (None: all of the text)."""


def run(command: Any, agents: Sequence[Agent], *, words: str) -> list[dict[str, Any]]:
    """Compares a network's edges with other ways to train: trains and tests all unfinished arms, and reports.

    Args:
        command: The settings (`evals.commands.lmnet.Compare`).
        agents: The vertices: one that all share, or one for each. The last one is compared with the network.
        words: The command line that runs it again.

    Returns:
        The lines of results.jsonl.

    Raises:
        ValueError: A setting, a text or the shape of the network is invalid (`texts.source`,
            `folders.build`), or the folder holds another run.
        OSError: A file does not exist, or the folder cannot be written.
    """
    recipe, agent = pick(Recipe, command), agents[-1]
    rates, amounts = command.learning_rates or (command.learning_rate,), command.examples or (None,)
    check_command(command)
    recipes = {rate: dataclasses.replace(recipe, learning_rate=rate) for rate in rates}
    asked = asked_by(command, QUESTIONS, "be tested on: name a file with --test")[: 2 * command.questions]
    known, field = known_before(command), Field(pick(Shape, command), agents, recipe)
    check(recipe, field.wires, min(a.params.config.max_positions for a in agents))
    every = arms(command.arms, command.equal)
    config = identity(command) | {"rank": field.rank, "fingerprints": [agent_fingerprint(a) for a in agents]}
    config |= surroundings("optax")
    with RunFolder(command.out, config, dict, command=words, resume=command.resume, free=FREE) as folder:
        done: Every = {}
        for amount, arm, rate, seed in itertools.product(amounts, every, rates, range(command.seeds)):
            if arm.kind is None and (rate != rates[0] or amount != amounts[0] or (arm == ALONE and seed)):
                continue
            name = "-".join(map(str, (arm.name, "all" if amount is None else amount, f"{rate:g}", seed)))
            name = name.replace(" ", "_").replace(",", "")
            if not folder.done(name):
                texts = source(command.text, agent, recipe.columns, n=amount, seed=seed)
                folder.write(name, trial(field, arm, recipes[rate], seed, texts, (asked, known), name))
            (done.setdefault(amount, {})[arm.name, rate, seed],) = folder.read(name).to_pylist()  # pyright: ignore[reportIndexIssue]
        for amount in amounts:  # untrained arms do not depend on the number of training texts
            done[amount] = {key: row for key, row in done[amounts[0]].items() if key[0] in untrained(every)} | dict(
                done[amount]
            )
        lines = [line for amount in amounts for line in summary(done[amount], every, field, len(asked) // 2, amount)]
        write_lines(folder.path / "results.jsonl", lines)
        report(folder, lines, done, field, len(asked) // 2)
        return lines


def check_command(command: Any) -> None:
    """Raises ValueError for invalid settings of a comparison."""
    if command.seeds < 2:
        raise ValueError(f"seeds = {command.seeds}: an interval over seeds needs at least 2")
    if command.questions < 1:
        raise ValueError(f"questions = {command.questions}: it must be at least 1")
    for name in ("arms", "equal", "examples"):
        given = getattr(command, name)
        if len({*given}) < len(given) or (name == "equal" and not given):
            raise ValueError(f"--{name} {' '.join(map(str, given)) or 'none'}: name at least one, each once")
    if command.examples and min(command.examples) < 1:
        raise ValueError(f"--examples {min(command.examples)}: it must be at least 1")


def untrained(every: Sequence[Arm]) -> set[str]:
    """Names of the arms that are not trained."""
    return {arm.name for arm in every if arm.kind is None}


def known_before(command: Any) -> list[Text]:
    """Questions that the model could answer before training.

    Args:
        command: The settings. `retain` names a file of questions.

    Returns:
        The questions of the file; or, for texts about the embedded pair's world, both games with their statements.

    Raises:
        ValueError: A line of the file is not a question.
        FileNotFoundError: There is no such file.
    """
    if command.retain is not None:
        return questions(str(command.retain))
    if command.text not in QUESTIONS:
        return []
    drawn = [item for name in ("countries", "tip_sheets") for item in draw(name, command.network_seed).items]
    return [Text(item.answer, f"{item.prompt_a} {item.prompt_b}") for item in drawn]


def trial(
    field: Field,
    arm: Arm,
    recipe: Recipe,
    seed: int,
    texts: Any,
    asked: tuple[Sequence[Text], Sequence[Text]],
    name: str,
) -> dict[str, Any]:
    """Trains an arm once, and asks it questions.

    Args:
        field: The models and settings of the arms.
        arm: The arm.
        recipe: How to train it, with its learning rate; the number of steps is the arm's own.
        seed: Random seed for its new weights.
        texts: The training texts.
        asked: New questions, and questions that the vertex could answer before.
        name: Its name in the progress bar.

    Returns:
        The columns of its chunk: replies, hits for both kinds of questions, losses, seconds, number of trained parameters,
        training FLOPs. After a diverged training there are no replies.
    """
    trained, frozen = field.begin(arm, seed)
    clock, losses, model = time.perf_counter(), [], trained.join(frozen)
    steps, numbers = field.steps(arm), lmnet.size(trained) if arm.kind else 0
    if arm.kind:
        try:
            own = dataclasses.replace(recipe, steps=steps)
            model = train(trained, frozen, texts, own, title=name, losses=losses).trained.join(frozen)
        except FloatingPointError as error:
            print(f"{name}: {error}")
            model = None
    seconds = time.perf_counter() - clock
    said, hits = [], []
    for part in asked:
        agent = dataclasses.replace(field.agents[-1], params=model) if model else None
        said.append(answers(agent, part) if agent and part else [""] * len(part))
        hits.append([exact_match(text, q.answer) for text, q in zip(said[-1], part, strict=True)])
    flops = float(steps * field.step_flops(arm)) if arm.kind else 0.0
    kept = {"said": said[0], "hits": hits[0], "retained": hits[1], "losses": losses, "seconds": seconds}
    return {key: [value] for key, value in (kept | {"numbers": numbers, "flops": flops, "steps": steps}).items()}


def summary(
    done: Done, every: Sequence[Arm], field: Field | None, n: int, amount: int | None = None
) -> list[dict[str, Any]]:
    """Summarises the comparison at one number of training texts, one line for each arm at its best learning rate.

    The learning rate is chosen on the first half of the questions; accuracy is reported on the second half.

    Args:
        done: The finished trainings, by name of the arm, learning rate and seed.
        every: The arms.
        field: The models and settings of the arms. None: not known.
        n: Number of questions in the first half.
        amount: Number of training texts. None: all of the text.

    Returns:
        The lines of results.jsonl. accuracy is the mean over the seeds, as a share; low and high are its 95 % interval over
        the seeds (over the questions if there is only one seed); retained is the same for questions that the model could
        answer before. The last line is the difference between edges and LoRA, paired by seed, if both exist.
    """
    lines, values = [], {}
    for arm in every:
        runs, chosen, took = best(done, arm.name, arm.kind is not None, lambda row: row["hits"][:n])
        hits = np.array([row["hits"][n:] for row in runs], float)
        values[arm] = hits.mean(axis=1)
        interval = over_seeds(values[arm]) if len(hits) > 1 else accuracy(hits[0])
        kept = [float(np.mean(row["retained"])) for row in runs if row["retained"]]
        lines.append(
            {"arm": arm.name, "examples": amount, "rank": field.rank if field and arm.kind == "LoRA" else None}
            | {key: runs[0][key] for key in ("numbers", "flops", "steps")}
            | chosen
            | dict(zip(("accuracy", "low", "high"), interval, strict=True))
            | {"each": values[arm].tolist(), "retained": float(np.mean(kept)) if kept else None, "retained_each": kept}
            | took
        )
    if LORA in values:
        less = dict(zip(("accuracy", "low", "high"), over_seeds(values[EDGES] - values[LORA]), strict=True))
        lines.append({"arm": f"{EDGES.name} - {LORA.name}", "examples": amount, "seeds": len(values[LORA]), **less})
    return lines


def report(folder: RunFolder, lines: Sequence[Mapping[str, Any]], done: Every, field: Field, n: int) -> None:
    """Prints the table of the comparison, and writes report.txt and the pictures.

    Args:
        folder: The run folder.
        lines: The lines of results.jsonl.
        done: The finished trainings.
        field: The models and settings of the arms.
        n: Number of reported questions.
    """
    widths = "-".join(map(str, field.shape.widths))
    title = f"{', '.join(a.name for a in field.agents)}: {widths}, {field.shape.edge} edges; {n} questions"
    table = rich.table.Table(title=title, title_justify="left")
    columns = "examples", "", "trained numbers", "rate", "steps", "TFLOPs", "loss, last 20 steps"
    for name in (*columns, "exact match, % [95 %]", "still known, %", "seconds"):
        table.add_column(name, justify="right" if name not in ("examples", "") else "left")
    for line in lines:
        percent = Interval(*(100 * line[key] for key in ("accuracy", "low", "high")))
        name = f"{line['arm']}, rank {line['rank']}" if line.get("rank") else line["arm"]
        flops, kept = line.get("flops"), line.get("retained")
        table.add_row(
            "all" if line["examples"] is None else str(line["examples"]), name, shown(line.get("numbers"), ",d"),
            shown(line.get("learning_rate"), "g"), shown(line.get("steps") or None, ",d"),
            shown(flops / 1e12 if flops else None, ".3g"), shown(line.get("loss"), ".3f"),
            f"{percent.value:.1f} [{percent.low:.1f}, {percent.high:.1f}]", shown(None if kept is None else 100 * kept, ".0f"),
            shown(line.get("seconds"), ".0f"),
        )  # fmt: skip
    seeds = max(line["seeds"] for line in lines)
    note = (
        f"Mean and interval over {seeds} seeds (of {ALONE.name}: over the questions), at the learning rate that was best on {n} other "
        "questions. Edges - LoRA is paired by seed. TFLOPs: of the training, counted as three passes through trained weights and "
        "two through frozen ones. Still known: exact match on questions that the vertex could answer before."
    )
    print_table(folder, table, note, 150)
    amounts = list(done)
    folder.put(
        "curves.png", pictures.losses([line for line in lines if line["examples"] == amounts[-1]], done[amounts[-1]])
    )
    files = "run.json, results.jsonl, report.txt, curves.png"
    if len(amounts) > 1:
        folder.put("learning.png", pictures.learning(lines))
        files += ", learning.png"
    print(f"{folder.path}: {files}")
