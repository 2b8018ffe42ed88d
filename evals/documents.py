"""Documents of headings, paragraphs, tables and pictures: written as Markdown, as one HTML page, or on a console."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
import sys
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.table
import rich.text

from . import figures


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading.

    Attributes:
        level: 1 is the title of the document, 2 a section, and so on.
        text: The text.
    """

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Preformatted text, such as commands.

    Attributes:
        text: The text.
        columns: Whether the text is aligned in columns. If so, HTML does not break its lines.
    """

    text: str
    columns: bool = False


@dataclasses.dataclass(frozen=True)
class Items:
    """A list of items.

    Attributes:
        texts: The text of each item.
    """

    texts: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Names of the columns.
        rows: The cells of each row.
        left: Number of first columns that hold text. The others hold numbers and are aligned to the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        file: Name of its file.
        png: Its bytes.
        text: Description for readers who cannot see it.
    """

    file: str
    png: bytes
    text: str


Block = Heading | Code | Items | Table | Picture | str
"""A part of a document; a string is a paragraph."""


def markdown(blocks: Iterable[Block]) -> str:
    """Writes a document as Markdown. A picture is a link to its file.

    Args:
        blocks: The blocks of the document.

    Returns:
        The text.

    Example:
        >>> print(markdown([Heading(2, "Scores"), Table(["protocol", "hits"], [["silent", "3"]])]), end="")
        ## Scores
        <BLANKLINE>
        | protocol | hits |
        | :-- | --: |
        | silent | 3 |
    """
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {plain(text)}")
            case Code(text):
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
                parts.append(f"{fence}\n{text}\n{fence}")
            case Items(texts):
                parts.append("\n".join(f"- {plain(text)}" for text in texts))
            case Table(columns, rows, left):
                rule = [":--" if n < left else "--:" for n in range(len(columns))]
                lines = [[plain(cell) for cell in columns], rule, *([plain(cell) for cell in row] for row in rows)]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            case Picture(file, _, text):
                parts.append(f"![{plain(text)}]({file})")
            case str():
                parts.append(plain(block))
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Escapes a text so that Markdown shows it unchanged.

    Otherwise Markdown would interpret emphasis, links, tags and line starts.

    Args:
        text: The text.

    Returns:
        The text with escapes, and with <br> in place of line breaks.
    """
    escaped = re.sub(r"[\\`*|~$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)", r"\\\g<0>", html.escape(text, quote=False))
    lines = re.split(r"\r\n?|\n", escaped)
    return "<br>".join(re.sub(r"^(\s*\d*)([-+.)](?=\s|$)|#+(?=\s|$)|--+|=+)", r"\1\\\2", line) for line in lines)


STYLE = (
    figures.STYLE
    + """
body { max-width: 1320px }
h2 { margin-top: 2em; padding-top: .4em; border-top: 1px solid #ccc }
pre.wrapped { white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 12px 0 }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35 }
th, td { padding: 4px 9px; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
td { font-variant-numeric: tabular-nums }
td.number { white-space: nowrap }
th { vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid #888 }
.text { text-align: left }
td.text:nth-child(-n+2) { min-width: 5em }
tr.here td { background: #f2f6fb }
img { max-width: 100%; height: auto }
li { margin: 4px 0; font-size: 13px }
"""
)


def page(title: str, blocks: Iterable[Block]) -> str:
    """Writes a document as one HTML page that needs no other file.

    Args:
        title: Title of the page.
        blocks: The blocks of the document. Pictures are embedded.

    Returns:
        The page.
    """
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Code(text, columns):
                parts.append(f"<pre{'' if columns else ' class=wrapped'}>{html.escape(text)}</pre>")
            case Items(texts):
                parts += ["<ul>", *(f"<li>{html.escape(text)}</li>" for text in texts), "</ul>"]
            case Table():
                parts.append(html_table(block))
            case Picture(_, png, text):
                data = base64.b64encode(png).decode()
                parts.append(f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>')
            case str():
                parts.append(f"<p>{html.escape(block)}</p>")
    return figures.document(title, STYLE, parts)


def html_table(table: Table) -> str:
    """Writes a table as HTML. A row whose first cell begins with "here, " is highlighted.

    Args:
        table: The table.

    Returns:
        The HTML.
    """
    side = lambda n: "text" if n < table.left else "number"
    lined = lambda text: html.escape(text).replace("\n", "<br>")
    head = "".join(f'<th class="{side(n)}">{html.escape(name)}</th>' for n, name in enumerate(table.columns))
    lines = [f"<tr>{head}</tr>"]
    for row in table.rows:
        own = "".join(f'<td class="{side(n)}">{lined(cell)}</td>' for n, cell in enumerate(row))
        lines.append(f'<tr class="here">{own}</tr>' if row[0].startswith("here, ") else f"<tr>{own}</tr>")
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def console(width: int) -> rich.console.Console:
    """Opens standard output as a console.

    Args:
        width: Number of columns if the output is not a terminal. A terminal has its own width.

    Returns:
        The console.
    """
    return rich.console.Console(width=None if sys.stdout.isatty() else width)


def show(blocks: Iterable[Block], console: rich.console.Console) -> None:
    """Prints a document, without its pictures.

    Args:
        blocks: The blocks of the document.
        console: The console.
    """
    say = lambda text, **how: console.print(text, markup=False, highlight=False, emoji=False, **how)
    for block in blocks:
        match block:
            case Heading(level, text):
                say(f"\n{text}", style="bold" if level < 3 else "bold italic")
            case Code(text):
                say(text, soft_wrap=True)
            case Items(texts):
                say("\n".join(f"- {text}" for text in texts))
            case Table(columns, rows, left):
                table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
                for n, name in enumerate(columns):
                    table.add_column(rich.text.Text(name), justify="left" if n < left else "right")
                for row in rows:
                    table.add_row(*(rich.text.Text(cell) for cell in row))
                console.print(table)
            case str():
                say(block)
