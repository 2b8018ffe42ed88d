"""The demo: the paper's Table 2 on the embedded pair, with intervals, controls, costs, transcripts and layer maps."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table

from jaxcomm.agent import Agent
from jaxcomm.converters import agent_from_hf
from jaxcomm.evals import figures
from jaxcomm.evals.games import GAMES, Item
from jaxcomm.evals.pair import folder
from jaxcomm.evals.pair.text import statements
from jaxcomm.evals.play import Outcome, check_file, layer_map, play, states, write_lines, write_whole
from jaxcomm.evals.scores import Interval, difference
from jaxcomm.graft import GRAFTS
from jaxcomm.mapping import fit_maps
from jaxcomm.protocols import Control

REPORT, SELECT, FIT = 0, 1, 2
"""Seeds: of the games that are reported, of those (k, j) is chosen on, of the sentences W is fitted on."""
SENTENCES = 4096
SELECT_GAMES = 40
ANSWER_TOKENS = 8


def draw(game: str) -> tuple[list[Item], list[Item]]:
    """Games to report, and others to choose the layers on."""
    report = GAMES[game](REPORT)
    others = [item for item in GAMES[game](SELECT, 2 * SELECT_GAMES) if item not in report]
    return report, others[:SELECT_GAMES]


def fit(a: Agent, b: Agent) -> jax.Array:
    """W from every layer of A into every layer of B, fitted on the states at the last token of statements.
    [L_A + 1, L_B + 1, D_B, D_A]."""
    sentences = sorted(itertools.islice(statements(FIT), SENTENCES), key=len)
    collected = ([], [])
    half = SENTENCES // 2  # short sentences and long ones: two shapes to compile
    for start in (0, half):
        for agent, batches in zip((a, b), collected, strict=True):
            tokens, mask = agent.read(sentences[start : start + half])
            batches.append(states(agent.params, tokens, mask=mask, last=True))
    return fit_maps(*(jnp.concatenate(s, axis=1) for s in collected))


@dataclasses.dataclass
class Results:
    """Everything that was played with B as the receiver: label of a table row -> one outcome per game."""

    a: Agent
    b: Agent
    outcomes: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    unseen: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    """Likewise, with people and companies that never occur in training."""
    maps: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    """pair -> game -> accuracy at every (k, j), on the games the layers are chosen on."""
    chosen: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    target: int = 0
    """The layer of B that W maps into."""

    def every(self) -> list[Outcome]:
        return [o for table in (self.outcomes, self.unseen) for row in table.values() for o in row]


def play_everything() -> Results:
    """B alone and with everything to read; then B -> B and A -> B: the layers chosen on other games, every graft at
    these layers, every control."""
    a, b = (agent_from_hf(folder(name), name=name, unroll=False) for name in ("a", "b"))
    results = Results(a, b)
    draws = {game: draw(game) for game in GAMES}
    new = {game: GAMES[game](REPORT, names="new") for game in GAMES}

    def played(label: str, protocol: str, sender: Agent, **settings) -> None:
        for game, (report, _) in draws.items():
            drawn = {"games_seed": REPORT, "names": "seen"}
            outcome = play(game, report, protocol, sender, b, drawn=drawn, max_new_tokens=ANSWER_TOKENS, **settings)
            results.outcomes.setdefault(label, []).append(outcome)

    def played_new(label: str, protocol: str, sender: Agent, **settings) -> None:
        for game, items in new.items():
            drawn = {"games_seed": REPORT, "names": "new"}
            name = f"{game}, new names"
            outcome = play(name, items, protocol, sender, b, drawn=drawn, max_new_tokens=ANSWER_TOKENS, **settings)
            results.unseen.setdefault(label, []).append(outcome)

    for protocol in ("silent", "skyline"):
        played(protocol, protocol, b)
        played_new(protocol, protocol, b)
    for sender in (b, a):
        pair = f"{sender.name} -> {b.name}"
        if sender is b:
            maps, W = None, None
        else:  # into the layer b itself sends best from: early layers of b do not yet know what a statement says
            results.target = results.chosen[f"{b.name} -> {b.name}"][0]
            maps = fit(sender, b)
            W = maps[:, results.target]
        results.maps[pair] = {
            game: layer_map(select, sender, b, W=W, max_new_tokens=ANSWER_TOKENS, title=f"layer map {pair}, {game}")
            for game, (_, select) in draws.items()
        }
        mean = np.mean(list(results.maps[pair].values()), axis=0)
        k, j = (int(i) + 1 for i in np.unravel_index(np.argmax(mean), mean.shape))
        results.chosen[pair] = (k, j)
        at = dict(k=k, j=j, W=None if W is None else W[k])
        played(f"{pair}, message", "message", sender)
        for graft in GRAFTS:
            played(f"{pair}, {graft}", "activation", sender, graft=graft, **at)
        if maps is not None:
            played(f"{pair}, replace, W into layer j", "activation", sender, k=k, j=j, W=maps[k, j])
            played(f"{pair}, replace without W", "activation", sender, k=k, j=j)
        for control in get_args(Control):
            played(f"{pair}, control: {control}", "activation", sender, control=control, **at)
        played_new(f"{pair}, replace", "activation", sender, **at)
    return results


def percent(x: Interval) -> str:
    return f"{100 * x.value:.0f} [{100 * x.low:.0f}, {100 * x.high:.0f}]"


def accuracy_table(title: str, rows: dict[str, list[Outcome]]) -> rich.table.Table:
    """Exact match and compute, one line per method."""
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("method")
    for outcome in next(iter(rows.values())):
        table.add_column(f"{outcome.game.replace('_', ' ')} (n = {len(outcome.items)})", justify="right")
    table.add_column("MFLOPs a question", justify="right")
    for label, outcomes in rows.items():
        cost = "  ".join(f"{o.flops / 1e6:.0f}" for o in outcomes)
        style = "bold" if label.endswith("replace") else None
        table.add_row(label, *(percent(o.accuracy) for o in outcomes), cost, style=style)
    return table


def difference_table(results: Results, pair: str) -> rich.table.Table:
    """How many points `replace` is above silent and above every control, game by game on the same questions."""
    k, j = results.chosen[pair]
    ours = results.outcomes[f"{pair}, replace"]
    title = f"{pair}, replace at k = {k}, j = {j} (chosen on other games): points above ..., paired"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("method", *(o.game.replace("_", " ") for o in ours)):
        table.add_column(column)
    for label in ("silent", *(label for label in results.outcomes if label.startswith(f"{pair}, control"))):
        deltas = (difference(x.hits, y.hits) for x, y in zip(ours, results.outcomes[label], strict=True))
        table.add_row(label.removeprefix(f"{pair}, "), *map(percent, deltas))
    return table


def transcripts(results: Results, each: int = 2) -> Iterator[str]:
    """The first games of every pair, word by word."""
    for pair in results.chosen:
        for outcome in results.outcomes[f"{pair}, replace"]:
            for item, reply, hit in itertools.islice(
                zip(outcome.items, outcome.replies, outcome.hits, strict=True), each
            ):
                verdict = "right" if hit else f"wrong: {item.answer}"
                yield f"{pair}   A reads: {item.prompt_a}\n         B reads: {item.prompt_b}\n         B says:  {reply.text}   ({verdict})"


def run(out: Path, json: Path | None) -> None:
    """Plays everything, prints the tables, and writes `out`/layers.png, `out`/results.jsonl and `out`/items.jsonl."""
    if out.is_file():
        raise NotADirectoryError(f"{out} is a file: name a folder")
    check_file(json)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 112)
    results = play_everything()
    for agent in (results.a, results.b):
        c = agent.params.config
        console.print(f"Embedded model {agent.name}: Llama architecture, {c.layers} layers, width {c.width}.")
    console.print(
        f"Greedy decoding on {jax.default_backend()}; b -> b is one model with itself, a -> b goes through W.\n"
    )
    console.print(accuracy_table("Exact match, % [95 % interval]", results.outcomes))
    for pair in results.chosen:
        console.print(difference_table(results, pair))
    console.print(accuracy_table("People and companies that never occur in training", results.unseen))
    console.print("\nWhat B said after A's activation was grafted in:")
    for transcript in transcripts(results):
        console.print(transcript, markup=False, highlight=False, soft_wrap=True)
    write_whole(out / "layers.png", figures.layer_maps(results.maps, results.chosen))
    summaries = [o.summary() for o in results.every()]
    write_lines(out / "results.jsonl", summaries)
    write_lines(out / "items.jsonl", [row for o in results.every() for row in o.rows()])
    if json is not None:
        write_lines(json, summaries)
    console.print(f"\n{out}/layers.png: accuracy at every k and j.  {out}/results.jsonl: every result.", soft_wrap=True)
    console.print(
        f"{out}/items.jsonl: every game, with each token read and written, positions and norms.", soft_wrap=True
    )
