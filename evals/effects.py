"""Effect of messages on any per-item score: total = presence + content.

    presence   effect of any message of this kind: another item's message - B alone
    content    effect of what this message says: own message - another item's message

Zhang & Emu (2026, arXiv 2607.26773) and Cheng et al. (2026, arXiv 2608.04893) split the gains of published channels this
way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from .scores import Hits, Interval, difference, sign_flip

POWER, LEVEL = 0.8, 0.05
PARTS = ("total", "presence", "content")
LIKELIHOOD = "log p(right | choices)"
"""Metric: log-probability of the right answer among the choices, in nats. It can change when accuracy does not."""
HOLM = (
    "p is exact for right or wrong answers, and by random signs otherwise. It is corrected by Holm's method over all {n} tests "
    "of the table."
)
SMALLEST = " Smallest: the effect that a run of this size detects in 80 % of cases at the strictest of Holm's levels."
LARGEST = " It is the largest of the row's three."


class Effect(NamedTuple):
    """A paired difference between two conditions on the same items.

    Attributes:
        value: The mean difference, with its 95 % interval (`scores.difference`).
        p: Its p-value (`scores.sign_flip`): exact for right or wrong answers, else by random signs. Not corrected.
        spread: Standard deviation of the items' differences, for `smallest`.
        n: Number of items.
    """

    value: Interval
    p: float
    spread: float
    n: int

    def smallest(self, tests: int = 1) -> float:
        """Computes the smallest effect that the run would have detected with a probability of 80 %.

        Args:
            tests: Number of tests in the table. The level is 5 % divided by it (Holm's first step).

        Returns:
            The effect, in the unit of the values.
        """
        z = scipy.stats.norm.ppf
        return float((z(1 - LEVEL / tests / 2) + z(POWER)) * self.spread / np.sqrt(self.n))


class Split(NamedTuple):
    """Effect of a message on a score, split in two.

    Attributes:
        total: Own message minus no message.
        presence: Another item's message minus no message.
        content: Own message minus another item's message.

    Example:
        >>> found = split([1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1])
        >>> [effect.value.value for effect in found]
        [0.5, 0.25, 0.25]
    """

    total: Effect
    presence: Effect
    content: Effect


def effect(values: Hits, others: Hits) -> Effect:
    """Compares two conditions on the same items.

    Args:
        values: The scores of one condition, item by item.
        others: The scores of the other condition, on the same items.

    Returns:
        The paired difference. If no item differs, its spread is computed from the largest share of differing items that
        could have gone unseen (95 %).
    """
    x = np.asarray(values, float) - np.asarray(others, float)
    spread = float(x.std(ddof=1)) if len(x) > 1 else float("nan")
    if not x.any():
        spread = float(np.sqrt(1 - LEVEL ** (1 / len(x))))
    return Effect(difference(values, others), sign_flip(values, others), spread, len(x))


def split(own: Hits, other: Hits, alone: Hits) -> Split:
    """Splits the effect of a message into presence and content.

    Args:
        own: The scores with each item's own message.
        other: The scores with another item's message.
        alone: The scores without a message.

    Returns:
        Total, presence and content. The total is the sum of the others.
    """
    return Split(effect(own, alone), effect(other, alone), effect(own, other))


def holm(ps: Sequence[float]) -> list[float]:
    """Corrects p-values for multiple tests (Holm 1979). Controls the family-wise error rate under any dependence of tests.

    Args:
        ps: The p-values.

    Returns:
        The corrected p-values, in the same order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(ps, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(ps, float)[order] * np.arange(len(ps), 0, -1))
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def split_rows(splits: Mapping[tuple[str, ...], tuple[Split, str]]) -> tuple[list[str], list[list[str]]]:
    """Writes a table of splits, with one row for each.

    Args:
        splits: The first cells of a row -> its split and unit: "points" (shares, written in %) or "nats".

    Returns:
        Names of the columns after the first cells, and the rows. p-values are corrected over all rows (`HOLM`).
    """
    every = [found for found, _ in splits.values()]
    corrected = iter(holm([part.p for found in every for part in found]))
    rows = []
    for cells, (found, unit) in splits.items():
        row = list(cells)
        for part in found:
            row += [written(part.value, unit), p_written(next(corrected))]
        smallest = max(part.smallest(3 * len(every)) for part in found)
        rows.append([*row, f"{100 * smallest:.0f}" if unit == "points" else f"{smallest:.2f}"])
    return [name for part in PARTS for name in (part, "p")] + ["smallest"], rows


def written(x: Interval, unit: str) -> str:
    """Writes a difference: percentage points without decimals, nats with two."""
    if unit == "points":
        return f"{100 * x.value:+.0f} [{100 * x.low:.0f}, {100 * x.high:.0f}]"
    return f"{x.value:+.2f} [{x.low:.2f}, {x.high:.2f}]"


def p_written(p: float) -> str:
    """Writes a p-value with four decimals."""
    return "<.0001" if p < 1e-4 else f"{p:.4f}"


def meaning(tests: int, per_row: int = 3) -> str:
    """Explains the p-values and smallest effects of a table. per_row: Number of tests in a row, 1 or 3; 0: the table has no
    smallest effects."""
    return HOLM.format(n=tests) + (SMALLEST if per_row else "") + (LARGEST if per_row > 1 else "")


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Computes the Kullback-Leibler divergence KL(p || q) of each item, in nats.

    Args:
        p: Log-probabilities [items, tokens].
        q: Log-probabilities [items, tokens].

    Returns:
        The divergences [items], at least 0.

    Example:
        >>> kl(np.log([[0.5, 0.5]]), np.log([[0.5, 0.5]])).tolist()
        [0.0]
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)
