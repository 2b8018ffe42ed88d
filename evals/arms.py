"""A game under several protocols and controls, side by side: what is played, and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent

from .documents import Block, Code, Heading, Items, Table
from .games import PRESETS, Game, Wording
from .play import METRICS, Outcome, PlaySettings, alone_with, play_together, shown
from .scores import accuracy, difference, mean, percent, sign_flip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One protocol with its settings, and what the tables call it."""

    label: str
    protocol: str
    settings: Mapping[str, Any]


def arms(protocols: Sequence[str], settings: Mapping[str, Mapping[str, Any]], controls: Sequence[str]) -> list[Arm]:
    """Every protocol, and activation with each control after it. settings: of each protocol."""
    made = []
    for protocol in protocols:
        own = settings.get(protocol, {})
        made.append(Arm(protocol, protocol, own))
        if protocol == "activation":
            made += [Arm(f"control: {control}", protocol, {**own, "control": control}) for control in controls]
    return made


def play_all(game: Game, every: Sequence[Arm], a: Agent, b: Agent, settings: PlaySettings) -> Iterator[Outcome]:
    """One outcome for each arm. B alone is asked for the choices once for all."""
    others = settings.choices and any(arm.protocol != "silent" for arm in every)
    prior = alone_with(game, a, b, settings.wording) if others else None
    for arm in every:
        yield play_together(game, arm.protocol, a, b, settings, prior, **arm.settings)


def blocks(
    every: Sequence[Arm], outcomes: Sequence[Outcome], a: Agent, b: Agent, wording: Wording, transcripts: int = 2
) -> list[Block]:
    """What was played, how, and what came out: set-up, scores, how activation differs from the rest, and what was said."""
    first = outcomes[0]
    game = first.game
    metric, why = shown(b, wording, len(game.examples))
    made: list[Block] = [
        Heading(1, f"{game.name.replace('_', ' ')}, {a.name} -> {b.name}"),
        Items(list(set_up(first, a, b, wording))),
        Heading(2, "Scores"),
        f"Shown first: {METRICS[metric]} ({why}). Shares are %, with 95 % intervals over the {len(game.items)} items.",
        scores(every, outcomes, metric),
    ]
    if first.choices is not None:
        about = (
            f"Choices: {first.choices[0].choices} for every item"
            if len({c.choices for c in first.choices}) == 1
            else "Choices: each item's own"
        )
        made.append(
            f"{about}. Rank 1 is the likeliest. Calibrated: after each choice's log-probability without the message is taken off, so of B alone there is none. "
            "Last column: mean log-probability of the right answer, given that it is one of the choices."
        )
    if any(arm.protocol == "activation" and "control" not in arm.settings for arm in every) and len(every) > 1:
        made += [Heading(2, "Activation against the rest"), differences(every, outcomes, metric)]
        made.append(
            "Points of the same metric, paired item by item; p by random signs. Many comparisons: p-values are not corrected for their number."
        )
    made.append(Heading(2, "What was read and said"))
    made += [Code(text) for text in spoken(every, outcomes, metric, transcripts)]
    return made


def set_up(first: Outcome, a: Agent, b: Agent, wording: Wording) -> Iterator[str]:
    """How the game was put."""
    preset = PRESETS[wording.preset]
    yield f"Wording {wording.preset}: {preset.told}."
    if wording.instruction is not None:
        yield f"Instruction: {wording.instruction}"
    form = {True: "through its chat template", False: "raw"}
    yield f"A reads {form[a.chat]}, B {form[b.chat]}; {len(first.game.examples)} worked examples."
    if first.game.examples and not (a.chat and b.chat):
        yield "Raw worked examples are a line each, so what is written after them ends where a line does."
    yield f"A reads the {wording.reads.replace('+', ' and B' + chr(39) + 's ')} in protocols in which it sends."
    for name, told in (("A", a.system), ("B", b.system)):
        if told:
            yield f"System prompt of {name}: {told}"
    yield f"Items: {', '.join(f'{key} {value}' for key, value in first.game.source.items())}, n = {len(first.items)}."


def scores(every: Sequence[Arm], outcomes: Sequence[Outcome], metric: str) -> Table:
    """A row for each arm."""
    order = [metric, *(name for name in ("exact", "found") if name != metric)]
    columns = ["protocol", "k, j", *(f"{name} match" for name in order)]
    choices = outcomes[0].choices is not None
    columns += ["choice", "rank", "calibrated choice", "calibrated rank", "log p(right | choices)"] if choices else []
    rows = []
    for arm, outcome in zip(every, outcomes, strict=True):
        at = f"{arm.settings['k']}, {arm.settings['j']}" if "k" in arm.settings else ""
        row = [arm.label, at, *(percent(accuracy(outcome.scored(name))) for name in order)]
        if outcome.choices is not None:
            told = outcome.choices
            row += [percent(accuracy([c.hit for c in told])), f"{np.mean([c.rank for c in told]):.1f}"]
            if told[0].calibrated_rank is None:
                row += ["", ""]
            else:
                row += [
                    percent(accuracy([bool(c.calibrated_hit) for c in told])),
                    f"{np.mean([c.calibrated_rank or 0 for c in told]):.1f}",
                ]
            row.append(f"{np.mean([c.among for c in told]):.2f}")
        rows.append([*row, f"{outcome.flops / 1e9:.3g}", f"{outcome.seconds:.1f}"])
    return Table([*columns, "GFLOPs an item", "seconds"], rows, left=2)


def differences(every: Sequence[Arm], outcomes: Sequence[Outcome], metric: str) -> Table:
    """How far the activation is above every other arm: by hits, and by log p(right | choices)."""
    ours = next(
        o
        for arm, o in zip(every, outcomes, strict=True)
        if arm.protocol == "activation" and "control" not in arm.settings
    )
    rows = []
    for arm, other in zip(every, outcomes, strict=True):
        if other is ours:
            continue
        x, y = ours.scored(metric), other.scored(metric)
        row = [arm.label, percent(difference(x, y)), f"{sign_flip(x, y):.4f}"]
        if ours.choices is not None and other.choices is not None:
            p, q = ([c.among for c in told] for told in (ours.choices, other.choices))
            nats = mean(np.subtract(p, q))
            row += [f"{nats.value:.2f} [{nats.low:.2f}, {nats.high:.2f}]", f"{sign_flip(p, q):.4f}"]
        rows.append(row)
    columns = ["activation above", f"{metric} match, points", "p"]
    return Table(columns + (["log p(right | choices), nats", "p"] if ours.choices is not None else []), rows)


def spoken(every: Sequence[Arm], outcomes: Sequence[Outcome], metric: str, most: int) -> Iterator[str]:
    """The first items under every arm, as they were rendered."""
    for i in range(min(most, len(outcomes[0].items))):
        for arm, outcome in zip(every, outcomes, strict=True):
            reply, rendered = outcome.replies[i], outcome.rendered[i]
            verdict = "right" if outcome.scored(metric)[i] else f"wrong: {outcome.items[i].answer}"
            lines = [f"item {i + 1}, {arm.label} ({verdict})"]
            if rendered["rendered_a"]:
                lines.append(f"A reads: {rendered['rendered_a']!r}")
            if "message" in reply.details:
                lines.append(f"A says:  {reply.details['message']!r}")
            lines += [f"B reads: {text!r}" for text in rendered["rendered"][-1:]]
            yield "\n".join([*lines, f"B says:  {reply.text!r}"])
