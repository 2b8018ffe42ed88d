"""Find the number that a text gives as its answer, in any notation: 1,250 and 1{,}250 and \\boxed{\\$1\\,250.00} and
1.25e3 are the same number."""

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
        # LaTeX commands around a number, or in the place of a character.
        (r"\\(?:left|right|displaystyle|bf|rm)\b|\\?f?boxed(?=\s*\{)|\\[()\[\]]|\^\{?\s*\\circ\s*\}?", ""),
        (r"\\(?:text|math|operatorname|mbox)[a-z]*\s*(?=\{)", " "),
        (r"\{,\}", ","),
        (r"\\[,;:! ]|~|\\(?:thin|med|thick)space\b|\\q?quad\b", "\u2009"),
        (r"\\([$%€£#&])", r"\1"),
        (r"\\(?:times|cdot)\b", "*"),
        (r"\\(?:approx|simeq|equiv)\b|≈|≅", "="),
        (r"\\[dtc]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
        # Remove separators of thousands (and of lakhs: 1,00,000). A comma left before one or two digits is a decimal point.
        (r"(?<=\d)[\u2009'_](?=\d{3}(?!\d))", ""),
        (_GROUPS + r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d|,\d)", lambda found: found[0].replace(",", "")),
        (_GROUPS + r"\d{1,3}(?:\.\d{3})+,\d+(?!\d|,\d)", lambda found: found[0].replace(".", "").replace(",", ".")),
        (_GROUPS + r"(?<![(\[{])(\d+),(\d{1,2})(?![\d)\]}]|[,.]\d)", r"\1.\2"),
        # Keep exponents of numbers. Remove exponents of units and variables (cm^2) and all subscripts.
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
    """The number that a text gives as its answer: the number in its last box (\\\\boxed{72}; text after it is ignored), else
    in the last words that state an answer (#### 72; The answer is 72), else the last number.

    Returns:
        A decimal: "1250" for "$1,250.00", "0.5" for "\\\\frac{1}{2}". A fraction in lowest terms if the decimal would not
        end: "1/3". Per cent signs and units are ignored; "million" is not ("1.5 million"). None: there is no number, or
        the box holds none.
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
    """Contents of the boxes of a text: up to the closing brace, or to the end of the line if there is none."""
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
    """Turn LaTeX and typography into plain characters: 1\\,250 becomes 1250, \\frac{1}{2} becomes 1/2, x_{1}^2 becomes x."""
    text = text.translate(_TRANSLATED)
    for pattern, new in _REWRITTEN:
        text = pattern.sub(new, text)
    return text


def _quantity(text: str, strict: bool = False) -> str | None:
    """The one number of a short text, after its last "=". For "72 for 3 people", the first. None for a list, or for a sum
    without its result. strict: also None for mathematics that is not parsed here (\\sqrt, \\pi)."""
    said = re.sub(r"^(\W*)-\s+(?=[\d.$])", r"\1-", _plain(text).rpartition("=")[2].strip())
    found = _NUMBER.search(said)
    if found is None or (strict and "\\" in said) or re.match(r"\s*[-+*/^,;:&]\s*[-($]*\.?\d", said[found.end() :]):
        return None
    value = _value(found)
    return None if value is None else _spell(value)


def _value(found: re.Match[str]) -> Fraction | None:
    """Value of a matched number. None: it divides by 0."""
    try:
        value = Fraction(found["digits"]) / Fraction(found["over"] or 1)
        value = (value ** int(found["power"] or 1) + int(found["whole"] or 0)) * Fraction(10) ** int(found["e"] or 0)
    except ZeroDivisionError:
        return None
    value *= Fraction(10) ** int(found["ten"] or 0) * _UNITS.get(found["unit"], 1000 if found["k"] else 1)
    return -value if found["minus"] or found["also"] else value


def _spell(value: Fraction) -> str:
    """Write a number as a decimal, or as a fraction if the decimal would not end."""
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
