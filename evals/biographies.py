"""Biographies: agents write about a person, and a judge checks the text fact by fact.

There are two scoring rules. Their numbers are not comparable. Du et al. (2023): the judge says whether each agent's
biography is consistent with each fact: yes, no or uncertain. Uncertain and unclear verdicts are dropped, so the score is
a kind of precision. Ramesh & Li (2025): each fact is supported (1), partially supported (0.5) or not (0). Unclear
verdicts count 0.
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
"""Form of debates about people. It does not depend on the form for other tasks."""
SHORT = 400
"""Number of characters. If a biography is a single bullet shorter than this, the agent does not know the person, and the
biography is not scored (Du et al.)."""
VERDICT_TOKENS = 12
JUDGED_AT_ONCE = 32

JudgeBy = Literal["text", "likelihood"]
"""How to get a verdict: parse the judge's text, or take the likeliest allowed word (log-likelihood per token)."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule by which a judge scores the facts of a biography.

    Attributes:
        ask: Template of the judge's prompt, with {person}, {biography} and {fact}.
        words: The verdicts that the judge may give.
        parse: Turns the judge's text into the score of the fact, between 0 and 1. None: the verdict is unclear.
        released: Whether to drop unclear verdicts, and to leave out agents that do not know the person (Du et al. 2023,
            as in their released code).
    """

    ask: str
    words: tuple[str, ...]
    parse: Callable[[str], float | None]
    released: bool


def consistent(text: str) -> float | None:
    """Parses a verdict of the rule "consistent" (Du et al. 2023).

    As in the authors' code, it looks for "uncertain" first, then "yes", then "no".

    Args:
        text: The judge's text.

    Returns:
        1 for yes, 0 for no. None: uncertain, or unclear.
    """
    said = text.casefold()
    return None if "uncertain" in said else 1.0 if "yes" in said else 0.0 if "no" in said else None


def supported(text: str) -> float | None:
    """Parses a verdict of the rule "supported" (Ramesh & Li 2025).

    Args:
        text: The judge's text.

    Returns:
        1 for supported, 0.5 for partially supported, 0 for unsupported. None: unclear.

    Example:
        >>> supported("Partially supported."), supported("It is not supported."), supported("Hm.")
        (0.5, 0.0, None)
    """
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
"""consistent: Du et al. (2023). supported: Ramesh & Li (2025). Their prompt is not published; this one is ours."""


def bullets(text: str) -> list[str]:
    """Splits a text into bullets: each line from its first letter on. Lines without a letter are left out.

    Args:
        text: The text.

    Returns:
        The bullets.
    """
    lines = (re.search(r"[^\W\d_].*", line) for line in text.split("\n"))
    return [line.group().strip() for line in lines if line]


def read_people(path: Path) -> dict[str, list[str]]:
    """Reads facts about people from a JSON object, as in article.json of Du et al. (2023).

    Args:
        path: The file. It maps "Name (profession)" to a text of bullets, or to a list of facts.

    Returns:
        The facts about each person, by name without the profession.

    Raises:
        ValueError: The file is not such an object, a person has no facts, or two people have the same name.
        FileNotFoundError: There is no such file.
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
    """Writes an agent's prompt.

    Args:
        arm: Name of the protocol.
        person: The person.

    Returns:
        The request for a biography. For debates only the name: the form "biography" writes the request.
    """
    return person if arm in ("debate", "cipher") else str(FORMS[TASK_FORM].begin(person))


def judge_all(
    judge: Agent, by: str, rule: Rule, questions: Sequence[tuple[str, str, str]]
) -> list[tuple[float | None, str]]:
    """Lets the judge score facts.

    Args:
        judge: The judge.
        by: How to get a verdict: "text" or "likelihood" (`JudgeBy`).
        rule: The rule.
        questions: Triples of person, biography and fact.

    Returns:
        For each triple, the score (None: unclear) and the judge's text.
    """
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
    """Lets the judge score biographies by all rules.

    Args:
        judge: The judge.
        by: How to get a verdict: "text" or "likelihood" (`JudgeBy`).
        people: The facts about each person.
        written: Pairs of a person and the biographies that the agents wrote.

    Returns:
        For each pair, the verdicts by rule, agent and fact. An agent's verdicts are None if it does not know the person
        and the rule leaves it out.
    """
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
    """Adds up the scores of one person.

    If the rule drops unclear verdicts, the sum runs over all facts and agents. Otherwise an unclear verdict counts 0, and
    the score is the mean over an agent's facts, then over the agents.

    Args:
        rule: The rule.
        agents: For each agent, its pairs of score and verdict, or None if it does not know the person.

    Returns:
        The sum of the scores, their number, and the number of unclear verdicts.
    """
    verdicts = [score for own in agents if own is not None for score, _ in own]
    unclear = sum(score is None for score in verdicts)
    kept = [score for score in verdicts if score is not None]
    if rule.released:
        return float(sum(kept)), len(kept), unclear
    # Mean over a biography's facts, then over agents, then over people, so that all people have equal weight.
    every = [np.mean([score or 0.0 for score, _ in own]) for own in agents if own is not None]
    return (float(np.mean(every)), 1, unclear) if every else (0.0, 0, unclear)


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summarises the scores of all people, by each rule.

    Args:
        records: For each person the verdicts (`judged`).

    Returns:
        By rule: value (a share) with its 95 % interval over the people, number of people n, number of unclear verdicts
        (unparsed), and number of biographies that were not scored (skipped).
    """
    lines = {}
    for name, rule in RULES.items():
        sums = [person_scores(rule, record["verdicts"][name]) for record in records]
        skipped = sum(own is None for record in records for own in record["verdicts"][name])
        value, low, high = ratio([s for s, _, _ in sums], [n for _, n, _ in sums])
        known = dict(value=value, low=low, high=high) if value == value else dict(value=None, low=None, high=None)
        lines[name] = known | {"n": len(records)}
        lines[name] |= {"unparsed": sum(u for *_, u in sums), "skipped": skipped}
    return lines
