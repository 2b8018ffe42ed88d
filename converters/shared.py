"""Parts of a config.json that families share: sizes, rotary embeddings, windows, key heads.

`read_x` reads values, `write_x` writes them. They follow transformers' configuration classes and `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcomm.config import FULL, DeltaRule, Heads, ModelConfig, Rope

from .values import ACTIVATIONS, LAYERS, SAYS_NOTHING, Values, numbered

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
    given, shared = numbered(v.take("per_layer_config") or {}), v.take("attention_k_eq_v")
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


def write_window(c: ModelConfig) -> int | None:
    """The value of the key sliding_window: the window in tokens, or None if there is none."""
    return max(c.windows, default=None) or None
