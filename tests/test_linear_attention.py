"""Models with linear attention (Qwen 3.5): the rule against a loop, its state in caches and messages, branches, padding, and
what refuses them in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_unlike_layers import rows_of

import jaxcomm as jc
from jaxcomm import prefixes
from jaxcomm.bridges import shape_of
from jaxcomm.communication import communicate_logits, read_prompt, resume
from jaxcomm.config import DeltaRule, Heads
from jaxcomm.controls import stand_in
from jaxcomm.converters import from_hf, load, save
from jaxcomm.evals import cost
from jaxcomm.fingerprint import fingerprint, identity
from jaxcomm.flops import block_weights, blocks_flops, keys_flops, reading_flops
from jaxcomm.int8 import quantise
from jaxcomm.layer_sweep.programs import Cells, Drawing, Targets, decode_cells, read_answers, score_cells
from jaxcomm.layer_sweep.sizes import Need, Sizes
from jaxcomm.linear_attention import CHUNK, convolve, delta_rule
from jaxcomm.lmnet import init_network
from jaxcomm.sharding import local_mesh

from conftest import assert_close, make_checkpoint, prompts, refused, talk

ROWS = [prompts(1, n, seed=n)[0].tolist() for n in (5, 19, 12)]
PADDED, ASKED = jc.left_pad(ROWS, 24), jc.left_pad([[5, 6, 7], [8], [1, 2]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5_text", seed=5)


# The rule -----------------------------------------------------------------------------------------------------------


def by_hand(S, q, k, v, decay, strength):
    """Token by token, in float64."""
    out = []
    for t in range(q.shape[1]):
        S = S * np.exp(decay[:, t])[..., None, None]
        wrong = (v[:, t] - np.einsum("bnxy,bnx->bny", S, k[:, t])) * strength[:, t, :, None]
        S = S + k[:, t][..., None] * wrong[:, :, None]
        out.append(np.einsum("bnxy,bnx->bny", S, q[:, t]))
    return np.stack(out, axis=1), S


def drawn(seed, tokens, fast=1.0):
    rng = np.random.default_rng(seed)
    B, N, X, Y = 2, 3, 4, 5
    q, k = (rng.normal(size=(B, tokens, N, X)) for _ in "qk")
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    v, S = rng.normal(size=(B, tokens, N, Y)), rng.normal(size=(B, N, X, Y))
    decay = -fast * np.exp(rng.normal(size=(B, tokens, N)))
    return [a.astype(np.float32) for a in (S, q, k, v, decay, rng.random((B, tokens, N)))]


RULE = jax.jit(delta_rule)


@given(
    st.integers(0, 99),
    st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 200]),
    st.sampled_from([0.01, 1, 20]),
)
def test_the_rule_is_the_recurrence(seed, tokens, fast):
    given = drawn(seed, tokens, fast)
    out, S = RULE(*given)
    want, last = by_hand(*(a.astype(np.float64) for a in given))
    assert_close(out, want, "out", 3e-6)
    assert_close(S, last, "state", 3e-6)


@given(st.integers(0, 99), st.integers(1, 149))
def test_a_text_is_read_in_parts_as_whole(seed, cut):
    S, *given = drawn(seed, 150)
    whole = RULE(S, *given)
    first, between = RULE(S, *(a[:, :cut] for a in given))
    second, last = RULE(between, *(a[:, cut:] for a in given))
    assert_close(jnp.concatenate([first, second], axis=1), whole[0], "out", 3e-6)
    assert_close(last, whole[1], "state", 3e-6)


def test_tokens_of_strength_and_decay_0_change_nothing():
    S, q, k, v, _, _ = drawn(1, 70)
    assert_close(RULE(S, q, k, v, *(np.zeros((2, 70, 3), np.float32),) * 2)[1], S, "state", 0.0)


@pytest.mark.parametrize("padding", [0, 1, 4, 6])
def test_the_convolution_leaves_padding_out(padding):
    rng = np.random.default_rng(padding)
    kernel, before, x = rng.normal(size=(5, 3)), rng.normal(size=(1, 2, 5)), rng.normal(size=(1, 6, 5))
    x[:, :padding] = 0
    kernel, before, x = (a.astype(np.float32) for a in (kernel, before, x))
    positions = np.where(np.arange(6) < padding, -1, np.arange(6) - padding)[None].astype(np.int32)
    out, after = convolve(*map(jnp.asarray, (kernel, before, x, positions)))
    text = np.concatenate([before, x[:, padding:]], axis=1)
    want = [(text[:, t : t + 3] * kernel.T).sum(axis=1) for t in range(6 - padding)]
    if want:
        assert_close(out[:, padding:], np.stack(want, axis=1), "out", 1e-6)
    assert_close(after, text[:, -2:], "after", 0.0)


# Caches -------------------------------------------------------------------------------------------------------------


def test_the_cache_has_keys_where_there_is_attention_and_a_state_elsewhere(model):
    params = model.params
    assert params.unrolled and not params.config.alike and params.config.recurrent
    _, cache = jc.prefill(params, PADDED)
    assert [k.shape for k in cache.k] == [(3, 0, 24, 0), (3, 2, 24, 16)] * 2
    assert [state and state.memory.shape for state in cache.states] == [(3, 4, 12, 8), None] * 2
    assert [state and state.inputs.shape for state in cache.states] == [(3, 2, 80), None] * 2
    state = 2 * 4 * (4 * 12 * 8 + 2 * 80)
    assert cache.bytes.tolist() == [2 * 2 * 4 * 32 * n + state for n in (5, 19, 12)]
    drawn = jc.init_params(jax.random.key(0), params.config)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)


def test_padding_does_not_matter(model):
    """Neither before a text nor between two parts of it."""
    for row, tokens in enumerate(ROWS):
        alone, _ = jc.prefill(model.params, np.array([tokens]))
        assert_close(jc.prefill(model.params, PADDED)[0][row], alone[0], f"row {row}", 1e-5)


def test_messages_of_caches_survive_a_file_and_are_read_on(model, tmp_path):
    params, message = model.params, jc.send_cache(model.params, PADDED)
    message.sign(b"key").save(tmp_path / "message")
    again = jc.Message.load(tmp_path / "message").verify(b"key")
    assert "states of 2 layers with linear attention" in repr(again)
    whole = jc.left_pad([row + after for row, after in zip(ROWS, rows_of(ASKED), strict=True)])
    past = [jc.receive_cache(again, params)]
    assert_close(jc.prefill(params, ASKED, past=past)[0], jc.prefill(params, whole)[0], "read on", 1e-5)
    wrote = jc.generate(params, ASKED, past=past, max_new_tokens=6).tokens
    assert wrote.tolist() == jc.generate(params, whole, max_new_tokens=6).tokens.tolist()
    rows = again.take([2, 0])
    got, _ = jc.prefill(params, ASKED[np.array([2, 0])], past=[jc.receive_cache(rows, params)])
    assert_close(got, jc.prefill(params, whole)[0][np.array([2, 0])], "rows", 1e-5)
    _, own = jc.prefill(params, ASKED, past=past)
    third = [*past, own]
    three = jc.left_pad([a + b for a, b in zip(rows_of(whole), rows_of(ASKED), strict=True)])
    assert_close(jc.prefill(params, ASKED, past=third)[0], jc.prefill(params, three)[0], "a third part", 1e-5)
    refused(lambda: jc.prefill(params, ASKED, past=past * 2), "each cache must follow the one before it")
    unrelated = jax.jit(lambda x, y: jc.prefill(params, ASKED, past=[x, y])[0])
    assert np.isnan(unrelated(*past * 2)).all() and not np.isnan(unrelated(past[0], own)).any()
    two = jc.receive_cache(message.take([0, 1]), params)
    refused(lambda: jc.prefill(params, ASKED, past=[*past, two]), "a cache has 2 rows for 3 prompts")
    refused(
        lambda: jc.prefill(params, ASKED, past=[past[0].replace(states=())]), "states of linear attention are missing"
    )


def test_continuations_are_scored_from_one_state(model):
    """Branches of a row: each goes on from the prompt's state."""
    params, texts = model.params, np.array([[[7, 8, 9], [9, -1, -1], [4, 4, -1]]] * 3)
    logprobs, _ = jc.score(params, *jc.prefill(params, PADDED), texts)
    for n in range(3):
        alone, _ = jc.score(params, *jc.prefill(params, PADDED), texts[:, n : n + 1])
        assert_close(logprobs[:, n], alone[:, 0], f"text {n}", 1e-5)
    for row, tokens in enumerate(ROWS):
        logits = jax.nn.log_softmax(jc.forward(params, np.array([[*tokens, 7, 8, 9]]))[0])
        want = [logits[len(tokens) - 1 + t, token] for t, token in enumerate((7, 8, 9))]
        assert_close(logprobs[row, 0], np.array(want), f"row {row}", 1e-5)


def test_controls_of_a_whole_cache_change_its_states(model):
    message = jc.send_cache(model.params, PADDED)
    zero = stand_in(message, "zero").states
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves((zero.k, zero.v, zero.states)))
    noise = stand_in(message, "noise").states
    length = lambda cache: [jnp.linalg.norm(s.memory, axis=-1) for s in cache.states if s]
    jax.tree.map(lambda x, y: assert_close(x, y, "length", 1e-5), length(noise), length(message.states))
    assert not np.allclose(noise.states[0].memory, message.states.states[0].memory)


# Communication ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 4])
def test_a_prompt_that_was_read_once_is_resumed_with_every_edit(model, columns):
    params = model.params
    prompt = jc.left_pad([row[:columns] for row in ROWS])
    read = read_prompt(params, prompt)
    message = jc.send(params, PADDED, 3)
    for j in range(5):
        logits, cache = resume(params, read, message.states, j)
        edit = [jc.receive(message, j)]
        assert_close(logits, jc.prefill(params, prompt, edits=edit)[0], f"j = {j}", 1e-5)
        wrote = jc.decode(params, logits, cache, past=(read.earlier,), max_new_tokens=5)
        assert wrote.tokens.tolist() == jc.generate(params, prompt, edits=edit, max_new_tokens=5).tokens.tolist()


@pytest.mark.parametrize("slots", [None, 1])
def test_every_cell_of_a_sweep_is_its_communicate_call(model, llama, slots):
    a, b = llama.params, model.params
    told, asked = jc.left_pad([[5, 6, 7], [8, 9]], 4), jc.left_pad([[1, 2], [3]], 4)
    maps = np.random.default_rng(0).normal(size=(2, 1, 40, a.config.width)).astype(np.float32)
    budget = {} if slots is None else {"memory": 40_000_000}
    cells = jc.sweep(a, b, told, asked, ks=[1, 3], js=[0, 2, 4], maps=maps, max_new_tokens=3, **budget)
    answers = np.array([[7, 8], [9, 1]])
    scored = jc.sweep_answers(a, b, told, asked, answers, ks=[1, 3], js=[0, 2, 4], maps=maps)
    for x, k in enumerate((1, 3)):
        for y, j in enumerate((0, 2, 4)):
            how = dict(k=k, j=j, graft=jc.Graft("replace", maps[x, 0]))
            np.testing.assert_array_equal(
                cells.tokens[0, x, y], talk(a, b, told, asked, max_new_tokens=3, **how).tokens
            )
            logprobs = jax.nn.log_softmax(communicate_logits(a, b, told, asked, answers, **how))
            want = np.take_along_axis(np.asarray(logprobs), answers[..., None], axis=-1)[..., 0]
            assert_close(scored.logprobs[0, x, y], want, f"k = {k}, j = {j}", 1e-5)


def test_every_cell_of_a_patch_is_an_edited_call(model):
    params, answers = model.params, np.array([[7, 8], [9, 1], [3, 2]])
    found = jc.patch(
        params, params, PADDED, PADDED[np.array([1, 2, 0])], answers, sites=["attn_out"], positions=[-3, -1]
    )
    for n, layer in enumerate(found.layers):
        for m, at in enumerate((-3, -1)):
            if layer == 0:
                continue
            site = jc.Site("attn_out", layer, at)
            edit = jc.receive(jc.send(params, PADDED, site), site)
            logits = jax.nn.log_softmax(jc.answer_logits(params, PADDED[np.array([1, 2, 0])], answers, edits=[edit]))
            want = np.take_along_axis(np.asarray(logits), answers[..., None], axis=-1)[..., 0]
            assert_close(found.logprobs[0, n, m], want, f"layer {layer}, {at}", 1e-5)


def test_a_gradient_reaches_every_weight(model):
    """By finite differences along a random direction of all weights; over more than one chunk."""
    params, tokens = model.params, prompts(2, CHUNK + 6)
    loss = jax.jit(lambda p: jnp.mean(jnp.sin(jc.forward(p, tokens))))
    direction = jax.tree.map(lambda a: 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    at = lambda by: float(loss(jax.tree.map(lambda a, d: a + by * d, params, direction)))
    gradient = jax.jit(jax.grad(loss))(params)
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert abs(along - (at(1e-3) - at(-1e-3)) / 2e-3) < 0.02 * abs(along)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient.blocks))


# Everything else ----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_with_and_without_a_mesh_and_in_int8(model, tmp_path):
    params = model.params
    save(params, tmp_path / "saved")
    same = load(tmp_path / "saved")
    assert same.config == params.config and fingerprint(same) == fingerprint(params)
    assert identity(same) == identity(params)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    mesh = local_mesh(fsdp=2, tensor=2)
    for loaded in (from_hf(model.folder, mesh=mesh), load(tmp_path / "saved", mesh=mesh)):
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert_close(jc.forward(loaded, PADDED), jc.forward(params, PADDED), "on a mesh", 1e-5)
    eight = from_hf(model.folder, int8=True)
    jax.tree.map(np.testing.assert_array_equal, eight, quantise(params))


def test_what_is_counted_is_what_the_layers_have(model):
    c = model.params.config
    for i, layer in enumerate(model.params.blocks):
        matrices = [leaf.size for leaf in jax.tree.leaves(layer) if leaf.ndim == 2]
        assert block_weights(c.layer(i)) == sum(matrices)
    assert blocks_flops(c.layer(0), 7, 3) == blocks_flops(c.layer(0), 7, 900), "linear attention has no context"
    assert reading_flops(c, 9) < blocks_flops(c, 9) and keys_flops(c, 9) < reading_flops(c, 9)


def test_what_needs_keys_in_every_layer_says_so(model, llama):
    params, other = model.params, llama.params
    shapes = "need layers of one shape, and this model's have 2 key heads of 16 and linear attention without keys"
    refused(lambda: shape_of(params.config, other.config), shapes)
    refused(lambda: prefixes.check_prefix(params.config, other.config), shapes)
    told, one = jc.receive_cache(jc.send_cache(params, PADDED), params), "hold one state of all tokens, so"
    refused(lambda: jc.select(told, [2, 4]), f"{one} layers cannot be chosen from it: send it whole")
    refused(lambda: jc.select(told, [1, 2, 3, 4], positions="own"), one)
    assert jc.select(told, jnp.ones(4, bool), sink=True) is told and prefixes.hide_last(told, 0) is told
    refused(lambda: prefixes.stretch(told, 8), f"{one} it does not fit another depth")
    refused(
        lambda: jc.attention_cosine(params, PADDED, ASKED, told), "maps of keys and values need layers of one shape"
    )
    refused(lambda: prefixes.join([told, told]), f"{one} several cannot be joined")
    refused(lambda: prefixes.move(told, params.config, 3), f"{one} it cannot be moved")
    refused(lambda: prefixes.hide_last(told, 1), f"{one} its last tokens cannot be hidden")
    refused(
        lambda: jc.receive_cache(jc.send_cache(params, PADDED).anonymous(), other), "in layer 1, 0 key heads of size 0"
    )
    refused(lambda: init_network(jax.random.key(0), params, (1, 1)), "linear attention keeps a state")
    refused(
        lambda: jc.send(params, PADDED, jc.Site("z", 3)), "has no z: name attn_out, or a layer with attention (2, 4)"
    )
    refused(lambda: jc.run_with_cache(params, PADDED, sites="pattern"), "pattern")
    refused(lambda: jax.jit(lambda n: jc.send(params, PADDED, jc.Site("z", n)).states)(2), "by a whole number")
    assert jc.run_with_cache(params, PADDED, sites="z", layers=[2, 4])[1]["z"].shape == (2, 3, 24, 4, 16)
    other_way = dataclasses.replace(params.config, layer_heads=params.config.layer_heads[::-1])
    turned = params.replace(blocks=params.blocks[::-1], config=other_way)
    refused(lambda: jc.run_with_cache(turned, PADDED, sites="z"), "layer 2 has linear attention, so it has no z")
    onto = np.asarray(prefixes.attention_onto(params, ASKED, past=[told]))
    assert np.isnan(onto[[0, 2]]).all() and (onto[[1, 3]].sum(axis=-1) > 0).all()


def test_a_chunk_of_a_sweep_fits_in_what_is_counted():
    """What XLA allocates for a program, beside the estimate that chunks are made by."""
    heads = (*[DeltaRule(8, 8, 64, 64)] * 3, Heads(2, 16))
    config = jc.ModelConfig(
        vocab=97, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, ff=64, max_positions=512, layer_heads=heads,
        attention_gate=True,
    )  # fmt: skip
    params = jax.eval_shape(lambda: jc.init_params(jax.random.key(0), config))
    need = Need(config, config, 4, (256, 256), 2, decoding=False)
    read = jax.jit(read_prompt).lower(params, jax.ShapeDtypeStruct((8, 256), jnp.int32)).compile().memory_analysis()
    assert read.temp_size_in_bytes + read.output_size_in_bytes < need.bytes(Sizes(8, 1, 1))
    game = jax.eval_shape(read_prompt, params, jax.ShapeDtypeStruct((1, 256), jnp.int32))
    cells = Cells(jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.float32), None, jax.ShapeDtypeStruct((64,), jnp.int32))
    count, drawing = jax.ShapeDtypeStruct((1,), jnp.int32), Drawing(jnp.zeros(0, jnp.int32))
    write = decode_cells.lower(params, game, cells, count, drawing, slots=64, max_new_tokens=2, mesh=None)
    need = Need(config, config, 4, (256, 256), 2, decoding=True)
    assert write.compile().memory_analysis().temp_size_in_bytes < need.bytes(Sizes(1, 64, 64))
    targets = Targets(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), bool), jnp.zeros(0, jnp.int32))
    tail = jax.eval_shape(lambda p, g: read_answers(p, g, targets.tokens), params, game)
    score = score_cells.lower(params, tail, cells, targets).compile().memory_analysis()
    assert score.temp_size_in_bytes < Need(config, config, 4, (256, 256), 2, False).bytes(Sizes(1, 64, 64))


def test_what_is_sent_is_what_is_counted(model):
    c = model.params.config
    found = {each.protocol: each for each in cost.counts(c, c, 8, 4, 2, 2, 2, compiled=True)}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    assert found["kv"].sent == jc.prefill(half, prompts(1, 8))[1].bytes[0] and found["kv"].compiled is None


def test_sizes_that_do_not_fit_are_refused(model):
    config = model.params.config
    rule = config.layer_heads[0]
    put = lambda rule: dataclasses.replace(config, layer_heads=(rule, *config.layer_heads[1:]))
    refused(lambda: put(rule._replace(value_heads=3)), "value_heads 3 is not a multiple of key_heads 2")
    refused(lambda: put(rule._replace(kernel=0)), "its sizes must be whole numbers from 1 on")
    refused(
        lambda: dataclasses.replace(config, layer_heads=(), delta_rule=DeltaRule(1, 1, 4, 4)),
        "delta_rule is of one layer",
    )
