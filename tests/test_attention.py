"""Long prompts: attention tile by tile is attention with all scores at once, and keeps no matrix of all scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxcomm import attention
from jaxcomm.attention import Scoring, blocked, plain, rows_for
from jaxcomm.config import FULL, ModelConfig
from jaxcomm.converters.hf import abstract_params
from jaxcomm.language_model import Training
from jaxcomm.model import embed, run_blocks
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.reading import forward, prefill

from conftest import ROUNDED, assert_close, make_checkpoint, prompts

B, K, G, T, H, PAST = 4, 2, 3, 61, 8, 50
TILE = 16, 24
CASES = {
    "alone": {},
    "a past": dict(past=True),
    "several pasts": dict(past=True, example=True),
    "rows that share a past": dict(past=True, example=True, shared=2),
    "one past for all rows": dict(past=True, shared=1),
    "branches": dict(past=True, branches=4),
    "branches behind shared rows": dict(past=True, branches=4, shared=2, window=55),
    "softcap": dict(past=True, softcap=2.0),
    "sinks": dict(past=True, sinks=True, window=20),
    "sinks of branches": dict(past=True, branches=4, sinks=True, softcap=2.0),
    "window shorter than a tile": dict(past=True, window=5),
    "window longer than a tile": dict(past=True, window=40),
    "traced window": dict(past=True, window=20, traced=True),
    "moved positions": dict(past=True, moved=9),
    "empty columns": dict(past=True, empty=True),
    "one row of positions": dict(past=True, shared=1, one=True),
}


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


@dataclasses.dataclass
class Case:
    """Queries, positions and segments. Rows have 0, 5, 10 and 15 columns of padding; row 3 has one that sees nothing."""

    past: bool = False
    example: bool = False
    shared: int = B
    branches: int = 0
    softcap: float | None = None
    window: int | None = None
    traced: bool = False
    moved: int = 0
    empty: bool = False
    one: bool = False
    sinks: bool = False
    how: Scoring = dataclasses.field(init=False)

    def __post_init__(self):
        tokens = 60 if self.branches else T
        columns, row = jnp.arange(tokens)[None], jnp.arange(B)[:, None]
        self.q = numbers(B, K, G, tokens, H)
        self.positions = PAST + columns if self.one else jnp.where(columns < 5 * row, -1, PAST + columns - 5 * row)
        keys = lambda rows, *n: (numbers(rows, K, *n, H, seed=1), numbers(rows, K, *n, H, seed=2))
        places = jnp.maximum(self.positions - self.moved, -1)
        split = (self.branches, tokens // self.branches) if self.branches else (tokens,)
        self.segments = [(*keys(B, *split), rows_for(places, B).reshape(len(places), *split))]
        if self.past:
            there = jnp.broadcast_to(jnp.arange(PAST), (self.shared, PAST))
            self.segments.insert(
                0, (*keys(self.shared, PAST), jnp.where(there % 3 == 1, -1, there) if self.empty else there)
            )
        if self.example:
            self.segments.insert(0, (*keys(1, 7), jnp.arange(7)[None]))
        window = jnp.int32(self.window) if self.traced and self.window is not None else self.window
        self.how = Scoring(0.4, self.softcap, window, numbers(K * G, seed=3) + 2 if self.sinks else None)

    @functools.cached_property
    def sees(self) -> np.ndarray:
        """Which queries see anything, [B or 1, T]."""
        every = [
            np.asarray(attention.visible(
                self.positions.reshape(len(self.positions), *p.shape[1:-1], -1), rows_for(p, len(self.positions)), self.how.window
            )).any(-1).reshape(len(self.positions), -1)
            for _, _, p in self.segments
        ]  # fmt: skip
        return np.any(every, axis=0)

    def read(self, form, q, arrays, sinks=None):
        how = self.how if sinks is None else self.how._replace(sinks=sinks)
        segments = [(k, v, p) for (k, v), (_, _, p) in zip(arrays, self.segments, strict=True)]
        out = form(q, self.positions, segments, how)
        return jnp.where(self.sees[:, None, None, :, None], out.astype(jnp.float32), 0)


TILED = functools.partial(blocked, tile=TILE)


@pytest.mark.parametrize("name", CASES)
def test_tiles_read_what_all_scores_read_and_so_do_their_gradients(name):
    case = Case(**CASES[name])
    arrays = [(k, v) for k, v, _ in case.segments]
    assert case.sees.any()

    def both(form, *given):
        loss = lambda *given: jnp.sum(jnp.sin(case.read(form, *given)))
        return case.read(form, *given), jax.grad(loss, (0, 1, 2)[: len(given)])(*given)

    given = (case.q, arrays, case.how.sinks) if case.sinks else (case.q, arrays)
    want, got = (jax.jit(functools.partial(both, form))(*given) for form in (plain, TILED))
    for number, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        assert_close(a, b, f"{name}, result {number}", 1e-5 if number else 2e-6)


def test_all_scores_at_once_are_the_definition():
    """In numpy, float64, query by query."""
    case = Case(past=True, example=True, softcap=2.0, window=30, sinks=True)
    got = np.asarray(case.read(TILED, case.q, [(k, v) for k, v, _ in case.segments]))
    rows = lambda a: np.repeat(np.asarray(a, np.float64), B // len(a), axis=0)
    keys, values = (np.concatenate([rows(s[i]) for s in case.segments], axis=2) for i in (0, 1))
    places = np.concatenate([rows(s[2]) for s in case.segments], axis=1)
    for b, k, g, t in [(0, 0, 0, 0), (1, 1, 2, 5), (2, 0, 1, 33), (3, 1, 0, 60)]:
        at = int(case.positions[b, t])
        seen = (places[b] >= 0) & (places[b] <= at) & (at - places[b] < 30)
        score = 2.0 * np.tanh(0.4 * keys[b, k][seen] @ np.asarray(case.q[b, k, g, t], np.float64) / 2.0)
        sink = np.exp(np.float64(case.how.sinks[k * G + g]) - score.max())
        weights = np.exp(score - score.max())
        assert_close(got[b, k, g, t], weights @ values[b, k][seen] / (weights.sum() + sink), f"{b, k, g, t}", 2e-6)


def test_what_sees_nothing_is_finite_and_so_are_gradients():
    case = Case()
    assert not case.sees[3, :15].any()
    segments = [(k, v, jnp.full_like(p, -1)) for k, v, p in case.segments]
    for given in (case.segments, segments):
        loss = lambda q, given=given: jnp.sum(TILED(q, case.positions, given, case.how) ** 2)
        assert np.isfinite(TILED(case.q, case.positions, given, case.how)).all()
        assert np.isfinite(jax.grad(loss)(case.q)).all()


def test_bfloat16_is_as_close_to_float32_as_all_scores_at_once_are():
    case = Case(past=True, example=True)
    arrays = [(k, v) for k, v, _ in case.segments]
    exact = case.read(plain, case.q, arrays)
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    segments = [(*half((k, v)), p) for k, v, p in case.segments]
    towards = jax.grad(lambda q: jnp.sum(TILED(q, case.positions, segments, case.how).astype(jnp.float32)))(
        half(case.q)
    )
    assert towards.dtype == jnp.bfloat16 and np.isfinite(towards.astype(jnp.float32)).all()
    error = lambda form: float(jnp.sqrt(jnp.mean((case.read(form, half(case.q), half(arrays)) - exact) ** 2)))
    assert error(TILED) < 1.1 * error(plain)


def test_vmap_is_a_loop():
    case = Case(past=True)
    many = jnp.stack([case.q, case.q * 2])
    run = lambda q, shift: TILED(q, case.positions + shift, case.segments, case.how)
    shifts = jnp.asarray([0, 3])
    together = jax.jit(jax.vmap(run))(many, shifts)
    for i in range(2):
        assert_close(together[i], run(many[i], shifts[i]), f"{i}", 2e-6)


def test_tiles_that_nothing_is_seen_of_are_left_out():
    """NaN in the values of what is skipped does not arrive: later tokens, and those before the window."""
    long = 96
    places = jnp.arange(long)[None]
    q, k, v = numbers(1, 1, 1, long, H), numbers(1, 1, long, H), numbers(1, 1, long, H)
    out = blocked(q, places, [(k, v.at[:, :, 32:].set(jnp.nan), places)], Scoring(1.0), (32, 32))
    assert np.isfinite(out[0, 0, 0, :32]).all() and np.isnan(out[0, 0, 0, 32:]).all()
    out = blocked(q, places, [(k, v.at[:, :, :32].set(jnp.nan), places)], Scoring(1.0, None, 8), (32, 32))
    assert np.isfinite(out[0, 0, 0, 64:]).all() and np.isnan(out[0, 0, 0, :32]).all()


@pytest.fixture
def tiled(monkeypatch):
    """Everything of 64 keys is long. (What was compiled without knows nothing of it.)"""
    used = []
    monkeypatch.setattr(attention, "LONG", 64)
    monkeypatch.setattr(attention, "SCORES", 64)
    monkeypatch.setattr(attention, "blocked", lambda *given: used.append(1) or blocked(*given, tile=(128, 96)))
    jax.clear_caches()
    yield used
    jax.clear_caches()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_long_prompt_equals_transformers(family, tmp_path, tiled):
    """Also left-padded, and behind a cache."""
    pair = make_checkpoint(tmp_path, family, seed=1, max_position_embeddings=2048, num_hidden_layers=2)
    row = prompts(1, 1500)
    with torch.no_grad():
        exact = pair.torch.double()(torch.from_numpy(row).long()).logits.numpy()
    padded = left_pad([row[0].tolist(), [5, 6]])
    assert_close(forward(pair.params, padded)[:1], exact, f"{family}, whole", 2 * ROUNDED)
    _, cache = prefill(pair.params, left_pad([row[0, :1400].tolist()], 1430))
    logits, _ = prefill(pair.params.unroll(), Prompts(row[:, 1400:]), past=[unrolled(cache)])
    assert_close(logits, exact[:, -1], f"{family}, behind 1400", 2 * ROUNDED)
    assert tiled


def unrolled(cache):
    apart = lambda a: tuple(a[i] for i in range(len(a)))
    return cache.replace(k=apart(cache.k), v=apart(cache.v))


LONG = ModelConfig(97, 32, 2, 4, 2, 8, 32, 32768, windows=(FULL, 512))
MATRIX = 4 * 4 * 8192 * 8192
"""Bytes of the scores of 8,192 tokens, four heads, float32."""


def temporaries(work) -> int:
    tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    return jax.jit(work).lower(abstract_params(LONG), tokens).compile().memory_analysis().temp_size_in_bytes


def reading(params, tokens):
    return prefill(params, Prompts(tokens))


def behind(params, tokens):
    return prefill(params, Prompts(tokens[:, :64]), past=[prefill(params, Prompts(tokens))[1]])


def training(params, tokens, remat):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    read = lambda p: run_blocks(p, embed(p, tokens, positions), positions, training=Training(remat=remat))[0]
    return jax.grad(lambda p: jnp.sum(read(p) ** 2))(params)


WORKS = {"reading": reading, "behind": behind} | {
    f"gradient, {remat} made again": functools.partial(training, remat=remat) for remat in ("off", "products", "all")
}


@pytest.mark.parametrize("name", WORKS)
def test_no_matrix_of_8192_tokens_is_made(name, monkeypatch):
    """By the compiler's memory analysis; the control is the form that makes them, a quarter at a time."""
    jax.clear_caches()
    assert temporaries(WORKS[name]) < MATRIX / 16
    if name == "reading":
        jax.clear_caches()
        monkeypatch.setattr(attention, "LONG", 10**9)
        assert temporaries(WORKS[name]) > MATRIX / 4
        jax.clear_caches()


def test_short_prompts_and_decoding_make_all_scores_at_once(monkeypatch):
    """Sizes of games, of writing, and of a sweep's cells; long ones do not."""
    used = []
    monkeypatch.setattr(attention, "plain", lambda q, *rest: q)
    monkeypatch.setattr(attention, "blocked", lambda q, *rest: used.append(q.shape) or q)
    zeros = lambda tokens, keys: (jnp.zeros((1, 1, 1, tokens, 1)), jnp.zeros((1, tokens), jnp.int32), [
        (jnp.zeros((1, 1, keys, 1)), jnp.zeros((1, 1, keys, 1)), jnp.zeros((1, keys), jnp.int32))
    ])  # fmt: skip
    for tokens, keys in [(600, 600), (1, 32768), (16, 8192), (2048, 256), (768, 640), (1024, 1024)]:
        attention.attend(*zeros(tokens, keys), Scoring(1.0))
    assert not used
    for tokens, keys in [(64, 8192), (2048, 2048), (8192, 8192), (8192, 16384)]:
        attention.attend(*zeros(tokens, keys), Scoring(1.0))
    assert len(used) == 4
