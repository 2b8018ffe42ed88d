"""The facts behind both games: people, landmarks, companies, and the combinations that are held out of training.

`world.json` holds the facts. `held_out` is a fixed split of all combinations. The games use only one side. The training
text of the embedded pair (`evals/pair/text.py`) uses only the other, whatever the seeds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a game. A reads `prompt_a`, B reads `prompt_b`, and B should say `answer`.

    Attributes:
        prompt_a: The information that A has.
        prompt_b: The question to B.
        answer: The right answer.
        choices: The answers named in B's prompt. Empty: it names none.
    """

    prompt_a: str
    prompt_b: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Landmark:
    """A landmark and where it is.

    Attributes:
        name: Its name, without an article.
        article: Whether the name takes "the".
        city: Its city.
        country: Its country.
        continent: Its continent.
    """

    name: str
    article: bool
    city: str
    country: str
    continent: str

    @property
    def phrase(self) -> str:
        """The name with its article, as sentences use it."""
        return f"the {self.name}" if self.article else self.name


@dataclasses.dataclass(frozen=True)
class World:
    """The facts used by both games and by the embedded pair's training text.

    Attributes:
        landmarks: All landmarks.
        names: Given names in two groups. "seen" names occur in the training text, "new" names never do.
        stems: First words of company names, in the same two groups.
        suffixes: Last words of company names.
        filler: Sentences about something else.
    """

    landmarks: tuple[Landmark, ...]
    names: dict[str, tuple[str, ...]]
    stems: dict[str, tuple[str, ...]]
    suffixes: tuple[str, ...]
    filler: tuple[str, ...]


@functools.cache
def world() -> World:
    """Reads the facts in world.json, once for each process."""
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
    """Tests whether a combination, such as a person and a landmark, belongs to the games.

    About a fifth of all combinations do. They occur in no training text of the embedded pair.

    Args:
        *parts: The names. Their order does not matter.

    Returns:
        True: the combination may occur in a game. False: it may occur in training.
    """
    return zlib.crc32("|".join(sorted(parts)).encode()) % 5 == 0
