"""Messages of a game looked into: what was sent, what B heard of it layer by layer, what B said; as text, rows and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxcomm.agent import Agent, Prompt
from jaxcomm.protocols import Inspection, inspect_activation
from jaxcomm.protocols.inspections import Heard, Named

from .documents import Block, Heading, Items, Picture, Table
from .games import Game, Wording
from .inspection_figure import readable, scene
from .play import METRICS, shown
from .scores import exact_match

NAMED = 3
"""Tokens that a table names after each layer."""


@dataclasses.dataclass(frozen=True)
class Looked:
    """One item of a game, looked into.

    Attributes:
        prompt_a: What A read.
        prompt_b: What B read.
        answer: The right answer.
        right: Whether B's reply is right, by the metric that is shown first.
        found: What was sent, heard and said.
    """

    prompt_a: Prompt
    prompt_b: Prompt
    answer: str
    right: bool
    found: Inspection

    @property
    def verdict(self) -> str:
        """Whether the reply is right, in words."""
        return "right" if self.right else f"wrong: {self.answer}"

    def picture(self) -> bytes:
        """Draws what was sent, heard and said.

        Returns:
            The bytes of a PNG.
        """
        return scene(self.found, [f"A reads: {_last(self.prompt_a)}", f"B reads: {_last(self.prompt_b)}"], self.verdict)


def look(game: Game, a: Agent, b: Agent, wording: Wording, **how: Any) -> list[Looked]:
    """Plays every item of a game by its activations, and looks into each.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        wording: How the game is put to the agents.
        **how: k and j, and the options of `jaxcomm.protocols.Inspecting`.

    Returns:
        What was read, sent, heard and said, item by item.

    Raises:
        ValueError: As for `jaxcomm.protocols.inspect_activation`.
    """
    b = wording.writer(game, b)
    prompts_a, prompts_b = wording.prompts_a(game, a), wording.prompts_b(game, b)
    answers = [item.answer for item in game.items]
    metric, _ = shown(b, wording, len(game.examples))
    looked = []
    for n, found in enumerate(inspect_activation(a, b, prompts_a, prompts_b, answers, **how)):
        item, said = game.items[n], found.reply.text
        right = exact_match(said, item.answer) if metric == "exact" else game.named(said, item) == item.answer
        looked.append(Looked(prompts_a[n], prompts_b[n], item.answer, right, found))
    return looked


def rows(game: Game, a: Agent, b: Agent, looked: Sequence[Looked]) -> list[dict[str, Any]]:
    """Lists the items as JSON objects.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        looked: Its items, looked into.

    Returns:
        One object for each item: what the agents read, and all that `Inspection.row` has.
    """
    return [
        {"game": game.name, "pair": f"{a.name} -> {b.name}", **game.source, "index": n, **dataclasses.asdict(item)}
        | {"rendered_a": a.render(x.prompt_a), "rendered": b.render(x.prompt_b), "hit": x.right, **x.found.row()}
        for n, (item, x) in enumerate(zip(game.items, looked, strict=True))
    ]


def blocks(title: str, looked: Sequence[Looked], metric: str, pictures: Sequence[Picture] = ()) -> list[Block]:
    """Writes the report of a game's messages.

    Args:
        title: Title of the report.
        looked: The items, looked into.
        metric: The metric that says whether a reply is right, a key of `play.METRICS`.
        pictures: A picture for each item, or none.

    Returns:
        The blocks of a document (`evals.documents`).
    """
    made: list[Block] = [
        Heading(1, title),
        "Logit lens: what B's own final norm and head find in its stream after each layer, at the last token of its prompt. "
        "Rank and log-probability are of the right answer's first token. Patchscope: what A itself writes after a prompt in which its "
        f"message stands in the place of a word. {METRICS[metric].capitalize()}.",
    ]
    for n, x in enumerate(looked):
        made += [Heading(2, f"Item {n + 1} ({x.verdict})"), Items(list(_told(x))), heard(x.found), *pictures[n : n + 1]]
    return made


def _told(x: Looked) -> Iterator[str]:
    found = x.found
    yield f"A reads: {_last(x.prompt_a)!r}"
    yield (
        f"A sends: its state after layer {found.k} at {readable(found.sent_token)!r} (position {found.sent_position}), "
        f"of length {found.sent_norm:.1f}"
    )
    yield f"Nearest by A's head: {_listed(found.head)}"
    yield f"Nearest by A's embedding (cosines): {_listed(found.embedding)}"
    yield f"Patchscope: {found.patchscope!r}"
    yield f"B reads: {_last(x.prompt_b)!r}"
    yield f"B says: {found.reply.text!r} ({x.verdict})"


def _last(prompt: Prompt) -> str:
    """What is read after worked examples."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _listed(named: Named, count: int | None = None) -> str:
    pairs = zip(named.tokens[:count], named.values, strict=False)
    return "  ".join(f"{readable(token)} {value:.2f}" for token, value in pairs)


def heard(found: Inspection) -> Table:
    """Makes the table of what B heard.

    Args:
        found: What was sent, heard and said.

    Returns:
        A row for each layer from j on: the likeliest tokens with their probabilities, and rank and log-probability of the
        right answer's first token, with the message and without.
    """
    answer = readable(found.answer_token)
    columns = ["layer", "with the message", "without", f"rank of {answer}", "without", f"log p({answer})", "without"]
    return Table(columns, [_both(x, y) for x, y in zip(found.heard, found.alone, strict=True)], left=3)


def _both(x: Heard, y: Heard) -> list[str]:
    each = [(_listed(z.likeliest, NAMED), str(z.answer_rank), f"{z.answer_logprob:.2f}") for z in (x, y)]
    return [str(x.layer), *(cell for pair in zip(*each, strict=True) for cell in pair)]
