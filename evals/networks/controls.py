"""Measure the messages on a network's edges: read a game with the edges' own messages, another item's, and zeros, for
each layer.

A network is one agent, so it reads the prompts of A and B together (the protocol skyline). Every edge may carry all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.controls import Drawn
from jaxcomm.lmnet import control_edges, edge_sets
from jaxcomm.protocols import CONTROLS
from jaxcomm.protocols.text import together

from ..choices import Choice, choose
from ..conditions import overlap_told
from ..documents import Block, Heading, Items, Table
from ..effects import effect, holm, meaning, p_written, split, split_rows, written
from ..games import INFORMATION, Game, Wording
from ..scores import accuracy, mean, percent
from .wires import network_of

OWN, NONE = "own", "no edges"


@dataclasses.dataclass(frozen=True)
class Controlled:
    """Results of a network on a game with controls on its edges, for each set of edges.

    Attributes:
        game: The game.
        network: Name of the network.
        choices: For each set of edges and control, the scores of each item's right answer among its choices. The key for
            the edges' own messages is `NONE`, `OWN`.
    """

    game: Game
    network: str
    choices: Mapping[tuple[str, str], Sequence[Choice]]

    @property
    def edges(self) -> list[str]:
        """The controlled sets of edges."""
        return [edges for edges, control in self.choices if control == "other"]

    def scored(self, edges: str, control: str) -> tuple[list[bool], list[float]]:
        """Scores every item.

        Args:
            edges: A set of edges.
            control: The control on them.

        Returns:
            Whether the right choice is the likeliest, and its log-probability among the choices.
        """
        found = self.choices[(NONE, OWN) if control == OWN else (edges, control)]
        return [choice.hit for choice in found], [choice.among for choice in found]

    def rows(self) -> list[dict[str, Any]]:
        """Lists the conditions as JSON objects, with every item's score."""
        made = []
        for edges, control in self.choices:
            hits, among = self.scored(edges, control)
            told = {"game": self.game.name, "network": self.network, **self.game.source}
            told |= {"information": self.game.information, "edges": edges, "control": control, "n": len(hits)}
            for name, x in (("choice_accuracy", accuracy(hits)), ("choice_among", mean(among))):
                told |= {name: x.value, f"{name}_low": x.low, f"{name}_high": x.high}
            made.append(told | {"hits": hits, "among": among})
        return made


def control(
    agent: Agent, game: Game, controls: Sequence[Drawn] = (), *, each: bool = False, seed: int = 0
) -> Controlled:
    """Reads a game with controls on a network's edges: on all edges, on the edges into each layer, or on each edge.

    The edges into the last layer are left out. The last vertex reads nothing else, so the result would be the same as for
    all edges.

    Args:
        agent: A network as an agent.
        game: The game.
        controls: Controls besides "other" and "zero".
        each: Whether to control every single edge too.
        seed: Random seed.

    Returns:
        The choices under every control.

    Raises:
        ValueError: The agent is not a network, or has no edges; the game has one item; a prompt is too long; an answer
            has no tokens.
    """
    network = network_of(agent)
    wording, count = Wording(), max(len(game.choices(item)) for item in game.items)
    prompts = together(wording.prompts_a(game, agent, sends=False), wording.prompts_b(game, agent))
    pairs = [(i, c) for i, item in enumerate(game.items) for c in range(len(game.choices(item)))]
    spelled = agent.spell([prompts[i] for i, _ in pairs], [game.choices(game.items[i])[c] for i, c in pairs])
    answers = np.full((len(prompts), count, spelled.shape[1]), -1, np.int32)
    for (i, c), row in zip(pairs, spelled, strict=True):
        answers[i, c] = row
    last = f"edges into layer {len(network.config.layers) - 1}"
    names = [x for x in edge_sets(network.config) if x not in (NONE, last) and (each or not x.startswith("edge "))]
    right, found = [item.answer for item in game.items], {}
    every: list[Drawn] = ["other", "zero", *controls]
    for name in dict.fromkeys(every):
        asked = [NONE, *names] if name == "other" else names
        how: dict[str, Any] = dict(edges=asked, right=right, seed=seed)
        logprobs = control_edges(network, agent.tokenize(prompts, spelled.shape[1]), answers, name, **how)
        for edges, x in logprobs.items():
            each_item = [row[: len(game.choices(item))] for row, item in zip(np.asarray(x), game.items, strict=True)]
            own = edges == NONE
            found[edges, OWN if own else name] = choose(game, [row.sum(-1, dtype=float) for row in each_item], None)
    return Controlled(game, agent.name, found)


def blocks(found: Controlled) -> Iterator[Block]:
    """Writes the report: choices under every control, presence and content, and every further control.

    Args:
        found: The results.

    Yields:
        The blocks of a document (`evals.documents`).
    """
    game, told = found.game, f"({found.game.information} information)"
    about = INFORMATION[game.information]
    yield Heading(1, f"{game.name.replace('_', ' ')}, edges of {found.network} {told}")
    yield (
        f"{about[0].upper()}{about[1:]}. But a network is one agent: it reads A's and B's prompts together, so a message on "
        "an edge may contain both. So presence and content describe what passes between vertices, not from A to B. Another "
        "item's messages lack this item's question as well as its facts."
    )
    yield "Items: " + ", ".join(f"{key} {value}" for key, value in game.source.items()) + f", n = {len(game.items)}."
    yield Heading(2, f"Choices {told}")
    yield (
        "Share of items whose right answer is the likeliest of its choices, in %, and its mean log-probability among "
        "them, with 95 % intervals. Nothing is decoded."
    )
    rows = []
    for edges, name in found.choices:
        hits, among = found.scored(edges, name)
        nats = mean(among)
        between = f"{nats.value:.2f} [{nats.low:.2f}, {nats.high:.2f}]"
        rows.append(["all edges" if name == OWN else edges, name, percent(accuracy(hits)), between])
    yield Table(["edges", "carry", "choice", "log p(right | choices)"], rows, left=2)
    yield Items([f"{name}: {CONTROLS[name]}" for name in CONTROLS if any(name == x for _, x in found.choices)])
    yield Heading(2, f"Presence and content {told}")
    splits = {}
    for edges in found.edges:
        scores = [found.scored(edges, name) for name in (OWN, "other", "zero")]
        splits[edges, "choice"] = split(*(hits for hits, _ in scores)), "points"
        splits[edges, "log p(right | choices)"] = split(*(among for _, among in scores)), "nats"
    yield (
        "Total: own messages minus zeros (no message) on the same edges. Presence: another item's messages minus zeros. "
        "Content: own messages minus another item's. " + meaning(3 * len(splits))
    )
    yield (
        "Everything passes through the edges into each layer. So the row of all edges also stands for the edges into the last "
        "layer. The rows of other layers differ from it mostly because items' prompts differ in length. Single edges (--each) "
        "show differences between vertices. With zeros on all edges the network knows nothing, not even the language: only a choice's number of tokens counts."
    )
    yield overlap_told(game)
    columns, cells = split_rows(splits)
    yield Table(["edges", "metric", *columns], cells, left=2)
    yield from further(found)


def further(found: Controlled) -> Iterator[Block]:
    """Writes the gain of the edges' own messages over each further control.

    Args:
        found: The results.

    Yields:
        The blocks. There are none without further controls.
    """
    rows, ps = [], []
    for edges, name in found.choices:
        if name not in (OWN, "other", "zero"):
            (hits, among), (hits_there, among_there) = found.scored(edges, OWN), found.scored(edges, name)
            points, nats = effect(hits, hits_there), effect(among, among_there)
            rows.append([edges, name, written(points.value, "points"), written(nats.value, "nats")])
            ps += [points.p, nats.p]
    if rows:
        corrected = [p_written(p) for p in holm(ps)]
        yield Heading(2, f"Against every further control ({found.game.information} information)")
        yield "The edges' own messages minus each control, paired. " + meaning(len(ps), per_row=0)
        cells = [[*row[:3], p, row[3], q] for row, p, q in zip(rows, corrected[::2], corrected[1::2], strict=True)]
        yield Table(["edges", "above", "choice, points", "p", "log p(right | choices), nats", "p"], cells, left=2)
