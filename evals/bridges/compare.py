"""Compare a bridge with baselines that publications often leave out: a sharer equal to the receiver, LoRA of the same size,
and other items' messages.

    chunks/ARM-RATE-SEED.parquet   of one finished training: losses, answers under every control, seconds
    results.jsonl                  a line per arm: accuracy over the seeds on questions the rate was not chosen on
    report.txt

All trained arms learn the same texts in the same order, for the same number of steps, with the same number of parameters
(LoRA's rank is the nearest). Each has its own best learning rate, chosen on half of the questions and reported on the
other half. Content is the paired difference between a bridge's own message and another item's.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.table

from jaxcomm import bridges, lora
from jaxcomm.agent import Agent
from jaxcomm.protocols import StandIn
from jaxcomm.protocols import bridge as cross

from ..files import write_lines
from ..networks.folders import identity
from ..networks.settings import Recipe, pick
from ..networks.texts import PRIVATE, QUESTIONS, Text, source
from ..networks.training import check, train
from ..networks.trials import Done, Run, answers, asked_by, best, print_table, shown
from ..runs import RunFolder, agent_fingerprint, surroundings
from ..scores import accuracy, exact_match, over_seeds
from .folders import build, lessons
from .settings import Span

BRIDGE, SAME, LORA = "bridge", "bridge, sharer = receiver", "LoRA on the receiver"
ALONE, TOLD, SHARER = "receiver alone", "receiver, told", "sharer alone"
ARMS = {ALONE: False, TOLD: False, SHARER: False, LORA: True, SAME: True, BRIDGE: True}
"""Arm -> whether it is trained. "receiver, told" and "sharer alone" read the text of a gated bridge's sharer."""
CONTROLS = (None, "other", "zero")
"""Stand-ins for the sharer's keys and values. None: the sharer's own."""
ROWS = 50
"""Number of questions in a batch. The control "other" exchanges messages within a batch."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Data that all arms share.

    Attributes:
        command: The settings (`evals.commands.bridge.Compare`).
        a: The sharer.
        b: The receiver.
        asked: The questions, with their right answers; the first half to choose the learning rate on.
        rank: Rank of LoRA.
    """

    command: Any
    a: Agent
    b: Agent
    asked: Sequence[Text]
    rank: int

    @property
    def span(self) -> Span:
        """Kind and size of the bridges."""
        return pick(Span, self.command)


def run(command: Any, a: Agent, b: Agent, *, words: str) -> list[dict[str, Any]]:
    """Compares a bridge: trains and tests all arms that are not finished in the folder, and reports.

    Args:
        command: The settings (`evals.commands.bridge.Compare`).
        a: The sharer.
        b: The receiver.
        words: The command line that runs it again.

    Returns:
        The lines of results.jsonl.

    Raises:
        ValueError: A setting or text is invalid, or the folder holds another run.
        OSError: A file does not exist, or the folder cannot be written.
    """
    span, recipe = pick(Span, command), pick(Recipe, command)
    rates = command.learning_rates or (command.learning_rate,)
    for name in ("seeds", "questions"):
        if getattr(command, name) < (least := 2 if name == "seeds" else 1):
            raise ValueError(f"{name} = {getattr(command, name)}: it must be at least {least}")
    made = build(span, a, b, recipe.steps)
    bench = Bench(command, a, b, _questions(command, span), lora.rank_of_size(b.single, bridges.size(made)))
    lessons(command, span, a, b, 0)
    check(recipe, made, min(agent.single.config.max_positions for agent in (a, b)))
    config = identity(command) | {"rank": bench.rank, "fingerprints": [agent_fingerprint(x) for x in (a, b)]}
    config |= surroundings("optax")
    with RunFolder(command.out, config, dict, command=words, resume=command.resume, free=("every",)) as folder:
        done: dict[tuple[str, float, int], Run] = {}
        for arm, rate, seed in itertools.product(ARMS, rates, range(command.seeds)):
            if (not ARMS[arm] and (rate, seed) != (rates[0], 0)) or (arm == TOLD and span.kind == "c2c"):
                continue
            name = f"{arm}-{rate:g}-{seed}".replace(" ", "_").replace(",", "").replace("=", "is")
            if not folder.done(name):
                folder.write(name, {key: [value] for key, value in _one(bench, arm, rate, seed, name).items()})
            (done[arm, rate, seed],) = folder.read(name).to_pylist()
        lines = summary(done, len(bench.asked) // 2)
        write_lines(folder.path / "results.jsonl", lines)
        report(folder, lines, bench)
        return lines


def _questions(command: Any, span: Span) -> list[Text]:
    """The questions. The first half is for choosing the learning rate."""
    known = PRIVATE if span.kind == "gated" else QUESTIONS
    purpose = f"test a {span.kind} bridge on: name a file with --test, or take {' or '.join(known)}"
    found = asked_by(command, known, purpose)
    if span.kind == "gated" and not all(text.told for text in found):
        raise ValueError(
            f'{command.test} has questions without "told", the text that only the sharer reads: a gated bridge needs it'
        )
    return found[: 2 * command.questions]


def _one(bench: Bench, arm: str, rate: float, seed: int, name: str) -> dict[str, Any]:
    """Run one arm at one rate with one seed: hits under every control, [controls, questions], losses, sizes, seconds."""
    clock, losses, numbers = time.perf_counter(), [], 0
    command, a, b, asked = bench.command, bench.a, bench.b, bench.asked
    if not ARMS[arm]:
        reader = a if arm == SHARER else b
        both = [q._replace(prompt=f"{q.told} {q.prompt}".strip()) for q in asked]
        said = [answers(reader, asked if arm == ALONE else both, ROWS)]
    else:
        recipe = dataclasses.replace(pick(Recipe, command), learning_rate=rate)
        span = dataclasses.replace(bench.span, bridge_seed=bench.span.bridge_seed + seed)
        sharer = b if arm == SAME else a
        if arm == LORA:
            trained, frozen = lora.init_lora(jax.random.key(span.bridge_seed), b.single, bench.rank), b.single
            texts = source(command.text, b, command.columns, n=command.examples, seed=seed)
        else:
            trained, frozen = build(span, sharer, b, recipe.steps), bridges.Pair(sharer.single, b.single)
            texts = lessons(command, span, sharer, b, seed)
        numbers = bridges.size(trained)
        try:
            made = train(trained, frozen, texts, recipe, title=name, losses=losses).trained
        except FloatingPointError as error:  # training diverged at this rate, so there are no answers
            print(f"{name}: {error}")
            said = [[""] * len(asked)] * (1 if arm == LORA else len(CONTROLS))
        else:
            if arm == LORA:
                said = [answers(dataclasses.replace(b, params=made.join(b.single)), asked, ROWS)]
            else:
                said = [crossed(made, sharer, b, asked, control) for control in CONTROLS]
    hits = [[exact_match(text, q.answer) for text, q in zip(own, asked, strict=True)] for own in said]
    return {"said": said, "hits": hits, "losses": losses, "numbers": numbers, "seconds": time.perf_counter() - clock}


def crossed(made: Any, a: Agent, b: Agent, asked: Sequence[Text], control: Any = None) -> list[str]:
    """Lets a receiver answer questions greedily, with messages over a bridge.

    Args:
        made: The bridge.
        a: The sharer.
        b: The receiver.
        asked: The questions, with their right answers.
        control: Stand-in for the sharer's keys and values. None: the sharer's own.

    Returns:
        The answers.
    """
    said, room = [], 1 + max(len(b.follow(q.prompt, f" {q.answer}")) for q in asked)
    for at in range(0, len(asked), ROWS):
        part = asked[at : at + ROWS]
        stand_in = control and StandIn(control, answers=[q.answer for q in part])
        turn = cross(a, b, [q.told for q in part], [q.prompt for q in part], bridge=made, control=stand_in)
        said += [reply.text for reply in turn.write(room)]
    return said


def summary(done: Done, n: int) -> list[dict[str, Any]]:
    """Summarises the comparison, one line for each arm at its best learning rate.

    Args:
        done: The finished arms, by arm, learning rate and seed.
        n: Number of questions in the first half, on which the rate is chosen.

    Returns:
        The lines of results.jsonl. Accuracies are means over the seeds on the second half, as shares, with 95 % intervals
        over the seeds (over the questions for untrained arms): `accuracy`; for bridges also `other` and `zero` (under
        these controls) and `content` (own minus other, paired). The last lines are differences between arms, paired by
        seed.
    """
    lines, values = [], {}
    whole = lambda x: dict(zip(("value", "low", "high"), map(float, x), strict=True))
    for arm in dict.fromkeys(kind for kind, *_ in done):
        runs, chosen, took = best(done, arm, ARMS[arm], lambda row: row["hits"][0][:n])
        # [seeds, controls, questions]
        hits = np.array([[own[n:] for own in row["hits"]] for row in runs], float)
        values[arm] = hits.mean(axis=2)
        own = values[arm][:, 0]
        line = {"arm": arm, "numbers": runs[0]["numbers"]} | chosen
        line["accuracy"] = whole(over_seeds(own) if len(hits) > 1 else accuracy(hits[0, 0]))
        if hits.shape[1] > 1:
            line |= {name: whole(over_seeds(values[arm][:, i])) for i, name in enumerate(CONTROLS) if name}
            line["content"] = whole(over_seeds(own - values[arm][:, 1]))
        lines.append(line | {"each": own.tolist()} | took)
    for other in (LORA, SAME):
        lines.append(
            {"arm": f"{BRIDGE} - {other}", "accuracy": whole(over_seeds(values[BRIDGE][:, 0] - values[other][:, 0]))}
        )
    return lines


def report(folder: RunFolder, lines: Sequence[Mapping[str, Any]], bench: Bench) -> None:
    """Prints the table of the comparison, and writes report.txt.

    Args:
        folder: The run folder.
        lines: The lines of results.jsonl.
        bench: Data that all arms share.
    """
    n, kind = len(bench.asked) // 2, bench.span.kind
    title = (
        f"{bench.a.name} -> {bench.b.name}, {kind} bridge, {bench.command.text}: exact match, % [95 %], {n} questions"
    )
    table = rich.table.Table(title=title, title_justify="left")
    for name in ("", "numbers", "rate", "loss", "own", "other", "zero", "content", "s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)

    def percent(x: Mapping[str, float] | None) -> str:
        return "" if x is None else f"{100 * x['value']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"

    for line in lines:
        name = f"{line['arm']}, rank {bench.rank}" if line["arm"] == LORA else line["arm"]
        table.add_row(
            name, shown(line.get("numbers") or None, ",d"), shown(line.get("learning_rate"), "g"), shown(line.get("loss"), ".3f"),
            *(percent(line.get(key)) for key in ("accuracy", "other", "zero", "content")), shown(line.get("seconds"), ".0f"),
        )  # fmt: skip
    note = (
        f"Mean and interval over {bench.command.seeds} seeds (of what is not trained: over the questions), at the learning rate "
        f"that was best on {n} other questions; loss of the last 20 steps. other: another item's message; zero: zeros; "
        "content: own - other. The last lines are paired by seed."
    )
    print_table(folder, table, note, 160)
    print(f"{folder.path}: run.json, results.jsonl, report.txt")
