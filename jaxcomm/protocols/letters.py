"""The letter, A to J, that a text gives as its choice."""

# ruff: noqa: RUF001 (the characters are what is read)

from __future__ import annotations

import re

from jaxcomm.protocols.numerals import boxed

_IN_WORD = "A-Za-zÀ-ɏ0-9"
_LETTER = rf"""(?<![{_IN_WORD}'’-])(?<![{_IN_WORD}][.(\[])(?P<letter>[A-J])(?![{_IN_WORD}'’+#]|-\w|\.[A-Za-z]\b)"""
"""A letter that stands alone, not within a word (vitamin B-12, U.S.A., B's, P(B))."""
_NO_ARTICLE = (
    r"(?!(?<=[AI])\s+(?!(?:is|was|as|or|and|but|because|since|given|due|seems|for|from|with|which|so|over|not)\b)[a-z])"
)
"""Excludes words: "A dog" and "I think" are not choices."""
_MARKS = r"""[\s*_"'`“”‘$\\({\[:]*"""
_FILLER = rf"{_MARKS}(?:(?:text\w*|math\w*|definitely|clearly|probably|likely|most|the|option|choice|answer|letter)\b{_MARKS})*"
_CHOSEN = rf"{_FILLER}{_LETTER}{_NO_ARTICLE}"
_LOWER = _CHOSEN.replace("[A-J]", "[a-j]", 1) + r"(?!\W*\s[a-z])"

_ANSWER = r"(?:####|\b(?i:answer|choice|option|solution)\b[^.;\n(]{0,60}?(?:\b(?i:is|be|are)\b|[:=]))"
_STATED = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_ANSWER}{_CHOSEN}",
        rf"{_ANSWER}{_LOWER}",
        rf"\b(?i:choose|chose|pick|picked|select|selected|go with|going with|opt for|vote for|prefer|settle on|stick with){_CHOSEN}",
        rf"\b(?i:it is|it's|must be|therefore|thus|hence|so),?{_CHOSEN}(?=\W*(?:$|[.,;\n]))",
        rf"{_LETTER}\W{{0,3}}\s+(?:is|was|must be|seems|looks|would be)\s+(?:[a-z]+\s+){{0,2}}?(?:correct|right|best|true|answer)\b",
        rf"(?m)^[^\w\n]*{_LETTER}[^\w\n]*$",
        r"\A\W*(?P<letter>[a-j])\W*\Z",
    )
)
_BRACKETED = re.compile(rf"(?<![{_IN_WORD}(\[])[(\[]\s*(?P<letter>[A-Ja-j])\s*[)\]]")
_IN_BOX = re.compile(r"\W*(?:(?:text|math)[a-z]*)?\W*(?P<letter>[A-J](?=(?![-'’+#])\b.*)|[a-j](?=\W*$))[\s\S]*")
_LABEL = re.compile(rf"(?:^|\n|[.!?;]\s)[^\w\n]*{_LETTER}(?=[.):])")
_BARE = re.compile(rf"{_LETTER}{_NO_ARTICLE}")
_REFUSED = re.compile(
    r"""[(\[]?\b[A-J]\b[)\]]?\s*(?:\b(?:or|and)\b|/)\s*(?:option\s+|choice\s+)?[(\[]?[A-J]\b[)\]]?(?!\s+is\b)
    |\b(?:not|unlike|neither|nor|than|instead\ of|rule\ out|eliminate)\s+(?:option\s+|choice\s+)?[(\[]?[A-Ja-j]\b[)\]]?
    |(?:\b(?:option|choice)\s+)?[(\[]?\b[A-J]\b[)\].]?(?:\s+(?!(?:because|since|as|option|choice|[A-J])\b)\w+){0,3}?\s+(?:is|are|was)\s+(?:\w+ly\s+)?(?:not|wrong|incorrect|false)\b
    |[(\[][A-Ja-j][)\]]\s+(?:no|wrong|incorrect|false)\b""",
    re.VERBOSE | re.IGNORECASE,
)  # fmt: skip
"""Letters that the text does not give as the answer: A or B; not B; (C) is wrong."""


def choice(text: str) -> str | None:
    """The letter (A to J) that a text gives as its choice: the letter in its last box, else in the last words that state a
    choice (The answer is (B); I choose B; a line of its own), else the last letter in brackets, the one that labels an
    answer (B. Paris), or the last single capital. Letters that the text rejects do not count."""
    text = text.translate(str.maketrans("（）［］", "()[]"))
    if boxes := [found for box in boxed(text) if (found := _IN_BOX.fullmatch(box))]:
        return boxes[-1]["letter"].upper()
    text = _REFUSED.sub(" ", text)
    stated = [found for pattern in _STATED for found in pattern.finditer(text)]
    if stated:
        return max(stated, key=lambda found: found.start("letter"))["letter"].upper()
    if bracketed := _BRACKETED.findall(text):
        return bracketed[-1].upper()
    labels = set(_LABEL.findall(text))
    if labels:
        return labels.pop() if len(labels) == 1 else None
    bare = [letter for letter in _BARE.findall(text) if letter != "I"]
    return bare[-1] if bare else None
