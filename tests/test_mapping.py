"""W for every layer pair, from one pass: what numpy finds for each pair alone, in float64, from all states at once."""

import numpy as np
import pytest

from jaxcomm.mapping import HELD_OUT, fit_maps
from jaxcomm.model import hidden_states

from conftest import assert_close, prompts

N, KS, JS = 120, (0, 2, 4), (1, 5)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def batches(*cuts):
    b = prompts(N, 9, vocab=12)
    a = b[:, 2:]
    mask = np.arange(9) >= np.random.default_rng(2).integers(0, 5, (N, 1))
    for rows in np.split(np.arange(N), cuts):
        yield (a[rows], np.ones((len(rows), 7), bool)), (b[rows], mask[rows])


def ridge_regression(a, b, ridge):
    """argmin_W, as an ordinary least-squares problem with rows added."""
    r = ridge * np.sum(a**2) / a.shape[1]
    return np.linalg.lstsq(
        np.concatenate([a, np.sqrt(r) * np.eye(a.shape[1])]), np.concatenate([b, np.zeros((a.shape[1], b.shape[1]))]), rcond=None
    )[0].T  # fmt: skip


@pytest.fixture(scope="module")
def states(llama, wide):
    (ta, ma), (tb, mb) = next(batches())
    return [
        np.asarray(hidden_states(p.params, t, mask=m, last=True), np.float64)
        for p, t, m in ((llama, ta, ma), (wide, tb, mb))
    ]


def test_every_pair_is_solved_as_if_alone_with_the_ridge_that_held_out_rows_choose(llama, wide, states):
    maps = fit_maps(llama.params, wide.params, batches(30, 70), ks=KS, js=JS, ridges=RIDGES)
    held = np.arange(N) % HELD_OUT == HELD_OUT - 1
    chosen = set()
    for i, k in enumerate(KS):
        for n, j in enumerate(JS):
            a, b = states[0][k], states[1][j]
            errors = []
            for ridge in RIDGES:
                W = ridge_regression(a[~held], b[~held], ridge)
                errors.append(np.sum((a[held] @ W.T - b[held]) ** 2) / np.sum(b[held] ** 2))
            best = int(np.argmin(errors))
            chosen.add(best)
            what = f"k = {k}, j = {j}"
            assert maps.ridge[i, n] == np.float32(RIDGES[best]), what
            assert_close(maps.error[i, n], errors[best], what, 1e-3)
            assert_close(maps.W[i, n], ridge_regression(a, b, RIDGES[best]), what, 1e-3)
    assert len(chosen) > 1, "the rows choose, not the order of the ridges"


def test_neither_batches_nor_company_change_a_map(llama, wide):
    whole = fit_maps(llama.params, wide.params, batches(), ks=KS, js=JS, ridges=RIDGES)
    alone = fit_maps(llama.params, wide.params, batches(*range(40, N, 40)), ks=KS[1:2], js=JS[:1], ridges=RIDGES)
    assert_close(alone.W[0, 0], whole.W[1, 0], "W", 1e-4)
    assert alone.ridge[0, 0] == whole.ridge[1, 0]


def test_bad_input_is_one_clear_line(llama, wide):
    fit = lambda batches, **how: fit_maps(llama.params, wide.params, batches, **{"ks": (1,), "js": (1,), **how})
    for call, message in (
        (lambda: fit(batches(), ks=()), "at least one value"),
        (lambda: fit(batches(), js=(6,)), "j = 6 is out of range"),
        (lambda: fit([]), "0 sentences: fitting W needs at least 10"),
        (lambda: fit([tuple((prompts(n, 4), np.ones((n, 4), bool)) for n in (3, 2))]), "3 sentences for A and 2 for B"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
