"""The architecture of a decoder-only transformer, as orthogonal facts.

Nothing here, and nothing that reads it, knows the name of a model family: a family is a translation into these
fields (`jaxcomm.converters`).

Shape letters, used in every annotation and einsum of the library:

    B batch   T query positions   S key positions   D width   N query heads   K key/value heads   G = N / K
    H head size   F feed-forward width   V vocabulary   L layers   P prompt length   C cells of a sweep
"""

import dataclasses
from typing import Literal

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""What public functions take where the values come from outside; they return `jax.Array`."""

FULL = 0
"""Window of a layer whose attention reaches back to the first token."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (half-split rotation, as in transformers' `modeling_rope_utils`).

    `linear` divides every frequency by `factor`; `llama3` divides only the low ones and blends between
    `original_positions / low_freq_factor` and `original_positions / high_freq_factor`.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything `jaxcomm.model` needs to know besides the weights. Frozen and hashable: a static field of `Params`."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    max_positions: int
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    """RMSNorm multiplies by 1 + w, in float32, instead of by w."""
    post_norms: bool = False
    """Norms on the outputs of attention and MLP too, before they are added to the stream."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None
    """Factor on the scores; None is head_dim ** -0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(width), rounded to the weights' dtype."""
    tied_head: bool = True
    rope: Rope = Rope()
    windows: tuple[int, ...] = ()
    """Per layer: how many keys a query sees, itself included; FULL is all. Empty: every layer is full."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows names {len(self.windows)} layers, the model has {self.layers}")
