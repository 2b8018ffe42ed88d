"""Play a game under several protocols and controls, and write the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.controls import derange, overlap
from jaxcomm.protocols import (
    CONTROLS,
    Asked,
    Bridging,
    Grafting,
    Prefixing,
    Sent,
    read_receiver,
    send_bridged,
    send_prefix,
    send_states,
)
from jaxcomm.protocols.text import put
from jaxcomm.sites import Site

from . import figures
from .documents import Block, Code, Heading, Items, Picture, Table
from .effects import LIKELIHOOD, Split, effect, holm, kl, meaning, p_written, split, split_rows, written
from .games import INFORMATION, PRESETS, Game, Wording
from .hearing import EQUAL, MORE, features, fitting_tokens, further, named, probe
from .play import METRICS, SENDS, Outcome, PlaySettings, alone_with, play_together, shown
from .scores import accuracy, percent


@dataclasses.dataclass(frozen=True)
class Condition:
    """One protocol with its settings.

    Attributes:
        label: Its name in the tables.
        protocol: A key of `jaxcomm.protocols.PROTOCOLS`.
        settings: The protocol's own settings.
        equal: A key of `EQUAL`, and the label of the condition whose cost limits the messages. None: no limit.
    """

    label: str
    protocol: str
    settings: Mapping[str, Any]
    equal: tuple[str, str] | None = None

    @property
    def is_control(self) -> bool:
        """Whether a control replaces the protocol's messages, or text messages are truncated to another protocol's cost."""
        return self.equal is not None or self.settings.get("control") is not None


def conditions(
    protocols: Sequence[str], settings: Mapping[str, Mapping[str, Any]], controls: Sequence[str]
) -> list[Condition]:
    """Lists all conditions: every protocol, and its controls if it sends messages. B alone is always included.

    Args:
        protocols: Keys of `jaxcomm.protocols.PROTOCOLS`.
        settings: The settings of each protocol. A protocol without settings may be left out.
        controls: Stand-ins for the messages (`jaxcomm.protocols.CONTROLS`), or keys of `EQUAL`, which do not apply to the
            protocol "message".

    Returns:
        The conditions, in the order of playing.

    Example:
        >>> made = conditions(["activation"], {"activation": {"k": 3, "j": 4}}, ["other"])
        >>> [condition.label for condition in made]
        ['silent', 'activation', 'activation, other']
        >>> made[2].settings
        {'k': 3, 'j': 4, 'control': 'other'}
    """
    if controls and "silent" not in protocols and set(protocols) & set(SENDS):
        protocols = ("silent", *protocols)
    made = []
    for protocol in protocols:
        own = settings.get(protocol, {})
        made.append(Condition(protocol, protocol, own))
        for control in controls if protocol in SENDS else ():
            label = f"{protocol}, {control}"
            if control not in EQUAL:
                made.append(Condition(label, protocol, {**own, "control": control}))
            elif protocol != "message":
                text = {name: value for name, value in settings.get("message", {}).items() if name != "turns"}
                made.append(Condition(label, "message", text, (control, protocol)))
    return made


def play_all(game: Game, every: Sequence[Condition], a: Agent, b: Agent, settings: PlaySettings) -> Iterator[Outcome]:
    """Plays a game under every condition. The choices are scored for B alone only once.

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
    played: dict[str, Outcome] = {}
    for condition in every:
        own, how = dict(condition.settings), settings
        if condition.equal is not None:
            what, of = condition.equal
            own |= limits(what, played[of], game, a, b, settings.wording, own)
            how = dataclasses.replace(settings, drawn={**settings.drawn, "control": what, "cost_of": of})
        outcome = play_together(game, condition.protocol, a, b, how, prior, **own)
        if condition.is_control and own.get("control") != "other":  # save memory: arrays of the vocabulary's size
            outcome = dataclasses.replace(outcome, heard=[note._replace(next=None) for note in outcome.heard])
        played[condition.label] = outcome
        yield outcome


class Readings:
    """Readings that activations share: A's states after each layer k, and B's prompts. Each is computed once.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        wording: How the game is put to the agents.
    """

    def __init__(self, game: Game, a: Agent, b: Agent, wording: Wording):
        self.game, self.a, self.b, self.wording = game, a, b, wording
        self._sent: dict[tuple[Any, int], tuple[Any, Sent]] = {}

    @functools.cached_property
    def asked(self) -> Asked:
        """B's prompts, read."""
        return read_receiver(self.b, self.wording.prompts_b(self.game, self.b))

    def add(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the readings to settings of the protocol "activation".

        Args:
            own: The settings: k, j, and possibly W, graft and control.

        Returns:
            The settings with `sent`, and with `asked` if j is a layer.
        """
        W, key = own.get("W"), (own["k"], id(own.get("W")))
        if key not in self._sent:
            told = self.wording.prompts_a(self.game, self.a)
            made = send_states(self.a, self.b, told, Grafting(W=W), k=own["k"], games=len(self.game.items))
            self._sent[key] = W, made  # W is kept, so that its id stays its own
        return dict(own) | {"sent": self._sent[key][1]} | ({} if isinstance(own["j"], Site) else {"asked": self.asked})


def limits(
    what: str, of: Outcome, game: Game, a: Agent, b: Agent, wording: Wording, talk: Mapping[str, Any]
) -> dict[str, list[int]]:
    """Finds the largest length of text messages that cost no more than a channel.

    Args:
        what: A key of `EQUAL`.
        of: The outcome of the channel.
        game: The game.
        a: The sender.
        b: The receiver.
        wording: How the game is put to the agents.
        talk: Options of the protocol "message".

    Returns:
        Options of the protocol "message": for each item, the largest number of bytes, or of tokens. With so many tokens,
        A's reading and writing and B's reading need no more FLOPs than the channel until B answers (0: reading alone
        costs more).
    """
    if what == "equal-bytes":
        return {"bytes": [note.sent for note in of.heard]}
    asked = [put(talk.get("ask", "{prompt}"), prompt) for prompt in wording.prompts_a(game, a)]
    prompts = asked, wording.prompts_b(game, b)
    return {"limits": fitting_tokens(a, b, prompts, of.heard, talk.get("max_message_tokens", 48))}


def blocks(
    every: Sequence[Condition],
    outcomes: Sequence[Outcome],
    a: Agent,
    b: Agent,
    wording: Wording,
    more: Mapping[str, tuple[Game, np.ndarray]] | None = None,
    transcripts: int = 2,
) -> list[Block]:
    """Writes the report of a game: the set-up, the scores, what the messages did, and transcripts.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        a: The sender.
        b: The receiver.
        wording: How the game was put to the agents.
        more: For each protocol, further items and their messages, to train the probe on (`further_messages`).
        transcripts: Number of items with transcripts.

    Returns:
        The blocks of a document (`evals.documents`).
    """
    first = outcomes[0]
    game = first.game
    metric, why = shown(b, wording, len(game.examples))
    made: list[Block] = [
        Heading(1, f"{game.name.replace('_', ' ')}, {a.name} -> {b.name}"),
        Items(list(set_up(first, a, b, wording))),
        Heading(2, f"Scores ({game.information} information)"),
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
            f"{about}. Rank 1 is the likeliest. Calibrated: each choice's log-probability without the message is subtracted first. B alone has no calibrated score. "
            "Last column: mean log-probability of the right answer, given that it is one of the choices."
        )
    made.append(costs_drawn(every, outcomes, metric))
    made += effects_told(every, outcomes, metric, b, more)
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
        yield "Raw worked examples take one line each. So the reply after them ends at the end of a line."
    yield f"If A sends, it reads the {wording.reads.replace('+', ' and B' + chr(39) + 's ')}."
    for name, told in (("A", a.system), ("B", b.system)):
        if told:
            yield f"System prompt of {name}: {told}"
    about = INFORMATION[first.game.information]
    yield f"{about[0].upper()}{about[1:]}."
    yield f"Items: {', '.join(f'{key} {value}' for key, value in first.game.source.items())}, n = {len(first.items)}."


def scores(every: Sequence[Condition], outcomes: Sequence[Outcome], metric: str) -> Table:
    """Makes the table of scores: one row for each condition.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        metric: The metric in the first column, a key of `play.METRICS`.

    Returns:
        Accuracies in %, with 95 % intervals; scores of the choices, if there are any; GFLOPs and sent bytes for one item;
        seconds.
    """
    order = [metric, *(name for name in ("exact", "found") if name != metric)]
    columns = ["protocol", "layers", *(f"{name} match" for name in order)]
    choices = outcomes[0].choices is not None
    columns += ["choice", "rank", "calibrated choice", "calibrated rank", "log p(right | choices)"] if choices else []
    rows = []
    for condition, outcome in zip(every, outcomes, strict=True):
        row = [
            condition.label,
            layers_told(condition.settings),
            *(percent(accuracy(outcome.scored(name))) for name in order),
        ]
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
        rows.append([*row, f"{outcome.flops / 1e9:.3g}", f"{outcome.sent:,.0f}", f"{outcome.seconds:.1f}"])
    return Table([*columns, "GFLOPs an item", "bytes sent", "seconds"], rows, left=2)


def layers_told(settings: Mapping[str, Any]) -> str:
    """Says at which layers a protocol reads and writes.

    Args:
        settings: The protocol's own settings.

    Returns:
        For example "k 26, j 26" (activation), "1-8, 12" (layers that see a prefix), "all", or "" if there are none.
    """
    if "k" in settings:
        return f"k {settings['k']}, j {settings['j']}"
    named = settings.get("layers", settings.get("j", ()))
    if isinstance(named, str):
        return named
    runs: list[list[int]] = []
    for n in sorted(named):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def costs_drawn(every: Sequence[Condition], outcomes: Sequence[Outcome], metric: str) -> Block:
    """Draws accuracy against FLOPs and against bytes, for all conditions except controls of messages.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        metric: The metric, a key of `play.METRICS`.

    Returns:
        The picture.
    """
    points = [
        (condition.label, outcome.flops, outcome.sent, accuracy(outcome.scored(metric)))
        for condition, outcome in zip(every, outcomes, strict=True)
        if condition.equal is not None or not condition.is_control
    ]
    png = figures.every_cost({f"{metric} match": points})
    assert png is not None  # reading always costs FLOPs
    return Picture("costs.png", png, "Accuracy against cost")


def effects_told(
    every: Sequence[Condition],
    outcomes: Sequence[Outcome],
    metric: str,
    b: Agent,
    more: Mapping[str, tuple[Game, np.ndarray]] | None,
) -> Iterator[Block]:
    """Reports the effect of messages: presence and content, every control, and whether content was sent and heard.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        metric: The main metric, a key of `play.METRICS`.
        b: The receiver.
        more: As for `blocks`.

    Yields:
        The blocks. None if no message was sent.
    """
    by = {condition.label: outcome for condition, outcome in zip(every, outcomes, strict=True)}
    sent = [c.label for c in every if c.protocol in SENDS and not c.is_control]
    told, game = f"({outcomes[0].game.information} information)", outcomes[0].game
    if not sent:
        return
    if "silent" in by and (channels := [label for label in sent if f"{label}, other" in by]):
        found = splits(by, channels, metric)
        columns, rows = split_rows(found)
        yield Heading(2, f"Presence and content {told}")
        yield (
            "Differences of scores. Total: own message minus B alone. Presence: another item's message minus B alone. Content: own "
            "message minus another item's. " + meaning(3 * len(found))
        )
        yield overlap_told(game)
        yield Table(["protocol", "metric", *columns], rows, left=2)
        points = {label: part for (label, what), (part, _) in found.items() if what == f"{metric} match"}
        yield Picture("effects.png", figures.effects(points, label=f"{metric} match, points"), "Presence and content")
    else:
        yield Heading(2, f"Presence and content {told}")
        yield "Not known: this needs B alone (silent), the control other, and at least two items."
    if rows := against(every, by, sent, metric):
        yield Heading(2, f"Against every control {told}")
        yield f"The protocol's {metric} match minus that of each control, in points, paired. " + meaning(
            len(rows), per_row=0
        )
        yield Table(["protocol", "above", "accuracy", "points", "p", "log p(right | choices), nats"], rows, left=2)
        yield Items([f"{name}: {CONTROLS[name]}" for name in CONTROLS if any(f"{c}, {name}" in by for c in sent)])
    yield Heading(2, f"Sent and heard {told}")
    yield (
        "Sent: whether the message contains the answer. A text contains it if it names it. For states, a linear probe, "
        "trained on other items, predicts the answer from the message (a better probe might find more). Heard: KL divergence "
        "between B's next-token distributions, in nats, mean over the items: own message against none, own message "
        "against another item's, and another item's against none."
    )
    yield Table(
        ["protocol", "sent, %", "own against none", "own against other", "other against none"],
        hearing(by, sent, b, more),
        left=1,
    )


def splits(by: Mapping[str, Outcome], channels: Sequence[str], metric: str) -> dict[tuple[str, ...], tuple[Split, str]]:
    """Splits the gain of every channel into presence and content, in every metric.

    Args:
        by: The outcomes, by label: each channel, "CHANNEL, other", and "silent".
        channels: Labels of the channels.
        metric: The main metric, a key of `play.METRICS`.

    Returns:
        For each channel and metric, the split and its unit, as input of `effects.split_rows`.
    """
    found = {}
    for label in channels:
        for name in (metric, *(x for x in ("found", "among") if x != metric)):
            values = [by[key].scored(name) for key in (label, f"{label}, other", "silent")]
            if all(len(x) for x in values):
                what = LIKELIHOOD if name == "among" else f"{name} match"
                found[label, what] = split(*values), "nats" if name == "among" else "points"
    return found


def overlap_told(game: Game) -> str:
    """Says whether the control "other" gives any item a message with the item's own answer."""
    answers = [item.answer for item in game.items]
    share = overlap(answers, derange(answers, 0)) if len(answers) > 1 else 1.0
    if not share:
        return "The other item always has another answer."
    return f"The other item has another answer, except for {share:.0%} of the items, because so many items have the same answer."


def against(every: Sequence[Condition], by: Mapping[str, Outcome], sent: Sequence[str], metric: str) -> list[list[str]]:
    """Compares every channel with each of its controls.

    Args:
        every: The conditions.
        by: The outcomes, by label.
        sent: Labels of the channels.
        metric: A key of `play.METRICS`.

    Returns:
        The rows of the table. p-values are corrected over all of them.
    """
    rows, ps = [], []
    for label in sent:
        for condition in every:
            if condition.is_control and condition.label.startswith(f"{label}, "):
                own, other = by[label], by[condition.label]
                found = effect(own.scored(metric), other.scored(metric))
                ps.append(found.p)
                row = [label, condition.label.removeprefix(f"{label}, "), percent(accuracy(other.scored(metric)))]
                nats = ""
                if own.choices is not None and other.choices is not None:
                    nats = written(effect(own.scored("among"), other.scored("among")).value, "nats")
                rows.append([*row, written(found.value, "points"), nats])
    return [[*row[:4], p_written(p), row[4]] for row, p in zip(rows, holm(ps), strict=True)]


def hearing(
    by: Mapping[str, Outcome], sent: Sequence[str], b: Agent, more: Mapping[str, tuple[Game, np.ndarray]] | None
) -> list[list[str]]:
    """Reports for every channel whether the answer was sent, and how far B's next-token distribution moved.

    Args:
        by: The outcomes, by label.
        sent: Labels of the channels.
        b: The receiver.
        more: As for `blocks`.

    Returns:
        The rows of the table.
    """
    rows = []
    for label in sent:
        notes, game = by[label].heard, by[label].game
        if notes[0].text is not None:
            there = named(game, notes)
        elif notes[0].states is not None:
            states = np.stack([np.asarray(note.states) for note in notes])
            there = probe(game, b, states, (more or {}).get(label))
        else:
            there = []
        far = lambda x, y: f"{np.mean(kl(_next(by[x]), _next(by[y]))):.3f}" if x in by and y in by else ""
        pairs = ((label, "silent"), (label, f"{label}, other"), (f"{label}, other", "silent"))
        rows.append([label, percent(accuracy(there)) if there else "", *(far(x, y) for x, y in pairs)])
    return rows


def moved(every: Sequence[Condition], outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Computes for every item of every condition how far B's next-token distribution moved, for results files.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.

    Returns:
        One record for each item of each outcome, in their order: KL divergences in nats. A record is empty if no message
        was sent, or if B alone or the control "other" was not played.
    """
    by = {condition.label: outcome for condition, outcome in zip(every, outcomes, strict=True)}
    records: list[dict[str, float]] = []
    for condition, outcome in zip(every, outcomes, strict=True):
        other = f"{condition.label}, other"
        if condition.is_control or other not in by or "silent" not in by:
            records += [{} for _ in outcome.items]
            continue
        own, others, alone = (_next(by[label]) for label in (condition.label, other, "silent"))
        pairs = {"kl_from_none": (own, alone), "kl_from_other": (own, others), "kl_of_other_from_none": (others, alone)}
        found = {name: kl(*pair).tolist() for name, pair in pairs.items()}
        records += [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    return records


def _next(outcome: Outcome) -> np.ndarray:
    """Log-probabilities of B's next token, [items, V]."""
    return np.stack([np.asarray(note.next) for note in outcome.heard])


def further_messages(
    every: Sequence[Condition], game: Game, a: Agent, b: Agent, settings: PlaySettings, n: int = MORE
) -> dict[str, tuple[Game, np.ndarray]]:
    """Lets A send states for further items of a game, to train the probe on.

    Args:
        every: The conditions.
        game: The game. A game from a file has no further items.
        a: The sender.
        b: The receiver.
        settings: The settings that every protocol has.
        n: Number of further items.

    Returns:
        For each condition that sends states, by label: the further items and their messages.
    """
    others = further(game, n)
    speak = ("activation", "exchange", "kv", "latent", "bridge")
    channels = [c for c in every if c.protocol in speak and not c.is_control]
    if others is None or not others.items:
        return {}
    found = {}
    for condition in channels:
        own, prompts = dict(condition.settings), settings.wording.prompts_a(others, a)
        if condition.protocol in ("kv", "latent"):
            found[condition.label] = others, features(send_prefix(a, b, prompts, Prefixing(**own)).message)
            continue
        if condition.protocol == "bridge":
            asked = settings.wording.prompts_b(others, b)
            found[condition.label] = others, features(send_bridged([a], b, prompts, asked, Bridging(**own))[0].message)
            continue
        k = own.pop("k")
        how = Grafting(**{name: value for name, value in own.items() if name in ("graft", "W", "where", "think")})
        sent = send_states(a, b, prompts, how, k=k, games=len(others.items))
        found[condition.label] = others, features(sent.message)
    return found


def spoken(every: Sequence[Condition], outcomes: Sequence[Outcome], metric: str, most: int) -> Iterator[str]:
    """Writes transcripts of the first items under every condition.

    Args:
        every: The conditions.
        outcomes: The outcome of each condition.
        metric: The metric that says whether a reply is right, a key of `play.METRICS`.
        most: Largest number of items.

    Yields:
        For each item and condition, the prompts and texts of A and B.
    """
    for i in range(min(most, len(outcomes[0].items))):
        for condition, outcome in zip(every, outcomes, strict=True):
            reply, rendered = outcome.replies[i], outcome.rendered[i]
            verdict = "right" if outcome.scored(metric)[i] else f"wrong; the answer is {outcome.items[i].answer}"
            lines = [f"item {i + 1}, {condition.label} ({verdict})"]
            if rendered["rendered_a"]:
                lines.append(f"A reads: {rendered['rendered_a']!r}")
            if "message" in reply.details:
                lines.append(f"A says:  {reply.details['message']!r}")
            lines += [f"B reads: {text!r}" for text in rendered["rendered"][-1:]]
            yield "\n".join([*lines, f"B says:  {reply.text!r}"])
