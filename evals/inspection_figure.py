"""Figure of one message: the message, its effect in each layer of B, and B's reply."""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcomm.protocols import Inspection
from jaxcomm.protocols.inspections import Heard, Looks, Named, SentBridge, SentDeltas, SentPrefix, SentState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = 24
"""Largest number of layers to draw. If there are more, evenly spaced ones are drawn."""
MOST_TOKENS = 20
"""Largest number of A's tokens to draw. If there are more, those with the most attention are drawn."""
LETTERS = 13
"""Largest number of characters of a token in a cell."""
WITH, WITHOUT = "C0", "0.55"


def readable(token: str) -> str:
    """Makes a token's spaces and unprintable characters visible.

    Args:
        token: Text of the token.

    Returns:
        The text, with a dot for each space at its ends, and escapes.

    Example:
        >>> readable(" Italy"), readable("\\n")
        ('·Italy', '\\\\n')
    """
    inner = token.strip(" ")
    before = len(token) - len(token.lstrip(" "))
    dotted = "·" * before + inner + "·" * (len(token) - before - len(inner) if inner else 0)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in dotted)


@functools.cache
def _glyphs() -> frozenset[int]:
    """Characters that exist in the figure's font."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def drawable(text: str, most: int | None = None) -> str:
    """Escapes characters that are not in the figure's font.

    Args:
        text: The text.
        most: Largest number of characters; a longer text is truncated.

    Returns:
        The text.

    Example:
        >>> drawable("\\u4e2d a", most=8), drawable("Liechtenstein", most=8)
        ('\\\\u4e2d a', 'Liechte…')
    """
    text = "".join(c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in text)
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def scene(found: Inspection, title: Sequence[str], verdict: str) -> bytes:
    """Draws one message: its contents, the logit lens on B's later layers with and without it, and B's reply.

    Args:
        found: The inspection of one game.
        title: Lines above the figure, such as the prompts of A and B.
        verdict: Whether the reply is right, in words.

    Returns:
        The bytes of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = np.unique(np.linspace(0, len(found.heard) - 1, MOST_LAYERS).round().astype(int))
    heard, alone = ([x[n] for n in shown] for x in (found.heard, found.alone))
    count = len(found.heard[0].likeliest.tokens)
    lines = [part for line in title for part in textwrap.wrap(drawable(line, 560), 190)]
    height = 2.2 + 0.2 * len(lines) + max(0.3 * len(shown), 0.5 * count)
    figure = plt.figure(figsize=(19, height), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, parse_math=False)
    panels: Any = figure.subfigures(1, 3, width_ratios=(width(found.sent), 2.2 * max(count, 3), 4.4))
    draw_sent(found.sent, panels[0])
    draw_heard(panels[1], heard, alone, found)
    draw_said(panels[2], heard, alone, found, verdict)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


def width(sent: Any) -> float:
    """Returns the width of the panel that shows the message.

    Args:
        sent: `Inspection.sent`.

    Returns:
        The width, in inches.
    """
    looks = getattr(sent, "looks", None)
    return 4.2 if looks is None else 3 + 0.25 * min(len(looks.tokens), MOST_TOKENS)


@functools.singledispatch
def draw_sent(sent: Any, figure: Any) -> None:
    """Draws the message.

    Args:
        sent: `Inspection.sent`.
        figure: The figure to draw in.
    """
    raise TypeError(f"{type(sent).__name__} is not a message")


def title(figure: Any, text: str, below: str = "") -> None:
    """Writes the title of a panel that shows the message.

    Args:
        figure: The panel.
        text: Its title, after "sent:".
        below: Text below the title.
    """
    figure.suptitle(f"sent: {text}", fontsize=11, fontweight="bold", parse_math=False)
    figure.supxlabel(textwrap.fill(below, 44), fontsize=9, parse_math=False)


@draw_sent.register
def _(sent: SentState, figure: Any) -> None:
    token = drawable(readable(sent.token), LETTERS)
    title(figure, f"A after layer {sent.k}, at {token!r}", drawable(f"patchscope: {readable(sent.patchscope)}", 150))
    head, embedding = figure.subplots(2, 1)
    bars(head, sent.head, "probability, by A's head")
    bars(embedding, sent.embedding, "cosine with A's embedding")


@draw_sent.register
def _(sent: SentPrefix, figure: Any) -> None:
    title(figure, "A's keys and values", "attention of B's last token, % of all")
    attention(figure.subplots(), figure, sent.looks)


@draw_sent.register
def _(sent: SentDeltas, figure: Any) -> None:
    title(figure, f"how A's state changed, layer {sent.j[-1]}", drawable(f"A writes: {readable(sent.message)}", 150))
    axis, shown = figure.subplots(), slice(0, MOST_TOKENS)
    named = Named((), sent.tokens[shown], sent.norms[-1][shown])
    bars(axis, named, "length of the delta at each token of A's text", most=None)


@draw_sent.register
def _(sent: SentBridge, figure: Any) -> None:
    what = "mean size of gates" if sent.kind == "gated" else "share of B's own length"
    below = f"comes in: {what}, %" + (
        "" if sent.looks is None else "; attention of B's last token within the memory, %"
    )
    title(figure, f"through a {sent.kind} bridge", below)
    axes = figure.subplots(
        1, 1 if sent.looks is None else 2, squeeze=False, width_ratios=None if sent.looks is None else (1, 2)
    )[0]
    layers = range(1, len(sent.keys) + 1)
    for values, style, label in ((sent.keys, "o-", "keys"), (sent.values, "s--", "values")):
        if label == "keys" or sent.kind == "c2c":
            axes[0].plot([100 * x for x in values], layers, style, markersize=4, label=label)
    axes[0].set_ylabel("layer of B")
    axes[0].set_ylim(0.5, len(layers) + 0.5)
    axes[0].set_xlim(left=0)
    axes[0].tick_params(labelsize=9)
    axes[0].grid(alpha=0.25)
    if sent.kind == "c2c":
        axes[0].legend(fontsize=9)
    if sent.looks is not None:
        attention(axes[1], figure, sent.looks)


def attention(axis: Axes, figure: Any, looks: Looks) -> None:
    """Draws the attention of B's last token as a heat map, layer by layer and token by token.

    Args:
        axis: The axes to draw on.
        figure: The panel, for the colour bar.
        looks: Attention of each layer to the tokens.
    """
    blank = [np.nan] * len(looks.tokens)  # a layer with linear attention
    shares = 100 * np.array([blank if row is None else row for row in looks.last])
    most = np.nan_to_num(shares).max(axis=0)
    shown = np.sort(np.argsort(-most, kind="stable")[:MOST_TOKENS])
    image = axis.imshow(shares[:, shown], cmap="Blues", vmin=0, aspect="auto", origin="lower")
    tokens = [drawable(readable(looks.tokens[n]), LETTERS) for n in shown]
    axis.set_xticks(range(len(shown)), tokens, rotation=60, ha="right", fontsize=8, parse_math=False)
    step = 1 if len(shares) <= MOST_LAYERS else 5
    axis.set_yticks(range(step - 1, len(shares), step), [str(n) for n in range(step, len(shares) + 1, step)])
    axis.tick_params(axis="y", labelsize=9)
    axis.set_ylabel("layer of B")
    figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)


def bars(axis: Axes, named: Named, label: str, most: float | None = 1) -> None:
    """Draws tokens as bars, the nearest on top.

    Args:
        axis: The axes to draw on.
        named: The tokens.
        label: Quantity that the bars show.
        most: End of the axis. None: just beyond the longest bar.
    """
    places = range(len(named.tokens))
    axis.barh(places, named.values, color="#9ecae1")
    axis.set_yticks(places, [drawable(readable(token), LETTERS) for token in named.tokens], parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(min((0.0, *named.values)), most)
    axis.set_xlabel(label, fontsize=9)
    axis.tick_params(labelsize=9)


def draw_heard(figure: Any, heard: Sequence[Heard], alone: Sequence[Heard], found: Inspection) -> None:
    """Draws the logit lens on B: its likeliest tokens after each layer, with and without the message.

    Args:
        figure: The figure to draw in.
        heard: Layers with the message.
        alone: The same layers without.
        found: The game.
    """
    figure.suptitle("heard: B's likeliest tokens", fontsize=11, fontweight="bold")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, title in zip(axes, ("with the message", "without it"), strict=True):
        axis.set_title(title, fontsize=10)
    image, _ = (heat(axis, layers, found.answer_id) for axis, layers in zip(axes, (heard, alone), strict=True))
    axes[0].set_ylabel("layer of B")
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("probability", fontsize=9)


def heat(axis: Axes, layers: Sequence[Heard], answer: int) -> Any:
    """Draws the likeliest tokens of layers as a heat map. The right answer's first token has a frame.

    Args:
        axis: The axes to draw on.
        layers: The layers, the first at the bottom.
        answer: Id of that token.

    Returns:
        The image.
    """
    values = np.array([x.likeliest.values for x in layers])
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for row, x in enumerate(layers):
        for column, (id, token) in enumerate(zip(x.likeliest.ids, x.likeliest.tokens, strict=True)):
            dark, right = values[row, column] > 0.55, id == answer
            how = dict(boxstyle="round,pad=0.15", facecolor="none", edgecolor="#d62728", linewidth=1.3)
            axis.text(
                column, row, drawable(readable(token), LETTERS), ha="center", va="center", fontsize=8,
                color="white" if dark else "black", bbox=how if right else None, parse_math=False,
            )  # fmt: skip
    axis.set_xticks(range(values.shape[1]), [str(n + 1) for n in range(values.shape[1])])
    axis.set_yticks(range(len(layers)), [str(x.layer) for x in layers])
    axis.tick_params(labelsize=9)
    axis.set_xlabel("rank", fontsize=9)
    return image


def draw_said(figure: Any, heard: Sequence[Heard], alone: Sequence[Heard], found: Inspection, verdict: str) -> None:
    """Draws the right answer's probability after each layer, with and without the message, and writes B's reply.

    Args:
        figure: The figure to draw in.
        heard: Layers with the message.
        alone: The same layers without.
        found: The game.
        verdict: Whether the reply is right, in words.
    """
    said = textwrap.fill(drawable(f"said: {readable(found.reply.text)!r} ({verdict})", 120), 46)
    figure.suptitle(said, fontsize=11, fontweight="bold", parse_math=False)
    axis = figure.subplots()
    places = range(len(heard))
    for layers, colour, style, label in (
        (heard, WITH, "o-", "with the message"),
        (alone, WITHOUT, "s--", "without it"),
    ):
        axis.plot([x.answer_logprob for x in layers], places, style, color=colour, markersize=4, label=label)
    axis.set_yticks(places, [str(x.layer) for x in heard])
    axis.set_ylim(-0.5, len(heard) - 0.5)
    axis.set_xlim(min(axis.get_xlim()[0], -1), 0.4)
    axis.set_xlabel(
        f"log-probability of {drawable(readable(found.answer_token), LETTERS)}, nats", fontsize=9, parse_math=False
    )
    axis.set_ylabel("layer of B")
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
