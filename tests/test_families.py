"""What families have of their own: every config key is followed or refused; old spellings; names on disk; the table in docs/families.md."""

import json
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_parity import load, reference

from jaxcomm.converters import FAMILIES, from_hf, to_hf
from jaxcomm.converters.table import table
from jaxcomm.converters.values import CARRIES_NO_ARCHITECTURE
from jaxcomm.reading import hidden_states
from jaxcomm.sharding import local_mesh

from conftest import CONFIGS, SMALL, assert_close, make_checkpoint, prompts, read, refused

ONE_EACH = [name for name in CONFIGS if name in FAMILIES]
TOKENS = prompts(1, 24)


def changed(value):
    """Other values of a config key, some of which make no sense."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value // 2]
        case float():
            return [value * 1.5]
        case str():
            return ["gelu_pytorch_tanh" if value != "gelu_pytorch_tanh" else "silu", "linear"]
        case list():
            return [value[::-1], value[1:], [1, *value[1:]]]
        case dict():
            inner = [(key, other) for key in value for other in changed(value[key])]
            return [value | {key: other} for key, other in inner] + [value | {"surprise": 1.0}]
        case None:
            return [1.5, 5, True, "silu"]


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_config_key_changed_is_followed_or_refused(name, tmp_path):
    """Oracle: what transformers makes of the same folder. A model that is not loaded there need not be loaded here."""
    pair = make_checkpoint(tmp_path / "checkpoint", name, seed=7)
    path = pair.folder / "config.json"
    config, followed, same, refused = json.loads(path.read_text()), [], [], []
    with torch.no_grad():
        before = pair.torch(torch.from_numpy(TOKENS).long()).logits
    cases = [(key, value) for key in config for value in changed(config[key]) if key != "model_type"]
    for key, value in [*cases, ("surprise", 2), ("num_surprises", None)]:
        if key in CARRIES_NO_ARCHITECTURE or key.endswith("_token_id"):
            continue
        path.write_text(json.dumps(config | {key: value}))
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                loaded = from_hf(pair.folder, unroll=False)
            odd = "surprise" in repr((key, value)) and value is not None
            assert odd == any("surprise" in str(w.message) for w in warned), "what nobody reads is named"
        except ValueError as error:
            assert "\n" not in str(error)
            refused.append(key)
            continue
        try:
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                pair.folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        except Exception as error:  # whatever transformers says of nonsense
            raise AssertionError(f"{key} = {value!r} is loaded here, and refused there: {error}") from error
        assert not info["missing_keys"] and not info["mismatched_keys"], f"{key} = {value!r} leaves weights unread"
        with torch.no_grad():
            after = theirs.eval()(torch.from_numpy(TOKENS).long()).logits
        if loaded.config == pair.params.config:
            np.testing.assert_allclose(after, before, atol=1e-6, err_msg=f"{key} = {value!r} is not noticed")
            same.append(key)
        else:
            assert_close(read(loaded, TOKENS), after, f"{key} = {value!r}", tolerance=2e-5)
            followed.append(key)
    assert {"surprise", "num_surprises"} <= set(same), "what transformers does not read changes nothing"
    assert followed, "no key changes anything: the test does not look"


def test_carrying_no_architecture_is_true_of_all_families():
    """None of the keys that are passed over is read by a modeling file outside of training, losses and caches."""
    harmless = re.compile(
        r"use_cache|dropout|_pdrop|router_|return_dict|output_|initializer_range|_token_id|problem_type"
    )
    for family in FAMILIES.values():
        module = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]
        code = Path(__import__("inspect").getfile(getattr(transformers, module))).read_text()
        used = set(re.findall(r"config\.(\w+)", code)) & CARRIES_NO_ARCHITECTURE
        assert {key for key in used if not harmless.search(key)} == set(), family.model_type


OLD_SPELLINGS = {
    "llama": {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen3": {"rope_theta": 7e3, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"rope_theta": 7.0},
    "gemma3_text": {"rope_theta": 7.0, "rope_local_base_freq": 70.0, "sliding_window_pattern": 3,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types": None},
    "olmo3": {"rope_theta": 7.0, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "layer_types": None},
    "granite": {"rope_theta": 7.0},
    "gpt_oss": {"rope_theta": 7e3, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}, "layer_types": None},
    "phi3": {"rope_theta": 70.0, "partial_rotary_factor": 0.75, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.3, 2.0], "long_factor": [1.0, 2.0, 9.0]}},
    "smollm3": {"rope_theta": 7.0, "no_rope_layers": None, "no_rope_layer_interval": 3},
    "gpt_neox": {"rotary_emb_base": 70, "rotary_pct": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_old_spellings_mean_what_transformers_says(name, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", name, seed=5)
    path = checkpoint.folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "rope_parameters"}
    old = OLD_SPELLINGS[name]
    path.write_text(json.dumps({key: value for key, value in (config | old).items() if old.get(key, 0) is not None}))
    loaded, tokens = from_hf(checkpoint.folder, unroll=False), prompts(2, 40)
    assert loaded.config != checkpoint.params.config
    with torch.no_grad():
        want = load(checkpoint.folder, torch.float32)(torch.from_numpy(tokens).long()).logits
    assert_close(read(loaded, tokens), want, name, tolerance=2e-5)


def test_longrope_takes_its_long_numbers_where_the_model_has_more_positions_than_it_began_with(tmp_path):
    """transformers chooses by the longest text it is given; here a model has one set, chosen by its positions."""
    rope = CONFIGS["phi3"][1]["rope_parameters"]
    pair = make_checkpoint(tmp_path / "phi3", "phi3", seed=8, original_max_position_embeddings=16, rope_parameters=rope)
    assert pair.params.config.max_positions == 16
    with pytest.raises(ValueError, match="exceed the model's 16 positions"):
        read(pair.params, prompts(1, 17))
    short = prompts(2, 16)
    states, logits = reference(pair, short)
    assert_close(read(pair.params, short), logits, "short")
    long, tokens = from_hf(pair.folder, max_positions=4096, unroll=False), prompts(2, 700)
    states, logits = reference(pair, tokens)
    ours = jax.jit(hidden_states)(long, tokens)
    for k, state in enumerate(states):
        assert_close(ours[k], state, f"long, h[{k}]")
    assert_close(read(long, tokens), logits, "long")
    assert from_hf(to_hf(long, tmp_path / "out"), max_positions=4096).config == long.config
    with pytest.raises(ValueError, match="max_positions = 4097: the checkpoint has 4096"):
        from_hf(pair.folder, max_positions=4097)


def test_the_text_part_of_a_gemma_3_that_reads_images(tmp_path):
    text = CONFIGS["gemma3_text"][1] | dict(vocab_size=97, num_hidden_layers=4, num_attention_heads=4,
                                            num_key_value_heads=2, max_position_embeddings=1024)  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "gemma3")
    tokens = prompts(2, 40)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits
    for prefix in (None, "model.language_model."):  # as they are on the hub; as transformers names them in memory
        if prefix:
            weights = load_file(tmp_path / "gemma3" / "model.safetensors")
            renamed = {re.sub(r"^language_model\.model\.", prefix, name): value for name, value in weights.items()}
            assert renamed.keys() != weights.keys()
            save_file(renamed, tmp_path / "gemma3" / "model.safetensors")
        assert_close(read(from_hf(tmp_path / "gemma3", unroll=False), tokens), want, str(prefix))
    alone = to_hf(from_hf(tmp_path / "gemma3"), tmp_path / "out", family="gemma3_text")
    assert json.loads((alone / "config.json").read_text())["model_type"] == "gemma3_text"


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified"])
def test_the_text_part_of_a_gemma_4_that_reads_images_and_sound(kind, tmp_path):
    name = {"gemma4": "Gemma4", "gemma4_unified": "Gemma4Unified"}[kind]
    text = SMALL | CONFIGS["gemma4_text"][1] | dict(pad_token_id=0)
    if kind == "gemma4_unified":
        del text["hidden_size_per_layer_input"]
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=None, audio_config=None)
    torch.manual_seed(3)
    whole = getattr(transformers, f"{name}ForConditionalGeneration")
    model = whole._from_config(config, attn_implementation="eager").eval()
    for key, number in model.named_buffers():
        if key.endswith("layer_scalar"):
            number.add_(torch.randn_like(number) * 0.3)
    model.save_pretrained(tmp_path / kind)
    path, tokens = tmp_path / kind / "model.safetensors", prompts(2, 40)
    assert all(key.startswith("model.language_model.") for key in load_file(path))
    other = {"model.vision_tower.x": np.zeros(3, np.float32), "model.embed_vision.y": np.zeros(3, np.float32)}
    save_file(load_file(path) | other, path)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits
    params = from_hf(tmp_path / kind)
    assert_close(read(params, tokens), want, kind)
    alone = to_hf(params, tmp_path / "out")
    assert json.loads((alone / "config.json").read_text())["model_type"] == "gemma4_text"
    jax.tree.map(np.testing.assert_array_equal, from_hf(alone), params)


def test_the_text_part_of_a_qwen_3_5_that_reads_images(tmp_path):
    text = SMALL | CONFIGS["qwen3_5_text"][1] | dict(pad_token_id=0)
    config = transformers.Qwen3_5Config(
        text_config=text,
        vision_config=dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=40),
    )
    torch.manual_seed(3)
    model = transformers.Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "whole")
    path, tokens = tmp_path / "whole" / "model.safetensors", prompts(2, 40)
    names = load_file(path)
    assert any(key.startswith("model.visual.") for key in names)
    assert all(key.startswith(("model.language_model.", "model.visual.", "lm_head.")) for key in names)
    save_file(names | {"mtp.fc.weight": np.zeros((3, 3), np.float32)}, path)
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long()).logits
    params = from_hf(tmp_path / "whole")
    assert_close(read(params, tokens), want, "text part")
    alone = to_hf(params, tmp_path / "out")
    assert json.loads((alone / "config.json").read_text())["model_type"] == "qwen3_5_text"
    jax.tree.map(np.testing.assert_array_equal, from_hf(alone), params)


def test_gpt2_as_it_lies_on_the_hub(tmp_path):
    """Without the prefix transformers writes today, with the buffers of masks it once wrote."""
    pair = make_checkpoint(tmp_path / "gpt2", "gpt2", seed=9)
    path = pair.folder / "model.safetensors"
    weights = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    for i in range(4):
        weights |= {
            f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.float32),
            f"h.{i}.attn.masked_bias": np.float32([-1e4]),
        }
    save_file(weights, path)
    jax.tree.map(np.testing.assert_array_equal, from_hf(pair.folder, unroll=False), pair.params)


def test_gpt_oss_packed_in_four_bits_as_it_lies_on_the_hub(tmp_path):
    """Oracle: what transformers makes of the blocks and scales, loaded from an ordinary checkpoint."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pair = make_checkpoint(tmp_path / "gpt_oss", "gpt_oss", seed=4, hidden_size=64, intermediate_size=96)
    path, rng = pair.folder / "model.safetensors", np.random.default_rng(0)
    weights = load_file(path)
    packed = {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, out = weights.pop(name).shape
        blocks = rng.integers(0, 256, (experts, out, inner // 32, 16), np.uint8)
        scales = rng.integers(118, 124, (experts, out, inner // 32), np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        made = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
        pair.torch.load_state_dict({name: made}, strict=False)
    save_file(weights | packed, path)
    config = json.loads((pair.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (pair.folder / "config.json").write_text(json.dumps(config))
    pair.torch.save_pretrained(tmp_path / "plain")
    for how in (dict(unroll=False), dict(unroll=True), dict(mesh=local_mesh(fsdp=2, tensor=2))):
        got, want = (from_hf(folder, **how) for folder in (pair.folder, tmp_path / "plain"))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    tokens = prompts(2, 40)
    with torch.no_grad():
        wanted = pair.torch(torch.from_numpy(tokens).long()).logits
    assert_close(read(from_hf(pair.folder), tokens), wanted, "packed")
    del packed["model.layers.2.mlp.experts.down_proj_scales"]
    save_file(weights | packed, path)
    refused(lambda: from_hf(pair.folder), "layers.2.mlp.experts.down_proj is packed in (5, 64, 3, 16) and nothing")
    other = make_checkpoint(tmp_path / "llama", "llama", seed=4)
    save_file(
        load_file(other.folder / "model.safetensors") | {"x_blocks": np.zeros(3, np.uint8)},
        other.folder / "model.safetensors",
    )
    refused(lambda: from_hf(other.folder), "has weights packed in MXFP4, which are not supported for")
    config["quantization_config"] = {"quant_method": "gptq"}
    (pair.folder / "config.json").write_text(json.dumps(config))
    refused(lambda: from_hf(pair.folder), "quantization_config")


@pytest.mark.parametrize("name", ONE_EACH)
def test_what_is_written_has_the_names_that_transformers_writes(name, tmp_path):
    pair = make_checkpoint(tmp_path / "theirs", name, seed=3)
    ours = to_hf(pair.params, tmp_path / "ours", family=name)
    theirs, written = load_file(pair.folder / "model.safetensors"), load_file(ours / "model.safetensors")
    assert theirs.keys() == written.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value, written[key])


def test_gradients_flow_through_experts_and_empty_blocks(tmp_path):
    """By finite differences, along a random direction of all weights, the router's too."""
    params = make_checkpoint(tmp_path, "mixtral", seed=6).params
    tokens = prompts(2, 9)
    loss = jax.jit(lambda p: jnp.sum(jnp.sin(read(p, tokens))))
    direction = jax.tree.map(lambda a: 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    at = lambda by: float(loss(jax.tree.map(lambda a, d: a + by * d, params, direction)))
    gradient = jax.jit(jax.grad(loss))(params)
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert abs(along - (at(1e-3) - at(-1e-3)) / 2e-3) < 0.02 * abs(along)
    assert float(jnp.abs(gradient.blocks["mlp"]["router"]["weight"]).max()) > 0


def test_experts_equal_every_expert_on_every_token_weighted(tmp_path):
    """Oracle: all experts on all tokens, the unchosen times 0; also when one expert is chosen by all, and one by none."""
    from jaxcomm.layers import block_rows

    rng = np.random.default_rng(0)
    for n, k, experts in ((1, 1, 4), (7, 2, 5), (300, 3, 6), (64, 8, 128)):
        for chosen in (
            np.stack([rng.permutation(experts)[:k] for _ in range(n)]),
            np.tile(np.arange(k), (n, 1)),
        ):
            rows, blocks = jax.jit(block_rows, static_argnums=1)(chosen.astype(np.int32), experts)
            x = rng.normal(size=(n, 3))
            by_expert = rng.normal(size=(experts, 3))
            done = x[np.asarray(blocks.tokens)] * by_expert[np.asarray(blocks.experts)][:, None]
            done = np.where(np.asarray(blocks.used)[:, None, None], done, np.nan).reshape(-1, 3)
            np.testing.assert_array_equal(done[np.asarray(rows)], x[:, None] * by_expert[chosen])


def test_the_table_in_the_docs_is_the_registry():
    page = Path(__file__).parent.parent / "docs" / "families.md"
    assert table() in page.read_text(encoding="utf-8"), "put in what python -m jaxcomm.converters.table prints"
