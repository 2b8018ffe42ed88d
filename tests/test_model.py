"""The model as pure functions: composition, caches, layouts, compile counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.decoding import Sampling, bucket, choose, generate
from jaxcomm.edits import Edit, scale
from jaxcomm.prompts import left_pad
from jaxcomm.reading import forward, hidden_states, prefill, prefix, suffix
from jaxcomm.sites import Site

from conftest import assert_close, prompts, read, write


def test_prefix_then_suffix_is_forward_for_every_k_int_or_traced_in_both_layouts(kind):
    tokens = prompts(2, 13)
    want = read(kind.params, tokens)
    split = lambda params, k: suffix(params, prefix(params, tokens, k), k)
    traced, made_for_it = jax.jit(split), jax.jit(lambda params: split(params, 3))
    for params in (kind.params, kind.params.unroll()):
        for k in range(kind.params.config.layers + 1):
            assert_close(traced(params, k), want, f"traced k = {k}")
        assert_close(made_for_it(params), want, "k = 3 as an int")
    assert traced._cache_size() == 1 + kind.params.config.alike, "one program per layout serves every k"


def test_last_token_states_equal_the_last_column_of_all_states(kind):
    padded = left_pad([[3, 1, 4], [1, 5, 9, 2, 6]])
    everything = hidden_states(kind.params, padded)
    assert_close(hidden_states(kind.params, padded, last=True), everything[:, :, -1], "last", tolerance=1e-6)


def test_last_token_states_store_nothing_that_was_not_asked_for(llama):
    """By the compiler's own memory analysis: what all states take is gone, not moved into temporary memory."""
    tokens, c = prompts(2, 256), llama.params.config
    memory = lambda last: (
        jax.jit(functools.partial(hidden_states, last=last)).lower(llama.params, tokens).compile().memory_analysis()
    )
    every, last = memory(False), memory(True)
    states = (c.layers + 1) * 2 * 256 * c.width * 4
    assert every.output_size_in_bytes == states and last.output_size_in_bytes == states / 256
    assert last.temp_size_in_bytes < every.temp_size_in_bytes + states / (c.layers + 1)


def test_stack_undoes_unroll(llama):
    again = llama.params.unroll().stack()
    jax.tree.map(np.testing.assert_array_equal, again, llama.params)


def test_cached_decoding_equals_the_full_forward_pass(kind):
    tokens = prompts(3, 9)
    for params in (kind.params, kind.params.unroll()):
        out = write(params, tokens, max_new_tokens=12)
        whole = np.concatenate([tokens, out.tokens], axis=1)
        logits = jax.nn.log_softmax(read(kind.params, whole))[:, 8:-1]
        np.testing.assert_array_equal(jnp.argmax(logits, -1), out.tokens)
        assert_close(out.logprobs, jnp.take_along_axis(logits, out.tokens[..., None], -1)[..., 0], "log-probabilities")


def test_a_left_padded_batch_equals_single_prompts(kind):
    rows = [prompts(1, n, seed=n)[0].tolist() for n in (2, 17, 9)]
    padded = left_pad(rows, 24)
    together = write(kind.params, padded, max_new_tokens=8)
    for b, row in enumerate(rows):
        alone = write(kind.params, np.asarray([row]), max_new_tokens=8)
        np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
        assert_close(together.logprobs[b], alone.logprobs[0], f"row {b}")


def test_vmap_equals_a_loop(llama):
    tokens = prompts(6, 7).reshape(3, 2, 7)
    settings = dict(max_new_tokens=5, stop_tokens=(11,))
    together = jax.jit(jax.vmap(functools.partial(generate, llama.params, **settings)))(tokens)
    for g in range(3):
        np.testing.assert_array_equal(together.tokens[g], write(llama.params, tokens[g], **settings).tokens)


def test_new_prompts_of_a_bucket_and_new_sampling_settings_compile_nothing(llama):
    traces = []

    def counted(padded, sampling, keys):
        traces.append(padded.shape)
        return generate(llama.params, padded, max_new_tokens=4, sampling=sampling, keys=keys)

    compiled = jax.jit(counted)
    for length in (3, 9, 14, 32):
        padded = left_pad([prompts(1, length)[0].tolist()], bucket(length, 1000))
        keys = jax.random.split(jax.random.key(length), 1)
        compiled(padded, Sampling(0.1 * length, length, 0.5), keys)
    assert len(traces) == 1


def test_rows_stop_at_their_own_stop_token_and_the_loop_when_all_have(llama):
    tokens = prompts(4, 6)
    free = np.asarray(write(llama.params, tokens, max_new_tokens=20).tokens)
    stops = (int(free[0, 3]), int(free[1, 5]))
    out = write(llama.params, tokens, max_new_tokens=20, stop_tokens=stops)
    for row in range(4):
        hits = np.flatnonzero(np.isin(free[row], stops))
        length = hits[0] + 1 if len(hits) else 20
        assert int(out.lengths[row]) == length
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        assert (np.asarray(out.tokens[row, length:]) == -1).all() and (
            np.asarray(out.logprobs[row, length:]) == 0
        ).all()


def test_every_step_of_every_row_has_a_draw_of_its_own(llama):
    """All tokens equally likely: 4 x 64 draws, of which those of a step, or of a row, are not the same."""
    even = llama.params.replace(embed=jnp.zeros_like(llama.params.embed), head=None)
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = np.asarray(write(even, prompts(4, 3), max_new_tokens=64, sampling=Sampling(), keys=keys).tokens)
    # Of 97 tokens, 64 draws leave 47 different ones on average, 256 leave 90.
    assert all(len(set(row)) > 35 for row in tokens) and len(set(tokens.flat)) > 80
    assert all(len(set(column)) > 1 for column in tokens.T)


def test_a_sampled_row_depends_on_its_own_key_only(llama):
    tokens, keys = prompts(4, 6), jax.random.split(jax.random.key(5), 4)
    draw = functools.partial(write, llama.params, max_new_tokens=10, sampling=Sampling(1.5))
    together = draw(tokens, keys=keys)
    for row in (0, 3):
        alone = draw(tokens[row : row + 1], keys=keys[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    assert not np.array_equal(together.tokens, draw(tokens, keys=jax.random.split(jax.random.key(6), 4)).tokens)


@given(st.integers(0, 2**31), st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.3, 3.0))
def test_draws_come_from_exactly_the_set_top_k_and_top_p_leave(seed, top_k, top_p, temperature):
    """Oracle: the definition, in numpy, on one row."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=10).astype(np.float32) * 2
    order = np.argsort(-logits)
    order = order[:top_k] if top_k else order
    p = np.exp(np.float64(logits[order]) / temperature)
    p /= p.sum()
    before = np.cumsum(p) - p
    if np.min(np.abs(before - top_p)) < 1e-5:
        return  # a tie within rounding may fall either way
    allowed = set(order[(before < top_p) | (np.arange(len(order)) == 0)].tolist())
    draws = choose(
        jnp.tile(logits, (400, 1)), Sampling(temperature, top_k, top_p), jax.random.split(jax.random.key(seed), 400)
    )
    assert set(np.asarray(draws).tolist()) <= allowed
    q = p[: len(allowed)] / p[: len(allowed)].sum()
    share = np.mean(np.asarray(draws) == order[0])
    assert abs(share - q[0]) < 5 * np.sqrt(q[0] * (1 - q[0]) / 400) + 1e-9


def test_prefill_with_an_edit_that_changes_nothing_is_prefill(kind):
    tokens = prompts(2, 9)
    logits, cache = jax.jit(prefill)(kind.params, tokens)
    same = lambda state, message, context: state
    edited = jax.jit(lambda params, j: prefill(params, tokens, edits=[Edit(Site("resid_post", j), same)]))
    for j in range(kind.params.config.layers + 1):
        again, other = edited(kind.params, j)
        np.testing.assert_array_equal(logits, again)
        jax.tree.map(np.testing.assert_array_equal, cache, other)


def test_prefill_and_its_edits_are_the_same_in_both_layouts(kind):
    """Unrolled, the last block goes through the last token only."""
    padded = left_pad([[5, 6, 7, 8], [9]], 6)
    edited = jax.jit(lambda params, j: prefill(params, padded, edits=[Edit(Site("resid_post", j, "last"), scale(2.0))]))
    unrolled = kind.params.unroll()
    for j in range(kind.params.config.layers + 1):
        (logits, cache), (same, other) = edited(kind.params, j), edited(unrolled, j)
        assert_close(same, logits, f"logits, j = {j}")
        for i in range(kind.params.config.layers):
            jax.tree.map(functools.partial(assert_close, what=f"cache, j = {j}"), other.layer(i), cache.layer(i))


@given(st.integers(1, 900))
def test_buckets_are_few_and_never_much_larger_than_the_prompt(length):
    size = bucket(length, 1000)
    assert length <= size <= max(32, 1.5 * length) and bucket(size, 1000) == size


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda p: prefix(p, prompts(1, 4), 5),
            "k = 5 is out of range: this model's layers are 0 (the embedding) to 4",
        ),
        (lambda p: prefix(p, prompts(1, 4), -1), "k = -1 is out of range"),
        (
            lambda p: forward(p, prompts(1, 1025)),
            "1025 prompt columns + 0 new tokens exceed the model's 1024 positions",
        ),
        (lambda p: generate(p, prompts(1, 1020), max_new_tokens=5), "1020 prompt columns + 5 new tokens exceed"),
        (lambda p: forward(p, np.zeros((1, 0), np.int32)), "empty prompt"),
        (lambda p: left_pad([[1], []]), "empty prompt at row 1"),
        (lambda p: left_pad([]), "no prompts"),
        (lambda p: left_pad([[1, 2, 3]], 2), "row 0 has 3 tokens, the limit is 2"),
        (lambda p: bucket(9, 8), "a prompt of 9 tokens does not fit"),
        (lambda p: generate(p, prompts(1, 4), max_new_tokens=2, sampling=Sampling()), "sampling needs keys"),
    ],
)
def test_bad_input_is_one_clear_line(llama, call, message):
    with pytest.raises(ValueError, match=".*") as error:
        call(llama.params)
    assert message in str(error.value) and "\n" not in str(error.value)
