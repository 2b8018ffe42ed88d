"""Inspect the messages of a game: contents, effect in each layer of B, and B's reply, as text, rows and figures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.protocols import Inspection
from jaxcomm.protocols.inspections import Heard, Looks, Named, SentBridge, SentDeltas, SentPrefix, SentState

from .documents import Block, Heading, Items, Picture, Table
from .games import Game, Wording
from .inspection_figure import readable, scene
from .play import METRICS, shown
from .scores import exact_match

NAMED = 3
"""Number of tokens that a table names for each layer."""


@dataclasses.dataclass(frozen=True)
class Looked:
    """Inspection of one item of a game.

    Attributes:
        prompt_a: A's prompt.
        prompt_b: B's prompt.
        answer: The right answer.
        right: Whether B's reply is right, by the main metric.
        found: The inspection of one game.
    """

    prompt_a: Prompt
    prompt_b: Prompt
    answer: str
    right: bool
    found: Inspection

    @property
    def verdict(self) -> str:
        """Whether the reply is right, in words."""
        return "right" if self.right else f"wrong; the answer is {self.answer}"

    def picture(self) -> bytes:
        """Draws what was sent, heard and said.

        Returns:
            The bytes of a PNG.
        """
        return scene(self.found, [f"A reads: {_last(self.prompt_a)}", f"B reads: {_last(self.prompt_b)}"], self.verdict)


def look(game: Game, a: Agent, b: Agent, wording: Wording, inspect: Callable[..., list[Inspection]]) -> list[Looked]:
    """Plays and inspects every item of a game.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        wording: How the game is put to the agents.
        inspect: Function inspect(a, b, prompts_a, prompts_b, answers) that plays and inspects, such as
            `jaxcomm.protocols.inspect_activation` with its options.

    Returns:
        The inspection of each item.

    Raises:
        ValueError: As for `inspect`.
    """
    b = wording.writer(game, b)
    prompts_a, prompts_b = wording.prompts_a(game, a), wording.prompts_b(game, b)
    answers = [item.answer for item in game.items]
    metric, _ = shown(b, wording, len(game.examples))
    looked = []
    for n, found in enumerate(inspect(a, b, prompts_a, prompts_b, answers)):
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
        looked: The inspections of its items.

    Returns:
        One object for each item: the agents' prompts, and the fields of `Inspection.row`.
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
        looked: The inspections of the items.
        metric: The metric that decides whether a reply is right, a key of `play.METRICS`.
        pictures: A picture for each item, or none.

    Returns:
        The blocks of a document (`evals.documents`).
    """
    made: list[Block] = [
        Heading(1, title),
        "Logit lens: what B's final norm and head predict from its stream after each layer, at the position where its answer "
        f"begins. Rank and log-probability are of the right answer's first token. {about(looked[0].found.sent)} {METRICS[metric].capitalize()}.",
    ]
    for n, x in enumerate(looked):
        told = [f"A reads: {_last(x.prompt_a)!r}", *sent(x.found.sent)]
        told += [f"B reads: {_last(x.prompt_b)!r}", f"B says: {x.found.reply.text!r} ({x.verdict})"]
        made += [Heading(2, f"Item {n + 1} ({x.verdict})"), Items(told), *tables(x.found.sent), heard(x.found)]
        made += pictures[n : n + 1]
    return made


def _last(prompt: Prompt) -> str:
    """The last turn of a prompt, after worked examples."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def listed(named: Named, count: int | None = None) -> str:
    """Writes tokens with their probabilities or cosines.

    Args:
        named: The tokens.
        count: Number of them. Default: all.

    Returns:
        One line.
    """
    return _pairs(list(zip(named.tokens, named.values, strict=True))[:count])


def _pairs(pairs: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{readable(token)} {value:.2f}" for token, value in pairs)


# What was sent ------------------------------------------------------------------------------------------------------

LOOKS = (
    "Attention: the share of B's attention on A's tokens, mean over heads: for all tokens of B's prompt, and for the last one, "
    "which answers. A token with high attention need not affect the answer."
)
ABOUT = {
    SentState: "Patchscope: what A writes after a prompt in which its message replaces one word.",
    SentPrefix: LOOKS,
    SentDeltas: "Without: B reads A's text, but not how A's state changed. Toward: tokens that A's head finds in a delta's direction.",
    SentBridge: "Comes in: the length of what the bridge adds to B's keys and values, as a share of their own length.",
}
"""Explanations of a channel in a report."""
GATED = (
    "Comes in: the mean size of a layer's gates. They let in a memory, which has a softmax of its own. Most looked at: the "
    "shares of that softmax, mean over heads. A token with high attention need not affect the answer."
)


def about(found: Any) -> str:
    """Explains what a report shows for a channel.

    Args:
        found: `Inspection.sent`.

    Returns:
        A sentence or two.
    """
    return GATED if isinstance(found, SentBridge) and found.kind == "gated" else ABOUT[type(found)]


@functools.singledispatch
def sent(found: Any) -> Iterator[str]:
    """Describes the message, line by line.

    Args:
        found: `Inspection.sent`.

    Yields:
        The lines.
    """
    raise TypeError(f"{type(found).__name__} is not a message")


@sent.register
def _(found: SentState) -> Iterator[str]:
    yield (
        f"A sends: its state after layer {found.k} at {readable(found.token)!r} (position {found.position}), "
        f"of length {found.norm:.1f}"
    )
    yield f"Nearest by A's head: {listed(found.head)}"
    yield f"Nearest by A's embedding (cosines): {listed(found.embedding)}"
    yield f"Patchscope: {found.patchscope!r}"


@sent.register
def _(found: SentPrefix) -> Iterator[str]:
    thoughts = f", {len(found.thoughts)} of them thoughts" if found.thoughts else ""
    seen = f"{len(found.layers)} of {len(found.looks.prompt)}"
    yield f"A sends: keys and values of {len(found.looks.tokens)} tokens{thoughts}; {seen} layers of B see them"
    for n, named in enumerate(found.thoughts, 1):
        yield f"After thought {n} A would say: {listed(named)}"


@sent.register
def _(found: SentDeltas) -> Iterator[str]:
    yield f"A writes: {found.message!r}"
    yield f"A sends: how its state changed after layer {', '.join(map(str, found.j))} at each of {len(found.tokens)} tokens"


@sent.register
def _(found: SentBridge) -> Iterator[str]:
    some = sum(x > 0 for x in found.values)
    yield f"A sends: keys and values through a {found.kind} bridge, which lets them in at {some} of {len(found.values)} layers"


@functools.singledispatch
def tables(found: Any) -> list[Block]:
    """Writes tables about the message.

    Args:
        found: `Inspection.sent`.

    Returns:
        The tables. There are none for a single state.
    """
    return []


@tables.register
def _(found: SentPrefix) -> list[Block]:
    return [
        Table(["layer", *LOOKED], [[str(n), *_looked(found.looks, n)] for n in _layers(found.looks.prompt)], left=0)
    ]


@tables.register
def _(found: SentDeltas) -> list[Block]:
    columns = ["token", *(f"length, layer {j}" for j in found.j), "toward"]
    norms = np.array(found.norms).reshape(len(found.j), -1).T
    each = zip(found.tokens, norms, found.toward, strict=True)
    return [
        Table(columns, [[readable(t), *(f"{x:.1f}" for x in own), listed(named)] for t, own, named in each], left=1)
    ]


@tables.register
def _(found: SentBridge) -> list[Block]:
    percent = lambda x: f"{100 * x:.1f}"
    if (looks := found.looks) is not None:
        columns = ["layer", "comes in, %", "most looked at by the last token"]
        told = [[str(n), percent(found.keys[n - 1]), _pairs(looks.most(n, NAMED))] for n in _layers(found.keys)]
        return [Table(columns, told, left=0)]
    each = zip(_layers(found.keys), found.keys, found.values, strict=True)
    told = [[str(n), percent(keys), percent(values)] for n, keys, values in each]
    return [Table(["layer", "keys come in, %", "values come in, %"], told, left=0)]


LOOKED = ("prompt, %", "last token, %", "most looked at by the last token")


def _layers(each: Sequence[Any]) -> range:
    return range(1, len(each) + 1)


def _looked(looks: Looks, n: int) -> list[str]:
    if (last := looks.last[n - 1]) is None or (prompt := looks.prompt[n - 1]) is None:
        return ["", "", "linear attention, no weights"]
    shares = prompt, sum(last)
    return [*(f"{100 * x:.1f}" for x in shares), _pairs(looks.most(n, NAMED)) if shares[1] else ""]


# What was heard -----------------------------------------------------------------------------------------------------


def heard(found: Inspection) -> Table:
    """Makes the table of B's predictions after each layer.

    Args:
        found: The inspection of one game.

    Returns:
        One row for each layer that the message can affect: the likeliest tokens with their probabilities, and rank and
        log-probability of the right answer's first token, with and without the message.
    """
    answer = readable(found.answer_token)
    columns = ["layer", "with the message", "without", f"rank of {answer}", "without", f"log p({answer})", "without"]
    return Table(columns, [_both(x, y) for x, y in zip(found.heard, found.alone, strict=True)], left=3)


def _both(x: Heard, y: Heard) -> list[str]:
    each = [(listed(z.likeliest, NAMED), str(z.answer_rank), f"{z.answer_logprob:.2f}") for z in (x, y)]
    return [str(x.layer), *(cell for pair in zip(*each, strict=True) for cell in pair)]
