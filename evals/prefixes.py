"""Choose the layers of B that see a prefix: by number, or by a scheme. Some schemes use calibration items, which are never
played."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.cache import KVCache
from jaxcomm.prefixes import Scheme, attention_onto, choose_layers, greedy_scores, layer_scores
from jaxcomm.prompts import Prompts
from jaxcomm.protocols import Prefixing, send_prefix
from jaxcomm.protocols.prefixes import behind, places

from .games import Game, Wording, draw
from .hearing import further

CALIBRATED = ("score", "greedy")
"""Schemes that need calibration items."""
ITEMS = 8
"""Default number of calibration items."""


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """How to choose B's layers that see a prefix.

    Attributes:
        layers: Their numbers, from 1. Empty: chosen by `scheme`, or all.
        scheme: How to choose a share `ratio` of the layers (`jaxcomm.choose_layers`). None: all, or `layers`.
        ratio: Share of the layers, above 0.
        alpha: Weight of the attention in KVComm's score.
        calibration: A game, or a file, with calibration items. None: further items of the played game.
        items: Number of calibration items.
        seed: Random seed for the scheme "random", and for calibration items from another game.

    Raises:
        ValueError: The options do not fit each other.
    """

    layers: tuple[int, ...] = ()
    scheme: Scheme | None = None
    ratio: float | None = None
    alpha: float = 1.0
    calibration: str | None = None
    items: int = ITEMS
    seed: int = 0

    def __post_init__(self):
        if self.layers and self.scheme is not None:
            raise ValueError(f"--layers and --scheme {self.scheme} both choose layers: give one of them")
        if (self.scheme is None) != (self.ratio is None):
            raise ValueError("--scheme and --ratio go together: give the rule that chooses layers, and their share")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(
                f"--ratio {self.ratio}: a share of the layers, above 0 and at most 1 (0 is the protocol silent)"
            )
        if self.calibration is not None and self.scheme not in CALIBRATED:
            raise ValueError(f"--calibration is for --scheme {' and '.join(CALIBRATED)}: leave it out")
        if self.items != ITEMS and self.scheme not in CALIBRATED:
            raise ValueError(
                f"--calibration-items {self.items} is for --scheme {' and '.join(CALIBRATED)}: leave it out"
            )
        if self.alpha != 1.0 and self.scheme != "score":
            raise ValueError(f"--alpha {self.alpha}: it is for --scheme score: leave it out")
        if self.items < 1:
            raise ValueError(f"--calibration-items {self.items}: it must be at least 1")

    def __call__(
        self, game: Game | None, a: Agent, b: Agent, wording: Wording, how: Prefixing | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Chooses the layers.

        Args:
            game: The played game. Its items are excluded from calibration. None: the task is not a game.
            a: The sender.
            b: The receiver.
            wording: How games are put to the agents.
            how: Options of the prefix, apart from the layers: maps, and its place. None: the defaults.

        Returns:
            The layers for `Prefixing`, and a record of the choice, for results.

        Raises:
            ValueError: There are no calibration items, or some of them are played.
        """
        if self.scheme is None:
            return (self.layers or "all"), {}
        count, told = b.single.config.layers, {"scheme": self.scheme, "ratio": self.ratio}
        scores = None
        if self.scheme in CALIBRATED:
            items = self.calibration_items(game)
            scores = calibrate(self.scheme, items, (a, b), wording, how or Prefixing(), self.alpha)
            told |= {"calibration": self.calibration or items.name, "calibration_items": len(items.items)}
            told |= {"layer_scores": [round(float(x), 6) for x in scores]}
        chosen = choose_layers(self.scheme, self.ratio or 0.0, count, scores=scores, seed=self.seed)
        return tuple((np.flatnonzero(chosen) + 1).tolist()), told

    def calibration_items(self, game: Game | None) -> Game:
        """Draws the calibration items.

        Args:
            game: The played game. None: the task is not a game.

        Returns:
            The calibration items.

        Raises:
            ValueError: There are none, or some are played.
        """
        if self.calibration is None:
            found = None if game is None else further(game, 4 * self.items)
            if found is None or not found.items:
                name = "this task" if game is None else game.name
                raise ValueError(
                    f"--scheme {self.scheme} needs items that are not played, and {name} has no others: name a game or a "
                    "file with --calibration"
                )
            return found.part(range(min(self.items, len(found.items))))
        found = draw(self.calibration, self.seed + 7, self.items)
        played = set() if game is None else {item.prompt_a for item in (*game.items, *game.examples)}
        if twice := [item.prompt_a for item in found.items if item.prompt_a in played]:
            raise ValueError(
                f"--calibration {self.calibration}: {twice[0][:60]!r} is also played; layers would be chosen on what is "
                "reported: calibrate on other items"
            )
        return found if game is None else dataclasses.replace(found, examples=game.examples)


def calibrate(
    scheme: str, items: Game, agents: tuple[Agent, Agent], wording: Wording, how: Prefixing, alpha: float = 1.0
) -> np.ndarray:
    """Scores B's layers on calibration items.

    Args:
        scheme: "score": KVComm's score, from the attention of B's prompts to the prefix. "greedy": adds one layer after
            another, always the one that makes the right answers likeliest.
        items: The calibration items.
        agents: The sender and the receiver.
        wording: How games are put to the agents.
        how: Options of the prefix, for all layers.
        alpha: Weight of the attention in KVComm's score.

    Returns:
        One number for each layer, [L_B].
    """
    a, b = agents
    before, cache, prompts, answers = laid_out(items, a, b, wording, how)
    if scheme == "greedy":
        return greedy_scores(b.single, prompts, cache, answers, before=before)
    columns = sum(x.positions.shape[-1] for x in before)
    onto = attention_onto(b.single, prompts, past=[*before, cache])[..., columns:]
    return layer_scores(np.asarray(onto.sum(axis=-1)), alpha=alpha)


def laid_out(
    game: Game, a: Agent, b: Agent, wording: Wording, how: Prefixing
) -> tuple[tuple[KVCache, ...], KVCache, Prompts, np.ndarray]:
    """Lets A read a game, and lays out B's prompts behind A's prefix.

    Args:
        game: The game.
        a: The sender.
        b: The receiver.
        wording: How the game is put to the agents.
        how: Options of the prefix, for all layers.

    Returns:
        Caches of the tokens before the prefix, the prefix, the rest of B's prompts, and the right answers [items, T].
    """
    prompts_b = wording.prompts_b(game, b)
    cache: Any = send_prefix(a, b, wording.prompts_a(game, a), how).message.states
    rows = b.rows(prompts_b, 1)
    ahead = places(b, prompts_b, rows) if how.place == "turn" else 0
    (*before, cache), prompts = behind(b, rows, cache, ahead)
    return tuple(before), cache, prompts, answers_of(game, b, prompts_b)


def answers_of(game: Game, b: Agent, prompts_b: Sequence[Any]) -> np.ndarray:
    """Encodes the right answer of every item in the context of B's prompt.

    Args:
        game: The game.
        b: The receiver.
        prompts_b: B's prompts.

    Returns:
        Token ids [items, T]; -1 after the end of an answer.
    """
    return b.spell(prompts_b, [item.answer for item in game.items])
