"""The config.json of published checkpoints: read to the architecture they describe, or refused for the reason there is."""

import json
import warnings
from pathlib import Path

import pytest

from jaxcomm.config import DeltaRule, Heads, ModelConfig
from jaxcomm.converters import FAMILIES
from jaxcomm.converters.configs import reaching, read_config

DATA = Path(__file__).parent / "data"
REAL = json.loads((DATA / "real_configs.json").read_text())
RECONSTRUCTED = json.loads((DATA / "reconstructed_configs.json").read_text())
ACTS = {"silu": "silu", "gelu": "gelu"}  # every other name in these files is of the tanh approximation


def parse(folder, config) -> tuple[ModelConfig, list[str]]:
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        return read_config(folder)[1], [str(w.message) for w in warned]


def expected(c: dict) -> dict:
    """What a config says, read apart from the converters: plain look-ups with the defaults that these files leave out."""
    if c["model_type"] == "gpt2":
        sizes = dict(width=c["n_embd"], layers=c["n_layer"], heads=c["n_head"], kv_heads=c["n_head"])
        sizes |= dict(ff=4 * c["n_embd"], max_positions=c["n_positions"], norm_eps=c["layer_norm_epsilon"])
        act, rope = c["activation_function"], dict(kind="none")
    else:
        sizes = dict(width=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"])
        sizes |= dict(ff=c["intermediate_size"], kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]))
        sizes |= dict(norm_eps=c.get("rms_norm_eps", c.get("layer_norm_eps")))
        act, scaling = c.get("hidden_activation") or c["hidden_act"], c.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default")).replace("su", "longrope")
        rope = dict(
            kind=kind, theta=c.get("rope_theta", c.get("rotary_emb_base", 10000)), share=c.get("rotary_pct", 1.0)
        )
        rope |= dict(factor=scaling.get("factor", 1.0), short=tuple(scaling.get("short_factor", ())))
        sizes["max_positions"] = (
            c["original_max_position_embeddings"] if kind == "longrope" else c["max_position_embeddings"]
        )
    family = c["model_type"]
    layers, window = range(sizes["layers"]), c.get("sliding_window")
    if family == "gemma2":
        windows = tuple(0 if i % 2 else window for i in layers)
    elif family == "gemma3_text":
        windows = tuple(0 if i % 6 == 5 else window for i in layers)
    elif family == "mistral" and "sliding_window" not in c:
        windows = (4096,) * len(layers)  # the default of its class, and of the model
    else:
        windows = (window,) * len(layers) if window and family in ("mistral", "phi3") else ()
    if family in ("olmo3", "gpt_oss"):
        windows = tuple(window if kind == "sliding_attention" else 0 for kind in c["layer_types"])
    scale = c["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in c else c.get("attention_multiplier")
    older = family in ("gpt2", "gpt_neox")
    return sizes | dict(
        vocab=c["vocab_size"],
        head_dim=c.get("head_dim") or sizes["width"] // sizes["heads"],
        activation="gelu_sigmoid" if family == "gpt_oss" else ACTS.get(act, "gelu_tanh"),
        windows=windows,
        qkv_bias=older or family == "qwen2" or c.get("attention_bias", False),
        mlp_bias=older or family == "gpt_oss" or c.get("mlp_bias", False),
        parallel=c.get("use_parallel_residual", family == "gpt_neox"),
        gated=not older,
        tied_head=c.get("tie_word_embeddings", family in ("gemma2", "gemma3_text", "gpt2")),
        attention_scale=scale,
        attention_softcap=c.get("attn_logit_softcapping"),
        logit_softcap=c.get("final_logit_softcapping"),
        experts=c.get("num_local_experts", 0),
        experts_per_token=c.get("num_experts_per_tok", 0),
        sinks=family == "gpt_oss",
        embedding_scale=c.get("embedding_multiplier", 1.0),
        residual_scale=c.get("residual_multiplier", 1.0),
        logit_divisor=c.get("logits_scaling", 1.0),
        rope=rope,
    )


@pytest.mark.parametrize("name, config", [*REAL.items(), *RECONSTRUCTED.items()])
def test_published_configs_are_read_as_they_stand(name, config, tmp_path):
    if name == "Qwen2.5-7B-Instruct-1M":
        with pytest.raises(ValueError, match="config key dual_chunk_attention_config = .* is not supported"):
            parse(tmp_path, config)
        return
    got, warned = parse(tmp_path, config)
    want = expected(config)
    rope = want.pop("rope")
    assert {key: getattr(got, key) for key in want} == want
    turning = [r for r in got.ropes if r.kind != "none"] or list(got.ropes)
    widest = max(turning, key=lambda r: (r.theta, r.factor))  # of two the global one
    assert {key: getattr(widest, key) for key in rope} == rope
    if config["model_type"] == "gemma3_text":
        assert {r.theta for r in got.ropes} == {config["rope_theta"], config["rope_local_base_freq"]}
    if config["model_type"] == "smollm3":
        assert [got.ropes[r].kind != "none" for r in got.rope_of] == [bool(turns) for turns in config["no_rope_layers"]]
    assert [w for w in warned if "activation" not in w] == []
    assert bool(warned) == (name == "Falcon3-1B-Instruct"), "its key activation is read by nobody"


LLAMA = REAL["Llama-2-7b-chat-hf"]
PHI, NEOX, QWEN = REAL["phi-4"], REAL["pythia-14m"], REAL["Qwen2.5-7B-Instruct"]
MOE = LLAMA | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
GEMMA = REAL["gemma-2-2b-it"]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

HARMLESS = {  # more keys -> what the warning names
    "token ids": (LLAMA | dict(unk_token_id=0, sep_token_id=None, image_token_id=99999, decoder_start_token_id=3), ()),
    "generation": (LLAMA | dict(temperature=0.6, top_p=0.9, do_sample=True, max_length=4096, num_beams=1, bad_words_ids=None), ()),
    "training": (LLAMA | dict(gradient_checkpointing=True, lora_alpha=16, deepspeed={"stage": 2}), ("deepspeed", "lora_alpha")),
    "types that its class would refuse": (LLAMA | dict(initializer_range=0, attention_dropout=None, problem_type="chat", use_cache="yes"), ()),
    "nothing": (LLAMA | dict(surprise=None, other={}, third=[], quantization_config=None, rope_parameters=None), ()),
    "what it does anyway": (PHI | dict(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1), ()),
    "of other experts": (MOE | dict(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=False), ()),
    "off": (LLAMA | dict(rope_interleaved=False, alibi=False, is_causal=True, layer_types=["full_attention"] * 32), ()),
    "windows longer than texts": (LLAMA | dict(sliding_window=4096), ()),
    "bitsandbytes that is off": (LLAMA | dict(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": False}), ()),
    "two spellings": (NEOX | dict(partial_rotary_factor=0.25, rope_theta=10000), ()),
    "two spellings of experts": (MOE | dict(num_experts=8), ()),
    "two dtypes, of which transformers takes the new spelling": (LLAMA | dict(dtype="bfloat16"), ()),
    "two spellings of rope": (LLAMA | dict(rope_theta=10000, rope_scaling=ROPE, rope_parameters=ROPE), ()),
    "two spellings of an activation": (GEMMA | dict(hidden_act="gelu_new", sliding_window_size=4096), ()),
    "rope settings nobody reads": (QWEN | dict(rope_scaling=YARN | {"finetuned": True}), ("rope_parameters.finetuned",)),
    "remote code": (LLAMA | dict(auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}), ()),
}  # fmt: skip


@pytest.mark.parametrize("what", HARMLESS)
def test_what_no_code_reads_is_no_reason_to_refuse(what, tmp_path):
    config, named = HARMLESS[what]
    got, warned = parse(tmp_path, config)
    plain = {
        "token ids",
        "generation",
        "training",
        "types that its class would refuse",
        "nothing",
        "off",
        "remote code",
    }
    if what in plain:
        assert got == parse(tmp_path, LLAMA)[0]
    assert len(warned) == bool(named)
    assert all(name in warned[0] for name in named)


@pytest.mark.parametrize(
    "config, message",
    [
        (LLAMA | dict(quantization_config={"quant_method": "gptq", "bits": 4}), "config key quantization_config"),
        (LLAMA | dict(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "config key quantization_config"),
        (LLAMA | dict(quantization={"group_size": 64, "bits": 4}), "config key quantization = "),
        (PHI | dict(full_attn_mod=2), "config key full_attn_mod = 2"),
        (PHI | dict(attention_bias=True), "config key attention_bias = True"),
        (MOE | dict(shared_expert_intermediate_size=64), "config key shared_expert_intermediate_size = 64"),
        (LLAMA | dict(rope_interleaved=True), "config key rope_interleaved = True"),
        (LLAMA | dict(is_causal=False), "config key is_causal = False"),
        (LLAMA | dict(sliding_window=1024), "config key sliding_window = 1024"),
        (LLAMA | dict(layer_types=["sliding_attention"] * 32), "config key layer_types"),
        (NEOX | dict(partial_rotary_factor=0.5), "config key partial_rotary_factor = 0.5"),
        (NEOX | dict(rope_theta=77), "config key rope_theta = 77"),
        (MOE | dict(num_experts=4), "config keys num_experts = 4 and num_local_experts = 8 differ"),
        (LLAMA | dict(rope_scaling=ROPE, rope_parameters=ROPE | {"factor": 4.0}), "rope_scaling = .* and rope_parameters = .* differ"),
        (LLAMA | dict(rope_theta=5.0, rope_parameters=ROPE), "config key rope_theta = 5.0"),
        (GEMMA | dict(hidden_act="silu"), "config key hidden_act = 'silu'"),
        (GEMMA | dict(sliding_window_size=512), "config key sliding_window_size = 512"),
        (QWEN | dict(use_mrope=True), "config key use_mrope = True"),
        (LLAMA | dict(num_attention_heads=0), "config key num_attention_heads = 0: it must be a whole number from 1"),
        (GEMMA | dict(num_attention_heads="8"), "config key num_attention_heads = '8': it must be a whole number from 1"),
        (GEMMA | dict(query_pre_attn_scalar=-1), "config key query_pre_attn_scalar = -1 is not a number above 0"),
        (LLAMA | dict(rope_theta="10000"), "rope setting rope_theta = '10000' is not a number above 0"),
        (QWEN | dict(rope_scaling=YARN | {"factor": 0}), "rope setting factor = 0 is not a number above 0"),
        (QWEN | dict(rope_scaling=YARN | {"attention_factor": True}), "rope setting attention_factor = True is not a number"),
    ],
)  # fmt: skip
def test_what_changes_the_result_is_refused_by_name(config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        parse(tmp_path, config)
    assert "\n" not in str(error.value)


def test_scaled_ropes_reach_as_far_as_their_model_cards_say(tmp_path):
    qwen, _ = parse(tmp_path, QWEN | dict(rope_scaling=YARN))
    assert qwen.max_positions == 131072 and reaching(qwen, 131072).max_positions == 131072
    assert parse(tmp_path, QWEN | dict(rope_scaling=YARN, max_position_embeddings=131072))[0] == qwen
    vicuna, _ = parse(tmp_path, LLAMA | dict(rope_scaling={"type": "linear", "factor": 4.0}, max_sequence_length=16384))
    assert vicuna.max_positions == 4096 and reaching(vicuna, 16384).max_positions == 16384
    with pytest.raises(ValueError, match="max_positions = 16385: the checkpoint has 16384"):
        reaching(vicuna, 16385)


def test_layers_of_ministral_differ(tmp_path):
    kinds = ["full_attention", *["sliding_attention"] * 3] * 8
    config = REAL["Mistral-7B-Instruct-v0.3"] | dict(
        layer_types=kinds, sliding_window=32768, max_position_embeddings=131072
    )
    assert parse(tmp_path, config)[0].windows == (0, 32768, 32768, 32768) * 8


def test_gemma_3_that_reads_images_says_what_its_text_part_is(tmp_path):
    text = dict(model_type="gemma3_text", hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, head_dim=128,
                num_attention_heads=32, num_key_value_heads=16, query_pre_attn_scalar=168, sliding_window=1024,
                rope_scaling={"rope_type": "linear", "factor": 8.0}, surprise=3)  # fmt: skip
    config = dict(model_type="gemma3", text_config=text, vision_config={"patch_size": 14}, boi_token_index=255999,
                  eoi_token_index=256000, image_token_index=262144, mm_tokens_per_image=256, torch_dtype="bfloat16")  # fmt: skip
    got, warned = parse(tmp_path, config)
    assert (got.layers, got.kv_heads, got.head_dim, got.attention_scale) == (62, 16, 128, 168**-0.5)
    assert {(rope.kind, rope.factor, rope.theta) for rope in got.ropes} == {("linear", 8, 1e6), ("default", 1, 1e4)}
    assert "text_config.surprise" in warned[0] and len(warned) == 1


GEMMA4 = dict(
    attention_bias=False, attention_k_eq_v=True, final_logit_softcapping=30.0, global_head_dim=512, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=0, max_position_embeddings=262144,
    num_kv_shared_layers=0, rms_norm_eps=1e-6, sliding_window=1024, tie_word_embeddings=True, use_cache=True,
    use_bidirectional_attention="vision", use_double_wide_mlp=False, vocab_size=262144, vocab_size_per_layer_input=262144,
    enable_moe_block=False, num_experts=None, top_k_experts=None, moe_intermediate_size=None,
    rope_parameters={
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
)  # fmt: skip
GEMMAS = {  # name -> kind, layers, width, MLP, heads, key heads of sliding and of other layers, and what is its own
    "gemma-4-12B": ("gemma4_unified", 48, 3840, 15360, 16, 8, 1, {}),
    "gemma-4-26B-A4B": ("gemma4", 30, 2816, 2112, 16, 8, 2, dict(
        enable_moe_block=True, num_experts=128, top_k_experts=8, moe_intermediate_size=704)),
    "gemma-4-31B": ("gemma4", 60, 5376, 21504, 32, 16, 4, {}),
}  # fmt: skip


def published_gemma4(name):
    kind, layers, width, ff, heads, kv, far, more = GEMMAS[name]
    text = GEMMA4 | more | dict(
        model_type=f"{kind}_text", num_hidden_layers=layers, hidden_size=width, intermediate_size=ff, num_attention_heads=heads,
        num_key_value_heads=kv, num_global_key_value_heads=far,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * (layers // 6),
    )  # fmt: skip
    whole = dict(vision_config=None, audio_config=None, boi_token_id=255999, eoa_token_index=258883, dtype="bfloat16")
    return dict(model_type=kind, text_config=text, tie_word_embeddings=True, **whole)


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_4_is_read_as_it_is_published(name, tmp_path):
    _, layers, width, ff, heads, kv, far, more = GEMMAS[name]
    got, warned = parse(tmp_path, published_gemma4(name))
    assert not warned and (got.layers, got.width, got.heads, got.vocab) == (layers, width, heads, 262144)
    assert got.layer_heads == (*[(kv, 256, False)] * 5, (far, 512, True)) * (layers // 6)
    assert got.windows == (*[1024] * 5, 0) * (layers // 6)
    assert [(rope.kind, rope.theta, rope.share) for rope in got.ropes] == [
        ("default", 1e4, 1.0), ("proportional", 1e6, 0.25)
    ]  # fmt: skip
    assert (got.v_norm, got.layer_scale, got.attention_scale, got.logit_softcap) == (True, True, 1.0, 30.0)
    if more:
        assert (got.ff, got.dense_ff, got.experts, got.experts_per_token) == (704, 2112, 128, 8)
    else:
        assert (got.ff, got.dense_ff, got.experts) == (ff, 0, 0)
    written = FAMILIES["gemma4_text"].write(got)
    assert parse(tmp_path, written | {"model_type": "gemma4_text"})[0] == got
    per_layer = {f"{i:02d}": {"head_dim": 512, "num_key_value_heads": far} for i in range(5, layers, 6)}
    later = {key: value for key, value in written.items() if "global" not in key} | {"per_layer_config": per_layer}
    assert parse(tmp_path, later | {"model_type": "gemma4_text"})[0] == got


def test_a_gemma_4_whose_layers_are_alike_is_a_stack(tmp_path):
    config = published_gemma4("gemma-4-12B")
    config["text_config"] |= dict(layer_types=["full_attention"] * 48)
    got, _ = parse(tmp_path, config)
    assert (got.alike, got.kv_heads, got.head_dim, got.keys_as_values, got.windows) == (True, 1, 512, True, ())


def test_what_gemma_4_has_and_a_split_model_has_not_is_refused_in_one_line(tmp_path):
    for change, told in {
        "hidden_size_per_layer_input": (
            256,
            "hidden_size_per_layer_input .* use Gemma 4 12B, 26B-A4B or 31B, or Gemma 3",
        ),
        "num_kv_shared_layers": (20, "config key num_kv_shared_layers = 20 is not supported"),
        "use_bidirectional_attention": ("all", "use_bidirectional_attention = 'all' is not supported"),
        "per_layer_config": ({"3": {"sliding_window": 5}}, "per_layer_config = .* is not supported"),
        "enable_moe_block": (True, "config key num_experts = None is not a number above 0"),
    }.items():
        config = published_gemma4("gemma-4-31B")
        config["text_config"][change] = told[0]
        with pytest.raises(ValueError, match=told[1]) as error:
            parse(tmp_path, config)
        assert "\n" not in str(error.value)


def published_qwen3_5(width, ff):
    """The config.json of Qwen 3.5 0.8B and 2B."""
    text = dict(
        attention_bias=False, attention_dropout=0.0, attn_output_gate=True, dtype="bfloat16", eos_token_id=248044,
        full_attention_interval=4, head_dim=256, hidden_act="silu", hidden_size=width, initializer_range=0.02,
        intermediate_size=ff, layer_types=[*["linear_attention"] * 3, "full_attention"] * 6, linear_conv_kernel_dim=4,
        linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=16, linear_value_head_dim=128,
        max_position_embeddings=262144, mlp_only_layers=[], model_type="qwen3_5_text", mtp_num_hidden_layers=1,
        mtp_use_dedicated_embeddings=False, num_attention_heads=8, num_hidden_layers=24, num_key_value_heads=2,
        rms_norm_eps=1e-6, tie_word_embeddings=True, use_cache=True, vocab_size=248320, mamba_ssm_dtype="float32",
        rope_parameters=dict(
            mrope_interleaved=True, mrope_section=[11, 11, 10], rope_type="default", rope_theta=10000000,
            partial_rotary_factor=0.25,
        ),
    )  # fmt: skip
    vision = dict(
        deepstack_visual_indexes=[], depth=12, hidden_act="gelu_pytorch_tanh", hidden_size=768, in_channels=3,
        initializer_range=0.02, intermediate_size=3072, model_type="qwen3_5", num_heads=12, num_position_embeddings=2304,
        out_hidden_size=width, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    return dict(
        architectures=["Qwen3_5ForConditionalGeneration"], image_token_id=248056, model_type="qwen3_5", text_config=text,
        tie_word_embeddings=True, transformers_version="4.57.0.dev0", video_token_id=248057, vision_config=vision,
        vision_end_token_id=248054, vision_start_token_id=248053,
    )  # fmt: skip


@pytest.mark.parametrize(("width", "ff"), [(1024, 3584), (2048, 6144)])
def test_qwen_3_5_is_read_as_it_is_published(width, ff, tmp_path):
    got, warned = parse(tmp_path, published_qwen3_5(width, ff))
    assert not warned and (got.layers, got.width, got.ff, got.heads, got.vocab) == (24, width, ff, 8, 248320)
    assert got.layer_heads == (*[DeltaRule(16, 16, 128, 128, 4)] * 3, Heads(2, 256)) * 6
    assert (got.norm, got.qk_norm, got.attention_gate, got.tied_head) == ("rms_plus_one", "head", True, True)
    assert (got.rope.theta, got.rope.dims(256), got.max_positions) == (1e7, 64, 262144)
    written = FAMILIES["qwen3_5_text"].write(got)
    assert parse(tmp_path, written | {"model_type": "qwen3_5_text"})[0] == got


def test_what_qwen_3_5_has_and_we_have_not_is_refused_in_one_line(tmp_path):
    for key, value, told in (
        ("attn_output_gate", False, "attn_output_gate"),
        ("full_attention_interval", 3, "full_attention_interval"),
        ("output_gate_type", "sigmoid", "output_gate_type"),
        ("mlp_only_layers", [3], "mlp_only_layers"),
        ("linear_num_value_heads", 24, "value_heads 24 is not a multiple of key_heads 16"),
        ("layer_types", ["linear_attention"] * 24, "layer_types = .* is not supported: 24, of both"),
        ("layer_types", ["sliding_attention", *["full_attention"] * 23], "layer_types"),
    ):
        config = published_qwen3_5(1024, 3584)
        config["text_config"][key] = value
        with pytest.raises(ValueError, match=told) as error:
            parse(tmp_path, config)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="architecture 'qwen3_5_moe' is not supported; supported are"):
        parse(tmp_path, {"model_type": "qwen3_5_moe"})
