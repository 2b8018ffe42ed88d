"""The number that a text gives as its answer, however it is written: 1,250 is 1{,}250 is \\boxed{\\$1\\,250.00} is
1.25e3."""

# ruff: noqa: RUF001 (the characters are what is read)

from __future__ import annotations

import re
from fractions import Fraction

_TRANSLATED = str.maketrans(
    dict.fromkeys("−–‐‑﹣－", "-")
    | dict.fromkeys("×·⋅∙", "*")
    | dict.fromkeys("⁄∕÷", "/")
    | dict.fromkeys("\u00a0\u2007\u2009\u202f", "\u2009")
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "°": "", "％": "%", "＝": "=", "’": "'"}
)
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_GROUPS = r"(?<![\d.])(?<!\d,)"

_REWRITTEN = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        # What LaTeX writes around a number, or instead of a character.
        (r"\\(?:left|right|displaystyle|bf|rm)\b|\\?f?boxed(?=\s*\{)|\\[()\[\]]|\^\{?\s*\\circ\s*\}?", ""),
        (r"\\(?:text|math|operatorname|mbox)[a-z]*\s*(?=\{)", " "),
        (r"\{,\}", ","),
        (r"\\[,;:! ]|~|\\(?:thin|med|thick)space\b|\\q?quad\b", "\u2009"),
        (r"\\([$%€£#&])", r"\1"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\\(?:approx|simeq|equiv)\b|≈|≅", "="),
        (r"\\[dtc]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
        # Separators of thousands (the lakhs of 1,00,000, too); then a comma before one or two digits is a decimal point.
        (r"(?<=\d)[\u2009'_](?=\d{3}(?!\d))", ""),
        (_GROUPS + r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d|,\d)", lambda found: found[0].replace(",", "")),
        (_GROUPS + r"\d{1,3}(?:\.\d{3})+,\d+(?!\d|,\d)", lambda found: found[0].replace(".", "").replace(",", ".")),
        (_GROUPS + r"(?<![(\[{])(\d+),(\d{1,2})(?![\d)\]}]|[,.]\d)", r"\1.\2"),
        # Exponents of numbers stay, those of units and variables (cm^2) and all subscripts are no numbers.
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + found[0].translate(_SUPERSCRIPT)),
        (r"_\{[^{}]*\}|(?<=[A-Za-z\\)])_\w", ""),
        (r"(?<=\d)\s\^\s(?=\d)", "^"),
        (r"\s*\^(?:\{\s*([^{}]*?)\s*\}|\(\s*(-?\d+)\s*\)|(-?\w))", lambda found: "^" + (found[1] or found[2] or found[3] or "")),
        (r"(?<!\d)\^-?[\w.]*", ""),
        (r"[{}]", " "),
    )
)  # fmt: skip

_NUMBER = re.compile(
    r"""(?<![A-Za-z_\d^])(?<!\d[./]|\^-)  # not within a word, a longer number, a date, 1.2.3, an exponent
    (?P<minus>(?<![\w)\]%])-|(?<=[^\x00-\x7f])-)?(?:[$€£¥₹]\s?(?P<also>-)?)?
    (?:(?P<whole>\d{1,400})\s+(?=\d+/\d))?
    (?P<digits>(?<![.\d])\.\d{1,400}|\d{1,400}(?:\.\d{1,400})?)(?!\d|\.\d)
    (?:[eE](?P<e>[+-]?\d{1,3})(?![\w.]))?
    (?:\s?/\s?(?P<over>\d{1,400}(?:\.\d{1,400})?)(?!\d|\.\d|\s?/))?
    (?:\^(?P<power>-?\d{1,3})(?!\d|\.\d))?(?!\^)
    (?:\s*(?:\*|x|\\times)\s*10\^(?P<ten>-?\d{1,3})(?!\d|\.\d))?
    (?:\s*(?P<unit>thousand|million|billion|trillion)\b|(?P<k>k)\b)?""",
    re.VERBOSE,
)
_UNITS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_BOX = re.compile(r"\\?f?boxed\s*\{")
_BRACED = re.compile(r"(?<![\w^_}])\{([^{}]*)\}")
_STATED = re.compile(r"####|\banswer\b(?:\W*[:=]|[^.:=\n]{0,60}?\b(?:is|be|equals)\b)", re.IGNORECASE)
_CLAUSE = re.compile(r"[\s:*]*(.*?)(?=$|\n|[.!?;](?=\s|$|\*)|,?\s(?:because|since|given)\b)", re.DOTALL | re.IGNORECASE)


def numeric(text: str) -> str | None:
    """The number a text gives as its answer: that of its last box (\\\\boxed{72}; nothing after it counts), else of the last
    words that state one (#### 72; The answer is 72), else the last of all.

    Returns:
        A decimal, "1250" of "$1,250.00", "0.5" of "\\\\frac{1}{2}"; a fraction in lowest terms where a decimal would not end,
        "1/3". Per cent and units do not count, "1.5 million" does. None: there is no number, or the box holds none.
    """
    boxes = [box for box in boxed(text) if box.strip(" .") not in ("", "answer", "\\text{answer}", "X")]
    if boxes:
        return _quantity(boxes[-1], strict=True)
    if braced := [content for content in _BRACED.findall(text) if _NUMBER.fullmatch(_plain(content).strip())]:
        return _quantity(braced[-1])
    plain = _plain(text)
    for said in reversed(list(_STATED.finditer(plain))):
        clause = _CLAUSE.match(plain[said.end() : said.end() + 300])
        if clause and not clause[1].startswith("not ") and (value := _quantity(clause[1])) is not None:
            return value
    values = [value for found in _NUMBER.finditer(plain) if (value := _value(found)) is not None]
    return _spell(values[-1]) if values else None


def boxed(text: str) -> list[str]:
    """What stands in the boxes of a text, up to the brace that closes each, or to the line's end if none does."""
    found, box = [], _BOX.search(text)
    while box:
        depth, end = 1, box.end()
        while end < len(text) and depth and text[end] != "\n":
            depth += {"{": 1, "}": -1}.get(text[end], 0) * (text[end - 1] != "\\")
            end += 1
        found.append(text[box.end() : end - (depth == 0)])
        box = _BOX.search(text, end)
    return found


def _plain(text: str) -> str:
    """LaTeX and typography as plain characters: 1\\,250 is 1250, \\frac{1}{2} is 1/2, x_{1}^2 is x."""
    text = text.translate(_TRANSLATED)
    for pattern, new in _REWRITTEN:
        text = pattern.sub(new, text)
    return text


def _quantity(text: str, strict: bool = False) -> str | None:
    """The one number of a short text, after its last "="; of "72 for 3 people" the first. None: a list, or a sum that is not
    worked out. strict: mathematics that is not read here (\\sqrt, \\pi) makes it None, too."""
    said = re.sub(r"^(\W*)-\s+(?=[\d.$])", r"\1-", _plain(text).rpartition("=")[2].strip())
    found = _NUMBER.search(said)
    if found is None or (strict and "\\" in said) or re.match(r"\s*[-+*/^,;:&]\s*[-($]*\.?\d", said[found.end() :]):
        return None
    value = _value(found)
    return None if value is None else _spell(value)


def _value(found: re.Match[str]) -> Fraction | None:
    """None: it divides by 0."""
    try:
        value = Fraction(found["digits"]) / Fraction(found["over"] or 1)
        value = (value ** int(found["power"] or 1) + int(found["whole"] or 0)) * Fraction(10) ** int(found["e"] or 0)
    except ZeroDivisionError:
        return None
    value *= Fraction(10) ** int(found["ten"] or 0) * _UNITS.get(found["unit"], 1000 if found["k"] else 1)
    return -value if found["minus"] or found["also"] else value


def _spell(value: Fraction) -> str:
    """A decimal, or a fraction where that would not end."""
    rest, places = value.denominator, 0
    for factor in (2, 5):
        times = 0
        while rest % factor == 0:
            rest, times = rest // factor, times + 1
        places = max(places, times)
    if rest > 1:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    point = len(digits) - places
    return "-" * (value < 0) + digits[:point] + "." * (places > 0) + digits[point:]
