"""The table of families in docs/families.md, made from the registry: python -m jaxcomm.converters.table prints it."""

from __future__ import annotations

import json
from pathlib import Path

from jaxcomm.config import ModelConfig

from .families import FAMILIES
from .values import Values

NORMS = {"rms": "RMS", "rms_wide": "RMS", "rms_plus_one": "RMS, 1 + w", "layer": "LayerNorm"}
PLACES = {"before": "", "after": ", on outputs", "both": ", before and after"}


TRUE_CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "real_configs.json"
"""config.json files of published checkpoints; a test reads them all. (In the repository, not in the package.)"""


def table() -> str:
    """Makes the table of families in docs/families.md.

    It shows what each family's config class describes by default (or `Family.example`), and the published checkpoints
    whose config.json a test reads.

    Returns:
        The table in Markdown.
    """
    import transformers

    true = json.loads(TRUE_CONFIGS.read_text(encoding="utf-8"))
    columns = ("model_type", "models", "norms", "positions", "attention", "MLP", "biases", "head", "tested configs")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for family in FAMILIES.values():
        config = family.read(Values(transformers.AutoConfig.for_model(family.model_type, **family.example)))
        read = ", ".join(name for name, values in true.items() if values["model_type"] == family.model_type)
        lines.append("| " + " | ".join((f"`{family.model_type}`", family.title, *describe(config), read)) + " |")
    return "\n".join(lines)


def describe(c: ModelConfig) -> tuple[str, ...]:
    """Describes an architecture in words.

    Args:
        c: The architecture.

    Returns:
        Norms, positions, attention, MLP, biases and head.

    Example:
        >>> describe(params.config)
        ('RMS', 'rope', 'grouped', 'gated silu', '', 'tied')
    """
    turning = [rope for rope in c.ropes if rope.kind != "none"]
    positions = "learned" if c.learned_positions else "rope" if len(turning) == 1 else f"{len(turning)} ropes by layer"
    if turning and turning[0].share != 1:
        positions += f" on {turning[0].share:.0%} of a head"
    if turning and len(turning) < len(c.ropes):
        positions += ", none in some layers"
    attention = ["grouped" if c.kv_heads < c.heads else "multi-head"]
    if len(sizes := {heads.head_dim for heads in c.key_heads if heads}) > 1:
        attention.append(f"heads of {len(sizes)} sizes by layer")
    if c.attention_gate:
        attention.append("gated")
    if c.recurrent:
        attention.append(f"linear in {c.key_heads.count(None)} of {c.layers} layers")
    kinds = "q, k, v" if c.v_norm else "q, k"
    attention += {"none": [], "head": [f"norms on {kinds}"], "width": [f"norms on {kinds} of all heads"]}[c.qk_norm]
    if any(c.windows):
        attention.append("windows" if all(c.windows) else "windows in some layers")
    if c.attention_softcap is not None:
        attention.append("soft-cap")
    if c.sinks:
        attention.append("sinks")
    mlp = [("gated " if c.gated else "") + c.activation.replace("_", " ")]
    if c.experts:
        mlp.append(f"{c.experts_per_token} of {c.experts} experts" + (" beside it" if c.dense_ff else ""))
    if c.parallel:
        mlp.append("parallel to attention")
    biases = [name for name, has in (("q, k, v", c.qkv_bias), ("o", c.out_bias), ("MLP", c.mlp_bias)) if has]
    head = ("tied" if c.tied_head else "own") + (", soft-cap" if c.logit_softcap is not None else "")
    return NORMS[c.norm] + PLACES[c.norms], positions, ", ".join(attention), ", ".join(mlp), ", ".join(biases), head


if __name__ == "__main__":
    print(table())
