"""The demo: the paper's Table 2 on the embedded pair, with intervals, controls, costs, transcripts and layer maps."""

from __future__ import annotations

import itertools
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
from jaxcomm.evals.play import Outcome, layer_map, play, write_lines
from jaxcomm.evals.scores import Interval, difference
from jaxcomm.graft import GRAFTS
from jaxcomm.mapping import fit_maps
from jaxcomm.model import hidden_states
from jaxcomm.protocols import Control

REPORT, SELECT, FIT = 0, 1, 2
"""Seeds: of the games that are reported, of those (k, j) is chosen on, of the sentences W is fitted on."""
SENTENCES = 1536
ANSWER_TOKENS = 8

_states = jax.jit(hidden_states, static_argnames="last")


def draw(game: str) -> tuple[list[Item], list[Item]]:
    """Games to report, and others to choose the layers on."""
    report = GAMES[game](REPORT)
    return report, [item for item in GAMES[game](SELECT) if item not in report]


def fit(a: Agent, b: Agent) -> jax.Array:
    """W for every (k, j), from the states at the last token of training-world statements. [L_A + 1, L_B + 1, D_B, D_A]."""
    sentences = sorted(itertools.islice(statements(FIT), SENTENCES), key=len)
    states = ([], [])
    for start in range(0, SENTENCES, 256):
        for agent, collected in zip((a, b), states, strict=True):
            tokens, mask = agent.read(sentences[start : start + 256])
            collected.append(_states(agent.params, tokens, mask=mask, last=True))
    return fit_maps(*(jnp.concatenate(s, axis=1) for s in states))


def percent(x: Interval) -> str:
    return f"{100 * x.value:.0f} [{100 * x.low:.0f}, {100 * x.high:.0f}]"


def run(out: Path, json: Path | None) -> None:
    """Plays everything, prints the tables, and writes `out`/layers.png, `out`/results.jsonl and `out`/items.jsonl."""
    console = rich.console.Console()
    a, b = (agent_from_hf(folder(name), name=name) for name in ("a", "b"))
    describe = lambda agent: f"{agent.name}: {agent.params.config.layers} layers, width {agent.params.config.width}"
    console.print(f"Embedded pair: {describe(a)}; {describe(b)}. {jax.default_backend().upper()}, greedy decoding.")
    outcomes: dict[str, list[Outcome]] = {}
    maps, chosen = {}, {}
    games = {game: draw(game) for game in GAMES}

    def played(label: str, protocol: str, sender: Agent, **settings) -> None:
        for game, (report, _) in games.items():
            outcome = play(game, report, protocol, sender, b, max_new_tokens=ANSWER_TOKENS, **settings)
            outcomes.setdefault(label, []).append(outcome)

    for protocol in ("silent", "skyline"):
        played(protocol, protocol, b)
    for sender in (b, a):
        pair = f"{sender.name} -> {b.name}"
        W = None if sender is b else fit(sender, b)
        maps[pair] = {
            game: layer_map(select, sender, b, W=W, max_new_tokens=ANSWER_TOKENS, title=f"layer map {pair}, {game}")
            for game, (_, select) in games.items()
        }
        mean = np.mean(list(maps[pair].values()), axis=0)
        k, j = chosen[pair] = tuple(int(i) + 1 for i in np.unravel_index(np.argmax(mean), mean.shape))
        at = dict(k=k, j=j, W=None if W is None else W[k, j])
        played(f"{pair}, message", "message", sender)
        for graft in GRAFTS:
            played(f"{pair}, {graft}", "activation", sender, graft=graft, **at)
        if W is not None:
            played(f"{pair}, replace without W", "activation", sender, k=k, j=j)
        for control in get_args(Control):
            played(f"{pair}, control: {control}", "activation", sender, control=control, **at)

    table = rich.table.Table(title="Exact match, % [95 % interval]", title_justify="left")
    table.add_column("method")
    for game, (report, _) in games.items():
        table.add_column(f"{game.replace('_', ' ')} (n = {len(report)})", justify="right")
    table.add_column("MFLOPs a question", justify="right")
    for label, results in outcomes.items():
        mega = "  ".join(f"{o.flops / 1e6:.0f}" for o in results)
        style = "bold" if label.endswith("replace") else None
        table.add_row(label, *(percent(o.accuracy) for o in results), mega, style=style)
    console.print(table)

    for pair, (k, j) in chosen.items():
        console.print(
            f"\n{pair}: k = {k}, j = {j}, chosen on {sum(len(s) for _, s in games.values())} other games. Paired differences, replace against:"
        )
        ours = outcomes[f"{pair}, replace"]
        for label in ("silent", *(label for label in outcomes if label.startswith(f"{pair}, control"))):
            deltas = [difference(x.hits, y.hits) for x, y in zip(ours, outcomes[label], strict=True)]
            console.print(
                f"  {label.removeprefix(f'{pair}, '):20}"
                + "  ".join(f"{o.game} {percent(d)}" for o, d in zip(ours, deltas, strict=True))
            )

    unseen = list(play_unseen(a, b, chosen, fit(a, b)))
    table = rich.table.Table(title="People and companies never seen in training", title_justify="left")
    for column in ("method", *games):
        table.add_column(column.replace("_", " "))
    for label, results in itertools.groupby(unseen, key=lambda o: f"{o.pair}, {o.protocol}"):
        table.add_row(label, *(percent(o.accuracy) for o in results))
    console.print(table)

    console.print("\nWhat B said after A's activation was grafted in:")
    for pair in chosen:
        for outcome in outcomes[f"{pair}, replace"]:
            for item, reply, hit in list(zip(outcome.items, outcome.replies, outcome.hits, strict=True))[:2]:
                console.print(
                    f"  {pair}  A reads: {item.prompt_a}\n          B reads: {item.prompt_b}\n          B says:  {reply.text}  ({'right' if hit else f'wrong: {item.answer}'})",
                    markup=False,
                    highlight=False,
                )

    every = [o for results in outcomes.values() for o in results] + unseen
    figures.layer_maps(maps, chosen, out / "layers.png")
    write_lines(out / "results.jsonl", [o.summary() for o in every])
    write_lines(out / "items.jsonl", [row for o in every for row in o.rows()])
    if json is not None:
        write_lines(json, [o.summary() for o in every])
    console.print(
        f"\nWritten: {out}/layers.png (accuracy at every k and j), {out}/results.jsonl, {out}/items.jsonl (every token read and written)"
    )


def play_unseen(a: Agent, b: Agent, chosen: dict[str, tuple[int, int]], W: jax.Array) -> Iterator[Outcome]:
    """The same with names and companies that never occur in training."""
    for sender in (b, a):
        k, j = chosen[f"{sender.name} -> {b.name}"]
        settings = {"silent": {}, "skyline": {}} if sender is b else {}
        settings["activation"] = dict(k=k, j=j, W=None if sender is b else W[k, j])
        for protocol, own in settings.items():
            for game in GAMES:
                items = GAMES[game](REPORT, names="new")
                yield play(f"{game}, new names", items, protocol, sender, b, max_new_tokens=ANSWER_TOKENS, **own)
