"""Games of one's own: items, and files of them."""

import json
from pathlib import Path

from jaxcomm.evals.games import Item

KEYS = ("prompt_a", "prompt_b", "answer")
LINE = dict(prompt_a="Ann is at the Louvre Museum.", prompt_b="Which country is Ann located in?", answer="France")
ANN = Item(*LINE.values())


def write_game(path: Path, *lines) -> str:
    """A file with these lines: objects, or as they are."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return str(path)


def lines_of(items) -> list[dict]:
    return [{key: getattr(item, key) for key in KEYS} for item in items]


def numbered(n: int) -> list[dict]:
    """Items that are told apart by their numbers."""
    return [dict(prompt_a=f"It is {i}.", prompt_b="Which is it?", answer=f"number {i}") for i in range(n)]
