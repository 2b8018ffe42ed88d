"""Checkpoints: strict, streaming, whole or not at all."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxcomm.converters import FAMILIES, from_hf, save, to_hf
from jaxcomm.converters import hf as hf_module

from conftest import make_checkpoint, prompts, read


@pytest.fixture
def copy(llama, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(llama.folder, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sharded_checkpoint_loads_like_a_single_file(pair, tmp_path):
    out = to_hf(pair.params, tmp_path / "shards", shard_bytes=20_000)
    assert (out / "model.safetensors.index.json").is_file() and len(list(out.glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, from_hf(out, unroll=False), pair.params)
    pair.torch.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    jax.tree.map(np.testing.assert_array_equal, from_hf(tmp_path / "theirs", unroll=False), pair.params)


def test_unrolled_loading_equals_unrolling_and_is_what_a_cpu_gets(pair):
    jax.tree.map(np.testing.assert_array_equal, from_hf(pair.folder), pair.params.unroll())
    assert from_hf(pair.folder).unrolled


def test_bfloat16_survives_a_round_trip_bit_for_bit(pair, tmp_path):
    half = from_hf(pair.folder, jnp.bfloat16, unroll=False)
    again = from_hf(to_hf(half.unroll(), tmp_path / "half"), jnp.bfloat16, unroll=False)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32)), half, again)
    assert {a.dtype for a in load_file(tmp_path / "half" / "model.safetensors").values()} == {jnp.dtype(jnp.bfloat16)}


def test_old_spelling_of_rope_settings_means_the_same(llama, copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    path.write_text(json.dumps(config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}))
    assert from_hf(copy).config == llama.params.config


def test_loading_and_writing_need_no_torch(llama, tmp_path):
    out = tmp_path / "out"
    code = f"""
import sys
sys.modules["torch"] = None
from jaxcomm.converters import from_hf, to_hf
params = from_hf({str(llama.folder)!r})
to_hf(params, {str(out)!r})
assert not any(name.startswith("torch.") for name in sys.modules)
print(params.config.layers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "4"
    assert load_file(out / "model.safetensors").keys() == load_file(llama.folder / "model.safetensors").keys()


def test_the_class_that_is_written_is_the_one_transformers_runs_it_by(pair, tmp_path):
    to_hf(pair.params, tmp_path / "out", family=pair.torch.config.model_type)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [type(pair.torch).__name__]


def test_a_hub_id_without_a_network_is_one_clear_line():
    with pytest.raises(ConnectionError, match=r"cannot download somebody/nothing-here .*give a local checkpoint"):
        from_hf("somebody/nothing-here")


def drop_tensor(folder, name="model.layers.2.mlp.up_proj.weight"):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def change_tensor(folder, **tensors):
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    out = to_hf(from_hf(folder), folder.parent / "sharded", shard_bytes=20_000)
    shutil.rmtree(folder)
    out.rename(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


NAN = np.full(48, np.nan, np.float32)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: edit_config(f, model_type="mamba"), "architecture 'mamba' is not supported; supported are llama, mistral, mixtral, qwen2"),
        (lambda f: edit_config(f, quantization_config={"bits": 4}), "config key quantization_config = {'bits': 4} is not supported"),
        (lambda f: edit_config(f, hidden_act="relu"), "hidden_act = 'relu' is not supported, only silu"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope type 'dynamic' is not supported"),
        (lambda f: edit_config(f, num_attention_heads=3), "heads 3 is not a multiple of kv_heads 2"),
        (lambda f: (f / "config.json").write_text("{"), "is not a JSON object"),
        (lambda f: (f / "config.json").unlink(), "is not a checkpoint folder: it has no config.json"),
        (drop_tensor, "tensor model.layers.2.mlp.up_proj.weight is missing"),
        (lambda f: change_tensor(f, **{"model.norm.weight": np.ones(3, np.float32)}), "tensor model.norm.weight has shape (3,), the config asks for (48,)"),
        (lambda f: change_tensor(f, **{"model.norm.weight": NAN}), "tensor model.norm.weight holds NaN"),
        (lambda f: change_tensor(f, **{"model.norm.weight": np.ones(48, np.int8)}), "tensor model.norm.weight is I8: quantised"),
        (lambda f: change_tensor(f, **{"model.surprise": np.ones(3, np.float32)}), "no place for: model.surprise (1 in all)"),
        (truncate, "is truncated or corrupt"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "is truncated or corrupt"),
        (only_pickle, "has only pickle files (pytorch_model.bin)"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lose_a_shard, "is missing from"),
        (lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json"), "is not a weight index"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_name(copy, damage, message):
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        from_hf(copy)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, extra",
    [
        ("qwen2", {"use_mrope": False, "use_sliding_window": False, "max_window_layers": 28, "sliding_window": 32768}),
        ("gemma2", {"sliding_window_size": 9, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
        ("llama", {"unsloth_fixed": True, "_attn_implementation_autoset": True, "pretraining_tp": 1}),
        ("llama", {"eos_token_id": [1, 2, 3], "torch_dtype": "bfloat16", "rope_parameters": None, "rope_theta": 7.0,
                   "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ],
)  # fmt: skip
def test_keys_that_hub_checkpoints_carry_are_understood(name, extra, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", name, seed=5)
    path = checkpoint.folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | extra).items() if v is not None}
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    loaded = from_hf(checkpoint.folder, unroll=False)
    theirs = type(checkpoint.torch).from_pretrained(checkpoint.folder, dtype=torch.float32, attn_implementation="eager")
    tokens = prompts(2, 40)
    with torch.no_grad():
        np.testing.assert_allclose(read(loaded, tokens), theirs(torch.from_numpy(tokens).long()).logits, atol=2e-5)


def test_a_dtype_that_cannot_hold_a_weight_is_refused(llama, tmp_path):
    large = llama.params.replace(embed=llama.params.embed.at[3, 3].set(1e6))
    with pytest.raises(ValueError, match="model.embed_tokens.weight is not finite as float16"):
        to_hf(large, tmp_path / "out", dtype=np.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkpoint: give a folder"):
        from_hf(tmp_path / "nowhere")


def test_a_failed_conversion_leaves_no_folder_and_an_existing_one_alone(llama, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(hf_module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        to_hf(llama.params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        to_hf(llama.params, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_tied_checkpoints_may_carry_the_head_twice(llama, copy):
    embedding = load_file(copy / "model.safetensors")["model.embed_tokens.weight"]
    change_tensor(copy, **{"lm_head.weight": embedding})
    jax.tree.map(np.testing.assert_array_equal, from_hf(copy, unroll=False), llama.params)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_no_family_has_is_refused(family, llama, tmp_path):
    import dataclasses

    odd = llama.params.replace(config=dataclasses.replace(llama.params.config, mlp_bias=True, out_bias=True))
    with pytest.raises(ValueError, match="no supported family can describe this architecture"):
        to_hf(odd, tmp_path / "out")


def test_head_size_apart_from_width_over_heads(tmp_path):
    odd = make_checkpoint(tmp_path, "llama_untied_bias", seed=4, head_dim=20)
    tokens = prompts(1, 9)
    with torch.no_grad():
        np.testing.assert_allclose(
            read(odd.params, tokens), odd.torch(torch.from_numpy(tokens).long()).logits, atol=1e-5
        )


def test_a_place_that_is_not_local_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for keep in (save, to_hf):
        with pytest.raises(ValueError, match="gs://bucket/model is not local: name a local folder"):
            keep(llama.params, "gs://bucket/model")
    assert not list(tmp_path.iterdir())
