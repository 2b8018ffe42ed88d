"""Final answers in free text, for votes and for scoring debates as Du et al. (2023) do.

`released` follows the code they published where it differs: minus signs are dropped, and what cannot be parsed counts as
correct.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal, get_args

Parse = Callable[[str], str | None]
Tie = Literal["first", "last"]
"""Of answers with equally many votes, the one given by the first (Du et al.) or by the last agent wins."""

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\d.])\.\d+)")
"""A minus that follows a digit, a letter or a bracket is no sign: 5-10 minutes."""
_BRACED = re.compile(r"\{\s*(-?[$\d.,]*\d[$\d.,]*)\s*\}")


def numeric(text: str) -> str | None:
    """The last number in braces (\\\\boxed{72}), else the last number: digits as they are counted, "1,250.0" is 1250."""
    found = _BRACED.findall(text) or _NUMBER.findall(text)
    if not found:
        return None
    try:
        value = Decimal(re.sub(r"[$,]", "", found[-1]).rstrip("."))
    except InvalidOperation:
        return None
    if not value:
        return "0"
    return f"{value:f}".rstrip("0").rstrip(".") if "." in f"{value:f}" else f"{value:f}"


def choice(text: str) -> str | None:
    """The letter of the last "(X)", else of the last capital from A to J, but I, that stands alone."""
    found = re.findall(r"\((\w)\)", text) or re.findall(r"\b([A-HJ])\b", text)
    return found[-1].upper() if found else None


def whole(text: str) -> str | None:
    """The text itself, its first line without case and a final full stop."""
    return text.strip().split("\n")[0].rstrip(".").casefold() or None


ANSWERS: dict[str, Parse] = {"numeric": numeric, "choice": choice, "text": whole}


def vote(answers: Sequence[str | None], tie: Tie = "first") -> int:
    """The agent whose answer the majority gave: the first of them, or the last. Who gave none has no vote."""
    if tie not in get_args(Tie):
        raise ValueError(f"unknown tie {tie!r}: choose one of {', '.join(get_args(Tie))}")
    given = [a for a in answers if a is not None]
    most = max((given.count(a) for a in given), default=0)
    winners = [i for i, a in enumerate(answers) if a is not None and given.count(a) == most]
    winners = winners or list(range(len(answers)))
    return winners[0] if tie == "first" else winners[-1]


def correct(text: str, gold: str, parse: Parse, *, released: bool = False) -> bool:
    """Whether an answer is the reference's. What cannot be parsed is wrong, or, as `released`, right."""
    said, want = parse(text), parse(gold)
    if released:
        if said is None:
            return True
        said, want = said.lstrip("-"), (want or "").lstrip("-")
    return said is not None and said == want
