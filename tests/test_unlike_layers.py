"""Models whose layers differ in the shapes of their keys and values (Gemma 4): layouts, caches, messages, sweeps, what is
counted, and what refuses them in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm.bridges import init_gated, shape_of
from jaxcomm.config import Heads
from jaxcomm.converters import from_hf, load, save
from jaxcomm.fingerprint import fingerprint, identity
from jaxcomm.flops import block_weights, blocks_flops, generation_flops, keys_flops, reading_flops
from jaxcomm.int8 import quantise
from jaxcomm.prefixes import check_prefix
from jaxcomm.sharding import local_mesh, logical_axes

from conftest import assert_close, make_checkpoint, prompts, refused, talk

PADDED = jc.left_pad([prompts(1, n, seed=n)[0].tolist() for n in (5, 19, 12)], 24)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A dense model, and one with experts beside the MLP."""
    return [make_checkpoint(tmp_path_factory.mktemp(n), n, seed=5) for n in ("gemma4_text", "gemma4_experts")]


def test_layers_have_the_shapes_of_their_kind(two):
    params = two[0].params
    assert params.unrolled and not params.config.alike and params.stack() is params and params.unroll() is params
    assert from_hf(two[0].folder, unroll=False).unrolled
    kinds = [layer["attention"] for layer in params.blocks]
    assert ["v" in attention for attention in kinds] == [True, False, True, False]
    assert [attention["k"]["weight"].shape for attention in kinds] == [(64, 40)] * 4
    assert [attention["k_norm"]["weight"].shape for attention in kinds] == [(16,), (32,)] * 2
    _, cache = jc.prefill(params, PADDED)
    assert [k.shape for k in cache.k] == [(3, 4, 24, 16), (3, 2, 24, 32)] * 2
    assert cache.bytes.tolist() == [2 * 4 * 4 * 64 * n for n in (5, 19, 12)]
    drawn = jc.init_params(jax.random.key(0), params.config)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)


def test_layers_that_are_alike_are_a_stack(two):
    config = two[0].params.config
    refused(
        lambda: dataclasses.replace(config, layer_heads=(Heads(2, 32),) * 4), "are the same in all layers: say it with"
    )
    refused(lambda: dataclasses.replace(config, layer_heads=config.layer_heads[1:]), "names 3 layers, the model has 4")
    one = dataclasses.replace(config, layer_heads=(), kv_heads=2, head_dim=32, keys_as_values=True)
    params = jc.init_params(jax.random.key(0), one)
    assert one.alike and not params.unrolled and "v" not in params.blocks["attention"]
    assert_close(jc.forward(params, PADDED), jc.forward(params.unroll(), PADDED), "layouts", 1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_what_is_saved_is_loaded_with_and_without_a_mesh_and_in_int8(two, n, tmp_path):
    params = two[n].params
    save(params, tmp_path / "saved")
    same = load(tmp_path / "saved")
    assert same.config == params.config and fingerprint(same) == fingerprint(params)
    assert identity(same) == identity(params)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    for loaded in (
        from_hf(two[n].folder, mesh=local_mesh(fsdp=2, tensor=2)),
        load(tmp_path / "saved", mesh=local_mesh(fsdp=2, tensor=2)),
    ):
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert not any("kv_heads" in str(axes) for axes in logical_axes(params).blocks[1]["attention"]["q"].values())
    eight = from_hf(two[n].folder, int8=True)
    jax.tree.map(np.testing.assert_array_equal, eight, quantise(params))
    assert float(jnp.abs(jc.forward(eight, PADDED) - jc.forward(params, PADDED))[:, -1].max()) < 1.0


def test_messages_of_keys_and_values_survive_a_file_and_are_read_on(two, tmp_path):
    params = two[0].params
    message = jc.send_cache(params, PADDED)
    message.save(tmp_path / "message")
    again = jc.Message.load(tmp_path / "message")
    signed = message.sign(b"key")
    assert signed.verify(b"key").mac == again.sign(b"key").mac
    asked = jc.left_pad([[5, 6, 7], [8], [1, 2]])
    whole = jc.left_pad([row + after for row, after in zip(rows_of(PADDED), rows_of(asked), strict=True)])
    want, _ = jc.prefill(params, whole)
    got, _ = jc.prefill(params, asked, past=[jc.receive_cache(again, params)])
    assert_close(got, want, "read on", 1e-5)
    some = jc.select(jc.receive_cache(again, params), [2, 4])
    jc.Message(some).save(tmp_path / "some")
    found = jc.Message.load(tmp_path / "some").states
    assert_close(jc.prefill(params, asked, past=[found])[0], jc.prefill(params, asked, past=[some])[0], "some", 1e-6)
    refused(
        lambda: jc.receive_cache(again.anonymous(), two[1].params),
        "this model has 4 layers and 2 heads of size 16: read with the same",
    )


def rows_of(padded):
    return [row[real].tolist() for row, real in zip(np.asarray(padded.tokens), np.asarray(padded.real), strict=True)]


def test_every_cell_of_a_sweep_is_its_communicate_call(two):
    a, b = two[1].params, two[0].params
    told, asked = jc.left_pad([[5, 6, 7], [8, 9]], 4), jc.left_pad([[1, 2], [3, 4, 5]], 4)
    cells = jc.sweep(a, b, told, asked, ks=[1, 3], js=[0, 2, 4], max_new_tokens=3)
    for x, k in enumerate((1, 3)):
        for y, j in enumerate((0, 2, 4)):
            one = talk(a, b, told, asked, k=k, j=j, max_new_tokens=3).tokens
            np.testing.assert_array_equal(cells.tokens[0, x, y], one)
    with pytest.raises(ValueError, match="z is not the same in all layers"):
        jc.patch(b, b, told, asked, np.array([[1], [2]]), sites=["z"], layers=[1, 2], positions=[-1])


def test_what_is_counted_is_what_the_layers_have(two):
    for pair in two:
        c, params = pair.params.config, pair.params
        matrices = ("q", "k", "v", "o", "gate", "up", "down", "router")
        for i, layer in enumerate(params.blocks):
            leaves = jax.tree_util.tree_leaves_with_path(layer)
            sizes = {(p[0].key, p[1].key): leaf.size for p, leaf in leaves if len(p) > 2 and p[1].key in matrices}
            of_experts = sum(n for at, n in sizes.items() if at[0] == "experts" and at[1] != "router")
            unused = of_experts * (1 - c.experts_per_token / c.experts) if c.experts else 0
            assert block_weights(c.layer(i)) == sum(sizes.values()) - unused
        assert blocks_flops(c, 7, 3) == sum(blocks_flops(c.layer(i), 7, 3) for i in range(c.layers))
        assert reading_flops(c, 9) < blocks_flops(c, 9) and keys_flops(c, 9) < reading_flops(c, 9)
        assert generation_flops(c, 9, 2) > generation_flops(c, 9, 1)


def test_what_needs_keys_of_one_shape_says_so(two, llama):
    unlike, other = two[0].params, llama.params
    needs = (
        "need layers of one shape, and this model's have 2 key heads of 32 that are also values and 4 key heads of 16: "
        "send states instead"
    )
    texts = jc.left_pad([[n, n + 1, 3] for n in range(40)])
    refused(lambda: shape_of(unlike.config, other.config), needs)
    refused(lambda: init_gated(jax.random.key(0), other, unlike), needs)
    refused(lambda: jc.fit_kv_maps(unlike, other, [(texts, texts)], stride=1), needs)
    refused(lambda: check_prefix(unlike.config, other.config), needs)
    check_prefix(unlike.config, unlike.config)
    refused(lambda: jc.run_with_cache(unlike, PADDED, sites="k"), "k is not the same in all layers")
    refused(lambda: jc.run_with_cache(unlike, PADDED, sites=jc.Site("v", 2, heads=3)), "v has heads 0 to 1")
    vectors = jnp.ones((3, 2, 32))
    at = lambda layer: jc.forward(unlike, PADDED, edits=[jc.Edit(jc.Site("v", layer), jc.add(vectors[0]))])
    assert at(2).shape == (3, 24, 97)
    refused(lambda: jax.jit(at)(jnp.int32(2)), "name its layer by a whole number")
    assert jax.jit(lambda: at(2))().shape == (3, 24, 97)


@pytest.mark.parametrize("n", [0, 1])
def test_a_gradient_reaches_every_weight(two, n):
    """By finite differences along a random direction of all weights."""
    params, tokens = two[n].params, prompts(2, 9)
    loss = jax.jit(lambda p: jnp.sum(jnp.sin(jc.forward(p, tokens))))
    direction = jax.tree.map(lambda a: 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    at = lambda by: float(loss(jax.tree.map(lambda a, d: a + by * d, params, direction)))
    gradient = jax.jit(jax.grad(loss))(params)
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    # A step so short that no token changes its experts.
    assert abs(along - (at(1e-4) - at(-1e-4)) / 2e-4) < 0.02 * abs(along)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient.blocks))


def test_decoding_compiles_once_for_every_pair_of_layers(two):
    from jax._src import test_util

    params = two[0].params
    talk(params, params, PADDED, PADDED, k=1, j=1, max_new_tokens=2)
    with test_util.count_jit_compilation_cache_miss() as misses:
        for k, j in ((2, 3), (4, 0), (0, 4)):
            talk(params, params, PADDED, PADDED, k=k, j=j, max_new_tokens=2)
    assert misses() == 0
