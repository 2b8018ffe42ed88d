"""The values of a config.json, and functions for the parts that families share: sizes, rotary embeddings, windows.

`read_x` reads values, `write_x` writes them. They follow transformers' configuration classes and
`modeling_rope_utils`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcomm.config import FULL, DeltaRule, Heads, ModelConfig, Rope

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
}  # fmt: skip
"""transformers' name -> ours. If several names mean the same function, the first is written."""

CARRIES_NO_ARCHITECTURE = frozenset(
    """architectures attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop auto_map
    cache_implementation chunk_size_feed_forward classifier_dropout cross_attention_hidden_size custom_pipelines dtype
    mtp_num_hidden_layers mtp_use_dedicated_embeddings embd_pdrop finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range is_llama_config label2id
    max_sequence_length model_max_length model_type n_special output_attentions output_hidden_states output_past
    output_router_logits predict_special_tokens prefix pretraining_tp problem_type resid_pdrop return_dict
    router_aux_loss_coef router_jitter_noise task_specific_params tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_bfloat16 use_cache""".split()  # noqa: SIM905
)
"""Config keys that do not change a converted model's results. Token ids and keys that begin with "_" do not either. `read`
must take every other key of a transformers config class."""

SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})
_thetas = lambda c: [rope.theta for rope in c.ropes if rope.kind != "none"]
_shares = lambda c: [rope.share for rope in c.ropes if rope.kind != "none"]
_never = lambda c, value: False
_off = lambda c, value: value is False
_equals_one = lambda c, value: value == 1
_acts = lambda c, value: ACTIVATIONS.get(value) == c.activation
_turns = lambda c, value: not _thetas(c) or value in _thetas(c)
_part = lambda c, value: not _shares(c) or value in _shares(c)
_experts = lambda c, value: value == c.experts

MEANS: dict[str, Callable[[ModelConfig, Any], bool]] = {
    # Second spellings of keys that the config class has read.
    "rope_theta": _turns, "rotary_emb_base": _turns, "rope_local_base_freq": _turns,
    "partial_rotary_factor": _part, "rotary_pct": _part,
    "num_experts": _experts, "num_local_experts": _experts, "experts_per_token": lambda c, value: value == c.experts_per_token,
    "initial_context_length": lambda c, value: all(value == rope.original_positions for rope in c.ropes),
    "hidden_act": _acts, "hidden_activation": _acts, "activation_function": _acts,
    "sliding_window_size": lambda c, value: value in c.windows,
    # Keys that shared code in transformers reads: masks and caches.
    "layer_types": lambda c, value: value == layer_types(c),
    "sliding_window": lambda c, value: value >= c.max_positions,
    "attention_chunk_size": _never, "per_layer_config": lambda c, value: _layers_agree(c, value),
    "is_causal": lambda c, value: value is True,
    # Keys that other families, other programs or a repository's own code read.
    "attention_bias": lambda c, value: value in (c.qkv_bias, c.out_bias),
    "qkv_bias": lambda c, value: value == c.qkv_bias,
    "mlp_bias": lambda c, value: value == c.mlp_bias,
    "attn_output_gate": lambda c, value: value == c.attention_gate,
    "output_gate_type": lambda c, value: value in ("swish", "silu"), "mamba_ssm_dtype": lambda c, value: value == "float32",
    "full_attention_interval": lambda c, value: all(bool(heads) == (i % value == 0) for i, heads in enumerate(c.key_heads, 1)),
    "mlp_only_layers": lambda c, value: value == [], "language_model_only": lambda c, value: True,
    "lm_head_bias": _off, "rope_interleaved": _off, "alibi": _off, "qk_layernorm": _off, "use_bidirectional_attention": _off,
    "use_qk_norm": lambda c, value: value == (c.qk_norm != "none"),
    "shared_expert_intermediate_size": lambda c, value: value == 0,
    "full_attn_mod": _equals_one, "interpolate_factor": _equals_one,
    "dual_chunk_attention_config": _never, "pruned_heads": _never,
    # Disabled bitsandbytes leaves its settings behind. MXFP4 is detected from the tensors (`tensors.unpacked`).
    "quantization_config": lambda c, value: value.get("quant_method") == "mxfp4" or (
        value.get("quant_method") == "bitsandbytes" and not (value.get("load_in_4bit") or value.get("load_in_8bit"))
    ),
    "quantization": _never, "compression_config": _never,
}  # fmt: skip
"""Keys that a family's config class does not have but that still have a meaning -> a test whether the value agrees with
the converted model. No code reads any other key that the class does not have."""


class Values:
    """The values of a config.json, with transformers' defaults. It keeps track of the values that were not read.

    Args:
        config: A config of transformers.
        raw: The JSON of its file, if it was read from a file.

    Attributes:
        ignored: Keys that nothing reads.
    """

    def __init__(self, config: Any, raw: Mapping[str, Any] | None = None):
        self._config, self._raw, self._values = config, raw or {}, config.to_dict()
        self._left = {
            key
            for key in self._values
            if not (key in CARRIES_NO_ARCHITECTURE or key.startswith("_") or key.endswith(("_token_id", "_token_ids")))
        }
        self.ignored: set[str] = set()
        """Keys that no code reads."""

    def part(self, key: str) -> Values:
        """The values of a config nested in this one.

        Args:
            key: Its key.

        Returns:
            Its values.
        """
        self._left.discard(key)
        return Values(getattr(self._config, key), self._raw.get(key))

    def has(self, key: str) -> bool:
        """Whether the config has the key."""
        return key in self._values

    def take(self, key: str, default: Any = None) -> Any:
        """Reads a value.

        Args:
            key: The key.
            default: Result if the config does not have the key.

        Returns:
            The value.
        """
        self._left.discard(key)
        return self._values.get(key, default)

    def number(self, key: str) -> Any:
        """Reads a number.

        Args:
            key: The key.

        Returns:
            The number as a float. None: the value is null or missing.

        Raises:
            ValueError: The value is not a number.
        """
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"config key {key} = {value!r} is not a number")
        return None if value is None else float(value)

    def positive(self, key: str) -> Any:
        """Reads a number above 0.

        Args:
            key: The key.

        Returns:
            The number.

        Raises:
            ValueError: The value is not a number above 0.
        """
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"config key {key} = {value!r} is not a number above 0")
        return value

    def demand(self, key: str, *allowed: Any) -> None:
        """Checks that a key is missing, or has one of the allowed values.

        Args:
            key: The key.
            *allowed: The allowed values.

        Raises:
            ValueError: It has another value.
        """
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"config key {key} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}")

    def choose(self, key: str, table: Mapping[str, Any]) -> Any:
        """Reads a value, and looks it up in a table.

        Args:
            key: The key.
            table: The table.

        Returns:
            The table's entry for the value.

        Raises:
            ValueError: The table does not have the value.
        """
        value = self.take(key)
        if value not in table:
            raise ValueError(f"config key {key} = {value!r} is not supported, only {', '.join(table)}")
        return table[value]

    def finish(self, config: ModelConfig) -> None:
        """Checks the keys that were not read, after the architecture has been read.

        Args:
            config: The architecture.

        Raises:
            ValueError: transformers' config class has a key that was not read; a key contradicts the architecture
                (`MEANS`); or two spellings of one key differ.
        """
        has = {field.name for field in dataclasses.fields(self._config)}
        unknown = sorted(self._left & has)
        if unknown:
            told = ", ".join(f"{key} = {self._values[key]!r:.40}" for key in unknown)
            raise ValueError(f"unknown config keys {told}: this version does not know what they change")
        alike = {**self._config.attribute_map, "rope_scaling": "rope_parameters"}
        for one, other in alike.items():
            if not one.endswith("_token_id"):
                _check_same(one, self._raw.get(one), other, self._raw.get(other))
        settings = [self._raw.get(key) for key in ("rope_parameters", "rope_scaling")]
        for said in (self._values, self._raw, *(s for s in settings if isinstance(s, Mapping))):
            for key in said.keys() & MEANS.keys() - has:
                if said[key] not in SAYS_NOTHING and not _holds(key, config, said[key]):
                    raise ValueError(
                        f"config key {key} = {said[key]!r:.80} is not supported, or contradicts the other keys: use the checkpoint this one was made from"
                    )
        self.ignored |= {k for k in self._left - has - MEANS.keys() if self._values[k] not in SAYS_NOTHING}


def _layers_agree(c: ModelConfig, value: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether what a config says of single layers is what the architecture says of them."""
    own = lambda i: {"head_dim": c.layer(i).head_dim, "num_key_value_heads": c.layer(i).kv_heads}.items()
    return all(0 <= i < c.layers and each.items() <= own(i) for i, each in _numbered(value).items())


def _numbered(layers: Mapping[str, Any]) -> dict[int, Any]:
    """Values by the number of their layer, which transformers writes as "05"."""
    return {int(key): value for key, value in layers.items()}


def _holds(key: str, config: ModelConfig, value: Any) -> bool:
    try:
        return MEANS[key](config, value)
    except (AttributeError, TypeError, ZeroDivisionError):  # a value of a meaningless type, or 0
        return False


def _check_same(one: str, a: Any, other: str, b: Any) -> None:
    """ValueError if two spellings of one key differ."""
    if a in SAYS_NOTHING or b in SAYS_NOTHING:
        return
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        differ = [key for key in a.keys() & b.keys() if a[key] != b[key]]
    else:
        differ = a != b
    if differ:
        raise ValueError(f"config keys {one} = {str(a)[:80]} and {other} = {str(b)[:80]} differ: remove one of them")


_ORIGINAL = {"original_max_position_embeddings": "original_positions"}
ROPE_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", **_ORIGINAL},
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate", **_ORIGINAL},
    "longrope": {"short_factor": "short", "long_factor": "long", **_ORIGINAL},
    "proportional": {"factor": "factor"},
}  # fmt: skip
"""rope type -> its settings: transformers' name -> the field of `Rope`. Each type also has rope_theta and
partial_rotary_factor; yarn and longrope also have attention_factor, or the settings that it is computed from."""
ROPE_NUMBERS = frozenset(
    {
        name
        for names in ROPE_SETTINGS.values()
        for name in names
        if name not in ("short_factor", "long_factor", "truncate")
    }
    | {"rope_theta", "partial_rotary_factor", "attention_factor"}
)
OPTIONAL = {"beta_fast", "beta_slow", "truncate"}


def read_rope(v: Values, settings: Mapping[str, Any], positions: int, *, partial: bool = False) -> Rope:
    """Reads the settings of a rotary embedding.

    Args:
        v: The values of the config. Settings that this kind of rotary embedding does not use are added to `v.ignored`.
        settings: The dict that transformers makes from rope_theta and rope_scaling, or from rope_parameters.
        positions: The value of max_position_embeddings. The factor of longrope is computed from it.
        partial: Whether the family's code uses partial_rotary_factor.

    Returns:
        The rotary embedding.

    Raises:
        ValueError: A setting is missing or not supported, or is not a number above 0.
    """
    settings = dict(settings)
    settings.pop("type", None)  # the oldest spelling; transformers copied it to rope_type
    for name in settings.keys() & ROPE_NUMBERS:
        value = settings[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"rope setting {name} = {value!r} is not a number above 0")
    theta, kind = settings.pop("rope_theta"), settings.pop("rope_type", "default")
    share = settings.pop("partial_rotary_factor", None) or 1.0
    if kind == "proportional":
        settings.setdefault("factor", 1.0)
    elif share != 1.0 and not partial:
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
    settings = {key: value for key, value in settings.items() if value not in SAYS_NOTHING}
    if missing := names.keys() - settings.keys() - OPTIONAL:
        raise ValueError(f"rope settings lack {', '.join(sorted(missing))}, which rope type {kind!r} needs")
    v.ignored |= {f"rope_parameters.{key}" for key in settings.keys() - names.keys()}
    fields |= {names[key]: value for key, value in settings.items() if key in names}
    whole = {"original_positions": int, "reach": int, "truncate": bool, "short": _floats, "long": _floats}
    return Rope(float(theta), kind, float(share), **{name: whole.get(name, float)(x) for name, x in fields.items()})


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _attention_factor(kind: str, factor: float, settings: dict[str, Any]) -> float:
    """The attention factor, computed as in `modeling_rope_utils`. Removes the settings that it uses."""
    given, scale, every = (settings.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return given
    if kind == "longrope":
        original = settings["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    grown = lambda by: 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
    return grown(scale) / grown(every) if scale and every else grown(1.0)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Writes the settings of a rotary embedding.

    Args:
        rope: The rotary embedding.

    Returns:
        The dict rope_parameters.

    Raises:
        ValueError: No config can describe it.
    """
    if rope.kind not in ROPE_SETTINGS:
        raise ValueError(f"no config can say rope kind {rope.kind!r} of all layers")
    settings = {theirs: getattr(rope, ours) for theirs, ours in ROPE_SETTINGS[rope.kind].items()}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    if rope.kind in ("yarn", "longrope"):
        settings["attention_factor"] = rope.scale
    if rope.share != 1.0:
        settings["partial_rotary_factor"] = rope.share
    return {"rope_theta": rope.theta, "rope_type": rope.kind, **settings}


def one_rope(v: Values, positions: int) -> Rope:
    """Reads one rotary embedding for all layers, over whole heads.

    Args:
        v: The values of the config.
        positions: The value of max_position_embeddings.

    Returns:
        The rotary embedding.

    Raises:
        ValueError: As for `read_rope`.
    """
    return read_rope(v, v.take("rope_parameters"), positions)


def partial_rope(v: Values, positions: int) -> Rope:
    """Reads one rotary embedding for all layers, over whole heads or a part of each.

    Args:
        v: The values of the config.
        positions: The value of max_position_embeddings.

    Returns:
        The rotary embedding.

    Raises:
        ValueError: As for `read_rope`.
    """
    return read_rope(v, v.take("rope_parameters"), positions, partial=True)


def read_common(
    v: Values, read_rope: Callable[[Values, int], Rope | None] = one_rope, *, act: str | None = "hidden_act",
    eps: str = "rms_norm_eps",
) -> dict[str, Any]:  # fmt: skip
    """Reads the keys that most families share.

    Args:
        v: The values of the config.
        read_rope: Reads the rotary embedding. It returns None if the caller reads it later.
        act: Key of the activation function. None: do not read it.
        eps: Key of the epsilon of norms.

    Returns:
        Arguments of `ModelConfig`.

    Raises:
        ValueError: A value is not supported.
    """
    for key in ("is_encoder_decoder", "is_decoder", "add_cross_attention"):
        v.demand(key, False, None, *([True] if key == "is_decoder" else []))
    width, heads, positions = (
        v.take("hidden_size"),
        v.take("num_attention_heads"),
        v.take("max_position_embeddings"),
    )
    rope = read_rope(v, positions)
    reach = positions
    if rope is not None and rope.kind == "longrope":
        # Longer texts need the long factors. The choice is made before any text is read (`jaxcomm.config.Rope`).
        reach = min(positions, rope.original_positions)
    if rope is not None and rope.kind == "yarn":
        # Model cards say to add yarn to a config that still gives the old number of positions.
        reach = max(positions, round(rope.factor * rope.original_positions))
    return dict(
        vocab=v.take("vocab_size"),
        width=width,
        layers=v.take("num_hidden_layers"),
        heads=heads,
        kv_heads=v.take("num_key_value_heads") or heads,
        head_dim=v.take("head_dim") or width // heads,
        ff=v.take("intermediate_size"),
        max_positions=reach,
        norm_eps=v.number(eps),
        tied_head=v.take("tie_word_embeddings"),
        **({} if act is None else {"activation": v.choose(act, ACTIVATIONS)}),
        **({} if rope is None else {"rope": rope}),
    )


def write_common(c: ModelConfig, act: str | None = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Writes the keys that most families share. If rotary embeddings differ by layer, the caller writes them.

    Args:
        c: The architecture.
        act: Key of the activation function. None: do not write it.
        eps: Key of the epsilon of norms.

    Returns:
        The keys and values of a config.json.
    """
    rope = {"rope_parameters": write_rope(c.rope)} if isinstance(c.rope, Rope) else {}
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
        **({} if act is None else {act: {ours: name for name, ours in reversed(ACTIVATIONS.items())}[c.activation]}),
        **rope,
        **({} if c.head_dim * c.heads == c.width else {"head_dim": c.head_dim}),
    }


LAYERS = {True: "sliding_attention", False: "full_attention"}
"""Names of layers with a window, and of layers without one."""


def read_ropes(v: Values, common: dict[str, Any], windows: tuple[int, ...]) -> tuple[Rope, ...]:
    """Reads one rotary embedding for the layers with a window, and one for the layers without.

    Args:
        v: The values of the config.
        common: Result of `read_common`.
        windows: The window of each layer, from `read_windows`.

    Returns:
        The rotary embedding of each layer.

    Raises:
        ValueError: One of the two is missing, or as for `read_rope`.
    """
    ropes = v.take("rope_parameters")
    if set(ropes) != set(LAYERS.values()):
        raise ValueError(f"config key rope_parameters has {sorted(ropes)} instead of one for each kind of layer")
    each = {kind: read_rope(v, ropes[kind], common["max_positions"]) for kind in ropes}
    return tuple(each[LAYERS[bool(w)]] for w in windows or (FULL,) * common["layers"])


def write_ropes(c: ModelConfig) -> dict[str, Any]:
    """Writes one rotary embedding for the layers with a window, and one for the layers without.

    Args:
        c: The architecture.

    Returns:
        The dict rope_parameters.

    Raises:
        ValueError: Layers of one kind have different rotary embeddings.
    """
    ropes: dict[bool, int] = {}
    for window, rope in zip(c.windows or (FULL,) * c.layers, c.rope_of, strict=True):
        if ropes.setdefault(bool(window), rope) != rope:
            raise ValueError("layers of one kind have different ropes")
    return {LAYERS[window]: write_rope(c.ropes[rope]) for window, rope in ropes.items()}


def read_heads(v: Values, common: dict[str, Any], windows: tuple[int, ...]) -> dict[str, Any]:
    """Reads the key heads of each layer in families whose layers differ in them.

    Args:
        v: The values of the config.
        common: Result of `read_common`.
        windows: The window of each layer, from `read_windows`.

    Returns:
        Arguments of `ModelConfig`: the heads of each layer, or of all.

    Raises:
        ValueError: The config says more of a layer than its heads.
    """
    given, shared = _numbered(v.take("per_layer_config") or {}), v.take("attention_k_eq_v")
    known = {"head_dim", "num_key_value_heads"}
    if not all(isinstance(each, Mapping) and each.keys() <= known for each in given.values()):
        raise ValueError(
            f"config key per_layer_config = {given!r:.80} is not supported, only {' and '.join(sorted(known))}"
        )
    heads = []
    for i, window in enumerate(windows or (FULL,) * common["layers"]):
        own = given.get(i, {})
        sizes = own.get("num_key_value_heads", common["kv_heads"]), own.get("head_dim", common["head_dim"])
        heads.append(Heads(*sizes, bool(shared) and window == FULL))
    return {"layer_heads": tuple(heads)} if len(set(heads)) > 1 else heads[0]._asdict()


def read_linear(v: Values, layers: int, heads: Heads, rule: DeltaRule) -> tuple[Heads | DeltaRule, ...]:
    """Reads which layers have linear attention.

    Args:
        v: The values of the config.
        layers: Number of layers.
        heads: Key heads of a layer with attention.
        rule: Sizes of a layer with linear attention.

    Returns:
        The heads of each layer.

    Raises:
        ValueError: The kinds of layers are not supported.
    """
    kinds, table = v.take("layer_types"), {"full_attention": heads, "linear_attention": rule}
    if len(kinds) != layers or set(kinds) != set(table):
        raise ValueError(
            f"config key layer_types = {kinds!r} is not supported: {layers}, of both {' and '.join(table)}"
        )
    return tuple(table[kind] for kind in kinds)


def write_heads(c: ModelConfig) -> dict[str, Any]:
    """Writes the key heads of the layers with full attention, in families whose layers differ in them.

    Args:
        c: The architecture.

    Returns:
        The keys and values of a config.json. They are wrong if layers of one kind differ.
    """
    full = next((c.layer(i) for i in range(c.layers) if not any(c.layer(i).windows)), c)
    return dict(
        global_head_dim=full.head_dim,
        num_global_key_value_heads=full.kv_heads,
        attention_k_eq_v=full.keys_as_values,
    )


def read_windows(v: Values, layers: int) -> tuple[int, ...]:
    """Reads the attention windows in families whose layers differ.

    Args:
        v: The values of the config.
        layers: Number of layers.

    Returns:
        The window of each layer in tokens, `FULL` for none. Empty: no layer has one.

    Raises:
        ValueError: The kinds of layers are not supported, or the window is missing.
    """
    window, kinds = v.take("sliding_window"), v.take("layer_types")
    table = {"full_attention": FULL, "sliding_attention": window}
    unknown = set(kinds) - set(table)
    if unknown or len(kinds) != layers:
        raise ValueError(f"config key layer_types = {kinds!r} is not supported: {layers} of {', '.join(table)}")
    if "sliding_attention" in kinds and not window:
        raise ValueError(f"config has sliding layers but sliding_window = {window!r}")
    return tuple(table[kind] for kind in kinds) if "sliding_attention" in kinds else ()


def read_window(v: Values, layers: int) -> tuple[int, ...]:
    """Reads the attention window in families that have one for all layers.

    Args:
        v: The values of the config.
        layers: Number of layers.

    Returns:
        The window of each layer in tokens. Empty: there is none.

    Raises:
        ValueError: The window is below 1.
    """
    window = v.take("sliding_window")
    if window is not None and window < 1:
        raise ValueError(f"config key sliding_window = {window} is not supported, only null and numbers from 1 on")
    return () if window is None else (window,) * layers


def layer_types(c: ModelConfig) -> list[str]:
    """The value of the key layer_types: the kind of attention of each layer."""
    return [LAYERS[bool(w)] for w in c.windows or (FULL,) * c.layers]


def write_window(c: ModelConfig) -> int | None:
    """The value of the key sliding_window: the window in tokens, or None if there is none."""
    return max(c.windows, default=None) or None
