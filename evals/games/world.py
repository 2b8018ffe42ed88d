"""The world both games live in: people, landmarks, companies, and which combinations are kept out of training.

`world.json` holds the facts. `held_out` splits all combinations once and for ever: the games draw only from one side,
the text the embedded pair is trained on (`evals/pair/text.py`) only from the other, whatever their seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Item:
    """One game: A reads prompt_a, B reads prompt_b, and B should say `answer`. `choices`: what B may pick from, if its
    prompt names it."""

    prompt_a: str
    prompt_b: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Landmark:
    name: str
    article: bool
    city: str
    country: str
    continent: str

    @property
    def phrase(self) -> str:
        return f"the {self.name}" if self.article else self.name


@dataclasses.dataclass(frozen=True)
class World:
    landmarks: tuple[Landmark, ...]
    names: dict[str, tuple[str, ...]]
    """Given names: "seen" ones occur in the pair's training text, "new" ones never do."""
    stems: dict[str, tuple[str, ...]]
    """First words of company names, likewise."""
    suffixes: tuple[str, ...]
    filler: tuple[str, ...]


@functools.cache
def world() -> World:
    data = json.loads(resources.files("jaxcomm.evals.games").joinpath("world.json").read_text(encoding="utf-8"))
    tuples = lambda groups: {kind: tuple(values) for kind, values in groups.items()}
    return World(
        landmarks=tuple(Landmark(**entry) for entry in data["landmarks"]),
        names=tuples(data["names"]),
        stems=tuples(data["companies"]["stems"]),
        suffixes=tuple(data["companies"]["suffixes"]),
        filler=tuple(data["filler"]),
    )


def held_out(*parts: str) -> bool:
    """True for a fifth of all combinations (order does not matter): those of the games, never those of training."""
    return zlib.crc32("|".join(sorted(parts)).encode()) % 5 == 0
