"""One device or eight, one set of them or two: the same tokens, and nothing moves or is read that need not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm import SITES, Edit, Site, deliver, receive, run_with_cache, scale, send, shard, shardings, sweep
from jaxcomm.agent import Agent
from jaxcomm.converters import from_hf
from jaxcomm.converters import hf as hf_module
from jaxcomm.model import Params
from jaxcomm.prompts import left_pad
from jaxcomm.protocols import activation
from jaxcomm.sharding import by_rows, logical_axes

from conftest import assert_close, make_checkpoint, prompts, read, talk, toy_tokenizer, write

MESHES = {
    "data 2 x tensor 4": ((2, 4), ("data", "tensor")),
    "data 2 x fsdp 2 x tensor 2": ((2, 2, 2), ("data", "fsdp", "tensor")),
}


def mesh_of_kind(name):
    shape, axes = MESHES[name]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))


def test_every_weight_has_a_name_for_each_of_its_axes(kind):
    c = kind.params.config

    def sizes(path):
        one = c if c.alike or path[0].name != "blocks" else c.layer(path[1].idx)
        heads, keys = one.heads * one.head_dim, one.kv_heads * one.head_dim
        sizes = dict(vocab=c.vocab, positions=c.max_positions, width=c.width, heads=heads, kv_heads=keys, ff=c.ff)
        if rule := one.delta_rule:
            inner = {"qkv": rule.channels, "kernel": rule.channels, "read_norm": rule.value_dim}
            inner |= dict.fromkeys(("gate", "o"), rule.value_heads * rule.value_dim)
            name = "kernel" if path[-1].key == "kernel" else path[-2].key
            sizes |= {"delta": inner.get(name, rule.value_heads), "kernel": rule.kernel}
        return sizes | {"head_dim": one.head_dim, "sinks": c.heads, "experts": c.experts, "layers": c.layers, None: 1}

    for params in (kind.params, kind.params.unroll()):
        axes = jax.tree.leaves(logical_axes(params), is_leaf=lambda x: isinstance(x, P))
        for (path, leaf), names in zip(jax.tree_util.tree_leaves_with_path(params), axes, strict=True):
            assert leaf.shape == tuple(sizes(path)[name] for name in names)


@pytest.fixture(scope="module")
def eights(tmp_path_factory):
    """Sizes that eight devices divide."""
    return {
        name: make_checkpoint(
            tmp_path_factory.mktemp(name), name, seed=12, num_key_value_heads=4, vocab_size=104, **changes
        )
        for name, changes in {"mixtral": dict(head_dim=8, num_hidden_layers=3), "gemma3_text": {}}.items()
    }


@pytest.mark.parametrize("layout", MESHES)
def test_generate_and_communicate_say_on_eight_devices_what_they_say_on_one(eights, layout):
    mesh, tokens = mesh_of_kind(layout), prompts(4, 12)
    other = left_pad([[5, 3, 8], [9], [1, 2, 3, 4, 5, 6], [7, 7]], 8)
    for name, pair in eights.items():
        one, cut = pair.params, shard(pair.params, mesh)
        share = sum(a.addressable_shards[0].data.size for a in jax.tree.leaves(cut.blocks))
        parts = mesh.size // mesh.shape.get("data", 1)
        assert share < 1.3 / parts * sum(a.size for a in jax.tree.leaves(cut.blocks)), name
        rows = by_rows(cut, tokens)
        want, got = (write(p, t, max_new_tokens=8) for p, t in ((one, tokens), (cut, rows)))
        np.testing.assert_array_equal(want.tokens, got.tokens, err_msg=name)
        assert_close(got.logprobs, want.logprobs, name, 1e-4)
        how = dict(k=2, j=1, max_new_tokens=6)
        want, got = talk(one, one, tokens, other, **how), talk(cut, cut, rows, by_rows(cut, other), **how)
        np.testing.assert_array_equal(want.tokens, got.tokens, err_msg=name)


@pytest.mark.parametrize("layout", MESHES)
def test_every_site_is_read_and_edited_on_eight_devices_as_on_one(eights, layout):
    mesh, tokens = mesh_of_kind(layout), prompts(4, 12)
    names = [name for name, site in SITES.items() if site.writable]
    edits = [Edit(Site(name, 2 if SITES[name].layered else None, [-3, 0]), scale(0.5)) for name in names]
    read = lambda params, rows: run_with_cache(params, rows, sites=list(SITES), edits=edits)
    for name, pair in eights.items():
        cut = shard(pair.params, mesh)
        want, got = read(pair.params, tokens), read(cut, by_rows(cut, tokens))
        jax.tree.map(lambda x, y, name=name: assert_close(x, y, name, 1e-4), got, want)


def test_sweep_says_on_eight_devices_what_it_says_on_one(eights):
    a, b = eights["mixtral"].params, eights["gemma3_text"].params
    how = dict(ks=(1, 3), js=(0, 2, 4), grafts=("replace", "sum"), max_new_tokens=4)
    tokens = prompts(4, 9), prompts(4, 7, seed=1)
    want = sweep(a, b, *tokens, mesh=Mesh(np.array(jax.devices()[:1]), ("data",)), **how)
    for layout in MESHES:
        mesh = mesh_of_kind(layout)
        got = sweep(shard(a, mesh), shard(b, mesh), *tokens, **how)
        np.testing.assert_array_equal(want.tokens, got.tokens, err_msg=layout)


@pytest.fixture
def apart(eights):
    """A on the first two devices, B cut over four others; the same models as they are."""
    a, b = eights["mixtral"].params, eights["gemma3_text"].params
    devices = np.array(jax.devices())
    mesh = lambda some, **axes: Mesh(some.reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return (a, shard(a, mesh(devices[:2], tensor=2))), (b, shard(b, mesh(devices[4:], data=2, tensor=2)))


def test_only_the_message_moves_between_models_on_different_devices(apart):
    (a, far), (b, cut) = apart
    tokens_a, tokens_b = prompts(4, 9), prompts(4, 7, seed=1)
    want = talk(a, b, tokens_a, tokens_b, k=2, j=1, max_new_tokens=6)
    say = jax.jit(send)
    reply = jax.jit(lambda p, t, m: write(p, t, edits=[receive(m, 1)], max_new_tokens=6))
    here, there = by_rows(far, tokens_a), by_rows(cut, tokens_b)
    message = say(far, here, 2).states
    assert {*message.devices()} == {*jax.devices()[:2]} and message.shape == (4, a.config.width)
    arrived = deliver(message, cut)
    with jax.transfer_guard_device_to_device("disallow"):
        got = reply(cut, there, arrived)
    assert {*got.tokens.devices()} == {*jax.devices()[4:]}
    np.testing.assert_array_equal(want.tokens, got.tokens)


def test_sweeps_and_protocols_take_models_on_different_devices(apart):
    (a, far), (b, cut) = apart
    tokens = prompts(4, 9), prompts(4, 7, seed=1)
    how = dict(ks=(1, 3), js=(0, 2), max_new_tokens=4)
    want = sweep(a, b, *tokens, mesh=Mesh(np.array(jax.devices()[:1]), ("data",)), **how)
    np.testing.assert_array_equal(want.tokens, sweep(far, cut, *tokens, **how).tokens)
    speak = lambda params: Agent(params, toy_tokenizer(), (1,))
    told, asked = ["alice is at rome .", "bob is at paris ."], ["where is alice ?", "where is bob ?"]
    for control in (None, "noise", "self", "unrelated"):
        replies = [
            activation(speak(x), speak(y), told, asked, k=2, j=1, control=control).write(5)
            for x, y in ((a, b), (far, cut))
        ]
        assert [r.written for r in replies[0]] == [r.written for r in replies[1]]


@pytest.mark.parametrize("unroll", [False, True])
def test_loading_onto_a_mesh_is_loading_and_placing(kind, unroll):
    mesh = mesh_of_kind("data 2 x fsdp 2 x tensor 2")
    loaded, placed = from_hf(kind.folder, unroll=unroll, mesh=mesh), shard(from_hf(kind.folder, unroll=unroll), mesh)
    same = lambda x, y: x.sharding == y.sharding and bool(jnp.array_equal(x, y))
    assert all(jax.tree.leaves(jax.tree.map(same, loaded, placed)))


def test_a_process_reads_only_what_its_devices_hold(eights, monkeypatch):
    """As a process of two with four devices each would: only those of the first half are asked for."""
    pair, held = eights["mixtral"], []
    mesh = mesh_of_kind("data 2 x tensor 4")
    addressable = NamedSharding.addressable_devices_indices_map
    first = lambda self, shape: {d: i for d, i in addressable(self, shape).items() if d in mesh.devices[:, :2]}
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", first)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays[0])
    fill = hf_module.fill

    def counted(shape, dtype, device, parts):
        held.append(int(np.prod(shape)))
        return fill(shape, dtype, device, parts)

    monkeypatch.setattr(hf_module, "fill", counted)
    from_hf(pair.folder, mesh=mesh, unroll=False)
    whole = sum(leaf.size for leaf in jax.tree.leaves(pair.params))
    assert 0.5 * whole <= sum(held) < 0.55 * whole, "two of four parts of each matrix, and the norms"


def test_what_does_not_divide_is_whole_and_rules_may_be_others(llama):
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    placed: Params = shardings(llama.params, mesh)
    assert placed.blocks["attention"]["k"]["weight"].spec == P(None, None, None), "two key heads on eight devices"
    assert placed.blocks["mlp"]["up"]["weight"].spec == P(None, "tensor", None)
    assert placed.embed.spec == P(None, None), "97 tokens on eight devices"
    other = shardings(llama.params, mesh, {"width": "tensor"})
    assert other.blocks["mlp"]["up"]["weight"].spec == P(None, None, "tensor")


def test_a_bfloat16_model_on_a_mesh_is_the_same_model(eights):
    mesh, tokens = mesh_of_kind("data 2 x tensor 4"), prompts(4, 12)
    one = from_hf(eights["gemma3_text"].folder, jnp.bfloat16)
    cut = from_hf(eights["gemma3_text"].folder, jnp.bfloat16, mesh=mesh)
    assert_close(read(cut, tokens), read(one, tokens), "logits", 0.06)
