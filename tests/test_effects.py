"""Presence and content: the split says what a channel of known effect did, as often as its intervals promise."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.evals import figures
from jaxcomm.evals.effects import effect, holm, kl, split, split_rows
from jaxcomm.evals.scores import difference, sign_flip

TABLES, ITEMS = 200, 100
CHANNELS = {
    "presence only": (0.25, 0.0),
    "content only": (0.0, 0.4),
    "both": (0.2, 0.3),
    "neither": (0.0, 0.0),
    "a wrong message is worse than none": (-0.15, 0.5),
}
"""name -> presence and content, as differences of probabilities. Alone, the receiver is right in 30 % of the games."""


def table(rng, presence: float, content: float, n: int = ITEMS):
    """Hits with its own message, with another's, and without one, of games that are more or less hard under all three."""
    hard, own = rng.random(n), rng.random((3, n))
    drawn = np.where(rng.random((3, n)) < 0.5, hard, own)
    return [row < p for row, p in zip(drawn, (0.3 + presence + content, 0.3 + presence, 0.3), strict=True)]


def likelihoods(rng, presence: float, content: float, n: int = ITEMS):
    """Log-probabilities likewise: skewed, and alike in one game."""
    hard = -rng.gamma(2, 1, n)
    return [hard - rng.gamma(1.5, 0.4, n) + x for x in (presence + content, presence, 0)]


@pytest.fixture(scope="module")
def simulated():
    """By kind of score and channel: whether each part's interval holds the truth, each part's p-value, the truth."""
    rng, found = np.random.default_rng(0), {"hits": {}, "nats": {}}
    for name, (presence, content) in CHANNELS.items():
        truth = presence + content, presence, content
        for kind, draw, tables in (("hits", table, TABLES), ("nats", likelihoods, TABLES // 2)):
            if kind == "hits" or name in ("both", "neither"):  # bootstrap and random signs take long
                each = [split(*draw(rng, presence, content)) for _ in range(tables)]
                held = [[x.value.low <= t <= x.value.high for x, t in zip(s, truth, strict=True)] for s in each]
                found[kind][name] = np.array(held), np.array([[x.p for x in s] for s in each]), truth
    return found


def within(share: float, of: int) -> float:
    """How far a share may be from what it is of infinitely many, for this many draws (3 standard errors)."""
    return 3 * float(np.sqrt(share * (1 - share) / of))


@pytest.mark.parametrize("kind", ["hits", "nats"])
def test_95_percent_intervals_hold_the_truth_in_95_percent_of_tables(simulated, kind):
    held = np.concatenate([x for x, _, _ in simulated[kind].values()])
    assert len(held) >= TABLES and 0.93 <= held.mean() <= 0.97, held.mean(axis=0)
    for name, (own, _, _) in simulated[kind].items():
        assert abs(own.mean(axis=0) - 0.95).max() <= within(0.95, len(own)), (name, own.mean(axis=0))


@pytest.mark.parametrize("kind", ["hits", "nats"])
def test_what_is_not_there_is_found_in_at_most_5_percent_of_tables(simulated, kind):
    false = np.concatenate([ps[:, n] <= 0.05 for _, ps, t in simulated[kind].values() for n in range(3) if t[n] == 0])
    assert false.mean() <= 0.05 + (0 if kind == "hits" else within(0.05, len(false)))
    _, ps, _ = simulated[kind]["neither"]
    any_of_three = np.mean([min(holm(row.tolist())) <= 0.05 for row in ps])
    assert any_of_three <= 0.05 + (0 if kind == "hits" else within(0.05, len(ps)))


def test_what_is_there_is_told_apart(simulated):
    """Presence only: presence is found and content is not; content only, the other way round; both; neither."""
    for name, (_, ps, truth) in simulated["hits"].items():
        for n, there in enumerate(truth):
            share = (ps[:, n] <= 0.05).mean()
            assert share >= 0.8 if abs(there) >= 0.2 else share <= 0.08 if there == 0 else share >= 0.5, (
                name,
                n,
                share,
            )


def test_total_is_presence_and_content():
    found = split(*table(np.random.default_rng(1), 0.2, 0.3))
    assert found.total.value.value == pytest.approx(found.presence.value.value + found.content.value.value)


# Intervals and tests ------------------------------------------------------------------------------------------------


def score_statistic(better: int, worse: int, n: int, d: float) -> float:
    """Of a difference d, with the likeliest probabilities under it found by search (Tango 1998 has them in closed form)."""
    loss = lambda q: (
        -(
            better * np.log(max(q + d, 1e-12))
            + worse * np.log(max(q, 1e-12))
            + (n - better - worse) * np.log(max(1 - 2 * q - d, 1e-12))
        )
    )
    low, high = max(0.0, -d), (1 - d) / 2
    q = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options=dict(xatol=1e-10)).x
    return (better - worse - n * d) / np.sqrt(n * max(2 * q + d - d * d, 1e-18))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_paired_hits_have_the_differences_that_a_score_test_does_not_refuse(better, worse, same):
    n = better + worse + same
    if not n:
        return
    x, y = [1] * better + [0] * worse + [1] * same, [0] * better + [1] * worse + [1] * same
    value, low, high = difference(x, y)
    assert -1 <= low <= value <= high <= 1 and value == pytest.approx((better - worse) / n)
    for end, sign in ((low, 1), (high, -1)):
        if abs(end) < 0.999:
            assert score_statistic(better, worse, n, end) == pytest.approx(sign * 1.959964, abs=2e-3)
    mirrored = difference(y, x)
    assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low), abs=1e-9)


@given(st.integers(0, 30), st.integers(0, 30))
def test_p_of_paired_hits_is_mcnemars(better, worse):
    x, y = [1] * better + [0] * worse + [1], [0] * better + [1] * worse + [1]
    if better + worse == 0:
        assert sign_flip(x, y) == 1.0
        return
    k, n = max(better, worse), better + worse
    assert sign_flip(x, y) == pytest.approx(min(1.0, 2 * scipy.stats.binom.sf(k - 1, n, 0.5)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holms_correction_refuses_what_stepping_down_refuses(ps):
    corrected = holm(ps)
    for level in (0.01, 0.05, 0.2):
        refused, order = set(), np.argsort(ps)
        for rank, i in enumerate(order):
            if ps[i] > level / (len(ps) - rank):
                break
            refused.add(int(i))
        # Equal but for rounding at the edge of a level.
        edge = [i for i, p in enumerate(corrected) if abs(p - level) < 1e-9]
        assert {i for i, p in enumerate(corrected) if p <= level} - set(edge) <= refused
        assert refused <= {i for i, p in enumerate(corrected) if p <= level} | set(edge)
    assert all(p <= q <= 1 for p, q in zip(ps, corrected, strict=True))


def test_the_smallest_effect_is_seen_in_80_percent_of_runs():
    """Of the size that a first run names: drawn again with exactly this effect, it is found as often as promised."""
    rng, n = np.random.default_rng(2), 100
    spread = np.sqrt(0.4)  # of differences -1, 0, 1 that are there in four games of ten
    x = rng.choice([-1, 0, 1], size=20000, p=[0.2, 0.6, 0.2])
    small = effect(np.maximum(x, 0)[:n], np.maximum(-x, 0)[:n]).smallest()
    assert small == pytest.approx((1.96 + 0.84) * spread / 10, rel=0.15)
    found = []
    for _ in range(400):
        d = rng.choice([-1, 0, 1], size=n, p=[0.2 - small / 2, 0.6, 0.2 + small / 2])
        found.append(sign_flip(np.maximum(d, 0), np.maximum(-d, 0)) <= 0.05)
    assert 0.7 <= np.mean(found) <= 0.88
    assert effect([1] * 50, [1] * 50).smallest() > 0, "where nothing differs, something might have"
    assert effect([1, 0] * 50, [0, 1] * 50).smallest(3) > effect([1, 0] * 50, [0, 1] * 50).smallest()


def test_divergence_is_that_of_the_distributions():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    want = scipy.stats.entropy(p[0], q[0])
    assert kl(np.log(p), np.log(q))[0] == pytest.approx(want) and kl(np.log(p), np.log(p))[0] == 0


def test_a_table_has_a_row_for_every_split_and_corrects_over_all():
    rng = np.random.default_rng(3)
    found = {("strong", "exact match"): (split(*table(rng, 0.1, 0.5)), "points")}
    found["weak", "log p"] = split(*likelihoods(rng, 0.0, 0.1)), "nats"
    columns, rows = split_rows(found)
    assert columns == ["total", "p", "presence", "p", "content", "p", "smallest"]
    ps = holm([part.p for splits, _ in found.values() for part in splits])
    assert [cell for row in rows for cell in row[3:8:2]] == ["<.0001" if p < 1e-4 else f"{p:.4f}" for p in ps]
    assert rows[0][2].startswith("+") and rows[1][:2] == ["weak", "log p"]
    assert figures.effects({"a $b_": found["strong", "exact match"][0]}, label="%").startswith(b"\x89PNG")
