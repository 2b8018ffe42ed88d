"""Public functions as they are called: one program each, the same results under any transformation, and no number out of
invalid input."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm.cipher import Mixing, cipher
from jaxcomm.communication import read_prompt, resume
from jaxcomm.decoding import choose
from jaxcomm.prompts import Prompts

from conftest import assert_close, compiles, prompts


@pytest.fixture
def unchecked():
    """As users have it: shapes in annotations are not looked at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PADDED = jc.left_pad([[3, 1, 4], [1, 5, 9, 2, 6]], 8)
TOKENS, MASK = PADDED.tokens, PADDED.mask
NEW = dict(max_new_tokens=3)


def functions(p, j=2, k=3):
    """name -> a function of tokens and mask: every public one, called as the README shows."""
    texts = prompts(2, 6, seed=4).reshape(2, 3, 2)
    return {
        "prefix": lambda t, m: jc.prefix(p, Prompts(t, m), k),
        "suffix": lambda t, m: jc.suffix(p, jc.prefix(p, Prompts(t, m), k), k, mask=m),
        "forward": lambda t, m: jc.forward(p, Prompts(t, m)),
        "hidden_states": lambda t, m: jc.hidden_states(p, Prompts(t, m), last=True),
        "prefill": lambda t, m: jc.prefill(p, Prompts(t, m)),
        "decode": lambda t, m: jc.decode(p, *jc.prefill(p, Prompts(t, m)), **NEW),
        "score": lambda t, m: jc.score(p, *jc.prefill(p, Prompts(t, m)), texts),
        "generate": lambda t, m: jc.generate(p, Prompts(t, m), **NEW),
        "send": lambda t, m: jc.send(p, Prompts(t, m), k),
        "receive": lambda t, m: jc.prefill(p, Prompts(t, m), edits=[jc.receive(jc.send(p, Prompts(t, m), k), j)]),
        "answer": lambda t, m: jc.generate(
            p, Prompts(t, m), edits=[jc.receive(jc.send(p, Prompts(t, m), k), j)], **NEW
        ),
        "steer": lambda t, m: jc.generate(
            p, Prompts(t, m), edits=[jc.Edit(jc.Site("attn_out", max(j, 1)), jc.scale(0.5), every_step=True)], **NEW
        ),
        "run_with_cache": lambda t, m: jc.run_with_cache(p, Prompts(t, m), sites=["q", "logits"], layers=[1, 3]),
        "resume": lambda t, m: resume(p, read_prompt(p, Prompts(t, m)), jc.send(p, Prompts(t, m), k).states, j),
        "communicate": lambda t, m: jc.communicate(p, p, Prompts(t, m), Prompts(t, m), k=k, j=j, **NEW),
        "communicate_logits": lambda t, m: jc.communicate_logits(
            p, p, Prompts(t, m), Prompts(t, m), t[:, -2:], k=k, j=j
        ),
        "cipher": lambda t, m: cipher(p, *jc.prefill(p, Prompts(t, m)), Mixing(jc.Sampling(0.5)), **NEW),
    }


def same(got, want, what, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(x, y, what, tolerance)


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_a_second_call_compiles_nothing_whatever_the_prompts_and_layers(llama, layout):
    params = llama.params if layout == "stacked" else llama.params.unroll()
    for fn in functions(params).values():
        fn(TOKENS, MASK)
    other = jc.left_pad([[7, 7], [1, 2, 3, 4, 5, 6, 7]], 8)
    again, mask = other.tokens, other.mask
    for j, k in ((0, 4), (4, 0), (1, 1)):
        for name, fn in functions(params, j, k).items():
            with compiles() as programs:
                fn(again, mask)
            assert not programs, f"{name} at k = {k}, j = {j}"


def test_under_jit_vmap_and_scan_every_function_says_what_it_says_alone(llama):
    stack = jnp.stack([TOKENS, TOKENS[::-1]]), jnp.stack([MASK, MASK[::-1]])

    @jax.jit
    def every(t, m):
        return {name: fn(t, m) for name, fn in functions(llama.params).items()}

    @jax.jit
    def mapped(t, m):
        return {name: jax.vmap(fn)(t, m) for name, fn in functions(llama.params).items()}

    @jax.jit
    def scanned(t, m):
        return jax.lax.scan(lambda _, x: (None, every(*x)), None, (t, m))[1]

    batched, looped = mapped(*stack), scanned(*stack)
    for n, (tokens, mask) in enumerate(zip(*stack, strict=True)):
        jitted = every(tokens, mask)
        for name, fn in functions(llama.params).items():
            want = fn(np.asarray(tokens), np.asarray(mask))
            same(jitted[name], want, f"{name} under jit")
            for how, many in (("vmap", batched), ("scan", looped)):
                same(jax.tree.map(lambda a, n=n: a[n], many[name]), want, f"{name} under {how}")


def test_gradients_pass_through_compiled_calls(llama):
    """Of the caller's own loss, not jitted: int layers stay ints, or there would be no reverse mode."""

    def loss(params, W):
        h = jc.prefix(params, PADDED, 3)
        logits = jc.communicate_logits(params, params, PADDED, PADDED, TOKENS, k=2, j=1, graft=jc.Graft(W=W))
        return jnp.mean(jc.suffix(params, h, 3, mask=MASK) ** 2) + jnp.mean(logits**2)

    W = jnp.eye(llama.params.config.width)
    alone, jitted = jax.grad(loss, argnums=(0, 1))(llama.params, W), jax.jit(jax.grad(loss, argnums=(0, 1)))
    same(alone, jitted(llama.params, W), "gradient", 1e-4)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(alone))


def test_what_a_graft_closes_over_is_learned(llama):
    """Its tracers are in no argument of the call."""
    talk = lambda w, answers: jc.communicate_logits(
        llama.params,
        llama.params,
        PADDED,
        PADDED,
        answers,
        k=2,
        j=1,
        graft=lambda a, b: w * a + b,
    )
    loss = lambda w: jnp.mean(talk(w, TOKENS) ** 2)
    want = (loss(0.51) - loss(0.49)) / 0.02
    assert_close(jax.grad(loss)(0.5), want, "gradient", 1e-2)
    assert_close(jax.jit(jax.grad(loss))(0.5), want, "gradient under jit", 1e-2)


CALLS = {
    "prefix": lambda p, t, m: jc.prefix(p, Prompts(t, m), 1),
    "suffix": lambda p, t, m: jc.suffix(p, np.ones((2, 8, p.config.width), np.float32), 1, mask=m),
    "forward": lambda p, t, m: jc.forward(p, Prompts(t, m)),
    "hidden_states": lambda p, t, m: jc.hidden_states(p, Prompts(t, m)),
    "prefill": lambda p, t, m: jc.prefill(p, Prompts(t, m)),
    "generate": lambda p, t, m: jc.generate(p, Prompts(t, m), **NEW),
    "send": lambda p, t, m: jc.send(p, Prompts(t, m), 1),
    "run_with_cache": lambda p, t, m: jc.run_with_cache(p, Prompts(t, m), sites="z"),
    "edits": lambda p, t, m: jc.generate(
        p, Prompts(t, m), edits=[jc.receive(np.ones((2, p.config.width), np.float32), 1)], **NEW
    ),
    "read_prompt": lambda p, t, m: read_prompt(p, Prompts(t, m)),
    "communicate, A": lambda p, t, m: jc.communicate(p, p, Prompts(t, m), PADDED, k=1, j=1, **NEW),
    "communicate, B": lambda p, t, m: jc.communicate(p, p, PADDED, Prompts(t, m), k=1, j=1, **NEW),
    "communicate_logits": lambda p, t, m: jc.communicate_logits(p, p, TOKENS, Prompts(t, m), TOKENS, k=1, j=1),
    "sweep, A": lambda p, t, m: jc.sweep(p, p, Prompts(t, m), TOKENS, ks=[1], js=[1]),
    "sweep_answers, B": lambda p, t, m: jc.sweep_answers(p, p, TOKENS, Prompts(t, m), TOKENS, ks=[1], js=[1]),
}
OTHER = TOKENS.copy()
OTHER[1, 5] = 97


@pytest.mark.parametrize("name", CALLS)
def test_prompts_that_cannot_be_read_are_refused_by_every_function(unchecked, llama, name):
    call = functools.partial(CALLS[name], llama.params)
    empty = MASK & (np.arange(2) > 0)[:, None]
    with pytest.raises(ValueError, match=r"row \d ends in padding: pad on the left"):
        call(TOKENS, MASK[:, ::-1])
    with pytest.raises(ValueError, match="row 0 has no token: its mask is False everywhere"):
        call(jnp.asarray(TOKENS), jnp.asarray(empty))
    with pytest.raises(ValueError, match="the mask is"):
        call(TOKENS, MASK[:1])
    if name != "suffix":
        for bad in (97, -1):
            with pytest.raises(
                ValueError, match=f"token {bad} at row 1, column 5 is not in the vocabulary: .* 0 to 96"
            ):
                call(np.where(OTHER == 97, bad, TOKENS), MASK)
        call(np.where(MASK, TOKENS, 10**6), MASK)  # whatever stands on padding is not read


KEYS = jax.random.split(jax.random.key(0), 2)


def score_texts(p, texts):
    return jc.score(p, *jc.prefill(p, TOKENS), np.array(texts, np.int32))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: jc.prefix(p, TOKENS, 5), "k = 5 is out of range: this model's layers are 0 (the embedding) to 4"),
        (lambda p: jc.prefix(p, TOKENS, jnp.int32(-1)), "k = -1 is out of range"),
        (lambda p: jc.prefix(p, TOKENS, 2.5), "k = 2.5: a layer is a whole number, 0 to 4"),
        (lambda p: jc.prefix(p, TOKENS, "2"), "k = '2': a layer is a whole number"),
        (lambda p: jc.forward(p, [[1, 2]]), "prompts are an array, got a list: jaxcomm.left_pad makes one"),
        (lambda p: jc.suffix(p, np.ones((1, 2, 48), np.float32), 5), "k = 5 is out of range"),
        (lambda p: jc.communicate(p, p, TOKENS, TOKENS, k=9, j=1), "k = 9 is out of range"),
        (lambda p: jc.communicate(p, p, TOKENS, TOKENS, k=1, j=9), "j = 9 is out of range"),
        (lambda p: jc.Site("resid_post", 1, "al"), "unknown positions 'al': choose 'last' or 'all'"),
        (lambda p: jc.Site("resid", 1), "unknown site 'resid': choose one of embed, resid_pre"),
        (lambda p: jc.Site("z"), "z needs a layer"),
        (lambda p: jc.Site("logits", 2), "logits has no layers: leave it out"),
        (lambda p: jc.Site("attn_out", 1, heads=2), "attn_out has no heads"),
        (lambda p: jc.send(p, TOKENS, 5), "layer 5 is out of range: resid_post of this model has layers 0 to 4"),
        (lambda p: jc.send(p, TOKENS, jc.Site("z", 0)), "layer 0 is out of range: z of this model has layers 1 to 4"),
        (lambda p: jc.send(p, TOKENS, jc.Site("k", 1, heads=2)), "head 2 is out of range: k has heads 0 to 1"),
        (lambda p: jc.send(p, PADDED, jc.Site("z", 1, 3)), "position 3 is out of range: row 0 has 3 tokens"),
        (lambda p: jc.send(p, PADDED, jc.Site("z", 1, [0, -4])), "position -4 is out of range: row 0 has 3 tokens"),
        (lambda p: jc.send(p, PADDED, jc.Site("z", 1, np.array([0, 5]))), "position 5 is out of range: row 1 has 5 tokens"),
        (lambda p: jc.send(p, PADDED, jc.Site("z", 1, np.array([0, 1, 2]))), "positions are (3,) for prompts (2, 8)"),
        (lambda p: jc.send(p, PADDED, jc.Site("z", 1, ~MASK)), "the mask of positions chooses no token of row 0"),
        (lambda p: jc.run_with_cache(p, TOKENS, sites="z", layers=[5]), "layer 5 is out of range"),
        (lambda p: jc.forward(p, TOKENS, edits=[jc.Edit(jc.Site("pattern", 1), jc.scale(0.0))]), "pattern can be read and not edited"),
        (lambda p: jc.forward(p, TOKENS, edits=[jc.scale(0.0)]), "edit 0 is a Partial: make it with jaxcomm.Edit"),
        (lambda p: jc.forward(p, TOKENS, edits=[jc.Edit(jc.Site("z", 9), jc.scale(0.0))]), "layer 9 is out of range"),
        (lambda p: jc.forward(p, TOKENS, edits=[jc.Edit(jc.Site("z", 1), lambda s, m, c: s[:, :1])]), "the edit of z returned"),
        (lambda p: jc.forward(p, PADDED, edits=[jc.Edit(jc.Site("z", 1, at), jc.scale(0.0)) for at in ("last", [0, -1])]), "edits 0 and 1 both change z 1 at position 2 of row 0"),
        (lambda p: jc.communicate(p, p, TOKENS, TOKENS, k=1, j=1, graft="add"), "unknown graft 'add'"),
        (lambda p: jc.communicate(p, p, TOKENS[:1], TOKENS, k=1, j=1), "A has 1 prompts, B has 2"),
        (lambda p: jc.communicate_logits(p, p, TOKENS[:1], TOKENS, TOKENS, k=1, j=1, graft="sum"), "A has 1 prompts, B has 2"),
        (lambda p: jc.prefill(p, TOKENS, edits=[jc.receive(np.ones((1, 48), np.float32), 1, "sum")]), "1 messages for 2 prompts"),
        (lambda p: jc.communicate(p, p, TOKENS, TOKENS, k=1, j=1, graft=lambda a, b: a[:1]), "the graft returned"),
        (lambda p: jc.Sampling(temperature=-0.5), "temperature = -0.5: it must be 0 (greedy) or more"),
        (lambda p: jc.Sampling(temperature=np.array([0.5, -1.0])), "it must be 0 (greedy) or more"),
        (lambda p: jc.Sampling(top_k=-1), "top_k = -1: it must be 0 (all) or more"),
        (lambda p: jc.Sampling(top_p=0.0), "top_p = 0.0: it must be above 0 and at most 1"),
        (lambda p: jc.Sampling(top_p=1.5), "top_p = 1.5"),
        (lambda p: jc.forward(p, Prompts(TOKENS, MASK[:1])), "the mask is (1, 8), the prompts are (2, 8)"),
        (lambda p: jc.forward(p, np.ones(5, np.int32)), "prompts are tokens [rows, columns]"),
        (lambda p: jc.forward(p, np.ones((1, 5), np.float32)), "tokens are whole numbers, got float32"),
        (lambda p: jc.generate(p, np.ones((1, 0), np.int32), **NEW), "empty prompt"),
        (lambda p: jc.score(p, *jc.prefill(p, TOKENS), np.ones((2, 1, 0), np.int32)), "a text to score has no tokens"),
        (lambda p: score_texts(p, [[[5, 97]], [[5, 6]]]), "continuations have token 97, which is not in the vocabulary: this model's tokens are 0 to 96"),
        (lambda p: score_texts(p, [[[5, 6]], [[5, -2]]]), "continuations have token -2"),
        (lambda p: score_texts(p, [[[5, 6]], [[-1, 6]]]), "continuations have a token after the end of a text"),
        (lambda p: score_texts(p, [[[5, 6]]]), "continuations are (1, 1, 2) for 2 prompts"),
        (lambda p: jc.communicate_logits(p, p, TOKENS, TOKENS, TOKENS + 97, k=1, j=1), "answers have token 97"),
        (lambda p: jc.communicate_logits(p, p, TOKENS, TOKENS, TOKENS[:1], k=1, j=1), "1 answers for 2 prompts: give one for each"),
        (lambda p: jc.sweep_answers(p, p, TOKENS, TOKENS, TOKENS + 97, ks=[1], js=[1]), "answers have token 97"),
        (lambda p: jc.generate(p, TOKENS, **NEW, sampling=jc.Sampling(), keys=KEYS[:1]), "sampling needs keys, one per row, 2 in all"),
        (lambda p: jc.generate(p, TOKENS, **NEW, sampling=jc.Sampling(), keys=KEYS[0]), "sampling needs keys, one per row, 2 in all"),
        (lambda p: jc.generate(p, TOKENS, **NEW, sampling=jc.Sampling(np.ones(3)), keys=KEYS), "3 temperatures for 2 rows"),
        (lambda p: jc.sweep(p, p, TOKENS, TOKENS, ks=[1], js=[1], sampling=jc.Sampling(), keys=KEYS[:1]), "sampling needs keys, one per item, 2 in all"),
    ],
)  # fmt: skip
def test_invalid_values_are_one_clear_line(unchecked, llama, call, says):
    with pytest.raises(ValueError) as error:
        call(llama.params)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_layers_out_of_range_that_are_traced_give_nan_and_no_token(llama, layout):
    p = llama.params if layout == "stacked" else llama.params.unroll()
    talk = jax.jit(lambda k, j: jc.communicate(p, p, PADDED, PADDED, k=k, j=j, **NEW))
    loss = jax.jit(lambda k, j: jc.communicate_logits(p, p, TOKENS, TOKENS, TOKENS, k=k, j=j))
    split = jax.jit(lambda k, j: jc.suffix(p, jc.prefix(p, TOKENS, k), j))
    for k, j in ((5, 1), (-1, 1), (1, 5), (1, -1), (99, 99)):
        out = talk(k, j)
        assert np.all(np.asarray(out.tokens) == -1) and np.all(np.asarray(out.lengths) == 0), (k, j)
        assert np.all(np.isnan(out.logprobs[:, 0])), (k, j)
        assert np.all(np.isnan(loss(k, j))), (k, j)
        assert np.all(np.isnan(split(k, j))), (k, j)
    out = jax.vmap(talk, (0, None))(jnp.array([1, 99, 4]), 2)
    assert np.all(np.asarray(out.tokens[1]) == -1)
    for n, k in ((0, 1), (2, 4)):
        want = jc.communicate(p, p, PADDED, PADDED, k=k, j=2, **NEW)
        np.testing.assert_array_equal(out.tokens[n], want.tokens)


def test_texts_outside_the_vocabulary_give_nan_where_they_are_traced(llama):
    p, read = llama.params, jc.prefill(llama.params, TOKENS)
    texts = np.array([[[5, 6, 7]], [[5, 97, 7]]], np.int32)
    logprobs, _ = jax.jit(lambda t: jc.score(p, *read, t))(texts)
    assert np.all(np.isfinite(logprobs[0])) and np.isnan(logprobs[1]).tolist() == [[False, True, True]]
    logits = jax.jit(lambda t: jc.communicate_logits(p, p, TOKENS, TOKENS, t, k=1, j=1))(texts[:, 0])
    assert np.all(np.isfinite(logits[0])) and np.all(np.isnan(logits[1, 2]))


def test_prompts_that_cannot_be_read_give_nan_where_they_are_traced_and_only_there(llama):
    p, good = llama.params, jc.generate(llama.params, PADDED, **NEW)
    write = jax.jit(lambda t, m: jc.generate(p, Prompts(t, m), **NEW))
    read = jax.jit(lambda t, m: jc.forward(p, Prompts(t, m)))
    right = np.stack([MASK[0], MASK[1, ::-1]])
    nothing = np.stack([MASK[0], np.zeros(8, bool)])
    for tokens, mask in ((OTHER, MASK), (np.where(OTHER == 97, -1, TOKENS), MASK), (TOKENS, right), (TOKENS, nothing)):
        out, logits = write(tokens, mask), read(tokens, mask)
        np.testing.assert_array_equal(out.tokens[0], good.tokens[0])
        assert np.all(np.asarray(out.tokens[1]) == -1) and out.lengths[1] == 0 and np.isnan(out.logprobs[1, 0])
        assert np.all(np.isfinite(logits[0])) and np.all(np.isnan(logits[1, -1]))


def test_temperature_0_is_greedy_and_a_tiny_one_nearly(llama):
    keys, want = jax.random.split(jax.random.key(0), 2), jc.generate(llama.params, PADDED, **NEW)
    for temperature in (0, 0.0, 1e-40, 1e-12, np.array([0.0, 1e-12], np.float32)):
        how = dict(sampling=jc.Sampling(temperature, top_k=5, top_p=0.9), keys=keys)
        np.testing.assert_array_equal(jc.generate(llama.params, PADDED, **NEW, **how).tokens, want.tokens)
    for temperature in (0, np.zeros(2, np.float32)):  # without keys, as nothing is drawn
        out = jc.generate(llama.params, PADDED, **NEW, sampling=jc.Sampling(temperature))
        np.testing.assert_array_equal(out.tokens, want.tokens)
    swept = lambda **how: jc.sweep(llama.params, llama.params, TOKENS, TOKENS, ks=[1], js=[2], **NEW, **how)
    np.testing.assert_array_equal(swept(sampling=jc.Sampling(0.0)).tokens, swept().tokens)
    with pytest.raises(ValueError, match="sampling needs keys"):
        jc.generate(llama.params, PADDED, **NEW, sampling=jc.Sampling(np.array([0.0, 0.1])))
    first = choose(jnp.array([[1.0, 3.0, 3.0]]), jc.Sampling(0.0), keys[:1])
    assert first == 1, "of equals the first, as argmax has it"
    draw = jax.jit(lambda t: choose(jnp.zeros((2, 4)), jc.Sampling(t), keys))
    assert np.all(np.asarray(draw(-1.0)) == -1) and np.all(np.asarray(draw(1.0)) >= 0)


def test_an_answer_may_end_early_in_teacher_forcing(llama):
    """-1 after the end of an answer is padding, and changes nothing before it."""
    answers = np.array([[5, 6, -1], [7, -1, -1]], np.int32)
    how = dict(k=2, j=1)
    got = jc.communicate_logits(llama.params, llama.params, PADDED, PADDED, answers, **how)
    want = jc.communicate_logits(llama.params, llama.params, PADDED, PADDED, np.maximum(answers, 0), **how)
    assert_close(got[0, :2], want[0, :2], "two tokens")
    assert_close(got[1, :1], want[1, :1], "one token")


def test_a_text_without_tokens_has_no_probability(llama):
    texts = np.array([[[5, 6], [-1, -1]], [[7, -1], [8, 9]]], np.int32)
    logprobs, best = jc.score(llama.params, *jc.prefill(llama.params, PADDED), texts)
    assert np.isnan(logprobs[0, 1, 0]) and not best[0, 1, 0]
    assert np.isfinite(np.delete(np.asarray(logprobs).reshape(-1), 2)).all()
