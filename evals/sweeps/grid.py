"""A game at every layer pair: how it is computed, and whether the texts of its cells are right."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.decoding import Generation
from jaxcomm.layer_sweep import Grid, Plan, by_length

from ..games import Game, Item, Wording
from ..scores import exact_match

PLAIN = Wording()


def layers(agent: Agent) -> list[int]:
    """1 .. L."""
    return list(range(1, agent.params.config.layers + 1))


def plan_game(game: Game, a: Agent, b: Agent, *, max_new_tokens: int | None, wording: Wording = PLAIN, **how) -> Plan:
    """A sweep over a game: decoded if there is a number of tokens to write, else the exact match of its answers."""
    a, b = (wording.writer(game, agent) for agent in (a, b))
    prompts_b = wording.prompts_b(game, b)
    answers = None if max_new_tokens else b.spell(prompts_b, [i.answer for i in game.items])
    room = max_new_tokens or answers.shape[1] + 1  # pyright: ignore[reportOptionalMemberAccess]
    both = a.tokenize(wording.prompts_a(game, a)), b.tokenize(prompts_b, room)
    cells = Grid(how.pop("ks"), how.pop("js"), how.pop("grafts", ("replace",)), how.pop("maps", None))
    how |= dict(max_new_tokens=max_new_tokens or 1, stop_tokens=b.stop_tokens)
    return Plan(a.params, b.params, *both, cells, answers, **how)


def answer_groups(game: Game, b: Agent, wording: Wording) -> list[np.ndarray]:
    """Questions whose answers have about as many tokens."""
    b = wording.writer(game, b)
    return by_length(b.spell(wording.prompts_b(game, b), [item.answer for item in game.items]))


def texts(b: Agent, tokens: np.ndarray) -> np.ndarray:
    """What tokens [.., T] say, as strings [..]. Cells say the same few things: each is put together once."""
    rows, back = np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0, return_inverse=True)
    said = b.text(Generation(rows, np.zeros(rows.shape, np.float32), (rows >= 0).sum(axis=-1)))
    return np.array(said, object)[back.reshape(tokens.shape[:-1])]


def right(said: np.ndarray, game: Game, indices: Iterable[int], metric: str) -> np.ndarray:
    """Whether texts [.., items] answer these of a game's items, by a metric of `play.METRICS`. Cells say the same few things: each
    is judged once."""
    judged = functools.cache(lambda text, i: hit(game, text, game.items[i], metric))
    return np.vectorize(judged, otypes=[bool])(said, np.array(list(indices)))


def hit(game: Game, text: str, item: Item, metric: str) -> bool:
    """Whether a reply is right, by exact or found match."""
    return exact_match(text, item.answer) if metric == "exact" else game.named(text, item) == item.answer


def layer_map(game: Game, a: Agent, b: Agent, *, maps=None, max_new_tokens: int = 16) -> np.ndarray:
    """Exact match, decoded, of `replace` at every k = 1 .. L_A (rows) and j = 1 .. L_B (columns). maps: as `sweep`'s."""
    ks, js = layers(a), layers(b)
    plan = plan_game(game, a, b, ks=ks, js=js, maps=maps, max_new_tokens=max_new_tokens)
    tokens = plan.gather([plan.run(chunk) for chunk in plan.chunks])["tokens"][0]
    return right(texts(b, tokens), game, range(len(game.items)), "exact").mean(axis=-1)
