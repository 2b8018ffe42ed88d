"""The right answer among a game's choices, by their log-probabilities: nothing is decoded, so no form of the answer is asked for.

Some answers are likelier than others whatever B was told. Calibrated, each counts by how much likelier the message makes it than
B finds it alone (pointwise mutual information; Holtzman et al. 2021, domain-conditional PMI).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.special

from jaxcomm.protocols import Panel, Turn

from .games import Game


@dataclasses.dataclass(frozen=True)
class Choice:
    """One item's right answer among its choices.

    Attributes:
        rank: 1: none is likelier; of equals the mean of their ranks.
        logprob: Of the answer's text, in nats.
        among: Log-probability of the answer, given that it is one of the choices.
        calibrated_rank, calibrated_among: The same after each choice's log-probability without the message was taken off. None: of B
            alone, where nothing is left.
        choices: How many there are.
    """

    rank: float
    logprob: float
    among: float
    calibrated_rank: float | None
    calibrated_among: float | None
    choices: int

    @property
    def hit(self) -> bool:
        """Whether the right answer is the likeliest."""
        return self.rank == 1

    @property
    def calibrated_hit(self) -> bool | None:
        return None if self.calibrated_rank is None else self.calibrated_rank == 1


def logprobs(turn: Turn | Panel, game: Game, chat: bool) -> list[np.ndarray]:
    """Of every item's choices, as B's next words; chat: as a turn begins, else after a space. ValueError: a thought comes first."""
    for each in turn.turns if isinstance(turn, Panel) else (turn,):
        if any(map(each.agent.begins_thought, each.rows)):
            raise ValueError(
                f"{each.agent.name}'s chat template begins a thought, choices are scored as an answer begins: switch thinking off (such as --chat-args enable_thinking=false), or leave choices out (--no-choices)"
            )
    texts = [[choice if chat else f" {choice}" for choice in game.choices(item)] for item in game.items]
    return [np.array(scored.logprobs) for scored in turn.score(texts)]


def choose(game: Game, found: Sequence[np.ndarray], prior: Sequence[np.ndarray] | None) -> list[Choice]:
    """found, prior: `logprobs` of B with the message, and alone (None: they are B's alone)."""
    made = []
    for i, item in enumerate(game.items):
        at = game.choices(item).index(item.answer)
        rank, among = _place(found[i], at)
        calibrated = (None, None) if prior is None else _place(found[i] - prior[i], at)
        made.append(Choice(rank, float(found[i][at]), among, *calibrated, len(found[i])))
    return made


def _place(values: np.ndarray, at: int) -> tuple[float, float]:
    """Rank of one of the values, and its share of their exponentials, as a logarithm."""
    rank = 1 + np.sum(values > values[at]) + (np.sum(values == values[at]) - 1) / 2
    return float(rank), float(values[at] - scipy.special.logsumexp(values))
