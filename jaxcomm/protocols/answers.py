"""Find the final answer in free text, for votes and for scoring debates as Du et al. (2023) do.

`numerals` parses numbers, `letters` parses letters. `released` parses like the code that Du et al. published: it drops
minus signs, takes the last braces that hold digits, takes the last (X) as the letter, and counts an answer that cannot
be parsed as correct.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from jaxcomm.protocols.letters import choice
from jaxcomm.protocols.numerals import numeric

Parse = Callable[[str], str | None]
Tie = Literal["first", "last"]
"""Winner of a tied vote: the answer of the first agent (Du et al.) or of the last."""


def whole(text: str) -> str | None:
    """The text's first line, in lower case and without a final full stop."""
    return text.strip().split("\n")[0].rstrip(".").casefold() or None


ANSWERS: dict[str, Parse] = {"numeric": numeric, "choice": choice, "text": whole}


def released_numeric(text: str) -> str | None:
    """Du et al.'s rule: the digits of the last braces that hold any, else the last digits."""
    braced = [digits for found in re.findall(r"\{([0-9.,$]*)\}", text) if (digits := re.sub(r"[^0-9.]", "", found))]
    found = braced or re.findall(r"\d+\.?\d*", text)
    return numeric(found[-1]) if found else None


def released_choice(text: str) -> str | None:
    """Du et al.'s rule: the last (X), whatever X is."""
    found = re.findall(r"\((\w)\)", text)
    return found[-1].upper() if found else None


RELEASED: dict[Parse, Parse] = {numeric: released_numeric, choice: released_choice}
"""Parsers of the code that Du et al. published. Use them to compare scores with theirs, not for votes."""


def vote(answers: Sequence[str | None], tie: Tie = "first") -> int:
    """Index of the first (or last) agent that gave the majority's answer. An agent without an answer has no vote."""
    if tie not in get_args(Tie):
        raise ValueError(f"unknown tie {tie!r}: choose one of {', '.join(get_args(Tie))}")
    given = [a for a in answers if a is not None]
    most = max((given.count(a) for a in given), default=0)
    winners = [i for i, a in enumerate(answers) if a is not None and given.count(a) == most]
    winners = winners or list(range(len(answers)))
    return winners[0] if tie == "first" else winners[-1]


def correct(text: str, gold: str, parse: Parse, *, released: bool = False) -> bool:
    """Whether an answer equals the reference. One that cannot be parsed is wrong; with `released` it is right."""
    said, want = RELEASED.get(parse, parse)(text) if released else parse(text), parse(gold)
    if released:
        return said is None or said == (want or "").lstrip("-")
    return said is not None and said == want
