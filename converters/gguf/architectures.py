"""The architectures of GGUF. Each has a translation of its metadata into a config.json, and a layout of weights.

They follow llama.cpp's `conversion` (how it writes a checkpoint) and `llama-model.cpp` (its implicit defaults).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..tensors import Tensor, mapped, same
from ..weights import Layout, PairedRows, PlusOne, Rows, Stored, Table, _gate_up, _qkv, alone
from .file import read

Config = dict[str, Any]


class Metadata:
    """The metadata of one architecture. It keeps track of the values that were not read.

    Args:
        path: The file, for messages.
        metadata: Metadata of the whole file.
        tensors: The tensors by name.

    Attributes:
        path: The file.
        tensors: The tensors by name.
        whole: Metadata of the whole file.
        name: The value of general.architecture. Keys below are without it.

    Raises:
        ValueError: The file does not name its architecture.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]):
        self.path, self.tensors, self.whole = path, tensors, metadata
        self.name = metadata.get("general.architecture")
        if not isinstance(self.name, str):
            raise ValueError(f"{path} does not say its architecture (general.architecture): convert the model again")
        self._values = {
            k.removeprefix(f"{self.name}."): v for k, v in metadata.items() if k.startswith(f"{self.name}.")
        }
        self._left = set(self._values)

    def take(self, key: str, default: Any = None) -> Any:
        """Reads a value. If it is a list with one equal value for each layer, that value is returned.

        Args:
            key: The key.
            default: What is returned if there is no such key.

        Returns:
            The value.

        Raises:
            ValueError: The value differs by layer.
        """
        value = self.listed(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(f"{self.path}: {self.name}.{key} differs by layer, which is not supported")
            value = value[0]
        return value

    def listed(self, key: str, default: Any = None) -> Any:
        """Reads a value, which may be a list.

        Args:
            key: The key.
            default: What is returned if there is no such key.

        Returns:
            The value.
        """
        self._left.discard(key)
        return self._values.get(key, default)

    def need(self, key: str) -> Any:
        """Reads a value that must exist.

        Args:
            key: The key.

        Returns:
            The value.

        Raises:
            ValueError: There is no such key, or the value differs by layer.
        """
        value = self.take(key)
        if value is None:
            raise ValueError(f"{self.path} lacks {self.name}.{key}: convert the model again")
        return value

    def count(self, key: str) -> int:
        """Reads a whole number above 0.

        Args:
            key: The key.

        Returns:
            The number.

        Raises:
            ValueError: There is no such key, or the value is not a whole number above 0.
        """
        value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {self.name}.{key} = {value!r} is not a whole number above 0")
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
            raise ValueError(
                f"{self.path}: {self.name}.{key} = {value!r} is not supported, only {' or '.join(map(repr, allowed))}"
            )

    def has(self, tensor: str) -> bool:
        """Whether the file has the tensor."""
        return tensor in self.tensors

    def values(self, tensor: str) -> list[float]:
        """The numbers of a small tensor."""
        stored, decode = mapped(self.tensors[tensor]), self.tensors[tensor].decode
        return np.asarray(stored if decode is None else decode(stored), np.float64).tolist()

    def finish(self) -> None:
        """Checks that every key was read.

        Raises:
            ValueError: A key was not read, so its effect is unknown.
        """
        if self._left:
            told = ", ".join(f"{self.name}.{key} = {self._values[key]!r:.40}" for key in sorted(self._left))
            raise ValueError(
                f"{self.path}: unknown keys {told}: this version does not know what they change; use the checkpoint the file was made from"
            )


def _common(m: Metadata, *, eps: str = "rms_norm_eps", theirs: str = "layer_norm_rms_epsilon") -> Config:
    """The keys that most architectures share."""
    for unread in (
        "vocab_size",
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "expert_group_count",
        "expert_group_used_count",
        "pooling_type",
    ):
        m.take(unread)
    m.demand("attention.causal", True)
    m.demand("attention.max_alibi_bias", 0.0)
    m.demand("attention.clamp_kqv", 0.0)
    if not m.has("token_embd.weight"):
        raise ValueError(
            f"{m.path}: tensor token_embd.weight is missing: it is not a language model, or not all of one"
        )
    width, heads = m.count("embedding_length"), m.count("attention.head_count")
    size = m.take("attention.key_length") or width // heads
    m.demand("attention.value_length", size)
    return {
        "vocab_size": m.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": m.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.take("attention.head_count_kv", heads),
        "head_dim": size,
        "intermediate_size": m.count("feed_forward_length"),
        "max_position_embeddings": m.count("context_length"),
        eps: m.need(f"attention.{theirs}"),
        "tie_word_embeddings": tied(m),
        "rope_parameters": _rope(m, size),
    }


def tied(m: Metadata) -> bool:
    """Whether the head is the embedding matrix. Old files contain it twice."""
    head, embed = m.tensors.get("output.weight"), m.tensors.get("token_embd.weight")
    return head is None or (embed is not None and same(head, embed))


def _rope(m: Metadata, size: int) -> Config:
    """rope_parameters, of heads of so many dimensions."""
    theta, turning = float(m.take("rope.freq_base", 10000.0)), m.take("rope.dimension_count", size)
    rope: Config = {"rope_theta": theta, "rope_type": "default"}
    if turning != size:
        rope["partial_rotary_factor"] = turning / size
    kind, factor = m.take("rope.scaling.type", "none"), m.take("rope.scaling.factor")
    older, original = m.take("rope.scale_linear"), m.take("rope.scaling.original_context_length")
    scale = m.take("rope.scaling.attn_factor")
    if kind == "none" and older not in (None, 0.0, 1.0):
        kind, factor = "linear", older
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(
            f"{m.path}: {m.name}.rope.scaling.type = {kind!r} is not supported, only none, linear, yarn and longrope"
        )
    if kind == "linear" and factor in (None, 0.0, 1.0):
        kind = "none"
    longrope = m.has("rope_factors_short.weight") or m.has("rope_factors_long.weight")
    factors = _longrope(m, original, scale) if longrope else _llama3(m, theta, turning)
    if factors and kind not in ("none", factors["rope_type"]):
        raise ValueError(
            f"{m.path} has the frequencies of {factors['rope_type']} and rope.scaling.type = {kind!r}: only one of them is supported"
        )
    if factors or kind == "none":
        return rope | factors
    if factor is None:
        raise ValueError(f"{m.path} lacks {m.name}.rope.scaling.factor, which {kind} needs")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if original is None:
            raise ValueError(f"{m.path} lacks {m.name}.rope.scaling.original_context_length, which yarn needs")
        rope["original_max_position_embeddings"] = original
        for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := m.take(f"rope.scaling.{theirs}")) is not None:
                rope[ours] = value
        m.demand("rope.scaling.yarn_ext_factor", 1.0)
        m.demand("rope.scaling.yarn_attn_factor", 1.0)
        if scale not in (None, 1.0):
            # llama.cpp multiplies it with the value that is computed from the factor.
            rope["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    return rope


def _longrope(m: Metadata, original: int | None, scale: float | None) -> Config:
    if original is None or not (m.has("rope_factors_short.weight") and m.has("rope_factors_long.weight")):
        raise ValueError(
            f"{m.path} lacks a tensor rope_factors_*.weight or {m.name}.rope.scaling.original_context_length, which longrope needs"
        )
    factors = {f"{length}_factor": _shortest(m.values(f"rope_factors_{length}.weight")) for length in ("short", "long")}
    longer = m.count("context_length") / original
    follows = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    told = {} if scale is None or math.isclose(scale, follows, rel_tol=1e-6) else {"attention_factor": scale}
    return {"rope_type": "longrope", "original_max_position_embeddings": original, **factors, **told}


def _shortest(values: list[float]) -> list[float]:
    """Float32 numbers in the shortest decimal form, as in a config.json."""
    return [float(str(np.float32(value))) for value in values]


def _llama3(m: Metadata, theta: float, size: int) -> Config:
    """Recover llama3's four numbers (modeling_rope_utils) from a file's divisors of frequencies; empty if there are no
    divisors. ValueError: the divisors do not follow llama3's formula."""
    if not m.has("rope_freqs.weight"):
        return {}
    found = np.array(m.values("rope_freqs.weight"))
    if np.all(found == 1):
        return {}
    turns = theta ** (-np.arange(0, size, 2) / size) / (2 * np.pi)  # per token
    factor, candidates = found.max(), [(4.0, 2**n) for n in range(6, 21)]
    between = (found > 1.0001) & (found < factor * 0.9999)
    if len(found) == len(turns) and between.sum() >= 2:
        # In the blended range, 1 / divisor = (1 - s) / factor + s with s = (original * turns - low) / (high - low). The
        # three numbers are determined only up to a common factor, so set low to 1.
        slope, shift = np.polyfit(turns[between], (1 / found[between] - 1 / factor) / (1 - 1 / factor), 1)
        high = round(float(1 - 1 / shift), 4)
        candidates.append((high, round(float(slope * (high - 1)))))
    for high, original in candidates if len(found) == len(turns) else []:
        s = np.clip((original * turns - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - s) / factor + s), found, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": float(factor), "low_freq_factor": 1.0, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    raise ValueError(f"{m.path}: rope_freqs.weight is not what llama3's scaling makes, which is all that is supported")


def _no_window(m: Metadata) -> None:
    m.demand("attention.sliding_window", None, 0)


def _read_llama(m: Metadata) -> Config:
    _no_window(m)
    m.demand("attention.scale", None, 0.0)
    experts, used = m.take("expert_count", 0), m.take("expert_used_count", 0)
    m.demand("expert_feed_forward_length", None, m.take("feed_forward_length"))
    if experts:
        m.demand("interleave_moe_layer_step", None, 1)
        m.demand("expert_gating_func", None, 1)
        return _common(m) | {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "sliding_window": None,
        }
    return _common(m) | {
        "model_type": "llama",
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "mlp_bias": m.has("blk.0.ffn_gate.bias"),
    }


def _read_qwen2(m: Metadata) -> Config:
    _no_window(m)
    return _common(m) | {"model_type": "qwen2"}


def _read_qwen3(m: Metadata) -> Config:
    _no_window(m)
    return _common(m) | {"model_type": "qwen3", "attention_bias": m.has("blk.0.attn_q.bias")}


def _read_qwen3_moe(m: Metadata) -> Config:
    _no_window(m)
    m.demand("expert_shared_count", None, 0)
    m.demand("expert_shared_feed_forward_length", None, 0)
    m.demand("expert_weights_scale", None, 0.0, 1.0)
    m.demand("expert_gating_func", None, 1)
    return _common(m) | {
        "model_type": "qwen3_moe",
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "moe_intermediate_size": m.count("expert_feed_forward_length"),
        "num_experts": m.count("expert_count"),
        "num_experts_per_tok": m.count("expert_used_count"),
        "norm_topk_prob": m.take("expert_weights_norm", True),  # true by default in llama.cpp
        "sliding_window": None,
    }


def _gemma(m: Metadata, largest: int, every: int) -> Config:
    """Gemma 2 and 3. The largest model, recognised by its number of layers, scales scores differently. One layer of `every`
    has full attention, the others a window."""
    config = _common(m)
    layers, width, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    m.demand("attention.shared_kv_layers", None, 0)
    window, pattern = m.take("attention.sliding_window"), m.listed("attention.sliding_window_pattern", every)
    slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
    return config | {
        "query_pre_attn_scalar": width // heads if layers == largest else config["head_dim"],
        "sliding_window": window,
        "layer_types": ["sliding_attention" if x else "full_attention" for x in slides],
    }


def _read_gemma2(m: Metadata) -> Config:
    return _gemma(m, 46, 2) | {
        "model_type": "gemma2",
        "attn_logit_softcapping": m.need("attn_logit_softcapping"),
        "final_logit_softcapping": m.need("final_logit_softcapping"),
    }


def _read_gemma3(m: Metadata) -> Config:
    config, local = _gemma(m, 62, 6), m.take("rope.freq_base_swa", 10000.0)
    m.demand("rope.dimension_count_swa", None, config["head_dim"])
    ropes = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_theta": local, "rope_type": "default"},
    }
    return config | {
        "model_type": "gemma3_text",
        "rope_parameters": ropes,
        "attn_logit_softcapping": m.take("attn_logit_softcapping"),
        "final_logit_softcapping": m.take("final_logit_softcapping"),
    }


def _read_phi3(m: Metadata) -> Config:
    config, window = _common(m), m.take("attention.sliding_window")
    original = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    return config | {
        "model_type": "phi3",
        "sliding_window": window or None,
        "original_max_position_embeddings": original,
    }


def _read_olmo2(m: Metadata) -> Config:
    config, window = _common(m), m.take("attention.sliding_window")
    config |= {"model_type": "olmo2", "attention_bias": m.has("blk.0.attn_q.bias")}
    if not window:
        return config
    slides = m.listed(
        "attention.sliding_window_pattern", [bool((i + 1) % 4) for i in range(config["num_hidden_layers"])]
    )
    rope, scale = config["rope_parameters"], m.take("rope.scaling.attn_factor")
    m.demand("rope.freq_base_swa", None, rope["rope_theta"])
    if rope["rope_type"] == "yarn" and scale is not None:
        # Here the value is the full attention factor, as in the checkpoint.
        follows = 0.1 * math.log(rope["factor"]) + 1.0
        rope["attention_factor"] = follows if math.isclose(scale, follows, rel_tol=1e-6) else _shortest([scale])[0]
    local = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    return config | {
        "model_type": "olmo3",
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "sliding_window": window,
        "layer_types": ["sliding_attention" if x else "full_attention" for x in slides],
    }


def _read_granite(m: Metadata) -> Config:
    _no_window(m)
    factors = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    names = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    scales = dict(zip(names, _shortest([m.need(key) for key in factors]), strict=True))
    return _common(m) | scales | {"model_type": "granite", "attention_bias": m.has("blk.0.attn_q.bias")}


def _read_granite_moe(m: Metadata) -> Config:
    m.demand("expert_shared_feed_forward_length", None, 0)
    m.demand("expert_feed_forward_length", None, m.take("feed_forward_length"))
    return _read_granite(m) | {
        "model_type": "granitemoe",
        "num_local_experts": m.count("expert_count"),
        "num_experts_per_tok": m.count("expert_used_count"),
    }


def _read_gpt_oss(m: Metadata) -> Config:
    config = _common(m)
    m.demand("expert_feed_forward_length", None, config["intermediate_size"])
    return config | {
        "model_type": "gpt_oss",
        "rope_parameters": config["rope_parameters"] | {"truncate": False},  # as trained; the file does not say
        "sliding_window": m.count("attention.sliding_window"),
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])],
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "num_local_experts": m.count("expert_count"),
        "num_experts_per_tok": m.count("expert_used_count"),
    }


def _read_smollm3(m: Metadata) -> Config:
    _no_window(m)
    config = _common(m)
    return config | {
        "model_type": "smollm3",
        "attention_bias": m.has("blk.0.attn_q.bias"),
        "mlp_bias": m.has("blk.0.ffn_gate.bias"),
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])],
        "use_sliding_window": False,
    }


def _read_gpt2(m: Metadata) -> Config:
    config = _common(m, eps="layer_norm_epsilon", theirs="layer_norm_epsilon")
    return {
        "model_type": "gpt2",
        "vocab_size": config["vocab_size"],
        "n_embd": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": config["layer_norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


def _read_gpt_neox(m: Metadata) -> Config:
    config = _common(m, eps="layer_norm_eps", theirs="layer_norm_epsilon")
    share = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    for unread in ("num_key_value_heads", "head_dim"):
        del config[unread]
    return config | {
        "model_type": "gpt_neox",
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": share},
        "use_parallel_residual": m.take("use_parallel_residual", True),
        "attention_bias": m.has("blk.0.attn_qkv.bias"),
    }


_PLAIN = alone(
    (("attention_norm",), "attn_norm"),
    (("attention", "q"), "attn_q"),
    (("attention", "k"), "attn_k"),
    (("attention", "v"), "attn_v"),
    (("attention", "o"), "attn_output"),
    (("attention", "q_norm"), "attn_q_norm"),
    (("attention", "k_norm"), "attn_k_norm"),
    (("mlp_norm",), "ffn_norm"),
    (("mlp", "router"), "ffn_gate_inp"),
    (("mlp", "gate"), "ffn_gate"),
    (("mlp", "up"), "ffn_up"),
    (("mlp", "down"), "ffn_down"),
    (("attention_post_norm",), "post_attention_norm"),
    (("mlp_post_norm",), "post_ffw_norm"),
)
_PAIRED: Table = _PLAIN | {
    ("attention", x, part): PairedRows(f"attn_{x}.{part}", heads)
    for x, heads in (("q", lambda c: c.heads), ("k", lambda c: c.kv_heads))
    for part in ("weight", "bias")
}
_EXPERTS = alone((("mlp", "gate"), "ffn_gate_exps"), (("mlp", "up"), "ffn_up_exps"), (("mlp", "down"), "ffn_down_exps"))
_EACH_EXPERT = alone(
    (("mlp", "gate"), "ffn_gate.{e}"), (("mlp", "up"), "ffn_up.{e}"), (("mlp", "down"), "ffn_down.{e}")
)
_GPT_OSS: Table = (
    _PLAIN | alone((("mlp_norm",), "post_attention_norm")) | {("attention", "sinks"): Stored("attn_sinks.weight")}
)
_FUSED: Table = _PLAIN | {
    ("attention", x, part): Rows(f"attn_qkv.{part}", _qkv, n)
    for n, x in enumerate("qkv")
    for part in ("weight", "bias")
}
_PHI3: Table = _FUSED | {("mlp", x, "weight"): Rows("ffn_up.weight", _gate_up, n) for n, x in enumerate(("gate", "up"))}
_GEMMA: Table = _PLAIN | {
    path: PlusOne(stored.name) for path, stored in _PLAIN.items() if path[-2].endswith("norm") and path[-1] == "weight"
}
_OUTSIDE: dict[str, Any] = dict(
    layer="blk.{i}.", embed="token_embd.weight", positions="position_embd.weight", norm="output_norm", head="output.weight",
    roots=("",), ignored=re.compile(r"^(rope_freqs|rope_factors_(short|long))\.weight$|^blk\.\d+\.attn_rot_embd$"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        config: Turns the metadata into the keys and values of a config.json.
        block: How each weight of a block is stored.
        gemma: Whether norms are stored as in Gemma (`PlusOne`).
    """

    config: Callable[[Metadata], Config]
    block: Table
    gemma: bool = False

    def layout(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Finds how the weights of a file are stored.

        Args:
            tensors: The tensors of the file, by name.

        Returns:
            The layout.
        """
        block = self.block
        if "blk.0.ffn_gate_exps.weight" in tensors:
            block = block | _EXPERTS
        elif "blk.0.ffn_gate.0.weight" in tensors:  # files of 2023
            block = block | _EACH_EXPERT
        return Layout(block, norm_kind=PlusOne if self.gemma else Stored, **_OUTSIDE)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_read_llama, _PAIRED),
    "qwen2": Architecture(_read_qwen2, _PLAIN),
    "qwen3": Architecture(_read_qwen3, _PLAIN),
    "qwen3moe": Architecture(_read_qwen3_moe, _PLAIN),
    "gemma2": Architecture(_read_gemma2, _GEMMA, gemma=True),
    "gemma3": Architecture(_read_gemma3, _GEMMA, gemma=True),
    "phi3": Architecture(_read_phi3, _PHI3),
    "olmo2": Architecture(_read_olmo2, _PLAIN),
    "granite": Architecture(_read_granite, _PAIRED),
    "granitemoe": Architecture(_read_granite_moe, _PAIRED),
    "gpt-oss": Architecture(_read_gpt_oss, _GPT_OSS),
    "smollm3": Architecture(_read_smollm3, _PAIRED),
    "gpt2": Architecture(_read_gpt2, _FUSED),
    "gptneox": Architecture(_read_gpt_neox, _FUSED),
}


def _open(path: Path) -> tuple[Architecture, Metadata]:
    file = read(path)
    m = Metadata(path, file.metadata, file.tensors)
    if m.name not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {m.name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[m.name], m


def config(path: Path) -> Config:
    """Translates a file's metadata into the config.json of its checkpoint.

    Args:
        path: A .gguf file.

    Returns:
        The keys and values of the config.json.

    Raises:
        FileNotFoundError: One of several files is missing.
        ValueError: The architecture is not supported; a key is missing or not known; a value is not supported; or the
            file is damaged.
    """
    architecture, m = _open(path)
    try:
        made = architecture.config(m)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # e.g. a text instead of a number
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: its metadata make no sense ({error}): convert the model again") from error
    m.finish()
    ends = {f"{ours}_token_id": m.whole.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in _ENDS.items()}
    return made | ends | {"dtype": dtype_of(m.tensors)}


_ENDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def dtype_of(tensors: Mapping[str, Tensor]) -> str:
    """Chooses a dtype for a file's weights.

    Args:
        tensors: The tensors of the file, by name.

    Returns:
        The dtype of its matrices: "float32", "float16" or "bfloat16". If they are quantised: "bfloat16", which is more
        precise than they are.
    """
    kinds = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    if kinds <= {"F32", "F64"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def tensors(path: Path) -> tuple[Layout, dict[str, Tensor]]:
    """Finds the weights of a file.

    Args:
        path: A .gguf file.

    Returns:
        How they are stored, and the tensors by name.

    Raises:
        FileNotFoundError: One of several files is missing.
        ValueError: The architecture is not supported, or the file is damaged.
    """
    architecture, m = _open(path)
    return architecture.layout(m.tensors), dict(m.tensors)
