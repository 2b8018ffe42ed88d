"""What the README and the pages of docs/ show is what happens: their Python blocks run, one after another, and print
what their comments say. What they quote of error messages is in the source. Every public module is in the reference."""

import ast
import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

from test_docstrings import MODULES

ROOT = Path(__file__).parents[1]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PACKAGE = ("jaxcomm", "converters", "evals")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


# large_models.md shows what needs large models and several devices.
PAGES = [
    page
    for page in ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    if PYTHON.search(text_of(page)) and page != "docs/large_models.md"
]


def test_pages_with_blocks_are_found():
    assert {"README.md", "docs/index.md", "docs/sites.md", "docs/controls.md"} < {*PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_prints_what_its_comments_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Inspect writes its logs where it is called
    names = {}
    for block in PYTHON.findall(text_of(page)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, page, "exec"), names)
        lines = [line for line in block.splitlines() if re.match(r"\s*print\(", line)]
        want = [line.rpartition("  # ")[2] for line in lines]
        assert len(lines) == len([node for node in ast.walk(ast.parse(block)) if is_print(node)]), "one line each"
        assert said.getvalue().splitlines() == want


def is_print(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"


@pytest.fixture(scope="module")
def source():
    """The package's source, its strings joined over lines and without the prefixes and values of f-strings."""
    texts = [path.read_text(encoding="utf-8") for part in PACKAGE for path in (ROOT / part).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


def test_messages_that_the_page_on_errors_quotes_are_in_the_source(source):
    quoted = re.findall(r"^\| `(.+?)` \|", text_of("docs/errors.md"), re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        for part in message.split("…"):
            assert part in source, f"{message}: nothing says {part!r}"


def test_every_public_module_is_in_the_reference_once(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "make"), *sys.path])
    made = importlib.import_module("modules")
    shown = [module for group in made.GROUPS for module in made.grouped(group)]
    assert sorted(shown) == sorted(MODULES)
    nav = text_of("mkdocs.yml")
    assert all(f"reference/{group.page}.md" in nav for group in made.GROUPS)


def test_every_command_is_in_the_reference():
    from jaxcomm.evals.cli import COMMANDS

    words = re.search(r"^COMMANDS = \((.*?)\)", text_of("docs/make/hooks.py"), re.DOTALL | re.MULTILINE)[1]
    shown = re.findall(r'"([a-z -]+)"', words)
    assert {kind.typed for kind in COMMANDS} == {command.split()[0] for command in shown}
