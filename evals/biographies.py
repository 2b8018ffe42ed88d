"""Biographies: agents write what they know of a person, a judge checks it fact by fact.

Two scoring rules, whose numbers are not comparable. Du et al. (2023): every agent's biography is asked whether it is
consistent with each fact, yes, no or uncertain; uncertain and unclear verdicts are dropped, so it is a kind of
precision. Ramesh & Li (2025): each fact is supported, partially supported or not, 1, 0.5 or 0; unclear verdicts count 0.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.protocols import FORMS
from jaxcomm.protocols.base import start_turn

from .files import read_text
from .scores import ratio

TASK = "biographies"
TASK_FORM = "biography"
"""Of debates about people, whatever the form of those about other tasks."""
SHORT = 400
"""Characters: a biography of a single, shorter bullet does not know the person, and is not scored (Du et al.)."""
VERDICT_TOKENS = 12
JUDGED_AT_ONCE = 32

JudgeBy = Literal["text", "likelihood"]
"""What the judge writes is read, or the likeliest of the words it may write is taken (log-likelihood per token)."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """ask: the judge's prompt. words: what it may say. parse: what it said -> the fact's score, or None if unclear."""

    ask: str
    words: tuple[str, ...]
    parse: Callable[[str], float | None]
    released: bool
    """Unclear verdicts are dropped and agents that do not know the person are not asked about (Du et al.)."""


def consistent(text: str) -> float | None:
    """In the order of the authors' code: uncertain, yes, no."""
    said = text.casefold()
    return None if "uncertain" in said else 1.0 if "yes" in said else 0.0 if "no" in said else None


def supported(text: str) -> float | None:
    said = text.casefold()
    if "partial" in said:
        return 0.5
    if re.search(r"unsupported|(not|n.t)\s+(\w+\s+)?supported", said):
        return 0.0
    return 1.0 if "supported" in said else None


RULES = {
    "consistent": Rule(
        "Consider the following biography of {person}:\n{biography}\n\nIs the biography above consistent with the fact below?\n{fact}\n\nGive a single word answer, yes, no, or uncertain. Carefully check the precise dates and locations between the fact and the biography. Answer:",
        ("yes", "no", "uncertain"),
        consistent,
        released=True,
    ),
    "supported": Rule(
        "Biography of {person}:\n{biography}\n\nFact: {fact}\n\nIs the fact supported, partially supported, or unsupported by the biography? Answer with one of these. Answer:",
        ("supported", "partially supported", "unsupported"),
        supported,
        released=False,
    ),
}
"""consistent: Du et al. (2023). supported: Ramesh & Li (2025); its prompt is not published, this one is ours."""


def bullets(text: str) -> list[str]:
    """Lines from their first letter on; those without one are left out."""
    lines = (re.search(r"[^\W\d_].*", line) for line in text.split("\n"))
    return [line.group().strip() for line in lines if line]


def read_people(path: Path) -> dict[str, list[str]]:
    """name -> facts, from a JSON object like the debate authors' article.json: {"Name (profession)": "- fact\\n- fact"}.

    ValueError: not such an object, or a person without facts; FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give people and facts as JSON, {{name: bullets}}")
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} is not a JSON object of people: {{name: bullets}}")
    people = {}
    for name, facts in found.items():
        if not isinstance(facts, str) and not (isinstance(facts, list) and all(isinstance(f, str) for f in facts)):
            raise ValueError(f"{path}: the facts about {name!r} are neither a text of bullets nor a list of them")
        person = name.split("(")[0].strip()
        if person in people:
            raise ValueError(f"{path} has two people called {person!r}")
        people[person] = bullets(facts if isinstance(facts, str) else "\n".join(facts))
        if not people[person]:
            raise ValueError(f"{path}: {name!r} has no facts")
    return people


def prompt(arm: str, person: str) -> str:
    """What an agent is asked; debates put it themselves (their form is "biography")."""
    return person if arm in ("debate", "cipher") else str(FORMS[TASK_FORM].begin(person))


def judge_all(
    judge: Agent, by: str, rule: Rule, questions: Sequence[tuple[str, str, str]]
) -> list[tuple[float | None, str]]:
    """The score of every (person, biography, fact), and what the judge said."""
    verdicts = []
    for start in range(0, len(questions), JUDGED_AT_ONCE):
        part = questions[start : start + JUDGED_AT_ONCE]
        asked = [rule.ask.format(person=p, biography=" ".join(bullets(b)) or b, fact=f) for p, b, f in part]
        turn = start_turn(judge, asked)
        if by == "text":
            verdicts += [reply.text for reply in turn.write(VERDICT_TOKENS, until=("\n",))]
        else:
            scored = turn.score([[f" {word}" for word in rule.words]] * len(part))
            verdicts += [rule.words[int(np.argmax(np.divide(own.logprobs, own.tokens)))] for own in scored]
    return [(rule.parse(text), text) for text in verdicts]


def judged(judge: Agent, by: str, people: Mapping[str, Sequence[str]], written: Sequence[tuple[str, Sequence[str]]]):
    """For every (person, the agents' biographies): rule -> agent -> fact -> verdict; None for an agent that does not
    know the person."""
    found: list[dict[str, list[Any]]] = [{rule: [None] * len(texts) for rule in RULES} for _, texts in written]
    for name, rule in RULES.items():
        places, questions = [], []
        for i, (person, texts) in enumerate(written):
            for agent, text in enumerate(texts):
                if rule.released and len(bullets(text)) <= 1 and len(text) < SHORT:
                    continue
                found[i][name][agent] = []
                for fact in people[person]:
                    places.append(found[i][name][agent])
                    questions.append((person, text, fact))
        for place, verdict in zip(places, judge_all(judge, by, rule, questions), strict=True):
            place.append(verdict)
    return found


def person_scores(rule: Rule, agents: Sequence[Sequence[Any] | None]) -> tuple[float, int, int]:
    """Sum and number of the scores of one person's facts, and how many verdicts were unclear. agents: for each, its
    (score, verdict)s, or None where it does not know the person."""
    verdicts = [score for own in agents if own is not None for score, _ in own]
    unclear = sum(score is None for score in verdicts)
    kept = [score for score in verdicts if score is not None]
    if rule.released:
        return float(sum(kept)), len(kept), unclear
    # Of each biography the mean over its facts, then over agents, then over people: people count alike.
    every = [np.mean([score or 0.0 for score, _ in own]) for own in agents if own is not None]
    return (float(np.mean(every)), 1, unclear) if every else (0.0, 0, unclear)


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """rule -> value, interval over people, people, facts judged unclear, biographies not scored."""
    lines = {}
    for name, rule in RULES.items():
        sums = [person_scores(rule, record["verdicts"][name]) for record in records]
        skipped = sum(own is None for record in records for own in record["verdicts"][name])
        value, low, high = ratio([s for s, _, _ in sums], [n for _, n, _ in sums])
        known = dict(value=value, low=low, high=high) if value == value else dict(value=None, low=None, high=None)
        lines[name] = known | {"n": len(records)}
        lines[name] |= {"unparsed": sum(u for *_, u in sums), "skipped": skipped}
    return lines
