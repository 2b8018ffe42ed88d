"""What the README shows is what happens: its Python blocks run, one after another, and print what their comments say."""

import ast
import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_block_prints_what_its_comments_say():
    names, blocks = {}, re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, "README.md", "exec"), names)
        lines = [line for line in block.splitlines() if re.match(r"\s*print\(", line)]
        want = [line.rpartition("  # ")[2] for line in lines]
        assert len(lines) == len([node for node in ast.walk(ast.parse(block)) if is_print(node)]), "one line each"
        assert said.getvalue().splitlines() == want


def is_print(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
