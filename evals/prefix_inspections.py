"""Prefixes of a game looked into: which of A's tokens each of B's layers looks at before it answers, and what A thought."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.decoding import bucket
from jaxcomm.latents import Thoughts, think
from jaxcomm.prefixes import attention_onto
from jaxcomm.prompts import left_pad
from jaxcomm.protocols import Prefixing, receive_prefix, send_prefix
from jaxcomm.protocols.inspections import spell_out

from .documents import Block, Heading, Items, Picture, Table
from .games import Game, Wording
from .inspection_figure import readable
from .play import METRICS, shown
from .scores import exact_match

NAMED = 3
"""Tokens that are named of each layer, and of each thought."""


@dataclasses.dataclass(frozen=True)
class Followed:
    """One item of a game, looked into.

    Attributes:
        prompt_a: What A read.
        prompt_b: What B read.
        answer: The right answer.
        said: What B said.
        right: Whether that is right, by the metric that is shown first.
        tokens: The prefix's tokens; a thought is "<thought n>".
        attention: Share of the attention of B's last token that each layer gives to each of them, [L, S].
        mass: Share that B's whole prompt gives to the prefix, [L].
        thoughts: Of each thought, the tokens that A would say there, with their probabilities.
    """

    prompt_a: Prompt
    prompt_b: Prompt
    answer: str
    said: str
    right: bool
    tokens: tuple[str, ...]
    attention: np.ndarray
    mass: np.ndarray
    thoughts: tuple[tuple[tuple[str, float], ...], ...]

    @property
    def verdict(self) -> str:
        """Whether the reply is right, in words."""
        return "right" if self.right else f"wrong: {self.answer}"

    def most(self, layer: int) -> list[tuple[str, float]]:
        """Finds the tokens that a layer looks at most.

        Args:
            layer: The layer, from 1.

        Returns:
            Tokens and shares, the largest first.
        """
        shares = self.attention[layer - 1]
        return [(self.tokens[n], float(shares[n])) for n in np.argsort(-shares)[:NAMED]]

    def row(self) -> dict[str, Any]:
        """Makes a record, as results files hold it.

        Returns:
            All fields by name.
        """
        kept = dataclasses.asdict(self)
        return kept | {"attention": self.attention.tolist(), "mass": self.mass.tolist()}


def follow(
    game: Game, a: Agent, b: Agent, wording: Wording, how: Prefixing, max_new_tokens: int = 16
) -> list[Followed]:
    """Plays every item of a game behind A's keys and values, and looks into each.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        wording: How the game is put to the agents.
        how: Layers, steps, and how A thinks.
        max_new_tokens: Largest number of tokens of a reply.

    Returns:
        What was read, looked at, thought and said, item by item.

    Raises:
        ValueError: As for `jaxcomm.protocols.kv`.
    """
    b = wording.writer(game, b)
    prompts_a, prompts_b = wording.prompts_a(game, a), wording.prompts_b(game, b)
    sent = send_prefix(a, b, prompts_a, how)
    turn = receive_prefix(b, prompts_b, sent, how)
    replies, metric = turn.write(max_new_tokens), shown(b, wording, len(game.examples))[0]
    prompts = left_pad(turn.rows, bucket(max(map(len, turn.rows)), b.params.config.max_positions))
    onto = lambda last: np.asarray(attention_onto(b.single, prompts, past=turn.past, last=last))
    last, every, thoughts = onto(True), onto(False).sum(axis=-1), _thoughts(a, prompts_a, how)
    real = np.asarray(turn.past[0].positions) >= 0
    found = []
    for n, (item, reply) in enumerate(zip(game.items, replies, strict=True)):
        right = (
            exact_match(reply.text, item.answer) if metric == "exact" else game.named(reply.text, item) == item.answer
        )
        tokens = [readable(x) for x in spell_out(a, a.rows([prompts_a[n]])[0])]
        tokens += [f"<thought {m + 1}>" for m in range(how.steps)]
        at = last[:, n, real[n]]
        found.append(
            Followed(
                prompts_a[n], prompts_b[n], item.answer, reply.text, right, tuple(tokens), at, every[:, n], thoughts[n]
            )
        )
    return found


def _thoughts(a: Agent, prompts: Sequence[Prompt], how: Prefixing) -> list[tuple[tuple[tuple[str, float], ...], ...]]:
    """What A would say after each step, item by item. (The vectors it reads say what it said before.)"""
    if not how.steps:
        return [()] * len(prompts)
    each = []
    for steps in range(1, how.steps + 1):
        thoughts: Thoughts = think(
            a.single, a.tokenize(prompts, how.steps), steps=steps, thought=how.thought, W=a.realignment
        )
        p = np.asarray(jax.nn.softmax(thoughts.logits, axis=-1))
        top = np.argsort(-p, axis=-1)[:, :NAMED]
        each.append(
            [
                tuple((readable(spell_out(a, [i])[0]), float(row[i])) for i in best)
                for row, best in zip(p, top, strict=True)
            ]
        )
    return [tuple(step[n] for step in each) for n in range(len(prompts))]


def rows(game: Game, a: Agent, b: Agent, followed: Sequence[Followed]) -> list[dict[str, Any]]:
    """Lists the items as JSON objects.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        followed: Its items, looked into.

    Returns:
        One object for each item.
    """
    told = {"game": game.name, "pair": f"{a.name} -> {b.name}", **game.source}
    return [told | {"index": n, **x.row()} for n, x in enumerate(followed)]


def blocks(title: str, followed: Sequence[Followed], metric: str, pictures: Sequence[Picture] = ()) -> list[Block]:
    """Writes the report of a game's prefixes.

    Args:
        title: Title of the report.
        followed: The items, looked into.
        metric: The metric that says whether a reply is right, a key of `play.METRICS`.
        pictures: A picture for each item, or none.

    Returns:
        The blocks of a document (`evals.documents`).
    """
    made: list[Block] = [
        Heading(1, title),
        "Attention: the share that B gives to A's tokens, as a mean over heads; of all tokens of its prompt, and of the last one, "
        f"which answers. What is looked at need not be what is used. {METRICS[metric].capitalize()}.",
    ]
    for n, x in enumerate(followed):
        columns = ["layer", "prompt, %", "last token, %", "most looked at by the last token"]
        made += [
            Heading(2, f"Item {n + 1} ({x.verdict})"),
            Items(list(_told(x))),
            Table(columns, list(_layers(x)), left=0),
        ]
        made += pictures[n : n + 1]
    return made


def _told(x: Followed) -> Iterator[str]:
    last = lambda prompt: prompt if isinstance(prompt, str) else prompt[-1]["content"]
    yield f"A reads: {last(x.prompt_a)!r}"
    for n, named in enumerate(x.thoughts):
        yield f"After thought {n + 1} A would say: {_listed(named)}"
    yield f"B reads: {last(x.prompt_b)!r}"
    yield f"B says: {x.said!r} ({x.verdict})"


def _layers(x: Followed) -> Iterator[list[str]]:
    for n in range(len(x.mass)):
        yield [str(n + 1), f"{100 * x.mass[n]:.1f}", f"{100 * x.attention[n].sum():.1f}", _listed(x.most(n + 1))]


def _listed(named: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{token} {value:.2f}" for token, value in named)


def picture(x: Followed) -> bytes:
    """Draws the attention of B's last token, layer by layer and token by token.

    Args:
        x: One item, looked into.

    Returns:
        The bytes of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, columns = x.attention.shape
    size = (2.2 + 0.32 * columns, 1.6 + 0.18 * layers)
    figure, axis = plt.subplots(figsize=size, dpi=130, layout="constrained")
    drawn = axis.imshow(100 * x.attention, aspect="auto", cmap="viridis", vmin=0)
    axis.set_xticks(range(columns), x.tokens, rotation=60, ha="right", fontsize="small", parse_math=False)
    step = 1 if layers <= 12 else 5
    axis.set_yticks(range(step - 1, layers, step), [str(n) for n in range(step, layers + 1, step)])
    axis.set(ylabel="layer of B", title="Attention of B's last token, %")
    figure.colorbar(drawn, ax=axis)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    plt.close(figure)
    return png.getvalue()
