"""Inspect a network: de-embed the vectors on its wires into words (section 4 of the LMNet paper).

A vertex's wire is decoded with the model's own final norm and head. An edge's wire is decoded with those of the vertex that
it arrives at. The vectors need not represent words, so each word is given with its probability.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.language_model import positions_of
from jaxcomm.lmnet import Network
from jaxcomm.model import project_head, unembed
from jaxcomm.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class Wire:
    """The words and the norm of one wire at the last token.

    Attributes:
        layer: Layer of the vertex that the wire leaves; for an edge, of the vertex at which it arrives.
        index: Number of that vertex within its layer.
        source: Number of the vertex that an edge leaves. None: the wire is the output of a vertex.
        words: The likeliest words, with their probabilities.
        norm: Norm of the vector.
    """

    layer: int
    index: int
    source: int | None
    words: tuple[tuple[str, float], ...]
    norm: float

    @property
    def name(self) -> str:
        """Name of the wire, such as "vertex 1.0" or "edge 0.0 -> 1.1"."""
        if self.source is None:
            return f"vertex {self.layer}.{self.index}"
        return f"edge {self.layer - 1}.{self.source} -> {self.layer}.{self.index}"


@dataclasses.dataclass(frozen=True)
class Reading:
    """All wires of a network after one prompt. Vertices are numbered within their layer, group by group.

    Attributes:
        prompt: The prompt.
        widths: Number of vertices in each layer.
        wires: The wires, layer by layer.
    """

    prompt: str
    widths: tuple[int, ...]
    wires: tuple[Wire, ...]


def network_of(agent: Agent) -> Network:
    """Returns an agent's network.

    Args:
        agent: A network as an agent.

    Returns:
        The network.

    Raises:
        ValueError: The agent is not a network.
    """
    if isinstance(agent.params, Network):
        return agent.params
    raise ValueError(f"{agent.name} is a single model: only networks have wires (make one with jaxcomm lmnet train)")


def carried(network: Network, tokens: Any) -> dict[str, jax.Array]:
    """Reads tokens with a network, and returns the vectors on every wire.

    Args:
        network: The network.
        tokens: Tokens [B, T].

    Returns:
        Vectors by the names of `NetworkConfig`: vertices [M, B, T, D], edges [I, J, B, T, D].
    """
    seen: dict[str, jax.Array] = {}
    network.read(jnp.asarray(tokens), positions_of(Prompts(tokens)), wire=seen.setdefault)
    return seen


def words_of(network: Network, name: str, x: jax.Array) -> jax.Array:
    """Computes the word distribution of a wire's vectors: the de-embedding of the LMNet paper (section 4).

    Args:
        network: The network.
        name: Name of the wire's group of vertices or edges.
        x: Vectors [.., D].

    Returns:
        Log-probabilities of the words [.., V], in nats.
    """
    config = network.config
    group = config.groups[name] if name in config.groups else config.stacks[name][1]
    model, flat = network.models[group.model], x.reshape(1, -1, x.shape[-1])
    normed = name in config.groups and config.norm and group.layer < len(config.layers) - 1
    logits = (project_head if normed else unembed)(model, flat)
    return jax.nn.log_softmax(logits, axis=-1).reshape(*x.shape[:-1], -1)


def read(agent: Agent, prompt: str, words: int = 3) -> Reading:
    """Finds the likeliest words of every wire at the prompt's last token.

    Args:
        agent: A network as an agent.
        prompt: The prompt.
        words: Number of words for each wire.

    Returns:
        The wires with their words.

    Raises:
        ValueError: The agent is not a network; `words` is below 1 or above the size of the vocabulary; the prompt is
            too long.
    """
    if not 1 <= words <= agent.params.config.vocab:
        raise ValueError(f"words = {words}: name at least 1, and no more than the vocabulary has")
    network = network_of(agent)
    tokens = np.asarray(agent.rows([prompt]), np.int32)
    config, found = network.config, []
    for name, x in jax.jit(carried)(network, tokens).items():
        logprob, token = jax.lax.top_k(words_of(network, name, x[..., 0, -1, :]), words)
        norm = jnp.linalg.norm(x[..., 0, -1, :], axis=-1)
        logprob, token, norm = jax.device_get((logprob, token, norm))
        for at in np.ndindex(norm.shape):
            said = zip(agent.tokens(token[at]), np.exp(logprob[at]).tolist(), strict=True)
            spelled = tuple((agent.tokenizer.convert_tokens_to_string([word]), p) for word, p in said)
            if name in config.groups:
                group = config.groups[name]
                found.append(Wire(group.layer, config.first(group) + at[0], None, spelled, float(norm[at])))
            else:
                source, target = config.stacks[name]
                place = target.layer, config.first(target) + at[1], config.first(source) + at[0]
                found.append(Wire(*place, spelled, float(norm[at])))
    return Reading(
        prompt, config.widths, tuple(sorted(found, key=lambda w: (w.layer, w.source is None, w.index, w.source or 0)))
    )


def text(reading: Reading) -> str:
    """Writes a reading as text, one line for each wire, from the first layer to the last."""
    width = max(len(wire.name) for wire in reading.wires)
    say = lambda wire: "   ".join(f"{word.strip()!r} {p:.0%}" for word, p in wire.words)
    lines = [f"{wire.name:{width}}  |x| {wire.norm:7.1f}   {say(wire)}" for wire in reading.wires]
    return "\n".join([reading.prompt, *lines])


def picture(reading: Reading) -> bytes:
    """Draws a reading.

    Vertices are drawn by layer, with their likeliest words. The width of an edge is its share of the norms that arrive at a
    vertex. Its likeliest word is written on it.

    Args:
        reading: The reading.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tall, layers = max(reading.widths), len(reading.widths)
    figure = Figure(figsize=(3.6 * layers, 1.2 + 1.5 * tall), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    place = lambda layer, index: (layer, (reading.widths[layer] - 1) / 2 - index)
    arriving = [wire for wire in reading.wires if wire.source is not None]
    for (layer, index), into in itertools.groupby(arriving, key=lambda wire: (wire.layer, wire.index)):
        into = list(into)
        total = sum(wire.norm for wire in into) or 1.0
        for wire in into:
            (x0, y0), (x1, y1) = place(layer - 1, wire.source or 0), place(layer, index)
            share = wire.norm / total
            axis.plot(
                [x0, x1],
                [y0, y1],
                color="#8aa4c8",
                linewidth=0.8 + 5 * share,
                alpha=0.55,
                zorder=1,
                solid_capstyle="butt",
            )
            at = 0.26 + 0.38 * (wire.source or 0) / max(1, len(into) - 1)
            word, p = wire.words[0]
            axis.text(
                x0 + at * (x1 - x0), y0 + at * (y1 - y0), _plain(word), fontsize=7.5, ha="center", va="center", zorder=2,
                color="#1f3a5f", alpha=0.35 + 0.65 * p, bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.8},
            )  # fmt: skip
    for wire in reading.wires:
        if wire.source is None:
            said = "\n".join(f"{_plain(word)}  {p:.0%}" for word, p in wire.words)
            axis.text(
                *place(wire.layer, wire.index), said, fontsize=9, ha="center", va="center", zorder=3,
                bbox={"boxstyle": "round,pad=0.4", "fc": "#fff7e6", "ec": "#b8862b"},
            )  # fmt: skip
    axis.set(xlim=(-0.35, layers - 0.65), ylim=(-tall / 2 - 0.1, tall / 2 + 0.1))
    axis.set_axis_off()
    axis.set_title(f"{_short(reading.prompt)}\nwhat each wire says at the last token (likeliest words)", fontsize=10)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _plain(word: str) -> str:
    """Escape $, which matplotlib reads as mathematics."""
    return (word.strip() or repr(word)).replace("$", r"\$")


def _short(prompt: str, most: int = 110) -> str:
    return _plain(prompt if len(prompt) <= most else f"... {prompt[-most:]}")
