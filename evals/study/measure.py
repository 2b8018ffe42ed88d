"""Measurements of the study: every layer pair on the items for choosing layers, and conditions on the reported items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.controls import derange
from jaxcomm.layer_sweep import patch

from ..choices import Choice, choose, logprobs
from ..conditions import Condition, Readings, limits
from ..games import Game
from ..games.wording import Wording
from ..hearing import Heard, heard
from ..play import Outcome, PlaySettings, begin, play
from ..sweeps.grid import answer_groups, plan_game

SITES = ("resid_post", "attn_out", "mlp_out")
SCORES = ("among", "choice", "calibrated", "exact", "found", "flops", "sent")


def layer_maps(
    game: Game,
    agents: tuple[Agent, Agent],
    wording: Wording,
    layers: tuple[Sequence[int], Sequence[int]],
    grafts: Sequence[str],
    maps: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores the right answers at every layer pair, with each item's own message and with another item's.

    Args:
        game: The game.
        agents: The sender and the receiver.
        wording: How the game is put to them.
        layers: Layers of A and of B.
        grafts: The grafts.
        maps: The maps W [K, J, D_B, D_A]. None: states are grafted without a map.
        seed: Random seed for the assignment of other items' messages.

    Returns:
        Log-probability of each right answer in nats, "own" and "other" [grafts, K, J, items].
    """
    order = derange([item.answer for item in game.items], seed)
    cells: Any = dict(ks=layers[0], js=layers[1], grafts=grafts, maps=maps)
    shape = len(grafts), *map(len, layers), len(game.items)
    found = {name: np.zeros(shape, np.float32) for name in ("own", "other")}
    for questions in answer_groups(game, agents[1], wording):
        for name, senders in (("own", questions), ("other", order[questions])):
            told, asked = game.part(senders), game.part(questions)
            plan = plan_game(asked, *agents, wording=wording, told=told, max_new_tokens=None, **cells)
            result = plan.gather([plan.run(chunk) for chunk in plan.chunks])
            found[name][..., questions] = result["logprobs"].sum(axis=-1)
    return found


def other_sites(game: Game, agents: tuple[Agent, Agent], wording: Wording, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores the right answers with A's last-token activation instead of B's, at every layer and several sites.

    Args:
        game: The game.
        agents: The sender and the receiver, of the same shape.
        wording: How the game is put to them.
        seed: Random seed for the assignment of other items' messages.

    Returns:
        Log-probability of each right answer in nats, "own" and "other" [sites, L, items], for `SITES` and layers 1 to L.
    """
    a, b = agents
    order = derange([item.answer for item in game.items], seed)
    prompts_b = wording.prompts_b(game, b)
    answers = b.spell(prompts_b, [item.answer for item in game.items])
    told, asked = a.tokenize(wording.prompts_a(game, a)), b.tokenize(prompts_b, answers.shape[1] + 1)
    how: Any = dict(sites=SITES, layers=range(1, b.single.config.layers + 1), positions=[-1])
    score = lambda prompts: patch(a.single, b.single, prompts, asked, answers, **how).logprobs.sum(axis=-1)[:, :, 0]
    return {"own": score(told), "other": score(told[order])}


def same_shape(a: Agent, b: Agent) -> bool:
    """Whether two models have the same layers, width and heads, so that any activation of one fits the other."""
    shape = lambda agent: [
        getattr(agent.single.config, name)
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "layer_heads")
    ]
    return shape(a) == shape(b)


def entity(game: Game) -> Game:
    """Removes the full stop from A's statements, so that A's last token is the last of the place or company.

    Args:
        game: A game whose statements end in a place or company and a full stop.

    Returns:
        The same game without the full stops.
    """
    items = tuple(dataclasses.replace(item, prompt_a=item.prompt_a.rstrip(" .")) for item in game.items)
    return dataclasses.replace(game, items=items)


def played(
    readings: Readings,
    every: Sequence[Condition],
    settings: PlaySettings,
    prior: Sequence[np.ndarray],
    replies: bool = True,
) -> dict[str, np.ndarray]:
    """Plays a game under several conditions.

    Args:
        readings: The game and the agents, with what they have read before.
        every: The conditions. A condition with the cost of another (`Condition.equal`) must come after that one.
        settings: The settings that every protocol has.
        prior: Log-probabilities of each item's choices for B alone (`play.alone_with`).
        replies: Whether B also writes its answers. The registered outcomes do not need them.

    Returns:
        Scores [items], with keys "condition/score": those of `SCORES`, without "exact" and "found" if there are no replies.
    """
    game, agents = readings.game, (readings.a, readings.b)
    done: dict[str, Outcome] = {}
    found: dict[str, np.ndarray] = {}
    for condition in every:
        own = dict(condition.settings)
        if condition.protocol == "activation":
            own = readings.add(own)
        if condition.equal is not None:
            what, of = condition.equal
            own |= limits(what, done[of], game, *agents, settings.wording, own)
        if replies:
            outcome = done[condition.label] = play(game, condition.protocol, *agents, settings, prior, **own)
            values = scores(outcome.choices or (), outcome.heard) | {"exact": outcome.hits, "found": outcome.found_hits}
        else:
            turn, _ = begin(game, condition.protocol, *agents, settings, **own)
            values = scores(choose(game, logprobs(turn, game, agents[1].chat), prior), heard(turn))
        found |= {f"{condition.label}/{name}": np.asarray(x, float) for name, x in values.items()}
    return found


def scores(choices: Sequence[Choice], notes: Sequence[Heard]) -> dict[str, Sequence[float]]:
    """Lists the scores of a condition that need no replies.

    Args:
        choices: For each item, the scores of the right answer among the choices.
        notes: For each item, the message that arrived.

    Returns:
        For each name, one number for each item. Costs are counted until B's answer begins.
    """
    return {
        "among": [choice.among for choice in choices],
        "choice": [choice.hit for choice in choices],
        "calibrated": [bool(choice.calibrated_hit) for choice in choices],
        "flops": [note.flops for note in notes],
        "sent": [note.sent for note in notes],
    }
