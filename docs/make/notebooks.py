"""The tutorials: docs/tutorials/*.py, notebooks as text ("percent" cells), run, and made into pages and .ipynb files.

A notebook that was run is kept in .notebooks/ until its text or the package changes. With NOTEBOOKS=off none is run: its page has
no outputs, for those who write other pages.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".notebooks"
SECONDS = 600
"""Longest time that a cell may take."""


def pages(folder: Path) -> Iterator[tuple[str, str | bytes]]:
    """Runs every notebook of a folder.

    Args:
        folder: The folder.

    Yields:
        Name and content of every file that they become: a page in Markdown, the notebook with what it printed, its
        pictures.
    """
    for path in sorted(folder.glob("[!_]*.py")):
        notebook = ran(path)
        yield f"{path.stem}.ipynb", nbformat.writes(notebook)
        yield from rendered(path.stem, notebook)


@functools.cache
def package_digest() -> bytes:
    """A hash of the package's sources."""
    found = hashlib.sha256()
    for part in ("jaxcomm", "converters", "evals"):
        for path in sorted((ROOT / part).rglob("*.py")):
            found.update(path.read_bytes())
    return found.digest()


def ran(path: Path) -> nbformat.NotebookNode:
    """Runs a notebook, or reads it if it was run before and nothing has changed.

    Args:
        path: Its text.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
    """
    text = path.read_text(encoding="utf-8")
    kept = KEPT / f"{path.stem}-{hashlib.sha256(text.encode() + package_digest()).hexdigest()[:16]}.ipynb"
    if kept.is_file():
        return nbformat.read(kept, 4)
    notebook = jupytext.reads(text, fmt="py:percent")
    if os.environ.get("NOTEBOOKS") == "off":
        return notebook
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    surroundings = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # for `!jaxcomm`
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute(env=surroundings, stderr=subprocess.DEVNULL)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # or every build would name it anew
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    KEPT.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook


def tidy(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins what a cell printed to one output, and leaves out what it wrote to stderr (progress)."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and kept[-1].output_type == output.output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def rendered(name: str, notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str | bytes]]:
    """Makes a page of a notebook that was run.

    Args:
        name: Name of the page.
        notebook: The notebook.

    Yields:
        Name and content: the pictures, and the page.
    """
    parts, pictures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            if len(parts) == 1:
                parts.append(f"[Download this notebook]({name}.ipynb){{ .download }}")
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if png := data.get("image/png"):
                pictures += 1
                yield f"{name}-{pictures}.png", base64.b64decode(png)
                parts.append(f"![What the code above draws]({name}-{pictures}.png)")
            elif text := data.get("text/markdown"):
                parts.append(text)
            elif said := output.get("text") or data.get("text/plain"):
                lines = "\n".join(line.rstrip() for line in said.rstrip().split("\n"))
                parts.append(f"```{{ .text .output }}\n{lines}\n```")
    yield f"{name}.md", "\n\n".join(parts) + "\n"
