"""The architecture of a decoder-only transformer, as orthogonal facts.

Nothing here, and nothing that reads it, knows the name of a model family: a family is a translation into these
fields (`jaxcomm.converters`).

Shape letters, used in every annotation and einsum of the library:

    B batch   T query positions   S key positions   D width   N query heads   K key/value heads   G = N / K
    H head size   F feed-forward width   V vocabulary   L layers   P prompt length   C cells of a sweep
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""What public functions take where the values come from outside; they return `jax.Array`."""

Remat = Literal["off", "products", "all"]
"""What a gradient makes again instead of keeping it: nothing; what lies between the matrix products; or everything but the
streams between blocks."""

FULL = 0
"""Window of a layer whose attention reaches back to the first token."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (half-split rotation, as in transformers' `modeling_rope_utils`).

    `none` rotates nothing. `linear` divides every frequency by `factor`; `llama3` divides only the low ones and blends
    between `original_positions / low_freq_factor` and `original_positions / high_freq_factor`; `yarn` blends between the
    frequencies that turn `beta_fast` and `beta_slow` times in `original_positions`; `longrope` divides each by its own
    number.
    """

    theta: float = 10_000.0
    kind: Literal["none", "default", "linear", "llama3", "yarn", "longrope"] = "default"
    share: float = 1.0
    """The first so many of a head's dimensions turn, the rest stay."""
    scale: float = 1.0
    """Factor on cosines and sines (transformers' `attention_factor`)."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the two borders of the blend are whole dimensions."""
    short: tuple[float, ...] = ()
    """longrope: the numbers of a model whose `max_positions` are at most `original_positions`, one for each frequency."""
    long: tuple[float, ...] = ()
    """longrope: of a model of more positions."""
    reach: int = 0
    """longrope: how many positions the long numbers were trained for."""

    def __post_init__(self):
        for name in (
            "theta",
            "share",
            "scale",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rope {name} = {getattr(self, name)}: it must be a positive number")
        if self.original_positions < 1 or (self.kind == "yarn" and self.theta <= 1):
            raise ValueError(f"rope of {self.original_positions} positions and theta {self.theta} does not turn")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"rope low_freq_factor {self.low_freq_factor} is not below {self.high_freq_factor}")
        if not all(0 < number < math.inf for number in (*self.short, *self.long)):
            raise ValueError("longrope divides by numbers that are not positive")

    def dims(self, head_dim: int) -> int:
        """How many dimensions of a head turn."""
        return int(head_dim * self.share)


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
    """Of one expert, where there are several."""
    max_positions: int
    norm: Literal["rms", "rms_wide", "rms_plus_one", "layer"] = "rms"
    """RMSNorm, rounded to the stream's dtype before it is multiplied by w; after it; multiplied by 1 + w and then rounded;
    LayerNorm with a bias."""
    norm_eps: float = 1e-6
    norms: Literal["before", "after", "both"] = "before"
    """Where attention and MLP have theirs: on what they read, on what they add to the stream, or on both."""
    parallel: bool = False
    """Attention and MLP of a block both read the stream that enters it."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """Norms on queries and keys: none, of each head, or of all heads together."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    """down(act(gate(x)) * up(x)), and not down(act(up(x)))."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    experts: int = 0
    """MLPs of a block that its router chooses from for every token; 0: there is one, and no router."""
    experts_per_token: int = 0
    normalised_experts: bool = True
    """The chosen experts' probabilities are divided by their sum."""
    attention_scale: float | None = None
    """Factor on the scores; None is head_dim ** -0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(width), rounded to the weights' dtype."""
    tied_head: bool = True
    learned_positions: bool = False
    """A vector for each position is added to the embedding."""
    rope: Rope | tuple[Rope, ...] = Rope()
    """Of all layers, or of each."""
    windows: tuple[int, ...] = ()
    """Per layer: how many keys a query sees, itself included; FULL is all. Empty: every layer is full."""

    def __post_init__(self):
        sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ff", "max_positions")
        for name in sizes:
            if not isinstance(size := getattr(self, name), int) or not 1 <= size < 2**31:
                raise ValueError(f"{name} = {size!r}: it must be a whole number from 1 to 2^31 - 1")
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: it must be a positive number")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps = {self.norm_eps}: it must be a small number")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows names {len(self.windows)} layers, the model has {self.layers}")
        if isinstance(self.rope, tuple) and len(self.rope) != self.layers:
            raise ValueError(f"rope names {len(self.rope)} layers, the model has {self.layers}")
        turning = {rope.dims(self.head_dim) for rope in self.ropes if rope.kind != "none"}
        if len(turning) > 1 or any(dims % 2 or not 0 < dims <= self.head_dim for dims in turning):
            raise ValueError(
                f"{sorted(turning)} of head_dim {self.head_dim} dimensions turn: rotary embeddings need an even number, the same in all layers"
            )
        for rope in self.ropes:
            if rope.kind == "longrope" and {len(rope.short), len(rope.long)} != {rope.dims(self.head_dim) // 2}:
                raise ValueError(
                    f"longrope has {len(rope.short)} short and {len(rope.long)} long numbers, {rope.dims(self.head_dim) // 2} frequencies turn"
                )
        if not 0 <= self.experts_per_token <= self.experts or bool(self.experts) != bool(self.experts_per_token):
            raise ValueError(f"{self.experts_per_token} of {self.experts} experts per token: choose at least 1 of them")

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different ones."""
        return tuple(dict.fromkeys(self.rope)) if isinstance(self.rope, tuple) else (self.rope,)

    @property
    def rope_of(self) -> tuple[int, ...]:
        """Per layer, which of `ropes`."""
        ropes = self.rope if isinstance(self.rope, tuple) else (self.rope,) * self.layers
        return tuple(self.ropes.index(rope) for rope in ropes)


@dataclasses.dataclass(frozen=True)
class EdgeConfig:
    """A wire of a network (`jaxcomm.lmnet`): y = scale * (x + f(x)), f one decoder block in the shape of the vertex it
    leaves."""

    kind: Literal["block", "attention", "mlp", "linear", "identity"] = "block"
    """f: attention and gated MLP, one of the two, a matrix, or nothing at all (y = scale * x)."""
    attention: Literal["mha", "gqa"] = "mha"
    """As many key heads as query heads, or as the vertex has."""
    residual: bool = True
    """False: y = scale * f(x)."""
    zero_init: bool = True
    """f's last matrices begin at 0, so that f does."""
    scale: float | None = 1.0
    """Where the trainable factor begins, divided by the number of edges that are summed; None: there is no factor, and no
    division."""

    def __post_init__(self):
        if not self.residual and (self.zero_init or self.kind == "identity"):
            raise ValueError(
                "edges without residual carry nothing if they begin at zero or are identities: set zero_init to False"
            )


class Group(NamedTuple):
    """`copies` vertices of one layer with the weights of one model; which group of its layer."""

    layer: int
    number: int
    model: int
    copies: int


def check_widths(widths: tuple[int, ...]) -> None:
    """ValueError unless a network can have so many vertices per layer."""
    if not widths or widths[0] != 1 or widths[-1] != 1 or min(widths) < 1:
        raise ValueError(
            f"widths {widths} must begin and end with 1, and hold no 0: one vertex reads the tokens, and one writes"
        )


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Which vertices a network has, and how they are joined."""

    models: tuple[ModelConfig, ...]
    """The different models."""
    layers: tuple[tuple[tuple[int, int], ...], ...]
    """Per layer of vertices, its groups: (which model, how many vertices share its weights)."""
    edge: EdgeConfig = EdgeConfig()
    aggregate: Literal["sum", "mean", "concat"] = "sum"
    """What a vertex reads: the sum of its edges, their mean, or all of them through a matrix."""
    norm: bool = True
    """Interior vertices keep their model's final norm."""

    def __post_init__(self):
        check_widths(self.widths)
        if len({m.vocab for m in self.models}) > 1:
            raise ValueError(
                f"the vertices have vocabularies of {', '.join(str(m.vocab) for m in self.models)} tokens: all must have the output's"
            )
        widths = {m.width for m in self.models}
        if self.edge.kind == "identity" and len(widths) > 1:
            raise ValueError(f"identity edges cannot join widths {sorted(widths)}: choose another kind")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sum(count for _, count in layer) for layer in self.layers)

    @property
    def groups(self) -> dict[str, Group]:
        """Vertices that share a layer and a model, by name: `vertex LAYER.GROUP`, both from 0."""
        return {
            f"vertex {i}.{g}": Group(i, g, model, count)
            for i, layer in enumerate(self.layers)
            for g, (model, count) in enumerate(layer)
        }

    @property
    def stacks(self) -> dict[str, tuple[Group, Group]]:
        """Edges between two groups, by name: `edge LAYER.GROUP-GROUP`."""
        every = self.groups.values()
        return {f"edge {x.layer}.{x.number}-{y.number}": (x, y) for x in every for y in every if y.layer == x.layer + 1}

    @property
    def reader(self) -> ModelConfig:
        """Of the vertex that reads the tokens."""
        return self.models[self.layers[0][0][0]]

    @property
    def writer(self) -> ModelConfig:
        """Of the vertex that writes."""
        return self.models[self.layers[-1][0][0]]

    @property
    def vocab(self) -> int:
        return self.models[0].vocab

    @property
    def width(self) -> int:
        """Of the vectors that may stand in for tokens."""
        return self.reader.width

    @property
    def max_positions(self) -> int:
        return min(m.max_positions for m in self.models)
