"""The checkpoint families. Each has a translation of its config, in both directions, and a table of weight names.

A family is data for `converters.hf`. No other code depends on the name of a family. docs/add_a_family.md explains how to
add one. The parity tests and the table in docs/families.md run over `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcomm.config import DeltaRule, Heads, ModelConfig, Rope

from .shared import (
    one_rope,
    partial_rope,
    read_common,
    read_heads,
    read_linear,
    read_rope,
    read_ropes,
    read_window,
    read_windows,
    write_common,
    write_heads,
    write_rope,
    write_ropes,
    write_window,
)
from .values import ACTIVATIONS, Values, layer_types
from .weights import (
    GEMMA,
    GEMMA4,
    GEMMA4_WHOLE,
    GEMMA_VISION,
    GPT2,
    GPT_NEOX,
    GPT_OSS,
    GRANITE_MOE,
    LLAMA,
    MIXTRAL,
    OLMO2,
    PHI3,
    QWEN3_5,
    QWEN3_5_WHOLE,
    QWEN3_MOE,
    Layout,
)

NO_ROPE = Rope(kind="none")


def _read_llama(v: Values) -> ModelConfig:
    bias = v.take("attention_bias")
    return ModelConfig(**read_common(v), qkv_bias=bias, out_bias=bias, mlp_bias=v.take("mlp_bias"))


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | dict(head_dim=c.head_dim, attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)


def _read_mistral(v: Values) -> ModelConfig:
    common = read_common(v)
    # If the config has this key, transformers reads it as Ministral, whose layers differ from each other.
    windows = read_windows if v.has("layer_types") else read_window
    return ModelConfig(**common, windows=windows(v, common["layers"]))


def _write_mistral(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | dict(sliding_window=write_window(c))


def _read_mixtral(v: Values) -> ModelConfig:
    common = read_common(v)
    experts = dict(experts=v.take("num_local_experts"), experts_per_token=v.take("num_experts_per_tok"))
    return ModelConfig(**common, **experts, windows=read_window(v, common["layers"]))


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    experts = dict(num_local_experts=c.experts, num_experts_per_tok=c.experts_per_token)
    return _write_mistral(c) | experts


def _read_qwen2(v: Values) -> ModelConfig:
    v.demand("use_mrope", None, False)
    for folded in ("use_sliding_window", "max_window_layers"):  # transformers has put both into layer_types
        v.take(folded)
    common = read_common(v)
    return ModelConfig(**common, windows=read_windows(v, common["layers"]), qkv_bias=True)


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    sliding = {"sliding_window": write_window(c), "use_sliding_window": True} if c.windows else {}
    return write_common(c) | dict(layer_types=layer_types(c), **sliding)


def _read_qwen3(v: Values) -> ModelConfig:
    for folded in ("use_sliding_window", "max_window_layers"):
        v.take(folded)
    common, bias = read_common(v), v.take("attention_bias")
    return ModelConfig(
        **common, windows=read_windows(v, common["layers"]), qk_norm="head", qkv_bias=bias, out_bias=bias
    )


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(c) | dict(head_dim=c.head_dim, attention_bias=c.qkv_bias)


def _read_qwen3_moe(v: Values) -> ModelConfig:
    # The first two are already part of the window. The third is for dense layers, which are refused below.
    for unused in ("use_sliding_window", "max_window_layers", "intermediate_size"):
        v.take(unused)
    v.demand("decoder_sparse_step", 1)
    v.demand("mlp_only_layers", [], None)
    common, bias, ff = read_common(v), v.take("attention_bias"), v.take("moe_intermediate_size")
    return ModelConfig(
        **common | {"ff": ff},
        windows=read_window(v, common["layers"]),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        experts=v.take("num_local_experts") or v.take("num_experts"),
        experts_per_token=v.take("num_experts_per_tok"),
        normalised_experts=v.take("norm_topk_prob"),
    )


def _write_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    sliding = {"sliding_window": write_window(c), "use_sliding_window": True} if c.windows else {}
    return write_common(c) | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        moe_intermediate_size=c.ff,
        num_experts=c.experts,
        num_experts_per_tok=c.experts_per_token,
        norm_topk_prob=c.normalised_experts,
        **sliding,
    )


DELTA_RULE = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}
"""Fields of `DeltaRule` -> keys of a config.json."""


def _read_qwen3_5(v: Values) -> ModelConfig:
    def rope(v: Values, positions: int) -> Rope:
        settings = dict(v.take("rope_parameters"))
        for of_images in ("mrope_section", "mrope_interleaved"):  # a text's three positions are the same
            settings.pop(of_images, None)
        return read_rope(v, settings, positions, partial=True)

    common, bias = read_common(v, rope), v.take("attention_bias")
    rule = DeltaRule(**{field: v.positive(key) for field, key in DELTA_RULE.items()})
    heads = Heads(common["kv_heads"], common["head_dim"])
    return ModelConfig(
        **common,
        norm="rms_plus_one",
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        attention_gate=True,
        layer_heads=read_linear(v, common["layers"], heads, rule),
    )


def _write_qwen3_5(c: ModelConfig) -> dict[str, Any]:
    (rule,) = {rule for rule in c.rules if rule}
    return write_common(c) | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        rope_parameters=write_rope(c.ropes[0]) | {"partial_rotary_factor": c.ropes[0].share},
        layer_types=["full_attention" if heads else "linear_attention" for heads in c.key_heads],
        **{key: getattr(rule, field) for field, key in DELTA_RULE.items()},
    )


def _read_qwen3_5_whole(v: Values) -> ModelConfig:
    """The text part of a checkpoint that also reads images and videos."""
    for other in "vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings is_encoder_decoder".split():  # noqa: SIM905
        v.take(other)
    return _read_text(v, _read_qwen3_5)


def _read_gemma(v: Values, read_rope: Callable[[Values, int], Rope | None] = one_rope) -> dict[str, Any]:
    v.demand("use_bidirectional_attention", None, False)
    common, bias = read_common(v, read_rope, act="hidden_activation"), v.take("attention_bias")
    return common | dict(
        norm="rms_plus_one",
        norms="both",
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=v.positive("query_pre_attn_scalar") ** -0.5,
        logit_softcap=v.number("final_logit_softcapping"),
        scale_embedding=True,
        windows=read_windows(v, common["layers"]),
    )


def _write_gemma(c: ModelConfig) -> dict[str, Any]:
    assert c.attention_scale is not None
    return write_common(c, act="hidden_activation") | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        query_pre_attn_scalar=round(c.attention_scale**-2),
        final_logit_softcapping=c.logit_softcap,
        sliding_window=write_window(c),
        layer_types=layer_types(c),
    )


def _read_gemma2(v: Values) -> ModelConfig:
    return ModelConfig(**_read_gemma(v), attention_softcap=v.number("attn_logit_softcapping"))


def _write_gemma2(c: ModelConfig) -> dict[str, Any]:
    return _write_gemma(c) | dict(attn_logit_softcapping=c.attention_softcap)


def _read_gemma3(v: Values) -> ModelConfig:
    v.take("sliding_window_pattern")  # folded into layer_types
    v.take("attn_logit_softcapping")  # transformers has the field and does not read it
    fields = _read_gemma(v, lambda v, positions: None)
    return ModelConfig(**fields, rope=read_ropes(v, fields, fields["windows"]), qk_norm="head")


def _write_gemma3(c: ModelConfig) -> dict[str, Any]:
    return _write_gemma(c) | dict(rope_parameters=write_ropes(c))


def _read_gemma3_vision(v: Values) -> ModelConfig:
    """The text part of a checkpoint that also reads images."""
    for picture in """vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id
        eoi_token_id image_token_id tie_word_embeddings is_encoder_decoder""".split():  # noqa: SIM905
        v.take(picture)
    return _read_text(v, _read_gemma3)


def _read_text(v: Values, read: Callable[[Values], ModelConfig]) -> ModelConfig:
    """The config under the key text_config."""
    text = v.part("text_config")
    config = read(text)
    text.finish(config)
    v.ignored |= {f"text_config.{key}" for key in text.ignored}
    return config


def _read_gemma4(v: Values) -> ModelConfig:
    if v.take("hidden_size_per_layer_input", 0):
        raise ValueError(
            "config key hidden_size_per_layer_input is not 0: per-layer embeddings (Gemma 4 E2B, E4B) give every block the token ids, which a model split at a layer does not have; use Gemma 4 12B, 26B-A4B or 31B, or Gemma 3"
        )
    v.demand("num_kv_shared_layers", 0)
    v.demand("use_bidirectional_attention", None, "vision")  # "vision" is about the tokens of images only
    for unused in ("vocab_size_per_layer_input", "use_double_wide_mlp"):  # of per-layer embeddings, of shared layers
        v.take(unused)
    common, bias = read_common(v, lambda v, positions: None, act="hidden_activation"), v.take("attention_bias")
    windows = read_windows(v, common["layers"])
    mixed, of_experts = v.take("enable_moe_block", False), ("num_experts", "top_k_experts", "moe_intermediate_size")
    experts, each, ff = (v.positive(key) if mixed else v.take(key) for key in of_experts)
    if mixed:
        common |= dict(experts=experts, experts_per_token=each, dense_ff=common["ff"], ff=ff, router_norm=True)
    return ModelConfig(
        **common | read_heads(v, common, windows),
        norm="rms_wide",
        norms="both",
        qk_norm="head",
        v_norm=True,
        layer_scale=True,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=1.0,
        logit_softcap=v.number("final_logit_softcapping"),
        scale_embedding=True,
        windows=windows,
        rope=read_ropes(v, common, windows),
    )


def _write_gemma4(c: ModelConfig) -> dict[str, Any]:
    experts = dict(enable_moe_block=False)
    if c.experts:
        sizes = dict(intermediate_size=c.dense_ff, moe_intermediate_size=c.ff)
        experts = dict(enable_moe_block=True, num_experts=c.experts, top_k_experts=c.experts_per_token, **sizes)
    return write_common(c, act="hidden_activation") | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        final_logit_softcapping=c.logit_softcap,
        sliding_window=write_window(c),
        layer_types=layer_types(c),
        rope_parameters=write_ropes(c),
        hidden_size_per_layer_input=0,
        **write_heads(c),
        **experts,
    )


def _read_gemma4_whole(v: Values) -> ModelConfig:
    """The text part of a checkpoint that also reads images and sound."""
    for other in """vision_config audio_config eoa_token_index tie_word_embeddings is_encoder_decoder
        vision_soft_tokens_per_image""".split():  # noqa: SIM905
        v.take(other)
    return _read_text(v, _read_gemma4)


def _read_phi3(v: Values) -> ModelConfig:
    original = v.take("original_max_position_embeddings")  # transformers has copied it into rope_parameters

    def rope(v: Values, positions: int) -> Rope:
        settings = dict(v.take("rope_parameters"))
        if settings.get("rope_type") == "longrope":
            settings.setdefault("original_max_position_embeddings", original)
        return read_rope(v, settings, positions, partial=True)

    common = read_common(v, rope)
    return ModelConfig(**common, windows=read_window(v, common["layers"]))


def _write_phi3(c: ModelConfig) -> dict[str, Any]:
    (rope,) = c.ropes
    original = {"original_max_position_embeddings": rope.original_positions} if rope.kind == "longrope" else {}
    # The config class and the code of Phi-3 read it only here.
    share = {"rope_parameters": write_rope(rope) | {"partial_rotary_factor": rope.share}}
    return write_common(c) | dict(sliding_window=write_window(c), **original, **share)


def _read_olmo2(v: Values) -> ModelConfig:
    common, bias = read_common(v), v.take("attention_bias")
    return ModelConfig(**common, norm="rms_wide", norms="after", qk_norm="width", qkv_bias=bias, out_bias=bias)


def _write_olmo2(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | dict(attention_bias=c.qkv_bias)


def _read_olmo3(v: Values) -> ModelConfig:
    common, bias = read_common(v, lambda v, positions: None), v.take("attention_bias")
    windows = read_windows(v, common["layers"])
    return ModelConfig(
        **common,
        norm="rms_wide",
        norms="after",
        qk_norm="width",
        qkv_bias=bias,
        out_bias=bias,
        windows=windows,
        rope=read_ropes(v, common, windows),
    )


def _write_olmo3(c: ModelConfig) -> dict[str, Any]:
    windows = dict(layer_types=layer_types(c), sliding_window=write_window(c))
    return _write_olmo2(c) | windows | dict(rope_parameters=write_ropes(c))


def _read_granite_moe(v: Values) -> ModelConfig:
    common, bias = read_common(v), v.take("attention_bias")
    experts = dict(experts=v.take("num_local_experts"), experts_per_token=v.take("num_experts_per_tok"))
    return ModelConfig(**common, **experts, **_granite_scales(v), qkv_bias=bias, out_bias=bias)


def _write_granite_moe(c: ModelConfig) -> dict[str, Any]:
    experts = dict(num_local_experts=c.experts, num_experts_per_tok=c.experts_per_token)
    return _write_granite(c) | experts


def _read_granite(v: Values) -> ModelConfig:
    common, bias = read_common(v), v.take("attention_bias")
    return ModelConfig(**common, **_granite_scales(v), qkv_bias=bias, out_bias=bias, mlp_bias=v.take("mlp_bias"))


def _granite_scales(v: Values) -> dict[str, Any]:
    return dict(
        attention_scale=float(v.positive("attention_multiplier")),
        embedding_scale=float(v.positive("embedding_multiplier")),
        residual_scale=float(v.positive("residual_multiplier")),
        logit_divisor=float(v.positive("logits_scaling")),
    )


def _write_granite(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
        attention_multiplier=c.attention_scale,
        embedding_multiplier=c.embedding_scale,
        residual_multiplier=c.residual_scale,
        logits_scaling=c.logit_divisor,
    )


def _read_gpt_oss(v: Values) -> ModelConfig:
    v.demand("swiglu_alpha", 1.702)
    v.take("hidden_act")  # the family's code fixes the function
    common, bias = read_common(v, act=None), v.take("attention_bias")
    return ModelConfig(
        **common,
        norm="rms_wide",
        activation="gelu_sigmoid",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        router_bias=True,
        mlp_limit=float(v.positive("swiglu_limit")),
        up_plus_one=True,
        experts=v.take("num_local_experts"),
        experts_per_token=v.take("num_experts_per_tok"),
        sinks=True,
        windows=read_windows(v, common["layers"]),
    )


def _write_gpt_oss(c: ModelConfig) -> dict[str, Any]:
    return write_common(c, act=None) | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        swiglu_limit=c.mlp_limit,
        num_local_experts=c.experts,
        num_experts_per_tok=c.experts_per_token,
        layer_types=layer_types(c),
        sliding_window=write_window(c),
    )


def _read_smollm3(v: Values) -> ModelConfig:
    # The first two are already part of layer_types and no_rope_layers. No code reads the last one, which hub configs have.
    for folded in ("use_sliding_window", "no_rope_layer_interval", "max_window_layers"):
        v.take(folded)
    common, bias = read_common(v), v.take("attention_bias")
    turns, layers, rope = v.take("no_rope_layers"), common["layers"], common["rope"]
    if len(turns) != layers or not set(turns) <= {0, 1}:
        raise ValueError(f"config key no_rope_layers = {turns!r} is not supported: {layers} of 0 and 1")
    common["rope"] = rope if all(turns) else tuple(rope if turn else NO_ROPE for turn in turns)
    return ModelConfig(
        **common,
        windows=read_windows(v, layers),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=v.take("mlp_bias"),
    )


def _write_smollm3(c: ModelConfig) -> dict[str, Any]:
    turns = [int(c.ropes[rope].kind != "none") for rope in c.rope_of]
    (rope,) = (rope for rope in c.ropes if rope.kind != "none")
    return write_common(c) | dict(
        rope_parameters=write_rope(rope),
        no_rope_layers=turns,
        layer_types=layer_types(c),
        sliding_window=write_window(c),
        use_sliding_window=bool(c.windows),
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
    )


def _read_gpt2(v: Values) -> ModelConfig:
    for key in ("is_encoder_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        v.demand(key, False)
    for other_head in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
                       "summary_first_dropout", "n_ctx"):  # fmt: skip
        v.take(other_head)
    v.take("reorder_and_upcast_attn")  # the same but for rounding; scores are float32 here
    width, heads = v.take("n_embd"), v.take("n_head")
    return ModelConfig(
        vocab=v.take("vocab_size"),
        width=width,
        layers=v.take("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ff=v.take("n_inner") or 4 * width,
        max_positions=v.take("n_positions"),
        norm="layer",
        norm_eps=v.number("layer_norm_epsilon"),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation=v.choose("activation_function", ACTIVATIONS),
        attention_scale=None if v.take("scale_attn_weights") else 1.0,
        tied_head=v.take("tie_word_embeddings"),
        learned_positions=True,
        rope=NO_ROPE,
    )


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        n_embd=c.width,
        n_layer=c.layers,
        n_head=c.heads,
        n_inner=c.ff,
        n_positions=c.max_positions,
        layer_norm_epsilon=c.norm_eps,
        activation_function={"gelu_tanh": "gelu_new"}.get(c.activation, c.activation),
        scale_attn_weights=c.attention_scale is None,
        tie_word_embeddings=c.tied_head,
    )


def _read_gpt_neox(v: Values) -> ModelConfig:
    common, bias = read_common(v, partial_rope, eps="layer_norm_eps"), v.take("attention_bias")
    return ModelConfig(
        **common,
        norm="layer",
        parallel=v.take("use_parallel_residual"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        gated=False,
    )


def _write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    values = write_common(c, eps="layer_norm_eps")
    rope = values["rope_parameters"] | {"partial_rotary_factor": c.ropes[0].share}
    del values["num_key_value_heads"]
    return values | dict(rope_parameters=rope, use_parallel_residual=c.parallel, attention_bias=c.qkv_bias)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        model_type: The value of model_type in its config.json.
        title: The published models of this kind.
        read: Reads the architecture from the values of a config.json.
        write: Writes a config.json for an architecture. None: such checkpoints are read, but written as another kind.
        layout: The names of its tensors, and how our weights are stored in them.
        model_class: Suffix of the name of transformers' model class, after the name of the config class. (transformers'
            own table of these names needs torch.)
        example: Values of a config that is read, where the config class's defaults are not.

    Example:
        >>> from jaxcomm.converters import FAMILIES
        >>> FAMILIES["qwen3"].title
        'Qwen 3'
    """

    model_type: str
    title: str
    read: Callable[[Values], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]] | None
    layout: Layout
    model_class: str = "ForCausalLM"
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NO_PLE = {"hidden_size_per_layer_input": 0}

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family("llama", "Llama 2, 3, 3.1, 3.2, 3.3", _read_llama, _write_llama, LLAMA),
        Family("mistral", "Mistral 7B, Nemo, Small", _read_mistral, _write_mistral, LLAMA),
        Family("mixtral", "Mixtral 8x7B, 8x22B", _read_mixtral, _write_mixtral, MIXTRAL),
        Family("qwen2", "Qwen 2, Qwen 2.5", _read_qwen2, _write_qwen2, LLAMA),
        Family("qwen3", "Qwen 3", _read_qwen3, _write_qwen3, LLAMA),
        Family("qwen3_moe", "Qwen 3 30B-A3B, 235B-A22B", _read_qwen3_moe, _write_qwen3_moe, QWEN3_MOE),
        Family("qwen3_5_text", "Qwen 3.5 (the text part, saved alone)", _read_qwen3_5, _write_qwen3_5, QWEN3_5),
        Family("qwen3_5", "Qwen 3.5 0.8B, 2B, 4B, 9B, 27B (the text part)", _read_qwen3_5_whole, None, QWEN3_5_WHOLE),
        Family("gemma2", "Gemma 2", _read_gemma2, _write_gemma2, GEMMA),
        Family("gemma3_text", "Gemma 3 270M, 1B", _read_gemma3, _write_gemma3, GEMMA),
        Family("gemma3", "Gemma 3 4B, 12B, 27B (the text part)", _read_gemma3_vision, None, GEMMA_VISION),
        Family("gemma4_text", "Gemma 4 (the text part, saved alone)", _read_gemma4, _write_gemma4, GEMMA4, example=NO_PLE),
        Family("gemma4", "Gemma 4 26B-A4B, 31B (the text part)", _read_gemma4_whole, None, GEMMA4_WHOLE, example=dict(text_config=NO_PLE)),
        Family("gemma4_unified_text", "Gemma 4 12B (the text part, saved alone)", _read_gemma4, None, GEMMA4),
        Family("gemma4_unified", "Gemma 4 12B (the text part)", _read_gemma4_whole, None, GEMMA4_WHOLE),
        Family("phi3", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", _read_phi3, _write_phi3, PHI3),
        Family("olmo2", "OLMo 2", _read_olmo2, _write_olmo2, OLMO2),
        Family("olmo3", "OLMo 3, 3.1", _read_olmo3, _write_olmo3, OLMO2),
        Family("granite", "Granite 3", _read_granite, _write_granite, LLAMA),
        Family("granitemoe", "Granite 3 1B-A400M, 3B-A800M", _read_granite_moe, _write_granite_moe, GRANITE_MOE),
        Family("gpt_oss", "gpt-oss 20B, 120B", _read_gpt_oss, _write_gpt_oss, GPT_OSS),
        Family("smollm3", "SmolLM 3", _read_smollm3, _write_smollm3, LLAMA),
        Family("gpt2", "GPT-2", _read_gpt2, _write_gpt2, GPT2, model_class="LMHeadModel"),
        Family("gpt_neox", "Pythia, GPT-NeoX", _read_gpt_neox, _write_gpt_neox, GPT_NEOX),
    )
}  # fmt: skip
