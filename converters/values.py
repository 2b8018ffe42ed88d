"""The values of a config.json, and what the families spell alike in it: sizes, rotary embeddings, windows.

Both ways: `read_x` takes values, `write_x` makes them. Mirrors transformers' configuration classes and `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcomm.config import FULL, ModelConfig, Rope

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
        """The value, which somebody has now asked for."""
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
        """What the table has for the value. ValueError: nothing."""
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


def read_rope(settings: Mapping[str, Any], positions: int, *, partial: bool = False) -> Rope:
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


def write_rope(rope: Rope) -> dict[str, Any]:
    """rope_parameters. ValueError: no config can say it."""
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
    """Of all layers, of whole heads."""
    return read_rope(v.take("rope_parameters"), positions)


def partial_rope(v: Values, positions: int) -> Rope:
    """Of all layers, of heads or a part of each."""
    return read_rope(v.take("rope_parameters"), positions, partial=True)


def read_common(
    v: Values, read_rope: Callable[[Values, int], Rope | None] = one_rope, *, act: str = "hidden_act", eps: str = "rms_norm_eps"
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


def write_common(c: ModelConfig, act: str = "hidden_act", eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The other way; a rope by layer is left to the caller."""
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
        act: {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[c.activation],
        **rope,
        **({} if c.head_dim * c.heads == c.width else {"head_dim": c.head_dim}),
    }


def read_windows(v: Values, layers: int) -> tuple[int, ...]:
    """Where layers differ."""
    window, kinds = v.take("sliding_window"), v.take("layer_types")
    table = {"full_attention": FULL, "sliding_attention": window}
    unknown = set(kinds) - set(table)
    if unknown or len(kinds) != layers:
        raise ValueError(f"config key layer_types = {kinds!r} is not supported: {layers} of {', '.join(table)}")
    if "sliding_attention" in kinds and not window:
        raise ValueError(f"config has sliding layers but sliding_window = {window!r}")
    return tuple(table[kind] for kind in kinds) if "sliding_attention" in kinds else ()


def read_window(v: Values, layers: int) -> tuple[int, ...]:
    """Of all layers; null means none."""
    window = v.take("sliding_window")
    if window is not None and window < 1:
        raise ValueError(f"config key sliding_window = {window} is not supported, only null and numbers from 1 on")
    return () if window is None else (window,) * layers


def layer_types(c: ModelConfig) -> list[str]:
    """The key of that name."""
    return ["sliding_attention" if w else "full_attention" for w in c.windows or (FULL,) * c.layers]


def write_window(c: ModelConfig) -> int | None:
    """Of `read_window` and `read_windows`."""
    return max(c.windows, default=None) or None
