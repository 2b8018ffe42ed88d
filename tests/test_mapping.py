"""W and the similarity for every layer pair, from one pass: what numpy finds for each pair alone, in float64, from all
states at once; W by gradient descent: what torch's optimizer makes of it."""

import jax
import numpy as np
import pytest
import torch

from jaxcomm import mapping
from jaxcomm.mapping import HELD_OUT, Recipe, fit_maps, similarity, train_maps
from jaxcomm.prompts import Prompts
from jaxcomm.reading import hidden_states

from conftest import assert_close, prompts

N, KS, JS = 120, (0, 2, 4), (1, 5)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def batches(*cuts):
    b = prompts(N, 9, vocab=12)
    a = b[:, 2:]
    mask = np.arange(9) >= np.random.default_rng(2).integers(0, 5, (N, 1))
    for rows in np.split(np.arange(N), cuts):
        yield Prompts(a[rows]), Prompts(b[rows], mask[rows])


def ridge_regression(a, b, ridge):
    """argmin_W, as an ordinary least-squares problem with rows added."""
    r = ridge * np.sum(a**2) / a.shape[1]
    return np.linalg.lstsq(
        np.concatenate([a, np.sqrt(r) * np.eye(a.shape[1])]), np.concatenate([b, np.zeros((a.shape[1], b.shape[1]))]), rcond=None
    )[0].T  # fmt: skip


@pytest.fixture(scope="module")
def states(llama, wide):
    read = next(batches())
    return [
        np.asarray(hidden_states(p.params, prompts, last=True), np.float64)
        for p, prompts in zip((llama, wide), read, strict=True)
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


def feed(monkeypatch, a, b, cuts=()):
    """States a [n, D_A] and b [n, D_B] of one layer each, instead of models'."""
    held = np.arange(len(a)) % HELD_OUT == HELD_OUT - 1
    parts = list(
        zip(np.split(a[None], cuts, axis=1), np.split(b[None], cuts, axis=1), np.split(held, cuts), strict=True)
    )
    monkeypatch.setattr(mapping, "_final_states", lambda *_: iter(parts))


def train(llama, wide, *cuts, ks=KS, js=JS, key=0, **how):
    key = jax.random.key(key)
    return train_maps(llama.params, wide.params, batches(*cuts), ks=ks, js=js, key=key, recipe=Recipe(**how))


def torch_adam(W, a, b, steps):
    """Full-batch steps of torch's Adam on torch's mean squared error."""
    W = torch.nn.Parameter(torch.tensor(np.asarray(W)))
    a, b = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    optimizer = torch.optim.Adam([W], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(a @ W.T, b).backward()
        optimizer.step()
    return W.detach().numpy()


def test_training_takes_torchs_steps(llama, wide, states):
    """One batch an epoch, with room to spare: the order cannot matter, and rows that are not there must not count."""
    first, trained = train(llama, wide, epochs=0), train(llama, wide, 50, epochs=7, batch=N + 9)
    held = np.arange(N) % HELD_OUT == HELD_OUT - 1
    for i, k in enumerate(KS):
        for n, j in enumerate(JS):
            a, b, W = states[0][k], states[1][j], first.W[i, n]
            assert_close(trained.W[i, n], torch_adam(W, a, b, 7), f"k = {k}, j = {j}")
            W = torch_adam(W, a[~held], b[~held], 7)
            error = np.sum((a[held] @ W.T - b[held]) ** 2) / np.sum(b[held] ** 2)
            assert_close(trained.error[i, n], error, f"error at k = {k}, j = {j}", 1e-4)


def test_training_says_how_far_it_is(llama, wide):
    seen = []
    how = dict(ks=KS, js=JS, key=jax.random.key(0), recipe=Recipe(epochs=1), progress=lambda *n: seen.append(n))
    train_maps(llama.params, wide.params, batches(), **how)
    every = 2 * len(KS) * len(JS)
    assert seen == [(done, every) for done in range(len(JS), every + 1, len(JS))]


def test_an_epoch_takes_a_step_for_what_is_left_over(llama, wide, monkeypatch):
    a, b = (
        np.tile(np.random.default_rng(i).standard_normal(d).astype(np.float32), (20, 1)) for i, d in ((1, 6), (2, 4))
    )
    feed(monkeypatch, a, b)
    first, trained = (
        train(llama, wide, epochs=0, ks=(1,), js=(1,)),
        train(llama, wide, epochs=2, batch=8, ks=(1,), js=(1,)),
    )
    assert_close(trained.W[0, 0], torch_adam(first.W[0, 0], a, b, 6), "three batches an epoch")


def test_an_epoch_reads_every_sentence_once_in_an_order_of_its_own(llama, wide, monkeypatch):
    """Sentence i moves only column i of W, and how far says when: the earlier, the longer momentum carries it."""
    feed(monkeypatch, np.eye(40, dtype=np.float32), np.full((40, 3), 1e5, np.float32))
    moved = []
    for key in (0, 1):
        how = dict(ks=(1,), js=(1,), key=key, batch=1)
        W = [np.asarray(train(llama, wide, epochs=epochs, **how).W[0, 0, 0]) for epochs in (0, 1)]
        moved.append(W[1] - W[0])
    assert_close(np.sort(moved[0]) * 1e3, np.sort(moved[1]) * 1e3, "the same moments, each once", 1e-2)
    assert len(np.unique(moved[0].round(6))) > 30
    orders = [np.argsort(m).tolist() for m in moved]
    assert orders[0] != orders[1] and orders[0] not in (list(range(40)), list(range(39, -1, -1)))


def test_xavier_initialisation(llama, wide):
    W = np.asarray(train(llama, wide, epochs=0).W)
    bound = np.sqrt(6 / (W.shape[-1] + W.shape[-2]))
    assert 0.99 * bound < np.abs(W).max() <= bound
    assert abs(W.std() - bound / np.sqrt(3)) < 0.02 * bound and abs(W.mean()) < 0.02 * bound
    assert len(np.unique(W[:, :, 0, 0])) == len(KS) * len(JS)


def test_a_key_decides_a_map_whatever_the_batches_and_the_company(llama, wide):
    whole = train(llama, wide, epochs=2)
    again = train(llama, wide, epochs=2)
    np.testing.assert_array_equal(again.W, whole.W)
    np.testing.assert_array_equal(again.error, whole.error)
    assert_close(train(llama, wide, 40, 80, ks=KS[1:2], js=JS[1:], epochs=2).W[0, 0], whole.W[1, 1], "alone")
    assert np.abs(np.asarray(train(llama, wide, epochs=2, key=1).W - whole.W)).max() > 0.1


def test_training_approaches_least_squares(llama, wide, monkeypatch):
    """A linear teacher and noise: in the recipe's 960 steps of 1e-3 W covers part of the way, in four times as many all of it."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3072, 24)).astype(np.float32)
    teacher = 0.3 * rng.standard_normal((16, 24))
    b = (a @ teacher.T + 0.5 * rng.standard_normal((3072, 16))).astype(np.float32)
    feed(monkeypatch, a, b)
    solved = fit_maps(llama.params, wide.params, [], ks=(1,), js=(1,))
    start, published, longer = (train(llama, wide, ks=(1,), js=(1,), epochs=epochs) for epochs in (0, 10, 40))
    assert 0.05 < solved.error[0, 0] < 0.2 < 1 < start.error[0, 0]
    assert 1.1 * solved.error[0, 0] < published.error[0, 0] < 2 * solved.error[0, 0]
    assert solved.error[0, 0] < longer.error[0, 0] < 1.02 * solved.error[0, 0]
    assert np.sqrt(np.mean((longer.W[0, 0] - teacher) ** 2)) < 0.03


def alike(a, b):
    """Both measures in float64, from all states at once."""
    square = lambda x: np.sum(x**2)
    x, y = a - a.mean(axis=0), b - b.mean(axis=0)
    cka = square(y.T @ x) / np.sqrt(square(x.T @ x) * square(y.T @ y))
    return square(b.T @ a) / (square(a) * square(b)), cka


def test_similarities_are_numpys_whatever_the_batches(llama, wide, states):
    for cuts in ((), (30, 70), range(1, N)):
        found = similarity(llama.params, wide.params, batches(*cuts), ks=KS, js=JS)
        for i, k in enumerate(KS):
            for n, j in enumerate(JS):
                activation, cka = alike(states[0][k], states[1][j])
                assert_close(100 * found.activation[i, n], 100 * activation, f"B.4 at k = {k}, j = {j}", 1e-4)
                assert_close(100 * found.cka[i, n], 100 * cka, f"CKA at k = {k}, j = {j}", 1e-4)


def test_a_space_is_like_itself_turned_and_scaled(llama, wide, monkeypatch):
    """By CKA wholly, by the paper's measure as much as its sentences point in one direction."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((50, 12)).astype(np.float32)
    turned = 3 * a @ np.linalg.qr(rng.standard_normal((12, 12)))[0].astype(np.float32)
    call = lambda: similarity(llama.params, wide.params, [], ks=(1,), js=(1,))
    feed(monkeypatch, a, turned, (20,))
    assert_close(call().cka[0, 0], 1.0, "CKA")
    assert call().activation[0, 0] < 0.2
    feed(monkeypatch, a[:, :1] * np.ones(12, np.float32), a[:, :1] * np.ones(5, np.float32), (20,))
    assert_close(call().activation[0, 0], 1.0, "one direction")


def test_similarities_hold_where_means_and_states_are_large(llama, wide, monkeypatch):
    """Means 1e4 times the spread, at 1e6: squares of products that float32 cannot hold, differences it cannot see."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 12)), rng.standard_normal((200, 8))
    b[:, :4] += a[:, :4]
    a, b = ((1e6 * (1e-4 * x + rng.standard_normal(x.shape[1]))).astype(np.float32) for x in (a, b))
    feed(monkeypatch, a, b, (70, 71, 150))
    found = similarity(llama.params, wide.params, [], ks=(1,), js=(1,))
    activation, cka = alike(a.astype(np.float64), b.astype(np.float64))
    assert 0.05 < cka < 0.9
    assert_close(found.cka[0, 0], cka, "CKA", 1e-3)
    assert_close(found.activation[0, 0], activation, "B.4", 1e-5)


def test_cka_of_what_does_not_vary_is_not_a_number(llama, wide, monkeypatch):
    same = np.tile(np.random.default_rng(0).standard_normal(12).astype(np.float32), (50, 1))
    feed(monkeypatch, same, np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32), (33,))
    found = similarity(llama.params, wide.params, [], ks=(1,), js=(1,))
    assert np.isnan(found.cka[0, 0]) and 0 < found.activation[0, 0] < 1


def test_bad_input_is_one_clear_line(llama, wide):
    fit = lambda batches, **how: fit_maps(llama.params, wide.params, batches, **{"ks": (1,), "js": (1,), **how})
    unequal = [tuple(Prompts(prompts(n, 4)) for n in (3, 2))]
    for call, message in (
        (lambda: fit(batches(), ks=()), "at least one layer"),
        (lambda: fit(batches(), ridges=()), "at least one value"),
        (lambda: fit(batches(), js=(6,)), "j = 6 is out of range"),
        (lambda: fit([]), "0 sentences: two models are matched on at least 10"),
        (lambda: fit(unequal), "3 sentences for A and 2 for B"),
        (lambda: train(llama, wide, ks=(6,)), "k = 6 is out of range"),
        (lambda: train(llama, wide, batch=0), "batch = 0"),
        (lambda: train_maps(llama.params, wide.params, [], ks=(1,), js=(1,), key=jax.random.key(0)), "0 sentences"),
        (lambda: similarity(llama.params, wide.params, unequal, ks=(1,), js=(1,)), "3 sentences for A and 2 for B"),
        (lambda: similarity(llama.params, wide.params, [], ks=(1,), js=(1,)), "0 sentences"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
