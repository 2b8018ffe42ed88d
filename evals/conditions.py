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
class Condition:
    """One protocol with its settings.

    Attributes:
        label: What the tables call it.
        protocol: A key of `jaxcomm.protocols.PROTOCOLS`.
        settings: The protocol's own settings.
    """

    label: str
    protocol: str
    settings: Mapping[str, Any]


def conditions(
    protocols: Sequence[str], settings: Mapping[str, Mapping[str, Any]], controls: Sequence[str]
) -> list[Condition]:
    """Lists what is played: every protocol, and the controls after the protocol "activation".

    Args:
        protocols: Keys of `jaxcomm.protocols.PROTOCOLS`.
        settings: The settings of each protocol. A protocol without settings may be left out.
        controls: What is grafted in place of A's activation (`jaxcomm.protocols.Control`).

    Returns:
        The conditions, in the order in which they are played.

    Example:
        >>> made = conditions(["silent", "activation"], {"activation": {"k": 3, "j": 4}}, ["zero"])
        >>> [condition.label for condition in made]
        ['silent', 'activation', 'control: zero']
        >>> made[2].settings
        {'k': 3, 'j': 4, 'control': 'zero'}
    """
    made = []
    for protocol in protocols:
        own = settings.get(protocol, {})
        made.append(Condition(protocol, protocol, own))
        if protocol == "activation":
            made += [Condition(f"control: {control}", protocol, {**own, "control": control}) for control in controls]
    return made


def play_all(game: Game, every: Sequence[Condition], a: Agent, b: Agent, settings: PlaySettings) -> Iterator[Outcome]:
    """Plays a game under every condition. B alone is asked for the choices only once.

    Args:
        game: The game.
        every: The conditions.
        a: The sender.
        b: The receiver.
        settings: The settings that every protocol has.

    Yields:
        One outcome for each condition.

    Raises:
        ValueError: As for `play.play_together`.
    """
    others = settings.choices and any(condition.protocol != "silent" for condition in every)
    prior = alone_with(game, a, b, settings.wording) if others else None
    for condition in every:
        yield play_together(game, condition.protocol, a, b, settings, prior, **condition.settings)


def blocks(
    every: Sequence[Condition], outcomes: Sequence[Outcome], a: Agent, b: Agent, wording: Wording, transcripts: int = 2
) -> list[Block]:
    """Writes the report of a game: the set-up, the scores, how activation differs from the rest, and transcripts.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        a: The sender.
        b: The receiver.
        wording: How the game was put to the agents.
        transcripts: Number of items whose transcripts are shown.

    Returns:
        The blocks of a document (`evals.documents`).
    """
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
    if (
        any(condition.protocol == "activation" and "control" not in condition.settings for condition in every)
        and len(every) > 1
    ):
        made += [Heading(2, "Activation against the rest"), differences(every, outcomes, metric)]
        made.append(
            "Points of the same metric, paired item by item; p by random signs. Many comparisons: p-values are not corrected for their number."
        )
    made.append(Heading(2, "What was read and said"))
    made += [Code(text) for text in spoken(every, outcomes, metric, transcripts)]
    return made


def set_up(first: Outcome, a: Agent, b: Agent, wording: Wording) -> Iterator[str]:
    """Describes how the game was put to the agents.

    Args:
        first: Any of the outcomes.
        a: The sender.
        b: The receiver.
        wording: How the game was put to them.

    Yields:
        One sentence for each fact.
    """
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


def scores(every: Sequence[Condition], outcomes: Sequence[Outcome], metric: str) -> Table:
    """Makes the table of scores: one row for each condition.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        metric: The metric in the first column, a key of `play.METRICS`.

    Returns:
        Accuracies in %, with 95 % intervals; scores of the choices, if there are any; GFLOPs of one item; seconds.
    """
    order = [metric, *(name for name in ("exact", "found") if name != metric)]
    columns = ["protocol", "k, j", *(f"{name} match" for name in order)]
    choices = outcomes[0].choices is not None
    columns += ["choice", "rank", "calibrated choice", "calibrated rank", "log p(right | choices)"] if choices else []
    rows = []
    for condition, outcome in zip(every, outcomes, strict=True):
        at = f"{condition.settings['k']}, {condition.settings['j']}" if "k" in condition.settings else ""
        row = [condition.label, at, *(percent(accuracy(outcome.scored(name))) for name in order)]
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


def differences(every: Sequence[Condition], outcomes: Sequence[Outcome], metric: str) -> Table:
    """Makes the table that compares the activation with every other condition.

    Args:
        every: The conditions. One of them is the protocol "activation" without a control.
        outcomes: The outcome of each condition, on the same items.
        metric: A key of `play.METRICS`.

    Returns:
        One row for each other condition: how many points the activation is above it, and by how many nats
        log p(right | choices) is above. Each has a 95 % interval and a p-value by random signs (`scores.sign_flip`).
    """
    ours = next(
        o
        for condition, o in zip(every, outcomes, strict=True)
        if condition.protocol == "activation" and "control" not in condition.settings
    )
    rows = []
    for condition, other in zip(every, outcomes, strict=True):
        if other is ours:
            continue
        x, y = ours.scored(metric), other.scored(metric)
        row = [condition.label, percent(difference(x, y)), f"{sign_flip(x, y):.4f}"]
        if ours.choices is not None and other.choices is not None:
            p, q = ([c.among for c in told] for told in (ours.choices, other.choices))
            nats = mean(np.subtract(p, q))
            row += [f"{nats.value:.2f} [{nats.low:.2f}, {nats.high:.2f}]", f"{sign_flip(p, q):.4f}"]
        rows.append(row)
    columns = ["activation above", f"{metric} match, points", "p"]
    return Table(columns + (["log p(right | choices), nats", "p"] if ours.choices is not None else []), rows)


def spoken(every: Sequence[Condition], outcomes: Sequence[Outcome], metric: str, most: int) -> Iterator[str]:
    """Writes transcripts of the first items under every condition.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        metric: The metric that says whether a reply is right, a key of `play.METRICS`.
        most: Largest number of items.

    Yields:
        For each item and condition, what A and B read and said.
    """
    for i in range(min(most, len(outcomes[0].items))):
        for condition, outcome in zip(every, outcomes, strict=True):
            reply, rendered = outcome.replies[i], outcome.rendered[i]
            verdict = "right" if outcome.scored(metric)[i] else f"wrong: {outcome.items[i].answer}"
            lines = [f"item {i + 1}, {condition.label} ({verdict})"]
            if rendered["rendered_a"]:
                lines.append(f"A reads: {rendered['rendered_a']!r}")
            if "message" in reply.details:
                lines.append(f"A says:  {reply.details['message']!r}")
            lines += [f"B reads: {text!r}" for text in rendered["rendered"][-1:]]
            yield "\n".join([*lines, f"B says:  {reply.text!r}"])
