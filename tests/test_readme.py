"""What the README and the pages of docs/ show is what happens: their Python blocks run, one after another, and print
what their comments say."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("sites", "controls", "security", "channels", "bridges")))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_prints_what_its_comments_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names, blocks = {}, re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, page, "exec"), names)
        lines = [line for line in block.splitlines() if re.match(r"\s*print\(", line)]
        want = [line.rpartition("  # ")[2] for line in lines]
        assert len(lines) == len([node for node in ast.walk(ast.parse(block)) if is_print(node)]), "one line each"
        assert said.getvalue().splitlines() == want


def is_print(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
