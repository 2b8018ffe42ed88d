"""The values of a config.json, and what keys that no family reads may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxcomm.config import FULL, ModelConfig

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
    return all(0 <= i < c.layers and each.items() <= own(i) for i, each in numbered(value).items())


def numbered(layers: Mapping[str, Any]) -> dict[int, Any]:
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


LAYERS = {True: "sliding_attention", False: "full_attention"}
"""Names of layers with a window, and of layers without one."""


def layer_types(c: ModelConfig) -> list[str]:
    """The value of the key layer_types: the kind of attention of each layer."""
    return [LAYERS[bool(w)] for w in c.windows or (FULL,) * c.layers]
