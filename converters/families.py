"""What each checkpoint family calls things: one translation of its config and one table of weight names.

A family is data for `converters.hf`; nothing else in the library knows one by name. docs/add_a_family.md says how to add
one; the parity tests and the README's table run over `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomm.config import FULL, ModelConfig, Rope

Path = tuple[str, ...]
"""Where a weight lies in the tree of `jaxcomm.layers.Block`."""

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

CARRIES_NO_ARCHITECTURE = frozenset(
    """architectures attention_dropout bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout dtype
    embd_pdrop attn_pdrop resid_pdrop hidden_dropout eos_token_id id2label initializer_range label2id model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    router_aux_loss_coef router_jitter_noise tie_last_hidden_states tokenizer_class torch_dtype transformers_version
    unsloth_fixed unsloth_version use_cache""".split()  # noqa: SIM905
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

    def number(self, key: str) -> Any:
        """As a float, whatever JSON has. ValueError: something else."""
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"config key {key} = {value!r} is not a number")
        return None if value is None else float(value)

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


_ORIGINAL = {"original_max_position_embeddings": "original_positions"}
ROPE_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", **_ORIGINAL},
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate", **_ORIGINAL},
    "longrope": {"short_factor": "short", "long_factor": "long", **_ORIGINAL},
}  # fmt: skip
"""rope type -> its settings: transformers' name -> the field of `Rope`. Besides these each has rope_theta and
partial_rotary_factor; yarn and longrope have attention_factor, or what it follows from."""
OPTIONAL = {"beta_fast", "beta_slow", "truncate"}


def _read_rope(settings: Mapping[str, Any], positions: int, *, partial: bool = False) -> Rope:
    """The dict that transformers makes of either spelling (rope_theta and rope_scaling, or rope_parameters).

    positions: max_position_embeddings, from which longrope's factor follows. partial: the family's code heeds
    partial_rotary_factor.
    """
    settings = dict(settings)
    settings.pop("type", None)  # the oldest spelling; transformers has copied it to rope_type
    theta, kind = settings.pop("rope_theta"), settings.pop("rope_type", "default")
    share = settings.pop("partial_rotary_factor", None) or 1.0
    if share != 1.0 and not partial:
        raise ValueError(f"rope setting partial_rotary_factor = {share} is not supported in this family")
    if kind not in ROPE_SETTINGS:
        raise ValueError(f"rope type {kind!r} is not supported, only {', '.join(ROPE_SETTINGS)}")
    names, fields = ROPE_SETTINGS[kind], {}
    if kind in ("yarn", "longrope"):
        factor = settings.get("factor") or positions / settings["original_max_position_embeddings"]
        fields["scale"] = _attention_factor(kind, factor, settings)
        if kind == "yarn":
            settings["factor"] = factor
        else:
            settings.pop("factor", None)
            fields["reach"] = positions
    missing = names.keys() - settings.keys() - OPTIONAL
    if missing or settings.keys() - names.keys():
        raise ValueError(f"rope settings {sorted(settings)} do not fit rope type {kind!r}, which has {sorted(names)}")
    fields |= {names[key]: value for key, value in settings.items() if value is not None}
    whole = {"original_positions": int, "reach": int, "truncate": bool, "short": _floats, "long": _floats}
    return Rope(float(theta), kind, float(share), **{name: whole.get(name, float)(x) for name, x in fields.items()})


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _attention_factor(kind: str, factor: float, settings: dict[str, Any]) -> float:
    """As `modeling_rope_utils` derives it; takes the settings it needs."""
    given, scale, every = (settings.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return given
    if kind == "longrope":
        original = settings["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    grown = lambda by: 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
    return grown(scale) / grown(every) if scale and every else grown(1.0)


def _write_rope(rope: Rope) -> dict[str, Any]:
    if rope.kind not in ROPE_SETTINGS:
        raise ValueError(f"no config can say rope kind {rope.kind!r} of all layers")
    settings = {theirs: getattr(rope, ours) for theirs, ours in ROPE_SETTINGS[rope.kind].items()}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    if rope.kind in ("yarn", "longrope"):
        settings["attention_factor"] = rope.scale
    if rope.share != 1.0:
        settings["partial_rotary_factor"] = rope.share
    return {"rope_theta": rope.theta, "rope_type": rope.kind, **settings}


def _one_rope(v: Values, positions: int) -> Rope:
    return _read_rope(v.take("rope_parameters"), positions)


def _partial_rope(v: Values, positions: int) -> Rope:
    return _read_rope(v.take("rope_parameters"), positions, partial=True)


def _read_common(
    v: Values, read_rope: Callable[[Values, int], Rope | None] = _one_rope, *, act: str = "hidden_act", eps: str = "rms_norm_eps"
) -> dict[str, Any]:  # fmt: skip
    """What most families spell alike. `read_rope`: None where the caller reads the rope himself."""
    for key in ("is_encoder_decoder", "is_decoder", "add_cross_attention"):
        v.demand(key, False, None, *([True] if key == "is_decoder" else []))
    width, heads, positions = v.take("hidden_size"), v.take("num_attention_heads"), v.take("max_position_embeddings")
    rope = read_rope(v, positions)
    # Longer texts take longrope's other numbers, so which ones is settled before a text is read (`jaxcomm.config.Rope`).
    reach = rope.original_positions if isinstance(rope, Rope) and rope.kind == "longrope" else positions
    return dict(
        vocab=v.take("vocab_size"),
        width=width,
        layers=v.take("num_hidden_layers"),
        heads=heads,
        kv_heads=v.take("num_key_value_heads") or heads,
        head_dim=v.take("head_dim") or width // heads,
        ff=v.take("intermediate_size"),
        max_positions=min(positions, reach),
        norm_eps=v.number(eps),
        tied_head=v.take("tie_word_embeddings"),
        activation=v.choose(act, ACTIVATIONS),
        **({} if rope is None else {"rope": rope}),
    )


def _write_common(c: ModelConfig, act: str = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    rope = {"rope_parameters": _write_rope(c.rope)} if isinstance(c.rope, Rope) else {}
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.ff,
        "max_position_embeddings": max(c.max_positions, *(rope.reach for rope in c.ropes)),
        "tie_word_embeddings": c.tied_head,
        eps: c.norm_eps,
        act: {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[c.activation],
        **rope,
        **({} if c.head_dim * c.heads == c.width else {"head_dim": c.head_dim}),
    }


def _read_windows(v: Values, layers: int) -> tuple[int, ...]:
    """Where layers differ."""
    window, kinds = v.take("sliding_window"), v.take("layer_types")
    table = {"full_attention": FULL, "sliding_attention": window}
    unknown = set(kinds) - set(table)
    if unknown or len(kinds) != layers:
        raise ValueError(f"config key layer_types = {kinds!r} is not supported: {layers} of {', '.join(table)}")
    if "sliding_attention" in kinds and not window:
        raise ValueError(f"config has sliding layers but sliding_window = {window!r}")
    return tuple(table[kind] for kind in kinds) if "sliding_attention" in kinds else ()


def _read_window(v: Values, layers: int) -> tuple[int, ...]:
    """Of all layers; null means none."""
    window = v.take("sliding_window")
    if window is not None and window < 1:
        raise ValueError(f"config key sliding_window = {window} is not supported, only null and numbers from 1 on")
    return () if window is None else (window,) * layers


def _layer_types(c: ModelConfig) -> list[str]:
    return ["sliding_attention" if w else "full_attention" for w in c.windows or (FULL,) * c.layers]


def _window(c: ModelConfig) -> int | None:
    return max(c.windows, default=None) or None


def _read_llama(v: Values) -> ModelConfig:
    bias = v.take("attention_bias")
    return ModelConfig(**_read_common(v), qkv_bias=bias, out_bias=bias, mlp_bias=v.take("mlp_bias"))


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    return _write_common(c) | dict(head_dim=c.head_dim, attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)


def _read_mistral(v: Values) -> ModelConfig:
    common = _read_common(v)
    return ModelConfig(**common, windows=_read_window(v, common["layers"]))


def _write_mistral(c: ModelConfig) -> dict[str, Any]:
    return _write_common(c) | dict(sliding_window=_window(c))


def _read_mixtral(v: Values) -> ModelConfig:
    common = _read_common(v)
    experts = dict(experts=v.take("num_local_experts"), experts_per_token=v.take("num_experts_per_tok"))
    return ModelConfig(**common, **experts, windows=_read_window(v, common["layers"]))


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    experts = dict(num_local_experts=c.experts, num_experts_per_tok=c.experts_per_token)
    return _write_mistral(c) | experts


def _read_qwen2(v: Values) -> ModelConfig:
    v.demand("use_mrope", None, False)
    for folded in ("use_sliding_window", "max_window_layers"):  # transformers has put both into layer_types
        v.take(folded)
    common = _read_common(v)
    return ModelConfig(**common, windows=_read_windows(v, common["layers"]), qkv_bias=True)


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    sliding = {"sliding_window": _window(c), "use_sliding_window": True} if c.windows else {}
    return _write_common(c) | dict(layer_types=_layer_types(c), **sliding)


def _read_qwen3(v: Values) -> ModelConfig:
    for folded in ("use_sliding_window", "max_window_layers"):
        v.take(folded)
    common, bias = _read_common(v), v.take("attention_bias")
    return ModelConfig(
        **common, windows=_read_windows(v, common["layers"]), qk_norm="head", qkv_bias=bias, out_bias=bias
    )


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(c) | dict(head_dim=c.head_dim, attention_bias=c.qkv_bias)


def _read_qwen3_moe(v: Values) -> ModelConfig:
    for unused in (
        "use_sliding_window",
        "max_window_layers",
        "intermediate_size",
    ):  # the first is folded into the window
        v.take(unused)
    v.demand("decoder_sparse_step", 1)
    v.demand("mlp_only_layers", [], None)
    common, bias, ff = _read_common(v), v.take("attention_bias"), v.take("moe_intermediate_size")
    return ModelConfig(
        **common | {"ff": ff},
        windows=_read_window(v, common["layers"]),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        experts=v.take("num_local_experts") or v.take("num_experts"),
        experts_per_token=v.take("num_experts_per_tok"),
        normalised_experts=v.take("norm_topk_prob"),
    )


def _write_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    sliding = {"sliding_window": _window(c), "use_sliding_window": True} if c.windows else {}
    return _write_common(c) | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        moe_intermediate_size=c.ff,
        num_experts=c.experts,
        num_experts_per_tok=c.experts_per_token,
        norm_topk_prob=c.normalised_experts,
        **sliding,
    )


def _read_gemma(v: Values, read_rope: Callable[[Values, int], Rope | None] = _one_rope) -> dict[str, Any]:
    v.demand("use_bidirectional_attention", None, False)
    if (twin := v.take("sliding_window_size")) not in (None, v.take("sliding_window")):  # on the hub beside it
        raise ValueError(f"config keys sliding_window_size = {twin} and sliding_window differ")
    v.take("hidden_act")  # on the hub beside hidden_activation, which is the one transformers reads
    common, bias = _read_common(v, read_rope, act="hidden_activation"), v.take("attention_bias")
    return common | dict(
        norm="rms_plus_one",
        norms="both",
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=v.take("query_pre_attn_scalar") ** -0.5,
        logit_softcap=v.number("final_logit_softcapping"),
        scale_embedding=True,
        windows=_read_windows(v, common["layers"]),
    )


def _write_gemma(c: ModelConfig) -> dict[str, Any]:
    assert c.attention_scale is not None
    return _write_common(c, act="hidden_activation") | dict(
        head_dim=c.head_dim,
        attention_bias=c.qkv_bias,
        query_pre_attn_scalar=round(c.attention_scale**-2),
        final_logit_softcapping=c.logit_softcap,
        sliding_window=_window(c),
        layer_types=_layer_types(c),
    )


def _read_gemma2(v: Values) -> ModelConfig:
    return ModelConfig(**_read_gemma(v), attention_softcap=v.number("attn_logit_softcapping"))


def _write_gemma2(c: ModelConfig) -> dict[str, Any]:
    return _write_gemma(c) | dict(attn_logit_softcapping=c.attention_softcap)


_GEMMA3_LAYERS = {True: "sliding_attention", False: "full_attention"}


def _read_gemma3(v: Values) -> ModelConfig:
    for folded in ("rope_local_base_freq", "sliding_window_pattern"):  # into rope_parameters and layer_types
        v.take(folded)
    v.take("attn_logit_softcapping")  # transformers has the field and does not read it
    fields = _read_gemma(v, lambda v, positions: None)
    ropes = v.take("rope_parameters")
    if set(ropes) != set(_GEMMA3_LAYERS.values()):
        raise ValueError(f"config key rope_parameters has {sorted(ropes)} instead of one for each kind of layer")
    each = {kind: _read_rope(ropes[kind], fields["max_positions"]) for kind in ropes}
    windows = fields["windows"] or (FULL,) * fields["layers"]
    return ModelConfig(**fields, rope=tuple(each[_GEMMA3_LAYERS[bool(w)]] for w in windows), qk_norm="head")


def _write_gemma3(c: ModelConfig) -> dict[str, Any]:
    ropes = {}
    for window, rope in zip(c.windows or (FULL,) * c.layers, c.rope_of, strict=True):
        if ropes.setdefault(bool(window), rope) != rope:
            raise ValueError("layers of one kind have different ropes")
    written = {_GEMMA3_LAYERS[window]: _write_rope(c.ropes[rope]) for window, rope in ropes.items()}
    return _write_gemma(c) | dict(rope_parameters=written)


def _read_gemma3_vision(v: Values) -> ModelConfig:
    """The text part of a checkpoint that reads images, too."""
    for picture in """vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id
        eoi_token_id image_token_id text_config tie_word_embeddings is_encoder_decoder""".split():  # noqa: SIM905
        v.take(picture)
    text = Values(v.take("text_config"))
    config = _read_gemma3(text)
    text.finish()
    return config


def _read_phi3(v: Values) -> ModelConfig:
    # transformers has copied both into rope_parameters.
    original, share = v.take("original_max_position_embeddings"), v.take("partial_rotary_factor")

    def rope(v: Values, positions: int) -> Rope:
        settings = dict(v.take("rope_parameters"))
        if settings.get("rope_type") == "longrope":
            settings.setdefault("original_max_position_embeddings", original)
        if share is not None and settings.get("partial_rotary_factor", 1.0) != share:
            raise ValueError(f"config key partial_rotary_factor = {share} and the rope settings differ")
        return _read_rope(settings, positions, partial=True)

    common = _read_common(v, rope)
    return ModelConfig(**common, windows=_read_window(v, common["layers"]))


def _write_phi3(c: ModelConfig) -> dict[str, Any]:
    (rope,) = c.ropes
    original = {"original_max_position_embeddings": rope.original_positions} if rope.kind == "longrope" else {}
    # Its config class looks for it, and its code nowhere else.
    share = {"rope_parameters": _write_rope(rope) | {"partial_rotary_factor": rope.share}}
    return _write_common(c) | dict(sliding_window=_window(c), **original, **share)


def _read_olmo2(v: Values) -> ModelConfig:
    common, bias = _read_common(v), v.take("attention_bias")
    return ModelConfig(**common, norm="rms_wide", norms="after", qk_norm="width", qkv_bias=bias, out_bias=bias)


def _write_olmo2(c: ModelConfig) -> dict[str, Any]:
    return _write_common(c) | dict(attention_bias=c.qkv_bias)


NO_ROPE = Rope(kind="none")


def _read_smollm3(v: Values) -> ModelConfig:
    for folded in ("use_sliding_window", "no_rope_layer_interval"):
        v.take(folded)
    common, bias = _read_common(v), v.take("attention_bias")
    turns, layers, rope = v.take("no_rope_layers"), common["layers"], common["rope"]
    if len(turns) != layers or not set(turns) <= {0, 1}:
        raise ValueError(f"config key no_rope_layers = {turns!r} is not supported: {layers} of 0 and 1")
    common["rope"] = rope if all(turns) else tuple(rope if turn else NO_ROPE for turn in turns)
    return ModelConfig(
        **common,
        windows=_read_windows(v, layers),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=v.take("mlp_bias"),
    )


def _write_smollm3(c: ModelConfig) -> dict[str, Any]:
    turns = [int(c.ropes[rope].kind != "none") for rope in c.rope_of]
    (rope,) = (rope for rope in c.ropes if rope.kind != "none")
    return _write_common(c) | dict(
        rope_parameters=_write_rope(rope),
        no_rope_layers=turns,
        layer_types=_layer_types(c),
        sliding_window=_window(c),
        use_sliding_window=bool(c.windows),
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
    )


def _read_gpt2(v: Values) -> ModelConfig:
    for key in ("is_encoder_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        v.demand(key, False)
    for other_head in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
                       "summary_first_dropout", "task_specific_params", "n_ctx"):  # fmt: skip
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
    for folded in ("rotary_pct", "rotary_emb_base"):  # into rope_parameters
        v.take(folded)
    common, bias = _read_common(v, _partial_rope, eps="layer_norm_eps"), v.take("attention_bias")
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
    values = _write_common(c, eps="layer_norm_eps")
    rope = values["rope_parameters"] | {"partial_rotary_factor": c.ropes[0].share}
    del values["num_key_value_heads"]
    return values | dict(rope_parameters=rope, use_parallel_residual=c.parallel, attention_bias=c.qkv_bias)


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a weight lies on disk: alone, in a tensor of its own."""

    name: str
    """After the layer's prefix; "{e}" in it: a tensor for every expert."""

    def shape(self, leaf: tuple[int, ...], c: ModelConfig) -> tuple[int, ...]:
        """Of the tensor, `leaf` being ours."""
        return leaf

    def view(self, tensor: np.ndarray, c: ModelConfig) -> np.ndarray:
        """Our weight in the tensor: nothing is copied, so that it serves reading and writing. Its first axis may still be
        two, heads and dimensions."""
        return tensor


@dataclasses.dataclass(frozen=True)
class Rows(Stored):
    """Beside others, one after another along the outputs. `transposed`: the tensor is [in, out] (GPT-2's Conv1D)."""

    parts: Callable[[ModelConfig], tuple[int, ...]]
    part: int
    transposed: bool = False

    def shape(self, leaf, c):
        whole = (sum(self.parts(c)), *leaf[1:])
        return whole[::-1] if self.transposed else whole

    def view(self, tensor, c):
        begin = sum(self.parts(c)[: self.part])
        rows = tensor.T if self.transposed else tensor
        return rows[begin : begin + self.parts(c)[self.part]]


@dataclasses.dataclass(frozen=True)
class Interleaved(Stored):
    """Queries, keys and values of each head together: [heads, 3, head_dim, ..]."""

    part: int

    def shape(self, leaf, c):
        return (3 * leaf[0], *leaf[1:])

    def view(self, tensor, c):
        return tensor.reshape(c.heads, 3, c.head_dim, *tensor.shape[1:])[:, self.part]


_qkv = lambda c: (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
_gate_up = lambda c: (c.ff, c.ff)
_whole = {"o": lambda c: (c.width,), "up": lambda c: (c.ff,), "down": lambda c: (c.width,)}

Table = dict[Path, Stored]


def _alone(*names: tuple[Path, str]) -> Table:
    """Weight and bias of each."""
    return {(*path, part): Stored(f"{theirs}.{part}") for path, theirs in names for part in ("weight", "bias")}


ATTENTION = _alone(
    (("attention", "q"), "self_attn.q_proj"),
    (("attention", "k"), "self_attn.k_proj"),
    (("attention", "v"), "self_attn.v_proj"),
    (("attention", "o"), "self_attn.o_proj"),
    (("attention", "q_norm"), "self_attn.q_norm"),
    (("attention", "k_norm"), "self_attn.k_norm"),
)
GATED = _alone((("mlp", "gate"), "mlp.gate_proj"), (("mlp", "up"), "mlp.up_proj"), (("mlp", "down"), "mlp.down_proj"))
LLAMA_BLOCK = (
    ATTENTION | GATED | _alone((("attention_norm",), "input_layernorm"), (("mlp_norm",), "post_attention_layernorm"))
)
_POST_NORMS = _alone(
    (("attention_post_norm",), "post_attention_layernorm"), (("mlp_post_norm",), "post_feedforward_layernorm")
)
GEMMA_BLOCK = LLAMA_BLOCK | _POST_NORMS | _alone((("mlp_norm",), "pre_feedforward_layernorm"))
OLMO2_BLOCK = ATTENTION | GATED | _POST_NORMS
PHI3_BLOCK: Table = (
    LLAMA_BLOCK
    | {("attention", x, "weight"): Rows("self_attn.qkv_proj.weight", _qkv, n) for n, x in enumerate("qkv")}
    | {("mlp", x, "weight"): Rows("mlp.gate_up_proj.weight", _gate_up, n) for n, x in enumerate(("gate", "up"))}
)
MIXTRAL_BLOCK = LLAMA_BLOCK | _alone(
    (("mlp", "router"), "block_sparse_moe.gate"),
    (("mlp", "gate"), "block_sparse_moe.experts.{e}.w1"),
    (("mlp", "down"), "block_sparse_moe.experts.{e}.w2"),
    (("mlp", "up"), "block_sparse_moe.experts.{e}.w3"),
)
QWEN3_MOE_BLOCK = LLAMA_BLOCK | _alone(
    (("mlp", "router"), "mlp.gate"),
    (("mlp", "gate"), "mlp.experts.{e}.gate_proj"),
    (("mlp", "up"), "mlp.experts.{e}.up_proj"),
    (("mlp", "down"), "mlp.experts.{e}.down_proj"),
)
_CONV1D = {("attention", "o"): "attn.c_proj", ("mlp", "up"): "mlp.c_fc", ("mlp", "down"): "mlp.c_proj"}
GPT2_BLOCK: Table = (
    _alone((("attention_norm",), "ln_1"), (("mlp_norm",), "ln_2"))
    | {("attention", x, "weight"): Rows("attn.c_attn.weight", _qkv, n, transposed=True) for n, x in enumerate("qkv")}
    | {("attention", x, "bias"): Rows("attn.c_attn.bias", _qkv, n) for n, x in enumerate("qkv")}
    | {(*path, "weight"): Rows(f"{name}.weight", _whole[path[-1]], 0, transposed=True) for path, name in _CONV1D.items()}
    | {(*path, "bias"): Stored(f"{name}.bias") for path, name in _CONV1D.items()}
)  # fmt: skip
GPT_NEOX_BLOCK: Table = _alone(
    (("attention", "o"), "attention.dense"),
    (("mlp", "up"), "mlp.dense_h_to_4h"),
    (("mlp", "down"), "mlp.dense_4h_to_h"),
    (("attention_norm",), "input_layernorm"),
    (("mlp_norm",), "post_attention_layernorm"),
) | {
    ("attention", x, part): Interleaved(f"attention.query_key_value.{part}", n)
    for n, x in enumerate("qkv")
    for part in ("weight", "bias")
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of checkpoint, by the `model_type` of its config.json."""

    model_type: str
    title: str
    """Which published models it covers."""
    read: Callable[[Values], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]] | None
    """None: it is read, and written as another."""
    block: Table
    """Weight of a Block -> how it lies on disk; entries that the config has no weight for do not count."""
    layer: str = "layers.{i}."
    """What the names of a layer's tensors begin with, after the root."""
    embed: str = "embed_tokens.weight"
    positions: str = "wpe.weight"
    norm: str = "norm"
    head: str = "lm_head.weight"
    """Not after the root."""
    roots: tuple[str, ...] = ("model.",)
    """What all names begin with; the first is written, any is read."""
    model_class: str = "ForCausalLM"
    """How the name of transformers' class ends, after that of the config's. (Its own table needs torch.)"""
    ignored: re.Pattern = re.compile(r"rotary_emb\.inv_freq$")
    """Tensors that are no weights of the model."""


FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family("llama", "Llama 2, 3, 3.1, 3.2, 3.3", _read_llama, _write_llama, LLAMA_BLOCK),
        Family("mistral", "Mistral 7B, Nemo, Small", _read_mistral, _write_mistral, LLAMA_BLOCK),
        Family("mixtral", "Mixtral 8x7B, 8x22B", _read_mixtral, _write_mixtral, MIXTRAL_BLOCK),
        Family("qwen2", "Qwen 2, Qwen 2.5", _read_qwen2, _write_qwen2, LLAMA_BLOCK),
        Family("qwen3", "Qwen 3", _read_qwen3, _write_qwen3, LLAMA_BLOCK),
        Family("qwen3_moe", "Qwen 3 30B-A3B, 235B-A22B", _read_qwen3_moe, _write_qwen3_moe, QWEN3_MOE_BLOCK),
        Family("gemma2", "Gemma 2", _read_gemma2, _write_gemma2, GEMMA_BLOCK),
        Family("gemma3_text", "Gemma 3 270M, 1B", _read_gemma3, _write_gemma3, GEMMA_BLOCK),
        Family(
            "gemma3", "Gemma 3 4B, 12B, 27B (the text part)", _read_gemma3_vision, None, GEMMA_BLOCK,
            roots=("model.language_model.", "language_model.model."),
            ignored=re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.|^(language_model\.)?lm_head\.weight$"),
        ),
        Family("phi3", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", _read_phi3, _write_phi3, PHI3_BLOCK),
        Family("olmo2", "OLMo 2", _read_olmo2, _write_olmo2, OLMO2_BLOCK),
        Family("smollm3", "SmolLM 3", _read_smollm3, _write_smollm3, LLAMA_BLOCK),
        Family(
            "gpt2", "GPT-2", _read_gpt2, _write_gpt2, GPT2_BLOCK, layer="h.{i}.", embed="wte.weight", norm="ln_f",
            roots=("transformer.", ""), ignored=re.compile(r"\.attn\.(masked_)?bias$"),
            model_class="LMHeadModel",
        ),
        Family(
            "gpt_neox", "Pythia, GPT-NeoX", _read_gpt_neox, _write_gpt_neox, GPT_NEOX_BLOCK, embed="embed_in.weight",
            norm="final_layer_norm", head="embed_out.weight", roots=("gpt_neox.",),
            ignored=re.compile(r"\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)$"),
        ),
    )
}  # fmt: skip
