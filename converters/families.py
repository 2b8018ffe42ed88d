"""What each checkpoint family calls things: one translation of its config and one table of weight names.

A family is data for `converters.hf`; nothing else in the library knows one by name. To add one: a `read` (its config
values -> ModelConfig), a `write` (back), its weight names, and a line in `FAMILIES`; the parity tests run over the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcomm.config import FULL, ModelConfig, Rope

Path = tuple[str, ...]
"""Where a weight lies in the tree of `jaxcomm.layers.Block`."""

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

CARRIES_NO_ARCHITECTURE = frozenset(
    """architectures attention_dropout bos_token_id cache_implementation chunk_size_feed_forward dtype eos_token_id
    id2label initializer_range label2id model_type output_attentions output_hidden_states pad_token_id pretraining_tp
    problem_type return_dict tie_last_hidden_states tokenizer_class torch_dtype transformers_version unsloth_fixed
    unsloth_version use_cache""".split()  # noqa: SIM905
)
"""Config keys that do not change what a converted model computes, nor do those that begin with "_". Every other key
has to be taken by `read`."""


class Values:
    """The values of a config.json with transformers' defaults filled in, which remembers those nobody asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        self._left = {key for key in values if key not in CARRIES_NO_ARCHITECTURE and not key.startswith("_")}

    def take(self, key: str, default: Any = None) -> Any:
        self._left.discard(key)
        return self._values.get(key, default)

    def demand(self, key: str, *allowed: Any) -> None:
        """ValueError unless the key is absent or has one of the values."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"config key {key} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}")

    def choose(self, key: str, table: Mapping[str, Any]) -> Any:
        value = self.take(key)
        if value not in table:
            raise ValueError(f"config key {key} = {value!r} is not supported, only {', '.join(table)}")
        return table[value]

    def finish(self) -> None:
        """ValueError if a key is left whose meaning nobody has taken into account."""
        if self._left:
            raise ValueError(
                f"unknown config keys {', '.join(f'{k} = {str(self._values[k])[:40]}' for k in sorted(self._left))}: this version does not know what they change"
            )


ROPE_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_positions",
    },
}
"""rope type -> its settings: transformers' name -> the field of `Rope`."""


def _read_rope(v: Values) -> Rope:
    settings = dict(v.take("rope_parameters"))
    settings.pop("type", None)  # the oldest spelling; transformers has copied it to rope_type
    if settings.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError("rope setting partial_rotary_factor is not supported")
    theta, kind = settings.pop("rope_theta"), settings.pop("rope_type", "default")
    if kind not in ROPE_SETTINGS:
        raise ValueError(f"rope type {kind!r} is not supported, only {', '.join(ROPE_SETTINGS)}")
    names = ROPE_SETTINGS[kind]
    if set(settings) != set(names):
        raise ValueError(f"rope settings {sorted(settings)} do not fit rope type {kind!r}, which has {sorted(names)}")
    return Rope(theta, kind, **{ours: settings[theirs] for theirs, ours in names.items()})


def _write_rope(rope: Rope) -> dict[str, Any]:
    settings = {theirs: getattr(rope, ours) for theirs, ours in ROPE_SETTINGS[rope.kind].items()}
    return {"rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.kind, **settings}}


def _read_common(v: Values) -> dict[str, Any]:
    v.demand("is_encoder_decoder", False)
    width, heads = v.take("hidden_size"), v.take("num_attention_heads")
    return dict(
        vocab=v.take("vocab_size"),
        width=width,
        layers=v.take("num_hidden_layers"),
        heads=heads,
        kv_heads=v.take("num_key_value_heads") or heads,
        head_dim=v.take("head_dim") or width // heads,
        ff=v.take("intermediate_size"),
        max_positions=v.take("max_position_embeddings"),
        norm_eps=v.take("rms_norm_eps"),
        tied_head=v.take("tie_word_embeddings"),
        rope=_read_rope(v),
    )


def _write_common(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        intermediate_size=c.ff,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied_head,
        **_write_rope(c.rope),
    )


def _read_windows(v: Values, layers: int) -> tuple[int, ...]:
    window, kinds = v.take("sliding_window"), v.take("layer_types")
    table = {"full_attention": FULL, "sliding_attention": window}
    unknown = set(kinds) - set(table)
    if unknown or len(kinds) != layers:
        raise ValueError(f"config key layer_types = {kinds!r} is not supported: {layers} of {', '.join(table)}")
    if "sliding_attention" in kinds and not window:
        raise ValueError(f"config has sliding layers but sliding_window = {window!r}")
    return tuple(table[kind] for kind in kinds) if "sliding_attention" in kinds else ()


def _layer_types(c: ModelConfig) -> list[str]:
    return ["sliding_attention" if w else "full_attention" for w in c.windows or (FULL,) * c.layers]


def _read_llama(v: Values) -> ModelConfig:
    bias = v.take("attention_bias")
    return ModelConfig(
        **_read_common(v),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=v.take("mlp_bias"),
        activation=v.choose("hidden_act", ACTIVATIONS),
    )


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    return _write_common(c) | dict(
        head_dim=c.head_dim, attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias, hidden_act=_hf_activation(c)
    )


def _read_qwen2(v: Values) -> ModelConfig:
    v.demand("use_mrope", None, False)
    for folded in ("use_sliding_window", "max_window_layers"):  # transformers has put both into layer_types
        v.take(folded)
    common = _read_common(v)
    return ModelConfig(
        **common,
        windows=_read_windows(v, common["layers"]),
        qkv_bias=True,
        activation=v.choose("hidden_act", ACTIVATIONS),
    )


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    sliding = {"sliding_window": max(c.windows), "use_sliding_window": True} if c.windows else {}
    if c.head_dim * c.heads != c.width:
        sliding |= {"head_dim": c.head_dim}
    return _write_common(c) | dict(layer_types=_layer_types(c), hidden_act=_hf_activation(c), **sliding)


def _read_gemma2(v: Values) -> ModelConfig:
    v.demand("use_bidirectional_attention", None, False)
    if (twin := v.take("sliding_window_size")) not in (None, v.take("sliding_window")):  # on the hub beside it
        raise ValueError(f"config keys sliding_window_size = {twin} and sliding_window differ")
    v.take("hidden_act")  # on the hub beside hidden_activation, which is the one transformers reads
    common, bias = _read_common(v), v.take("attention_bias")
    return ModelConfig(
        **common,
        norm_plus_one=True,
        post_norms=True,
        qkv_bias=bias,
        out_bias=bias,
        activation=v.choose("hidden_activation", ACTIVATIONS),
        attention_scale=v.take("query_pre_attn_scalar") ** -0.5,
        attention_softcap=v.take("attn_logit_softcapping"),
        logit_softcap=v.take("final_logit_softcapping"),
        scale_embedding=True,
        windows=_read_windows(v, common["layers"]),
    )


def _write_gemma2(c: ModelConfig) -> dict[str, Any]:
    assert c.attention_scale is not None
    return _write_common(c) | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        hidden_activation=_hf_activation(c),
        query_pre_attn_scalar=round(c.attention_scale**-2),
        attn_logit_softcapping=c.attention_softcap,
        final_logit_softcapping=c.logit_softcap,
        sliding_window=max(c.windows, default=None) or None,
        layer_types=_layer_types(c),
    )


def _hf_activation(c: ModelConfig) -> str:
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}[c.activation]


def _linears(*names: tuple[Path, str]) -> dict[Path, str]:
    return {(*path, part): f"{theirs}.{part}" for path, theirs in names for part in ("weight", "bias")}


LLAMA_BLOCK: dict[Path, str] = {
    **_linears(
        (("attention", "q"), "self_attn.q_proj"),
        (("attention", "k"), "self_attn.k_proj"),
        (("attention", "v"), "self_attn.v_proj"),
        (("attention", "o"), "self_attn.o_proj"),
        (("mlp", "gate"), "mlp.gate_proj"),
        (("mlp", "up"), "mlp.up_proj"),
        (("mlp", "down"), "mlp.down_proj"),
    ),
    ("attention_norm", "weight"): "input_layernorm.weight",
    ("mlp_norm", "weight"): "post_attention_layernorm.weight",
}
GEMMA2_BLOCK: dict[Path, str] = LLAMA_BLOCK | {
    ("attention_post_norm", "weight"): "post_attention_layernorm.weight",
    ("mlp_norm", "weight"): "pre_feedforward_layernorm.weight",
    ("mlp_post_norm", "weight"): "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of checkpoint, by the `model_type` of its config.json."""

    model_type: str
    title: str
    """Which published models it covers."""
    read: Callable[[Values], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    block: Mapping[Path, str]
    """Weight of a Block -> its name on disk, after "model.layers.{i}."; biases count only where the config has them."""
    embed: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family("llama", "Llama 2, 3, 3.1, 3.2, 3.3", _read_llama, _write_llama, LLAMA_BLOCK),
        Family("qwen2", "Qwen 2, Qwen 2.5", _read_qwen2, _write_qwen2, LLAMA_BLOCK),
        Family("gemma2", "Gemma 2", _read_gemma2, _write_gemma2, GEMMA2_BLOCK),
    )
}
