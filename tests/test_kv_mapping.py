"""Keys and values of A made B's: numpy in float64, from every row of transformers' keys before they are rotated, finds the
same layers, ridges and maps; what is mapped is what numpy maps and rotates; tokens are aligned as their characters say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import jaxcomm as jc
from jaxcomm.agent import Agent
from jaxcomm.alignment import PADDING, UNREAD
from jaxcomm.ridge import HELD_OUT

from conftest import assert_close, make_checkpoint, prompts, refused
from hooks import exact_of

N, STRIDE, SOURCES = 60, 3, 2
RIDGES = (1e-3, 1e-1, 10.0)
PAIRS = {
    "llama3 and yarn, whose scale is not 1; norms of heads": ("llama", "qwen3", {}),
    "yarn and a part of each head; biases": ("qwen3", "gpt_neox", dict(num_hidden_layers=3)),
    "two ropes and layers without": ("gemma3_text", "smollm3", dict(num_key_value_heads=4)),
    "learned positions and norms of all heads": ("gpt2", "olmo2", dict(num_hidden_layers=2, num_key_value_heads=1)),
    "linear, with biases, and learned positions": ("llama_untied_bias", "gpt2", {}),
}
LENGTHS = np.random.default_rng(0).integers(6, 13, N)
ROWS = [prompts(1, n, seed=i)[0].tolist() for i, n in enumerate(LENGTHS)]
A, B = jc.left_pad(ROWS, 15), jc.left_pad(ROWS, 13)


def strangers():
    """B reads other tokens than A: for each one a token of A's, or none; columns, and index by index."""
    rng = np.random.default_rng(1)
    rows = [prompts(1, n, seed=100 + i)[0].tolist() for i, n in enumerate(rng.integers(5, 12, N))]
    found = [np.sort(rng.integers(-1, len(a), len(b))) for a, b in zip(ROWS, rows, strict=True)]
    found = [np.where(at < 0, UNREAD, at) for at in found]
    columns = np.full((N, 13), PADDING)
    for row, (a, at) in enumerate(zip(ROWS, found, strict=True)):
        columns[row, 13 - len(at) :] = np.where(at < 0, at, at + 15 - len(a))
    return rows, found, columns


# What transformers and numpy make of it -------------------------------------------------------------------------------


def plain(pair, row):
    """Keys before their rotation, and values, [2, L, T, K, H], float64."""
    exact = exact_of(pair)
    read = exact.read(row, ("k", "v"))
    k, v = (np.stack([read[name, i + 1] for i in range(exact.layers)]) for name in "kv")
    for i, block in enumerate(exact.blocks):
        attention = getattr(block, "self_attn", None)
        if norm := getattr(attention, "k_norm", None):
            heads = torch.tensor(k[i])
            wide = pair.params.config.qk_norm == "width"
            with torch.no_grad():
                k[i] = norm(heads.flatten(-2) if wide else heads).numpy().reshape(k[i].shape)
    return np.stack([k, v])


def rotated(pair, k, positions):
    """Keys [L, T, K, H] turned to positions [T], with the frequencies that transformers has."""
    base, config = exact_of(pair).model.base_model, pair.torch.config
    turned = k.copy()
    if not hasattr(base, "rotary_emb"):
        return turned
    for i in range(len(k)):
        if hasattr(config, "no_rope_layers") and not config.no_rope_layers[i]:
            continue
        kind = f"{config.layer_types[i]}_" if hasattr(base.rotary_emb, "full_attention_inv_freq") else ""
        angles = positions[:, None] * getattr(base.rotary_emb, f"{kind}inv_freq").double().numpy()
        scale = getattr(base.rotary_emb, f"{kind}attention_scaling")
        half = angles.shape[-1]
        z = (k[i, ..., :half] + 1j * k[i, ..., half : 2 * half]) * (scale * np.exp(1j * angles))[:, None]
        turned[i, ..., :half], turned[i, ..., half : 2 * half] = z.real, z.imag
    return turned


def ridge_regression(x, y, ridge):
    """W and intercept of centred rows, by the normal equations."""
    at_x, at_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - at_x, y - at_y
    W = np.linalg.solve(x.T @ x + ridge * np.mean(np.sum(x**2, axis=0)) * np.eye(x.shape[1]), x.T @ y).T
    return W, at_y - W @ at_x


def judged(x, y, held):
    """1 - R^2 on held-out rows with every ridge."""
    errors = []
    for ridge in RIDGES:
        W, bias = ridge_regression(x[~held], y[~held], ridge)
        left = x[held] @ W.T + bias - y[held]
        errors.append(np.sum(left**2) / np.sum((y[held] - y[held].mean(axis=0)) ** 2))
    return np.array(errors)


def oracle(x, y, held):
    """x, y [L, R, K, H]: layers, ridge, error, W and intercept for every layer of B."""
    flat = lambda layers: np.concatenate(list(layers.reshape(*layers.shape[:2], -1)), axis=-1)
    for target in y:
        target = flat(target[None])
        alone = [judged(flat(one[None]), target, held).min() for one in x]
        layers = np.sort(np.argsort(alone)[:SOURCES])
        errors = judged(chosen := flat(x[layers]), target, held)
        best = errors.argmin()
        yield layers + 1, RIDGES[best], errors[best], *ridge_regression(chosen, target, RIDGES[best])


@pytest.fixture(scope="module", params=list(PAIRS))
def two(request, tmp_path_factory):
    """A and B, what both read, and what was fitted."""
    a, b, changes = PAIRS[request.param]
    a = make_checkpoint(tmp_path_factory.mktemp("a"), a, seed=5)
    b = make_checkpoint(tmp_path_factory.mktemp("b"), b, seed=6, **changes)
    fit = jc.fit_kv_maps(a.params, b.params, batches(A, B, 7, 33), sources=SOURCES, ridges=RIDGES, stride=STRIDE)
    return a, b, fit


def batches(a, b, *cuts, columns=None):
    for rows in np.split(np.arange(len(a)), cuts):
        yield (a[rows], b[rows]) if columns is None else (a[rows], b[rows], columns[rows])


def assert_fitted(fit, a, b, rows_b, found):
    """That the maps are the oracle's. found: for each text, which of A's tokens stands for each of B's."""
    x, y, held = [], [], []
    for n, (row, of_b, at) in enumerate(zip(ROWS, rows_b, found, strict=True)):
        ours = [p for p in range(len(of_b)) if (p - n - n // 10) % STRIDE == 0 and at[p] >= 0]
        x.append(plain(a, row)[:, :, at[ours]])
        y.append(plain(b, of_b)[:, :, ours])
        held += [n % HELD_OUT == HELD_OUT - 1] * len(ours)
    x, y, held, ridges = np.concatenate(x, axis=2), np.concatenate(y, axis=2), np.array(held), set()
    for what, maps, *rows in zip("kv", (fit.k, fit.v), x, y, strict=True):
        for j, (layers, ridge, error, W, bias) in enumerate(oracle(*rows, held)):
            assert maps.sources[j].tolist() == layers.tolist(), (what, j)
            assert maps.ridge[j] == np.float32(ridge), (what, j)
            ridges.add(ridge)
            assert_close(maps.r2[j], 1 - error, f"R^2 of {what}, layer {j + 1}", 2e-4)
            assert_close(maps.W[j], W, f"W of {what}, layer {j + 1}", 2e-3)
            assert_close(maps.bias[j], bias, f"intercept of {what}, layer {j + 1}", 2e-3)
    return ridges


def test_layers_ridges_and_maps_are_numpys_of_all_rows(two):
    a, b, fit = two
    ridges = assert_fitted(fit, a, b, ROWS, [np.arange(n) for n in LENGTHS])
    assert len(ridges) > 1, "the rows choose, not the order of the ridges"


def test_a_mapped_cache_is_what_numpy_maps_and_turns(two):
    """With other tokens and without, under jit and not; padding stays where it is."""
    a, b, fit = two
    _, found, columns = strangers()
    cache = jc.prefill(a.params, A[:4])[1]
    call = lambda cache, columns: jc.map_cache(fit, cache, a.params.config, b.params, columns)
    for mapped, at in (
        (call(cache, None), [np.arange(n) for n in LENGTHS]),
        (jax.jit(call)(cache, columns[:4]), found),
    ):
        for row in range(4):
            rows, want = plain(a, ROWS[row])[:, :, np.maximum(at[row], 0)], []
            for maps, x in zip((fit.k, fit.v), rows, strict=True):
                chosen = [
                    np.concatenate(list(x[np.asarray(s) - 1].reshape(SOURCES, len(at[row]), -1)), -1)
                    for s in maps.sources
                ]
                each = zip(chosen, np.float64(maps.W), np.float64(maps.bias), strict=True)
                want.append(
                    np.stack([x @ W.T + bias for x, W, bias in each]).reshape(
                        len(maps.W), len(at[row]), b.params.config.kv_heads, -1
                    )
                )
            want[0] = rotated(b, want[0], np.arange(len(at[row])))
            real, places = at[row] >= 0, np.asarray(mapped.positions[row])
            end = places.shape[0] - len(real)
            assert places.tolist() == [-1] * end + np.where(real, np.arange(len(real)), -1).tolist()
            for got, y in zip((mapped.k, mapped.v), want, strict=True):
                got = np.swapaxes(got[:, row], 1, 2)
                assert_close(got[:, end:][:, real], y[:, real], f"row {row}", 5e-5)
                assert not got[:, places < 0].any()
    assert (columns[:4] == UNREAD).any()


def test_tokens_of_another_tokenizer_are_rows_where_they_have_a_counterpart(two):
    a, b, _ = two
    rows, found, columns = strangers()
    how = dict(sources=SOURCES, ridges=RIDGES, stride=STRIDE)
    fit = jc.fit_kv_maps(a.params, b.params, batches(A, jc.left_pad(rows, 13), 20, columns=columns), **how)
    assert_fitted(fit, a, b, rows, found)


# A model with itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def itself(llama):
    """`llama` unrolled, as it is read on CPU, and its map to itself."""
    params = llama.params.unroll()
    text = jc.left_pad([prompts(1, n, seed=n)[0].tolist() for n in range(10, 40)])
    return params, jc.fit_kv_maps(params, params, [(text, text)], sources=1, stride=1)


def test_a_model_is_mapped_to_itself_by_the_identity(itself):
    params, fit = itself
    c = params.config
    for maps in (fit.k, fit.v):
        assert maps.sources[:, 0].tolist() == list(range(1, c.layers + 1))
        assert (np.asarray(maps.r2) > 0.9999).all()
        assert_close(maps.W, np.tile(np.eye(c.kv_heads * c.head_dim), (c.layers, 1, 1)), "W", 0.02)


def test_it_answers_from_its_mapped_cache_as_from_its_own(itself):
    params, fit = itself
    context, question = jc.left_pad([[3, 1, 4, 1, 5], [9, 2]], 8), jc.left_pad([[6, 5], [3, 5, 8]], 4)
    cache = jc.prefill(params, context)[1]
    mapped = jc.map_cache(fit, cache, params, params)
    assert isinstance(mapped.k, tuple) and mapped.positions.tolist() == cache.positions.tolist()
    own, through = (jc.prefill(params, question, past=[past])[0] for past in (cache, mapped))
    alone = jc.prefill(params, question)[0]
    assert np.abs(through - own).max() < 0.05 * np.abs(alone - own).max()
    write = lambda past: jc.generate(params, question, past=[past], max_new_tokens=4).tokens.tolist()
    assert write(mapped) == write(cache)


def test_cosines_are_those_of_what_is_read_with_one_layer_mapped(itself):
    """Layer by layer: a cache of B's own, in which that layer alone is another's."""
    params, _ = itself
    context, question = jc.left_pad([[3, 1, 4, 1, 5], [9, 2]], 8), jc.left_pad([[6, 5], [3, 5, 8]], 4)
    own, other = (jc.prefill(params, p)[1] for p in (context, jc.left_pad([[2, 7, 1, 8, 2], [8, 1]], 8)))
    found = jc.attention_cosine(params, context, question, other)
    assert_close(jc.attention_cosine(params, context, question, own), np.ones(4), "own", 1e-6)
    for layer in range(1, 5):
        put = lambda old, new: (*old[: layer - 1], new[layer - 1], *old[layer:])  # noqa: B023
        mixed = own.replace(k=put(own.k, other.k), v=put(own.v, other.v))
        read = lambda past: np.asarray(jc.send(params, question, jc.Site("z", layer), past=[past]).states, np.float64)  # noqa: B023
        x, y = (read(past).reshape(2, 4, -1) for past in (own, mixed))
        real = np.asarray(question.mask)
        cosine = np.sum(x * y, axis=-1)[real] / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))[real]
        assert_close(found[layer - 1], cosine.mean(), f"layer {layer}", 1e-5)
    assert np.ptp(found) > 0.01 and np.max(found) < 0.999
    stacked = jc.attention_cosine(params.stack(), context, question, other.extend(3))
    assert_close(stacked, found, "stacked layers, more columns", 1e-5)


def test_large_means_do_not_blur_the_maps(llama):
    """Biases of keys a thousand times what varies in them, as some models have."""
    bias = 1e3 * jax.random.normal(jax.random.key(0), (4, 32))
    params = llama.params
    attention = params.blocks["attention"]
    shifted = params.replace(
        blocks=params.blocks
        | {
            "attention": attention
            | {
                "v": attention["v"] | {"bias": bias},
                "k": attention["k"] | {"bias": 0 * bias},
                "q": attention["q"] | {"bias": jnp.zeros((4, 64))},
            }
        },
        config=dataclasses.replace(params.config, qkv_bias=True),
    )
    text = jc.left_pad([prompts(1, n, seed=n)[0].tolist() for n in range(10, 40)])
    # Values reach the stream, so A is the same model without them: its values are B's, moved in the first layer.
    fit = jc.fit_kv_maps(params, shifted, batches(text, text, 10), sources=1, stride=1)
    assert fit.v.r2[0] > 0.9999
    assert_close(fit.v.W[0], np.eye(32), "W", 0.02)
    assert_close(fit.v.bias[0] / 1e3, bias[0] / 1e3, "intercept", 1e-4)


def test_bfloat16_models_are_mapped_in_float32(llama):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), llama.params)
    text = jc.left_pad([prompts(1, n, seed=n)[0].tolist() for n in range(10, 40)])
    fit = jc.fit_kv_maps(half, half, [(text, text)], sources=1, stride=1)
    assert fit.k.W.dtype == jnp.float32 and (np.asarray(fit.k.r2) > 0.99).all()
    cache = jc.prefill(half, text[:3])[1]
    mapped = jc.map_cache(fit, cache, half, half)
    assert mapped.k.dtype == jnp.bfloat16
    real = np.asarray(cache.positions)[None, :, None, :, None] >= 0
    own = np.where(real, np.float32(cache.k), 0)
    assert np.abs(np.float32(mapped.k) - own).max() < 0.05 * np.abs(own).max()


# Tokens of different tokenizers ---------------------------------------------------------------------------------------


@st.composite
def cut(draw, length):
    """A text's tokens: pieces with what a tokenizer may drop between them, letters of several bytes, and specials."""
    found, at = [], 0
    while at < length:
        at = draw(st.sampled_from([at, at, at + 1]))
        end = min(at + draw(st.integers(1, 4)), length)
        if at < end:
            found += [(at, end)] * (draw(st.integers(1, 3)) if end == at + 1 else 1)
            found += [(0, 0)] * draw(st.sampled_from([0, 0, 0, 1]))
        at = end
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    return [(0, 0)] * before + found + [(0, 0)] * after


def by_characters(a, b):
    """Token by token, as the rule is written."""
    read = [max(stop for _, stop in a[: i + 1]) for i in range(len(a))]
    for at, (begin, end) in enumerate(b):
        if begin < end:
            holding = [i for i, (start, stop) in enumerate(a) if start <= end - 1 < stop]
            yield max(holding or [i for i in range(len(a)) if read[i] < end], default=UNREAD)
        else:
            end = max(stop for _, stop in b[: at + 1])
            begun = [i for i, (start, stop) in enumerate(a) if start < stop and start < end]
            yield max(begun + [i for i in range(len(a)) if read[i] <= end], default=UNREAD)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(cut(n), cut(n))))
def test_tokens_are_aligned_as_their_characters_say(both):
    a, b = both
    found = jc.align(a, b)
    assert found.tolist() == list(by_characters(a, b))
    assert (np.diff(found) >= 0).all() and len(found) == len(b), "A is read in order"


@given(st.integers(1, 12).flatmap(cut))
def test_a_tokenizer_is_aligned_with_itself(tokens):
    """But for the bytes of one letter, and for several specials: the last of these stands for each."""
    last = {span: i for i, span in enumerate(tokens) if span != (0, 0)}
    spelled = [last[span] for span in tokens if span != (0, 0)]
    assert [i for i, span in zip(jc.align(tokens, tokens), tokens, strict=True) if span != (0, 0)] == spelled


def letters(words: str, begins: bool) -> transformers.PreTrainedTokenizerFast:
    """A token for each letter; spaces are dropped."""
    vocabulary = {w: i for i, w in enumerate(["<s>", *sorted(set(words) - {" "})])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.WhitespaceSplit(), split])
    if begins:
        template = tokenizers.processors.TemplateProcessing
        tokenizer.post_processor = template(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_agents_with_different_tokenizers_make_columns(trio):
    words = trio["llama"].agent
    texts = ["bob is at rome", "who is alice ?"]
    spell = Agent(words.params, letters("".join(texts), begins=False), (1,), name="letters")
    columns = words.align(spell, texts)
    asked = spell.tokenize(texts)
    assert columns.shape == asked.shape
    np.testing.assert_array_equal(columns == PADDING, ~asked.mask)
    ids = np.asarray(words.tokenize(texts).tokens)
    for row, text in enumerate(texts):
        stands = [words.tokens([ids[row, c]])[0] for c in columns[row] if c >= 0]
        assert stands == [word for word in text.split() for _ in word]
    # A word's state is that of its last letter; A has nothing for what begins B's text.
    back = spell.align(words, texts)
    ids = np.asarray(asked.tokens)
    assert [spell.tokens([ids[0, c]])[0] for c in back[0] if c >= 0] == ["b", "s", "t", "e"]
    assert (back == UNREAD).sum() == len(texts)
    begun = Agent(words.params, letters("".join(texts), begins=True), (1,), name="letters")
    first = begun.align(words, texts)[0]
    assert UNREAD not in first and ids.shape and begun.tokenize(texts).tokens[0, first[first >= 0][0]] == 0


def test_columns_of_the_same_tokens_change_nothing(trio):
    """Of agents of one tokenizer, what is fitted and mapped is as without columns."""
    a, b = trio["llama"].agent, trio["qwen2"].agent
    texts = [
        f"{who} is at {where} {' '.join(['.'] * n)}"
        for who in ("alice", "bob")
        for where in ("rome", "paris")
        for n in (1, 2, 3)
    ]
    columns, both = a.align(b, texts), (a.tokenize(texts), b.tokenize(texts))
    with_, without = (
        jc.fit_kv_maps(a.params, b.params, [batch], stride=1, ridges=[0.1]) for batch in ((*both, columns), both)
    )
    jax.tree.map(lambda x, y: assert_close(x, y, "maps", 1e-5), with_, without)
    cache = jc.prefill(a.params, both[0])[1]
    given, plain = (jc.map_cache(without, cache, a.params, b.params, c) for c in (columns, None))
    jax.tree.map(lambda x, y: assert_close(x, y, "cache", 1e-5), given, plain)


# What is refused ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_line(llama, wide, trio, unchecked):
    a, b = llama.params, wide.params
    texts = jc.left_pad([[n, n + 1, 3] for n in range(20)])
    fit = lambda batches=((texts, texts),), **how: jc.fit_kv_maps(a, b, batches, **{"stride": 1, **how})
    good = fit()
    cache, columns = jc.prefill(a, texts)[1], np.zeros((20, 3), int)
    use = lambda maps=good, cache=cache, a=a, b=b, columns=None: jc.map_cache(maps, cache, a, b, columns)
    shorter = jc.left_pad([[n, 3] for n in range(20)])
    cosine = lambda question: jc.attention_cosine(b, texts, question, use())
    for call, says in (
        (lambda: fit(ks=[5]), "k = 5 is out of range: A has keys and values in layers 1 to 4"),
        (lambda: fit(ks=[0]), "k = 0 is out of range"),
        (lambda: fit(ks=[]), "at least one value"),
        (lambda: fit(ridges=[]), "at least one value"),
        (lambda: fit(sources=0), "sources = 0"),
        (lambda: fit(stride=0), "stride = 0"),
        (lambda: fit([]), "0 texts: two models are matched on at least 10"),
        (lambda: fit([(texts[:9], texts[:9])]), "9 texts"),
        (lambda: fit([(texts, texts[:9])]), "20 texts for A and 9 for B"),
        (lambda: fit([(texts, shorter)]), "text 0 has 3 tokens for A and 2 for B"),
        (lambda: fit([(texts, texts, columns[:, :2])]), "columns are (20, 2) for B's tokens (20, 3)"),
        (lambda: fit([(texts, texts, columns + 3)]), "column 3 is out of range: A's tokens have columns 0 to 2"),
        (lambda: fit([(texts, texts, columns + 0.5)]), "whole numbers"),
        (lambda: fit([(texts, texts, columns - 1)]), "0 rows to fit on and 0 held out are too few"),
        (lambda: fit(stride=50), "are too few: give more or longer texts, or a smaller stride"),
        (lambda: use(a=b, cache=jc.prefill(b, texts)[1]), " as A, this one is "),
        (lambda: use(b=a), " as B, this one is "),
        (lambda: use(maps=good.replace(receiver=None), b=a), "these maps make 5 layers of 32 numbers"),
        (lambda: use(cache=jc.prefill(b, texts)[1]), "the cache has 5 layers and"),
        (lambda: use(columns=columns[:4]), "columns are (4, 3) for a cache of 20 rows"),
        (lambda: use(columns=columns + 3), "column 3 is out of range"),
        (lambda: cosine(texts[:2]), "20 contexts, 2 questions, 20 rows"),
        (lambda: jc.attention_cosine(b, texts, texts, cache), "the cache has 4 layers and"),
        (lambda: trio["llama"].chatty.agent.align(trio["qwen2"].agent, ["who ?"]), "aligned in one text"),
    ):
        refused(call, says)
