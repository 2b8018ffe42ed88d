"""A game: its items, choices of answers, and worked examples. The paper's two games, or a game from a file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import json_lines
from .companies import tip_sheets
from .places import countries
from .world import Item, world

GAMES: dict[str, Callable[..., list[Item]]] = {"countries": countries, "tip_sheets": tip_sheets}
"""name -> generator(seed, n, names); n defaults to the paper's 100 and 70 prompts."""
FIELDS = ("prompt_a", "prompt_b", "answer", "choices")
"""Fields of a line of a game from a file. The last field is optional."""
SPELLINGS: dict[str, tuple[str, ...]] = {
    "Australia": ("New South Wales",),
    "Czechia": ("Czech Republic",),
    "Netherlands": ("Holland",),
    "Russia": ("Russian Federation",),
    "South Korea": ("Republic of Korea",),
    "Turkey": ("Türkiye", "Turkiye"),
    "United Kingdom": ("UK", "U.K", "Great Britain", "Britain", "England", "Scotland", "Wales", "Northern Ireland"),
    "United States": ("USA", "U.S.A", "US", "U.S", "United States of America", "New Mexico", "New England"),
}
"""Other names of countries, and names of their parts."""


@dataclasses.dataclass(frozen=True)
class Game:
    """A game: the items to play, and how to recognise answers.

    Attributes:
        name: "countries", "tip_sheets", or the name of a file without its ending.
        items: The items to play.
        examples: Other items. Agents see them with their answers as worked examples; they are not played.
        answers: The choices for every item without its own choices.
        instruction: Instruction for chat models on the form of the answer.
        hint: Text that the wording "kvcomm" adds to its instruction.
        spellings: Further names of an answer.
        source: How the items were drawn, for records.
    """

    name: str
    items: tuple[Item, ...]
    examples: tuple[Item, ...] = ()
    answers: tuple[str, ...] = ()
    instruction: str = ""
    hint: str = ""
    spellings: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def choices(self, item: Item) -> tuple[str, ...]:
        """The choices of an item: its own, or else the answers of the game."""
        return item.choices or self.answers

    @property
    def information(self) -> str:
        """Whether A's information is "private", "shared" or "mixed" (`information`)."""
        return information((item.prompt_a, item.prompt_b) for item in self.items)

    def named(self, text: str, item: Item) -> str | None:
        """Finds the choice that a text names first, in any of its spellings.

        Case is ignored, except in spellings in all capitals ("US"). If two spellings begin at the same letter, the longer
        one is used.

        Args:
            text: The text, such as a reply.
            item: The item with the choices.

        Returns:
            The choice. None: the text names no choice.

        Example:
            >>> game = draw("countries", n=1)
            >>> game.named("It is in Holland, not in Spain.", game.items[0])
            'Netherlands'
        """
        found = []
        for choice in self.choices(item):
            for spelling in (choice, *self.spellings.get(choice, ())):
                flags = 0 if spelling.isupper() else re.IGNORECASE
                if match := re.search(rf"(?<![^\W_]){re.escape(spelling)}(?![^\W_])", text, flags):
                    found.append((match.start(), -len(spelling), choice))
        return min(found)[2] if found else None

    def part(self, indices: Sequence[int] | np.ndarray) -> Game:
        """Selects some of the items.

        Args:
            indices: Indices of the items, in the order of playing.

        Returns:
            The same game with these items only.
        """
        return dataclasses.replace(self, items=tuple(self.items[i] for i in indices))


INFORMATION = {
    "private": "private information: A knows what B cannot",
    "shared": "shared information: B reads all that A knows",
    "mixed": "private information in some items, shared in others",
}
"""Kinds of information. The gain of a channel depends on it: the same channel may give 76 points on private facts and none
on shared ones (Cheng et al. 2026, arXiv 2608.04893)."""


def information(prompts: Iterable[tuple[str, str]]) -> str:
    """Classifies information: does B read everything that A reads?

    Args:
        prompts: A's prompt and B's prompt of each item.

    Returns:
        "shared": B reads all of A's prompt in every item. "private": in no item. "mixed": in some items.

    Example:
        >>> information([("Bob is at Petra.", "Where is Bob?"), ("2 + 2?", "2 + 2?")])
        'mixed'
    """
    shared = [" ".join(a.split()) in " ".join(b.split()) for a, b in prompts]
    return "shared" if all(shared) else "mixed" if any(shared) else "private"


def draw(name: str, seed: int = 0, n: int | None = None, *, names: str = "seen", examples: int = 0) -> Game:
    """Draws a game of n items.

    Args:
        name: "countries", "tip_sheets", or a file FILE.jsonl of your own. Each line of the file is a JSON object with
            the fields in `FIELDS`; choices may be left out.
        seed: Seed of the items.
        n: Number of items. Default: 100 (countries) and 70 (tip_sheets), as in the paper; for a file, all of its items
            that are not examples.
        names: "seen" or "new" people and companies. A file has its own.
        examples: Number of worked examples: further items with their answers. None of them is played.

    Returns:
        The game.

    Raises:
        ValueError: There is no such game; there are too few items; a line of the file is not an item.
        FileNotFoundError: There is no such file.

    Example:
        >>> game = draw("countries", n=2, examples=1)
        >>> game.items[1].prompt_a, game.items[1].prompt_b, game.items[1].answer
        ('Adam is at Chichen Itza.', 'Which country is Adam located in?', 'Mexico')
        >>> len(game.examples), len(game.answers)
        (1, 47)
    """
    if (n is not None and n < 1) or examples < 0:
        raise ValueError(f"n = {n}, examples = {examples}: play at least 1 item, after 0 examples or more")
    if name in GAMES:
        return _published(name, seed, n, names, examples)
    if not name.endswith(".jsonl"):
        raise ValueError(f"there is no game {name!r}: name {', '.join(GAMES)} or a file, FILE.jsonl")
    return _own(Path(name), seed, n, examples)


def _published(name: str, seed: int, n: int | None, names: str, examples: int) -> Game:
    make = GAMES[name]
    count = len(make(seed, names=names)) if n is None else n
    # Draw all items at once. The first ones are the same as without examples.
    items = make(seed, n=count + examples, names=names)
    source = {"games_seed": seed, "names": names}
    told: dict[str, Any]
    if name == "countries":
        places = len(world().landmarks)
        if examples and len(items) > places:
            raise ValueError(
                f"{count} games and {examples} examples need {len(items)} landmarks, there are {places}: ask for fewer"
            )
        every = tuple(sorted({landmark.country for landmark in world().landmarks}))
        hint = "You are required to extrapolate the country from the context."
        told = dict(answers=every, spellings=SPELLINGS, instruction="Answer with the country's name only.", hint=hint)
    else:
        stems = {choice: (choice.split()[0],) for item in items for choice in item.choices}
        told = dict(spellings=stems, instruction="Answer with the company's name only.")
    return Game(name, tuple(items[:count]), tuple(items[count:]), source=source, **told)


def _own(path: Path, seed: int, n: int | None, examples: int) -> Game:
    items = read_items(path)
    count = len(items) - examples if n is None else n
    if count < 1 or count + examples > len(items):
        raise ValueError(
            f"{path} has {len(items)} items, {max(count, 1)} and {examples} examples were asked for: ask for fewer"
        )
    order = np.arange(len(items))
    if count + examples < len(items) or examples:
        order = np.random.default_rng([seed, 8]).permutation(len(items))[: count + examples]
    played, shown = np.sort(order[:count]), order[count:]
    answers = tuple(dict.fromkeys(item.answer for item in items))
    take = lambda rows: tuple(items[i] for i in rows)
    return Game(path.stem, take(played), take(shown), answers=answers, source={"games_seed": seed, "file": path.name})


def read_items(path: Path) -> list[Item]:
    """Reads the items of a game of your own.

    Args:
        path: A file with a JSON object on each line. Its fields are those in `FIELDS`; choices may be left out.

    Returns:
        The items, in the order of the file.

    Raises:
        ValueError: A line is not an item, or the file has none.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: name a game's file, with the fields {', '.join(FIELDS)} in every line"
        )
    items = [_item(record, where) for where, record in json_lines(path)]
    if not items:
        raise ValueError(f"{path} has no items: write a JSON object with {', '.join(FIELDS)} in every line")
    return items


def _item(record: Mapping[str, Any], where: str) -> Item:
    if unknown := [key for key in record if key not in FIELDS]:
        raise ValueError(f"{where} has an unknown field {unknown[0]!r}: its fields are {', '.join(FIELDS)}")
    for field in FIELDS[:3]:
        value = record.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{where} has {'no' if field not in record else 'an empty'} field {field!r}: it must be a text"
            )
    choices = [] if record.get("choices") is None else record["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{where}: choices = {choices!r:.60} is not a list of texts")
    answer, choices = record["answer"].strip(), [choice.strip() for choice in choices]
    if twice := [choice for choice in choices if choices.count(choice) > 1]:
        raise ValueError(f"{where} has the choice {twice[0]!r} twice: leave one out")
    if len({choice.casefold() for choice in choices}) < len(choices):
        raise ValueError(f"{where} has choices that differ in case only, {', '.join(choices)}: spell them apart")
    if choices and answer not in choices:
        raise ValueError(f"{where}: the answer {answer!r} is not among its choices {', '.join(choices)}: add it")
    return Item(record["prompt_a"], record["prompt_b"], answer, tuple(choices))
