"""Scores of answers, with confidence intervals and tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

RESAMPLES, CONFIDENCE = 1000, 0.95


Hits = Sequence[bool] | Sequence[float] | np.ndarray
"""Right or wrong, question by question; or a share of right, between 0 and 1."""


class Interval(NamedTuple):
    """An estimate and its 95 % interval. For accuracies all three are shares between 0 and 1.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


def percent(x: Interval) -> str:
    """Writes an interval in per cent, as tables show it.

    Args:
        x: The interval, as shares.

    Returns:
        The value and both ends, rounded to whole per cent.

    Example:
        >>> percent(Interval(0.75, 0.25, 1.0))
        '75 [25, 100]'
    """
    return f"{100 * x.value:.0f} [{100 * x.low:.0f}, {100 * x.high:.0f}]"


def exact_match(text: str, answer: str) -> bool:
    """Tests whether a reply is exactly the answer (Ramesh & Li 2025, section 4.1). Surrounding space is ignored.

    Args:
        text: The reply.
        answer: The right answer.

    Returns:
        Whether they are the same string.
    """
    return text.strip() == answer


def normalised_match(text: str, answer: str) -> bool:
    """Tests whether a reply has the same words as the answer.

    Only the first line of each text is used. Case, punctuation and the articles a, an, the are ignored.

    Args:
        text: The reply.
        answer: The right answer.

    Returns:
        Whether the words are the same, in the same order.

    Example:
        >>> normalised_match("the United States.", "United States"), exact_match("the United States.", "United States")
        (True, False)
    """
    return _words(text) == _words(answer)


def _words(text: str) -> list[str]:
    first = text.strip().split("\n")[0].casefold()
    return [w for w in re.sub(r"[^\w\s]", "", first).split() if w not in ("a", "an", "the")]


def accuracy(hits: Hits, seed: int = 0) -> Interval:
    """Computes the share of hits with its 95 % interval.

    The interval is a bootstrap interval over the games (1000 resamples, BCa). If all hits are 1, or all are 0, resampling
    does not work, and the interval is Wilson's.

    Args:
        hits: The score of each game: right or wrong, or a share between 0 and 1. There is at least one.
        seed: Seed of the resamples.

    Returns:
        The share and its interval.

    Example:
        >>> accuracy([True, True, False, True])
        Interval(value=0.75, low=0.25, high=1.0)
    """
    x = np.asarray(hits, float)
    if x.min() == x.max() and x[0] in (0, 1):
        wilson = scipy.stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, method="wilson")
        return Interval(float(x.mean()), float(wilson.low), float(wilson.high))
    return _bootstrap(x, seed)


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Computes the mean of a number per item, such as a rank or a log-probability, with its 95 % bootstrap interval.

    Args:
        values: The number of each item. There is at least one.
        seed: Seed of the resamples.

    Returns:
        The mean and its interval. If all values are equal, both ends equal the mean.
    """
    return _bootstrap(np.asarray(values, float), seed)


def difference(hits: Hits, others: Hits, seed: int = 0) -> Interval:
    """Computes the mean difference between two methods on the same games, with a 95 % interval.

    If every score is right or wrong, the interval is Tango's (1998) score interval for paired proportions. Its coverage
    is 95 % even if few games differ. Otherwise it is a bootstrap interval over the games (`mean`).

    Args:
        hits: The scores of one method, game by game.
        others: The scores of the other method, on the same games.
        seed: Seed of the resamples.

    Returns:
        The mean paired difference and its interval, as shares.

    Example:
        >>> percent(difference([1, 1, 0, 1], [0, 1, 0, 0]))
        '50 [-23, 85]'
    """
    x = np.asarray(hits, float) - np.asarray(others, float)
    if _right_or_wrong(hits, others):
        return _tango(int((x > 0).sum()), int((x < 0).sum()), len(x))
    return _bootstrap(x, seed)


def _right_or_wrong(*scores: Hits) -> bool:
    """Whether every score is 0 or 1."""
    return all(np.isin(x, (0, 1)).all() for x in scores)


def _tango(better: int, worse: int, n: int) -> Interval:
    """Differences d that a score test at 5 % does not reject. The variance is that of the likeliest table with this d."""
    z = scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)

    def statistic(d: float) -> float:
        a, b, c = 2 * n, (2 * n - better + worse) * d - better - worse, -worse * d * (1 - d)
        variance = n * ((np.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / a + d * (1 - d))
        return float((better - worse - n * d) / np.sqrt(max(variance, 1e-18)))

    value, most = (better - worse) / n, 1 - 1e-12
    low: Any = -1.0
    high: Any = 1.0
    if statistic(-most) > z:
        low = scipy.optimize.brentq(lambda d: statistic(d) - z, -most, value)
    if statistic(most) < -z:
        high = scipy.optimize.brentq(lambda d: statistic(d) + z, value, most)
    return Interval(value, float(low), float(high))


def sign_flip(hits: Hits, others: Hits, seed: int = 0) -> float:
    """Tests whether two methods differ on the same games, with a two-sided sign-flip test.

    The null hypothesis is that neither method is better. Under it, the sign of each game's paired difference is random.
    If every score is right or wrong, this is the exact binomial test on the games that differ (McNemar's). Otherwise the
    test draws the signs 9999 times; if there are fewer patterns of signs, it uses each of them once.

    Args:
        hits: The scores of one method, game by game.
        others: The scores of the other method, on the same games.
        seed: Seed of the signs.

    Returns:
        The p-value: how often the mean difference is at least as large as the one found.

    Example:
        >>> sign_flip([1, 1, 0, 1], [0, 1, 0, 0])
        0.5
    """
    x = np.asarray(hits, float) - np.asarray(others, float)
    if len(x) < 2 or not x.any():  # the difference has the same size for every sign
        return 1.0
    if _right_or_wrong(hits, others):
        return float(scipy.stats.binomtest(int((x > 0).sum()), int((x != 0).sum())).pvalue)
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
    """Number of resamples per batch, with at most 128 MB of memory."""
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
    """Computes the mean over a few runs with Student's 95 % interval.

    Args:
        values: The result of each run. There are at least two.

    Returns:
        The mean and its interval. The ends may be below 0 or above 1, because values may be differences.
    """
    x = np.asarray(values, float)
    half = float(scipy.stats.sem(x) * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def ratio(sums: Sequence[float], counts: Sequence[int], seed: int = 0) -> Interval:
    """Computes a mean over single scores (such as facts), with an interval over groups (such as people).

    The interval is a 95 % bootstrap interval over the groups. If all scores are 0, or all are 1, it is Wilson's interval
    over the groups.

    Args:
        sums: Sum of the scores of each group.
        counts: Number of scores of each group. Groups with none are left out.
        seed: Seed of the resamples.

    Returns:
        The mean and its interval. All three are NaN if there are no scores.
    """
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


def auroc(positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Computes the area under the ROC curve, with a 95 % interval.

    It is the share of pairs (one positive, one negative) in which the positive has the higher score. Equal scores count
    half. The interval is a bootstrap interval over the rows; if the area is 0 or 1, it is Wilson's.

    Args:
        positives: Scores of the positives.
        negatives: Scores of the negatives. Row i of both belongs together, such as two versions of one text. Rows are
            resampled as pairs.
        seed: Seed of the resamples.

    Returns:
        The area and its interval.

    Example:
        >>> auroc([3, 2, 2, 1], [1, 2, 0, 0]).value
        0.84375
    """

    def area(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        n = p.shape[-1]
        ranks = scipy.stats.rankdata(np.concatenate([p, q], axis=-1), axis=-1)[..., :n]
        return (ranks.sum(axis=-1) - n * (n + 1) / 2) / n**2

    return _over_rows(area, positives, negatives, seed)


def caught(
    positives: Sequence[float] | np.ndarray, negatives: Sequence[float] | np.ndarray, alarms: float, seed: int = 0
) -> Interval:
    """Computes the share of positives above a threshold that few negatives exceed, with a 95 % interval.

    Args:
        positives: Scores of the positives.
        negatives: Scores of the negatives, row by row (`auroc`).
        alarms: The largest share of negatives above the threshold (false alarms). The lowest such threshold is used. With
            fewer than 1 / alarms negatives, none is above it.
        seed: Seed of the resamples. Each resample has its own threshold.

    Returns:
        The share and its interval.

    Example:
        >>> caught([3, 2, 2, 1], [1, 2, 0, 0], alarms=0.25).value
        0.75
    """

    def share(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        n = q.shape[-1]
        threshold = np.sort(q, axis=-1)[..., n - 1 - int(alarms * n)]
        return (p > threshold[..., None]).mean(axis=-1)

    return _over_rows(share, positives, negatives, seed)


def _over_rows(statistic: Callable, positives: Any, negatives: Any, seed: int) -> Interval:
    """A statistic of two samples [..., n] whose rows belong together, with a bootstrap interval over the rows."""
    p, q = np.asarray(positives, float), np.asarray(negatives, float)
    value, n = float(statistic(p, q)), len(p)
    if value in (0, 1):
        return accuracy([bool(value)] * n)
    rows = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(p[rows], q[rows]), [tail, 1 - tail])
    return Interval(value, float(low), float(high))
