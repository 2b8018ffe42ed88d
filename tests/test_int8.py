"""Weight-only int8: close to what it stands for, in every kind of block and layout, and small."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm import communicate, lora, shard, sweep
from jaxcomm.converters import load_agent, save, to_hf
from jaxcomm.evals.pair import folder
from jaxcomm.int8 import is_matrix, quantise

from conftest import assert_close, prompts, read, write


def rounded(params):
    """Oracle: the nearest of 255 steps between the largest of each output and its negative, in numpy."""

    def nearest(path, leaf):
        if not is_matrix(path):
            return leaf
        wide = np.asarray(leaf, np.float64)
        step = np.abs(wide).max(axis=-1, keepdims=True) / 127.5
        return jnp.asarray((np.clip(np.round(wide / step), -128, 127) * step).astype(np.float32))

    return params.replace(blocks=jax.tree_util.tree_map_with_path(nearest, params.blocks))


def test_it_is_the_model_with_its_matrices_rounded_and_nothing_else(kind):
    tokens, small = prompts(2, 24), quantise(kind.params)
    for params in (small, small.unroll()):
        off = jnp.abs(read(params, tokens) - read(rounded(kind.params.replace(head=kind.params.head)), tokens))
        assert float(off.max()) < 0.15, "steps of a 127th instead of a 127.5th, and heads that were rounded"
    kinds = {a.dtype.name for a in jax.tree.leaves(small.blocks)}
    assert kinds == {"int8", "float32"}
    size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
    assert size(small.blocks) < 0.45 * size(kind.params.blocks), "narrow matrices: scales and norms weigh"


def test_cached_decoding_equals_the_full_forward_pass(kind):
    small, tokens = quantise(kind.params), prompts(2, 9)
    out = write(small, tokens, max_new_tokens=6)
    whole = np.concatenate([tokens, out.tokens], axis=1)
    logits = jax.nn.log_softmax(read(small, whole))[:, 8:-1]
    np.testing.assert_array_equal(jnp.argmax(logits, -1), out.tokens)


def test_it_is_communicated_with_swept_and_cut_over_devices(llama):
    small, tokens = quantise(llama.params), prompts(4, 9)
    talk = jax.jit(communicate, static_argnames="max_new_tokens")
    want = talk(small, llama.params, tokens, tokens[::-1].copy(), k=2, j=1, max_new_tokens=5)
    found = sweep(small, llama.params, tokens, tokens[::-1].copy(), ks=(2,), js=(1,), max_new_tokens=5)
    np.testing.assert_array_equal(want.tokens, found.tokens[0, 0, 0])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    cut = quantise(shard(llama.params, mesh))
    assert_close(read(cut, tokens), read(small, tokens), "cut", 1e-4)
    up = cut.blocks["mlp"]["up"]["weight"].qvalue
    assert up.addressable_shards[0].data.size == up.size // 2


def test_the_pair_keeps_its_answers():
    exact, small = (load_agent(folder("b"), int8=int8) for int8 in (False, True))
    texts = ["Alice is at the Acropolis of Athens.", "Giulia is at Saint Basil's Cathedral."]
    prompts, mask = exact.tokenize(texts), exact.tokenize(texts).mask
    p, q = (jax.nn.log_softmax(read(agent.params, prompts))[:, 1:] for agent in (exact, small))
    assert float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)[mask[:, 1:]])) < 0.02


def test_without_qwix_it_says_what_to_install(llama, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"int8 weights need qwix: pip install 'jaxcomm\[int8\]'"):
        quantise(llama.params)


def test_int8_weights_are_not_saved(llama, tmp_path):
    for keep in (save, to_hf):
        with pytest.raises(ValueError, match="int8 weights cannot be saved"):
            keep(quantise(llama.params), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_is_cut_over_devices_whichever_comes_first(llama):
    """Quantised and then placed, as placed and then quantised."""
    tokens = prompts(2, 9)
    for axis, share in (("tensor", 2), ("fsdp", 2)):
        mesh = jax.make_mesh((4, 2), ("data", axis), axis_types=(AxisType.Auto,) * 2)
        cut = shard(quantise(llama.params), mesh)
        up = cut.blocks["mlp"]["up"]["weight"].qvalue
        assert up.addressable_shards[0].data.size == up.size // share, axis
        assert_close(read(cut, tokens), read(quantise(llama.params), tokens), axis, 1e-4)


def test_lora_refuses_it(llama):
    with pytest.raises(ValueError, match="LoRA changes weights, and int8 weights cannot change"):
        lora.init_lora(jax.random.key(0), quantise(llama.params), 2)
