"""Rank the right answer among a game's choices by log-probability. Nothing is decoded, so the form of a reply is irrelevant.

Some answers are likelier than others whatever B was told. Calibrated scores subtract each choice's log-probability for B
alone (pointwise mutual information; Holtzman et al. 2021, domain-conditional PMI).
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
    """Scores of the right answer of one item among its choices.

    For calibrated values, each choice's log-probability for B alone is subtracted first (Holtzman et al. 2021,
    domain-conditional PMI).

    Attributes:
        rank: Rank of the right answer. 1: no choice is likelier. Equally likely choices share the mean of their ranks.
        logprob: Log-probability of the answer's text, in nats.
        among: Log-probability of the right answer, given that the answer is one of the choices, in nats.
        calibrated_rank: The calibrated rank. None: the scores are for B alone.
        calibrated_among: The calibrated `among`. None: the scores are for B alone.
        choices: Number of choices.
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
        """Whether the right answer has calibrated rank 1. None: the scores are for B alone."""
        return None if self.calibrated_rank is None else self.calibrated_rank == 1


def logprobs(turn: Turn | Panel, game: Game, chat: bool) -> list[np.ndarray]:
    """Scores every item's choices as B's next words.

    Args:
        turn: B's turn. From a panel, only B's turn is used, because the other agents know the information.
        game: The game.
        chat: Whether B answers in a chat. If so, a choice begins a turn; otherwise it follows a space.

    Returns:
        For each item, the log-probabilities of its choices, in nats.

    Raises:
        ValueError: B's chat template begins a thought, which would come before the answer.
    """
    b = turn.turns[turn.receiver] if isinstance(turn, Panel) else turn
    if any(map(b.agent.begins_thought, b.rows)):
        raise ValueError(
            f"{b.agent.name}'s chat template begins a thought, but choices are scored at the start of an answer: switch thinking off (such as --chat-args enable_thinking=false), or leave choices out (--no-choices)"
        )
    texts = [[choice if chat else f" {choice}" for choice in game.choices(item)] for item in game.items]
    return [np.array(scored.logprobs) for scored in b.score(texts)]


def choose(game: Game, found: Sequence[np.ndarray], prior: Sequence[np.ndarray] | None) -> list[Choice]:
    """Ranks the right answer among each item's choices.

    Args:
        game: The game.
        found: Log-probabilities of each item's choices (`logprobs`).
        prior: The same for B alone. None: `found` is for B alone, and nothing is calibrated.

    Returns:
        The result of each item.

    Example:
        >>> from jaxcomm.evals import games
        >>> game = games.draw("tip_sheets", n=1)
        >>> choice, = choose(game, [np.log([0.2, 0.3, 0.5])], None)
        >>> choice.rank, choice.choices
        (1.0, 3)
    """
    made = []
    for i, item in enumerate(game.items):
        at = game.choices(item).index(item.answer)
        rank, among = _place(found[i], at)
        calibrated = (None, None) if prior is None else _place(found[i] - prior[i], at)
        made.append(Choice(rank, float(found[i][at]), among, *calibrated, len(found[i])))
    return made


def _place(values: np.ndarray, at: int) -> tuple[float, float]:
    """Rank of one of the values, and its log-softmax among them."""
    rank = 1 + np.sum(values > values[at]) + (np.sum(values == values[at]) - 1) / 2
    return float(rank), float(values[at] - scipy.special.logsumexp(values))
