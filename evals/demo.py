"""The demo: the paper's Table 2 on the embedded pair, with intervals, controls, costs, transcripts and layer maps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import rich.table

from jaxcomm.agent import Agent
from jaxcomm.edits import GRAFTS
from jaxcomm.protocols import Control

from ..converters import load_agent
from . import documents, figures
from .files import check_file, check_folder, write_lines, write_whole
from .games import GAMES, Game
from .games import draw as draw_game
from .pair import folder
from .play import Outcome, PlaySettings, play
from .scores import difference, percent
from .sweeps.fitting import fit, own_statements
from .sweeps.grid import layer_map, layers

REPORT, SELECT = 0, 1
"""Seeds: of the games that are reported, and of those (k, j) is chosen on."""
SELECT_GAMES = 40
ANSWER_TOKENS = 8


def draw(game: str) -> tuple[Game, Game]:
    """Games to report, and others to choose the layers on."""
    report, others = draw_game(game, REPORT), draw_game(game, SELECT, 2 * SELECT_GAMES)
    new = [i for i, item in enumerate(others.items) if item not in report.items]
    return report, others.part(new[:SELECT_GAMES])


@dataclasses.dataclass(frozen=True)
class Choice:
    """The layers of one pair that did best in a game on items that are not reported, and how all of them did there."""

    k: int
    j: int
    into: int | None
    """The layer of B that W maps into, where there is a W."""
    maps: Any
    """W from every layer of A into every layer of B, or None."""
    accuracies: np.ndarray
    """At every (k, j), through W into that layer."""

    def at(self, into: int | None) -> dict[str, Any]:
        """k, j, W into a layer of B (None: no W), and that layer."""
        return dict(k=self.k, j=self.j, W=None if into is None else self.maps[self.k, into], into=into)

    def __str__(self) -> str:
        return f"k = {self.k}, j = {self.j}" + ("" if self.into is None else f", W into layer {self.into}")


def search(sender: Agent, b: Agent, game: Game) -> Choice:
    """Every (k, j); with a W, into each layer of B's upper half: what a statement says has not reached the lower ones."""
    if sender is b:
        maps, upper = None, (None,)
    else:
        every = [range(agent.params.config.layers + 1) for agent in (sender, b)]
        maps, upper = fit(sender, b, own_statements(game.name), *every).W, every[1][len(every[1]) // 2 + 1 :]
    tried = {
        into: layer_map(
            game, sender, b, maps=None if maps is None else maps[1:, into, None], max_new_tokens=ANSWER_TOKENS
        )
        for into in upper
    }
    into = max(tried, key=lambda into: tried[into].max())
    k, j = (int(i) + 1 for i in np.unravel_index(np.argmax(tried[into]), tried[into].shape))
    return Choice(k, j, into, maps, tried[into])


@dataclasses.dataclass
class Results:
    """Everything that was played with B as the receiver: label of a table row -> one outcome per game."""

    a: Agent
    b: Agent
    outcomes: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    unseen: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    """Likewise, with people and companies that never occur in training."""
    choices: dict[str, dict[str, Choice]] = dataclasses.field(default_factory=dict)
    """pair -> game -> the layers."""

    def every(self) -> list[Outcome]:
        return [o for table in (self.outcomes, self.unseen) for row in table.values() for o in row]


def play_everything() -> Results:
    """B alone and with everything to read; then B -> B and A -> B: the layers chosen on other games, every graft at
    these layers, every control."""
    a, b = (load_agent(folder(name), "float32", name=name, unroll=False) for name in ("a", "b"))
    results = Results(a, b)
    draws = {game: draw(game) for game in GAMES}

    def played(label: str, protocol: str, sender: Agent, at=None, new: bool = False, **own) -> None:
        """Both games; at: game -> layers and W."""
        for game, (report, _) in draws.items():
            layers = dict(at[game]) if at else {}
            drawn = {"W_into": layers.pop("into", None)}
            if new:
                report = dataclasses.replace(draw_game(game, REPORT, names="new"), name=f"{game}, new names")
            settings = PlaySettings(max_new_tokens=ANSWER_TOKENS, drawn=drawn)
            outcome = play(report, protocol, sender, b, settings, **own, **layers)
            (results.unseen if new else results.outcomes).setdefault(label, []).append(outcome)

    for protocol in ("silent", "skyline"):
        played(protocol, protocol, b)
        played(protocol, protocol, b, new=True)
    for sender in (b, a):
        pair = f"{sender.name} -> {b.name}"
        chosen = results.choices[pair] = {game: search(sender, b, others) for game, (_, others) in draws.items()}
        at = {game: c.at(c.into) for game, c in chosen.items()}
        played(f"{pair}, message", "message", sender)
        for graft in GRAFTS:
            played(f"{pair}, {graft}", "activation", sender, at, graft=graft)
        if sender is not b:
            into_j = {game: c.at(c.j) for game, c in chosen.items()}
            played(f"{pair}, replace, W into layer j", "activation", sender, into_j)
            played(f"{pair}, replace without W", "activation", sender, {game: c.at(None) for game, c in chosen.items()})
        for control in get_args(Control):
            played(f"{pair}, control: {control}", "activation", sender, at, control=control)
        played(f"{pair}, replace", "activation", sender, at, new=True)
    return results


def accuracy_table(title: str, rows: dict[str, list[Outcome]]) -> rich.table.Table:
    """Exact match and compute, one line per method."""
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("method")
    for outcome in next(iter(rows.values())):
        table.add_column(f"{outcome.game.name.replace('_', ' ')} (n = {len(outcome.items)})", justify="right")
    table.add_column("MFLOPs a question", justify="right")
    for label, outcomes in rows.items():
        cost = "  ".join(f"{o.flops / 1e6:.0f}" for o in outcomes)
        style = "bold" if label.endswith("replace") else None
        table.add_row(label, *(percent(o.accuracy) for o in outcomes), cost, style=style)
    return table


def difference_table(results: Results, pair: str) -> rich.table.Table:
    """How many points `replace` is above silent and above every control, game by game on the same questions."""
    ours, choices = results.outcomes[f"{pair}, replace"], results.choices[pair]
    where = "; ".join(f"{game.replace('_', ' ')}: {choice}" for game, choice in choices.items())
    title = f"{pair}, replace, paired: points above ...\n{where} (chosen on other games)"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("method", *(o.game.name.replace("_", " ") for o in ours)):
        table.add_column(column)
    for label in ("silent", *(label for label in results.outcomes if label.startswith(f"{pair}, control"))):
        deltas = (difference(x.hits, y.hits) for x, y in zip(ours, results.outcomes[label], strict=True))
        table.add_row(label.removeprefix(f"{pair}, "), *map(percent, deltas))
    return table


def transcripts(results: Results, each: int = 2) -> Iterator[str]:
    """The first games of every pair, word by word."""
    for pair in results.choices:
        for outcome in results.outcomes[f"{pair}, replace"]:
            for item, reply, hit in itertools.islice(
                zip(outcome.items, outcome.replies, outcome.hits, strict=True), each
            ):
                verdict = "right" if hit else f"wrong: {item.answer}"
                yield f"{pair}   A reads: {item.prompt_a}\n         B reads: {item.prompt_b}\n         B says:  {reply.text}   ({verdict})"


def run(out: Path, json: Path | None) -> None:
    """Plays everything, prints the tables, and writes `out`/layers.png, `out`/results.jsonl and `out`/items.jsonl."""
    check_folder(out)
    check_file(json)
    console = documents.console(112)
    results = play_everything()
    for agent in (results.a, results.b):
        c = agent.params.config
        console.print(f"Embedded model {agent.name}: Llama architecture, {c.layers} layers, width {c.width}.")
    console.print(
        f"Greedy decoding on {jax.default_backend()}; b -> b is one model with itself, a -> b goes through W.\n"
    )
    console.print(accuracy_table("Exact match, % [95 % interval]", results.outcomes))
    for pair in results.choices:
        console.print(difference_table(results, pair))
    console.print(accuracy_table("People and companies that never occur in training", results.unseen))
    console.print("\nWhat B said after A's activation was grafted in:")
    for transcript in transcripts(results):
        console.print(transcript, markup=False, highlight=False, soft_wrap=True)
    senders = {f"{sender.name} -> {results.b.name}": sender for sender in (results.a, results.b)}
    maps = [
        figures.LayerMap(
            f"{pair}, {game.replace('_', ' ')}\n{choice}",
            100 * choice.accuracies,
            layers(senders[pair]),
            layers(results.b),
            (choice.k, choice.j),
        )
        for pair, by_game in results.choices.items()
        for game, choice in by_game.items()
    ]
    pictures = figures.contours(maps, label="exact match, %", columns=len(GAMES), limits=(0, 100))
    write_whole(out / "layers.png", pictures)
    summaries = [o.summary() for o in results.every()]
    write_lines(out / "results.jsonl", summaries)
    write_lines(out / "items.jsonl", [row for o in results.every() for row in o.rows()])
    if json is not None:
        write_lines(json, summaries)
    console.print(f"\n{out}/layers.png: accuracy at every k and j.  {out}/results.jsonl: every result.", soft_wrap=True)
    console.print(
        f"{out}/items.jsonl: every game, with each token read and written, positions and norms.", soft_wrap=True
    )
