"""Measurements of the study: every layer pair on the items for choosing layers, and conditions on the reported items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.controls import derange
from jaxcomm.layer_sweep import patch

from ..conditions import Condition, limits
from ..games import Game
from ..games.wording import Wording
from ..play import Outcome, PlaySettings, play
from ..sweeps.grid import answer_groups, plan_game
from ..sweeps.parts import unchanged

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
        Log-probability of each right answer in nats, "own" and "other" [grafts, K, J, items] and "alone" [items] without
        a message; "own_exact" and "other_exact", whether greedy decoding would generate it.
    """
    order = derange([item.answer for item in game.items], seed)
    found: dict[str, np.ndarray] = {}
    for questions in answer_groups(game, agents[1], wording):
        every: dict[str, Any] = {
            "own": (questions, dict(ks=layers[0], js=layers[1], grafts=grafts, maps=maps)),
            "other": (order[questions], dict(ks=layers[0], js=layers[1], grafts=grafts, maps=maps)),
            "alone": (questions, dict(ks=layers[0][:1], js=layers[1][-1:], grafts=(unchanged,))),
        }
        for name, (sent, cells) in every.items():
            told, asked = game.part(sent), game.part(questions)
            plan = plan_game(asked, *agents, wording=wording, told=told, max_new_tokens=None, **cells)
            result = plan.gather([plan.run(chunk) for chunk in plan.chunks])
            values = {name: result["logprobs"].sum(axis=-1), f"{name}_exact": result["exact"]}
            for key, value in values.items():
                whole = found.setdefault(key, np.zeros((*value.shape[:-1], len(game.items)), value.dtype))
                whole[..., questions] = value
    return {name: value[0, 0, 0] if name.startswith("alone") else value for name, value in found.items()}


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
    game: Game,
    every: Sequence[Condition],
    agents: tuple[Agent, Agent],
    settings: PlaySettings,
    prior: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    """Plays a game under several conditions.

    Args:
        game: The game.
        every: The conditions. A condition with the cost of another (`Condition.equal`) must come after that one.
        agents: The sender and the receiver.
        settings: The settings that every protocol has.
        prior: Log-probabilities of each item's choices for B alone (`play.alone_with`).

    Returns:
        Scores (`SCORES`) [items], with keys "condition/score".
    """
    done: dict[str, Outcome] = {}
    for condition in every:
        own = dict(condition.settings)
        if condition.equal is not None:
            what, of = condition.equal
            own |= limits(what, done[of], game, *agents, settings.wording, own)
        done[condition.label] = play(game, condition.protocol, *agents, settings, prior, **own)
    return {f"{label}/{name}": x for label, outcome in done.items() for name, x in scores(outcome).items()}


def scores(outcome: Outcome) -> Mapping[str, np.ndarray]:
    """Lists the scores of an outcome.

    Args:
        outcome: The outcome.

    Returns:
        For each name in `SCORES`, one number for each item.
    """
    choices = outcome.choices or ()
    kept = {
        "among": [choice.among for choice in choices],
        "choice": [choice.hit for choice in choices],
        "calibrated": [bool(choice.calibrated_hit) for choice in choices],
        "exact": outcome.hits,
        "found": outcome.found_hits,
        "flops": [reply.flops for reply in outcome.replies],
        "sent": [reply.spent.sent for reply in outcome.replies],
    }
    return {name: np.asarray(values, float) for name, values in kept.items()}
