"""The demo: the paper's Table 2 on the embedded pair, with intervals, controls, costs, transcripts and layer maps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.table

from jaxcomm.agent import Agent
from jaxcomm.edits import GRAFTS

from ..converters import load_agent
from . import documents, figures
from .effects import meaning, split, split_rows
from .files import check_file, check_folder, write_lines, write_whole
from .games import GAMES, INFORMATION, Game
from .games import draw as draw_game
from .pair import folder
from .play import Outcome, PlaySettings, play
from .scores import percent
from .sweeps.fitting import fit, own_statements
from .sweeps.grid import layer_map, layers

REPORT, SELECT = 0, 1
"""Seeds of the reported games, and of the games on which (k, j) is chosen."""
SELECT_GAMES = 40
ANSWER_TOKENS = 8
CONTROLS = ("other", "generated", "mean", "moments", "noise", "zero", "self")
"""Stand-ins for A's activation."""


def draw(game: str) -> tuple[Game, Game]:
    """Draws a game to report, and other items of it to choose the layers on.

    Args:
        game: "countries" or "tip_sheets".

    Returns:
        The game to report, and a game of 40 other items.
    """
    report, others = draw_game(game, REPORT), draw_game(game, SELECT, 2 * SELECT_GAMES)
    new = [i for i, item in enumerate(others.items) if item not in report.items]
    return report, others.part(new[:SELECT_GAMES])


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best layers for one pair in one game, chosen on items that are not reported.

    Attributes:
        k: Layer of the sender.
        j: Layer of B.
        into: The layer of B that W maps to. None: there is no W.
        maps: W from every layer of the sender to every layer of B, [L_A + 1, L_B + 1, D_B, D_A]. None: there is no W.
        accuracies: Share of exact matches at every (k, j) with W into that layer, [L_A, L_B].
    """

    k: int
    j: int
    into: int | None
    maps: Any
    accuracies: np.ndarray

    def at(self, into: int | None) -> dict[str, Any]:
        """The settings of the protocol "activation" at these layers.

        Args:
            into: The layer of B that W maps to. None: no W is used.

        Returns:
            k, j, W and `into`.
        """
        return dict(k=self.k, j=self.j, W=None if into is None else self.maps[self.k, into], into=into)

    def __str__(self) -> str:
        return f"k = {self.k}, j = {self.j}" + ("" if self.into is None else f", W into layer {self.into}")


def search(sender: Agent, b: Agent, game: Game) -> Choice:
    """Plays every pair of layers, and chooses the best.

    If sender and receiver differ, it tries W into each layer of B's upper half. In the lower layers, the last token does
    not contain the statement's information yet.

    Args:
        sender: The sender.
        b: The receiver.
        game: The items to choose on.

    Returns:
        The best layers.
    """
    if sender is b:
        maps, upper = None, (None,)
    else:
        every = [range(agent.single.config.layers + 1) for agent in (sender, b)]
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
    """Results of all games, always with B as the receiver.

    Attributes:
        a: The sender of the pair.
        b: The receiver.
        outcomes: For each label of a table row, one outcome for each game.
        unseen: The same, with people and companies that never occur in training.
        choices: The chosen layers, by pair and game.
    """

    a: Agent
    b: Agent
    outcomes: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    unseen: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    choices: dict[str, dict[str, Choice]] = dataclasses.field(default_factory=dict)

    def every(self) -> list[Outcome]:
        """All outcomes, in the order of the tables."""
        return [o for table in (self.outcomes, self.unseen) for row in table.values() for o in row]


def play_everything() -> Results:
    """Plays all games of the demo.

    First B plays alone, and with all the information in its prompt. Then B sends to itself, and A sends to B: a text
    message, every graft at the layers chosen on other items, and every control.

    Returns:
        The results.
    """
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
        for control in CONTROLS:
            played(f"{pair}, replace, {control}", "activation", sender, at, control=control)
        played(f"{pair}, replace", "activation", sender, at, new=True)
    return results


def accuracy_table(title: str, rows: dict[str, list[Outcome]]) -> rich.table.Table:
    """Makes a table of accuracy and compute, one row for each method.

    Args:
        title: Title of the table.
        rows: For each label of a row, one outcome for each game.

    Returns:
        Exact match in % with 95 % intervals, and MFLOPs per question for each game.
    """
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


def effects_table(results: Results) -> tuple[rich.table.Table, str]:
    """Makes the table that splits the gain from activations into presence and content, paired on the same questions.

    Args:
        results: Results of all games.

    Returns:
        The table with one row for each pair and game, and an explanation of its p-values.
    """
    found = {}
    for pair in results.choices:
        label = f"{pair}, replace"
        rows = (results.outcomes[name] for name in (label, f"{label}, other", "silent"))
        for own, other, silent in zip(*rows, strict=True):
            cells = pair, own.game.name.replace("_", " ")
            found[cells] = split(own.hits, other.hits, silent.hits), "points"
    columns, rows = split_rows(found)
    table = rich.table.Table(
        title="Effect of the activation (replace) on exact match, points [95 % interval]", title_justify="left"
    )
    for n, column in enumerate(("pair", "game", *columns)):
        table.add_column(column, justify="left" if n < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table, meaning(3 * len(found))


def transcripts(results: Results, each: int = 2) -> Iterator[str]:
    """Writes transcripts of the first games of every pair.

    Args:
        results: Results of all games.
        each: Number of items of each game.

    Yields:
        For each item, the prompts of A and B and B's reply.
    """
    for pair in results.choices:
        for outcome in results.outcomes[f"{pair}, replace"]:
            for item, reply, hit in itertools.islice(
                zip(outcome.items, outcome.replies, outcome.hits, strict=True), each
            ):
                verdict = "right" if hit else f"wrong; the answer is {item.answer}"
                yield f"{pair}   A reads: {item.prompt_a}\n         B reads: {item.prompt_b}\n         B says:  {reply.text}   ({verdict})"


def run(out: Path, json: Path | None) -> None:
    """Runs the demo: plays everything, prints the tables, and writes layers.png, results.jsonl and items.jsonl.

    Args:
        out: Folder for the files.
        json: Another file for the results, one JSON object per line. None: no other file.

    Raises:
        OSError: A file cannot be written.
        ValueError: A path is not local.
    """
    check_folder(out)
    check_file(json)
    console = documents.console(124)
    results = play_everything()
    for agent in (results.a, results.b):
        c = agent.params.config
        console.print(f"Embedded model {agent.name}: Llama architecture, {c.layers} layers, width {c.width}.")
    console.print(
        f"Greedy decoding on {jax.default_backend()}. b -> b: the model with itself; a -> b: a's states go through the map W.\n"
    )
    console.print(accuracy_table("Exact match, % [95 % interval]", results.outcomes))
    console.print(f"Both games: {INFORMATION['private']}. Layers, chosen on other games:")
    for pair, choices in results.choices.items():
        console.print(f"{pair}   " + "; ".join(f"{game.replace('_', ' ')}: {at}" for game, at in choices.items()))
    for part in effects_table(results):
        console.print(part)
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
    pictures = figures.layer_maps(maps, label="exact match, %", columns=len(GAMES), limits=(0, 100))
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
