"""Scores of answers, and how sure one may be of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

RESAMPLES, CONFIDENCE = 1000, 0.95


Hits = Sequence[bool] | Sequence[float] | np.ndarray
"""Right or wrong, question by question; or a share of right, between 0 and 1."""


class Interval(NamedTuple):
    """An estimate and its 95 % interval, as shares."""

    value: float
    low: float
    high: float


def percent(x: Interval) -> str:
    """An interval as tables show it."""
    return f"{100 * x.value:.0f} [{100 * x.low:.0f}, {100 * x.high:.0f}]"


def exact_match(text: str, answer: str) -> bool:
    """The same string, as in the paper; surrounding space does not count."""
    return text.strip() == answer


def normalised_match(text: str, answer: str) -> bool:
    """The same words: case, punctuation and the articles a, an, the do not count, and only the first line is read."""
    return _words(text) == _words(answer)


def _words(text: str) -> list[str]:
    first = text.strip().split("\n")[0].casefold()
    return [w for w in re.sub(r"[^\w\s]", "", first).split() if w not in ("a", "an", "the")]


def accuracy(hits: Hits, seed: int = 0) -> Interval:
    """Share of hits, bootstrap interval over the games (1000 resamples, BCa); Wilson's where all are right or all wrong
    and resampling can say nothing."""
    x = np.asarray(hits, float)
    if x.min() == x.max() and x[0] in (0, 1):
        wilson = scipy.stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(x.mean()), float(wilson.low), float(wilson.high))
    return _bootstrap(x, seed)


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Of a number for every item, such as a rank or a log-probability, with its bootstrap interval."""
    return _bootstrap(np.asarray(values, float), seed)


def difference(hits: Hits, others: Hits, seed: int = 0) -> Interval:
    """How much better one method does than another on the same games: mean paired difference, bootstrap interval.

    Where the difference is the same in every game, Wilson's interval for a share of all (or none) bounds it.
    """
    x = np.asarray(hits, float) - np.asarray(others, float)
    if x.min() == x.max():
        miss = float(scipy.stats.binomtest(0, len(x)).proportion_ci(CONFIDENCE, method="wilson").high)
        value = float(x[0])
        return Interval(value, max(-1.0, value - miss), min(1.0, value + miss))
    return _bootstrap(x, seed)


def sign_flip(hits: Hits, others: Hits, seed: int = 0) -> float:
    """p-value of one method being no better or worse than another on the same games: how often the mean paired
    difference is as large when every game's sign is drawn anew (two-sided, 9999 draws, or every pattern if fewer)."""
    x = np.asarray(hits, float) - np.asarray(others, float)
    if len(x) < 2:  # whichever sign it has, the difference is as large
        return 1.0
    result = scipy.stats.permutation_test(
        (x,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=9999,
        vectorized=True,
        batch=_batch(x),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _batch(x: np.ndarray) -> int:
    """Resamples at a time: 128 MB of them."""
    return max(1, 2**24 // len(x))


def _bootstrap(x: np.ndarray, seed: int) -> Interval:
    if x.min() == x.max():
        return Interval(float(x[0]), float(x[0]), float(x[0]))
    result = scipy.stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        vectorized=True,
        batch=_batch(x),
        rng=np.random.default_rng(seed),
    )
    return Interval(float(x.mean()), float(result.confidence_interval.low), float(result.confidence_interval.high))


def over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of a few runs and Student's interval for it; not clipped, since a difference may lie anywhere."""
    x = np.asarray(values, float)
    half = float(scipy.stats.sem(x) * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def ratio(sums: Sequence[float], counts: Sequence[int], seed: int = 0) -> Interval:
    """A mean over everything that was counted, with a bootstrap interval over those it was counted of (people), or
    Wilson's over them where everything counts 0 or everything 1; all not a number if nothing was counted."""
    x, n = np.asarray(sums, float), np.asarray(counts, float)
    x, n = x[n > 0], n[n > 0]
    if not len(n):
        return Interval(np.nan, np.nan, np.nan)
    if x.sum() in (0, n.sum()):
        return accuracy(x > 0)
    draws = np.random.default_rng(seed).integers(0, len(n), (RESAMPLES, len(n)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(x[draws].sum(axis=1) / n[draws].sum(axis=1), [tail, 1 - tail])
    return Interval(float(x.sum() / n.sum()), float(low), float(high))
