"""Play a game at every layer pair, and test the texts of its cells."""

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
    """The layers of an agent's model, 1 .. L."""
    return list(range(1, agent.single.config.layers + 1))


def plan_game(
    game: Game,
    a: Agent,
    b: Agent,
    *,
    max_new_tokens: int | None,
    wording: Wording = PLAIN,
    told: Game | None = None,
    **how,
) -> Plan:
    """Plans a sweep of a game over layer pairs.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        max_new_tokens: Number of tokens to decode in each cell. None: nothing is decoded, and the tokens of the answers
            are scored.
        wording: How the game is put to the agents.
        told: The items for A, one for each item of the game. Default: the game's own.
        **how: The layers `ks` and `js`, the `grafts`, the maps W as `maps`, and further arguments of `Plan`.

    Returns:
        The plan (`jaxcomm.layer_sweep.Plan`).
    """
    a, b = (wording.writer(game, agent) for agent in (a, b))
    prompts_b = wording.prompts_b(game, b)
    answers = None if max_new_tokens else b.spell(prompts_b, [i.answer for i in game.items])
    room = max_new_tokens or answers.shape[1] + 1  # pyright: ignore[reportOptionalMemberAccess]
    both = a.tokenize(wording.prompts_a(told or game, a)), b.tokenize(prompts_b, room)
    cells = Grid(how.pop("ks"), how.pop("js"), how.pop("grafts", ("replace",)), how.pop("maps", None))
    how |= dict(max_new_tokens=max_new_tokens or 1, stop_tokens=b.stop_tokens)
    return Plan(a.single, b.single, *both, cells, answers, **how)


def answer_groups(game: Game, b: Agent, wording: Wording) -> list[np.ndarray]:
    """Groups the questions of a game by the length of their answers (`layer_sweep.by_length`).

    Args:
        game: The game.
        b: The receiver. Its tokenizer is used.
        wording: How the game is put to B.

    Returns:
        Indices of the questions of each group.
    """
    b = wording.writer(game, b)
    return by_length(b.spell(wording.prompts_b(game, b), [item.answer for item in game.items]))


def texts(b: Agent, tokens: np.ndarray) -> np.ndarray:
    """Turns tokens into texts. Equal rows are decoded only once.

    Args:
        b: The agent whose tokenizer is used.
        tokens: Tokens [.., T]; -1 after the end of a text.

    Returns:
        The texts, an array of strings [..].
    """
    rows, back = np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0, return_inverse=True)
    said = b.text(Generation(rows, np.zeros(rows.shape, np.float32), (rows >= 0).sum(axis=-1, dtype=np.int32)))
    return np.array(said, object)[back.reshape(tokens.shape[:-1])]


def right(said: np.ndarray, game: Game, indices: Iterable[int], metric: str) -> np.ndarray:
    """Tests whether texts are right answers. Equal texts are tested only once.

    Args:
        said: Texts [.., items].
        game: The game.
        indices: Indices of the items on the last axis.
        metric: "exact" or "found" (`play.METRICS`).

    Returns:
        Whether each text is right, [.., items].
    """
    judged = functools.cache(lambda text, i: hit(game, text, game.items[i], metric))
    return np.vectorize(judged, otypes=[bool])(said, np.array(list(indices)))


def hit(game: Game, text: str, item: Item, metric: str) -> bool:
    """Tests whether a reply is right.

    Args:
        game: The game.
        text: The reply.
        item: The item that it answers.
        metric: "exact": exact match; otherwise found match (`play.METRICS`).

    Returns:
        Whether it is right.
    """
    return exact_match(text, item.answer) if metric == "exact" else game.named(text, item) == item.answer


def layer_map(game: Game, a: Agent, b: Agent, *, maps=None, max_new_tokens: int = 16) -> np.ndarray:
    """Plays a game at every layer pair, decoded, with the graft "replace".

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        maps: Maps W [K, J, D_B, D_A], or [K, 1, D_B, D_A] if all j share one. None: there is no W.
        max_new_tokens: Largest number of tokens of a reply.

    Returns:
        Share of exact matches [L_A, L_B], for k = 1 .. L_A and j = 1 .. L_B.
    """
    ks, js = layers(a), layers(b)
    plan = plan_game(game, a, b, ks=ks, js=js, maps=maps, max_new_tokens=max_new_tokens)
    tokens = plan.gather([plan.run(chunk) for chunk in plan.chunks])["tokens"][0]
    return right(texts(b, tokens), game, range(len(game.items)), "exact").mean(axis=-1)
