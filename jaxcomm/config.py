"""The architecture of a decoder-only transformer, as independent fields.

No code outside `jaxcomm.converters` depends on the name of a model family. A converter translates each family's config
into these fields.

Shape letters, used in every annotation and einsum of the library:

    B batch   T query positions   S key positions   D width   N query heads   K key/value heads   G = N / K
    H head size   F feed-forward width   V vocabulary   L layers   P prompt length   C cells of a sweep
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""Array types that public functions accept. They return `jax.Array`."""

Remat = Literal["off", "products", "all"]
"""What the backward pass recomputes instead of storing: nothing; everything between the matrix products; or everything
except the residual stream between blocks."""

NEW_TOKENS = 16
"""Default number of new tokens."""

LATER = """router_bias mlp_limit up_plus_one sinks embedding_scale residual_scale logit_divisor layer_heads
    keys_as_values v_norm layer_scale dense_ff router_norm attention_gate delta_rule""".split()  # noqa: SIM905
"""Later fields of `ModelConfig`, omitted from its repr at their default. So adding them did not change the hashes of older
models (`jaxcomm.fingerprint`), which saved messages hold."""

FULL = 0
"""Window of a layer with full attention, back to the first token."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: a rotation by halves, as in transformers' `modeling_rope_utils`.

    Attributes:
        theta: Base of the frequencies.
        kind: "none" rotates nothing. "default" keeps the frequencies. "linear" divides every frequency by `factor`.
            "llama3" and "yarn" divide the low frequencies, keep the high ones, and blend in between. "longrope" divides
            each frequency by its own number. "proportional" divides every frequency by `factor`, and rotates the pairs of
            the highest frequencies of a whole head only.
        share: Share of a head's dimensions that are rotated: the first ones. Of a "proportional" one: the share of pairs.
        scale: Factor on cosines and sines (transformers' `attention_factor`).
        factor: Divisor of the frequencies (linear, llama3, yarn, proportional).
        low_freq_factor: A frequency with fewer turns in `original_positions` is divided by the full factor (llama3).
        high_freq_factor: A frequency with more turns in `original_positions` is kept (llama3).
        original_positions: Number of positions in the model's original training.
        beta_fast: A frequency with more turns in `original_positions` is kept (yarn).
        beta_slow: A frequency with fewer turns in `original_positions` is divided by the full factor (yarn).
        truncate: Whether the two ends of the blend are rounded to whole dimensions (yarn).
        short: Divisors for a model with `max_positions` up to `original_positions`, one for each frequency (longrope).
        long: Divisors for a model with more positions (longrope).
        reach: Number of positions that the long divisors were trained for (longrope).

    Raises:
        ValueError: A number is not positive; no dimension is rotated; llama3's two factors are in the wrong order.

    Example:
        >>> jc.Rope(theta=500_000.0, share=0.5).dims(128)
        64
    """

    theta: float = 10_000.0
    kind: Literal["none", "default", "linear", "llama3", "yarn", "longrope", "proportional"] = "default"
    share: float = 1.0
    scale: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    reach: int = 0

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
            raise ValueError(
                f"rope original_positions = {self.original_positions}, theta = {self.theta}: give at least 1 position and, for yarn, a theta above 1"
            )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"rope low_freq_factor {self.low_freq_factor} is not below {self.high_freq_factor}")
        if wrong := [number for number in (*self.short, *self.long) if not 0 < number < math.inf]:
            raise ValueError(f"longrope divides frequencies by {wrong[0]}: all short and long numbers must be positive")

    def dims(self, head_dim: int) -> int:
        """Counts the dimensions of a head that are rotated.

        Args:
            head_dim: Number of dimensions of a head, H.

        Returns:
            The number of rotated dimensions, which are the first ones. Of a "proportional" one: all of them, since its
            pairs are spread over the whole head. Some of them have the frequency 0.
        """
        return head_dim if self.kind == "proportional" else int(head_dim * self.share)


class Heads(NamedTuple):
    """Key heads of one layer, in a model whose layers differ in them.

    Attributes:
        kv_heads: Number of key/value heads, K.
        head_dim: Number of dimensions of a head, H. Query heads have as many.
        keys_as_values: Whether the layer has no matrix for values, and takes its keys for them.
    """

    kv_heads: int
    head_dim: int
    keys_as_values: bool = False


class DeltaRule(NamedTuple):
    """Linear attention of one layer: the gated delta rule (Yang et al. 2024, arXiv 2412.06464, equation 10).

    The layer keeps one matrix for each head, [X, Y], instead of keys and values of every token.

    Attributes:
        key_heads: Number of heads of queries and keys. It divides the number of value heads.
        value_heads: Number of heads of values.
        key_dim: Number of dimensions of a query or key, X.
        value_dim: Number of dimensions of a value, Y.
        kernel: Number of tokens that the causal convolution before the rule covers.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int = 4

    @property
    def channels(self) -> int:
        """Number of channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def matrices(self) -> int:
        """Number of entries of the matrices of all heads."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def numbers(self) -> int:
        """Number of entries of the state: the matrices, and the tokens that the next convolution needs."""
        return self.matrices + (self.kernel - 1) * self.channels


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model: everything that `jaxcomm.model` needs besides the weights.

    It is frozen and hashable, and a static field of `Params`.

    Attributes:
        vocab: Number of tokens, V.
        width: Width of the residual stream, D.
        layers: Number of blocks, L.
        heads: Number of query heads, N.
        kv_heads: Number of key/value heads, K. It divides N.
        head_dim: Number of dimensions of a head, H.
        ff: Feed-forward width, F, of the MLP, or of one expert.
        max_positions: Largest number of tokens of a text.
        norm: "rms" is RMSNorm, rounded to the stream's dtype before it is multiplied by w. "rms_wide" is rounded after
            that. "rms_plus_one" is multiplied by 1 + w and then rounded. "layer" is LayerNorm with a bias.
        norm_eps: Number that norms add to the mean square, or to the variance.
        norms: Where attention and MLP have their norms: "before", on their input; "after", on the output that they add to
            the stream; or "both".
        parallel: Whether attention and MLP of a block both read the block's input.
        qk_norm: Norms on queries and keys: "none", of each "head", or of all heads together ("width").
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output matrix of attention has a bias.
        mlp_bias: Whether the matrices of the MLP, or of every expert, have a bias.
        gated: Whether the MLP is down(act(gate(x)) * up(x)). Otherwise it is down(act(up(x))).
        activation: The function act of the MLP. "gelu_tanh" is the tanh approximation of GELU, "gelu_sigmoid" the
            approximation x sigmoid(1.702 x).
        experts: Number of expert MLPs of a block. Its router chooses among them for every token. 0: one MLP, no router.
        experts_per_token: Number of experts for each token.
        normalised_experts: Whether the probabilities of the chosen experts are divided by their sum.
        router_bias: Whether the router has a bias.
        mlp_limit: Limit c of a gated MLP: gate(x) is clipped to at most c, and up(x) to [-c, c]. None: no clipping.
        up_plus_one: Whether 1 is added to up(x) of a gated MLP.
        attention_scale: Factor on the attention scores. None: 1 / sqrt(head_dim).
        attention_softcap: Soft-cap c of the attention scores, c tanh(x / c), or None.
        sinks: Whether every query head has one extra score, a trained weight. It takes part in the softmax but has no
            value.
        logit_softcap: Soft-cap of the logits, or None.
        logit_divisor: Number that logits are divided by.
        scale_embedding: Whether embeddings are multiplied by sqrt(width), rounded to the weights' dtype.
        embedding_scale: Factor on the embeddings.
        residual_scale: Factor on what attention and MLP add to the stream.
        tied_head: Whether the head is the embedding matrix.
        learned_positions: Whether a vector for each position is added to the embedding.
        rope: Rotary embedding of all layers, or a tuple with one for each layer.
        windows: For each layer, the number of keys that a query sees, including its own; `FULL` (0) means all. Empty:
            every layer sees all.
        layer_heads: Key heads of each layer, or its `DeltaRule`, if layers differ. `kv_heads`, `head_dim` and
            `keys_as_values` are then not used (`layer`). Layers of unlike shapes cannot be stacked (`Params.unrolled`).
            Empty: all layers are alike.
        keys_as_values: Whether layers have no matrix for values, and take their keys for them, before any norm or rotation.
        v_norm: Whether the values of each head are divided by their root mean square.
        layer_scale: Whether the stream after each block is multiplied by a weight, a single number.
        dense_ff: Feed-forward width of an MLP that every token goes through in addition to the experts, with norms of its own. 0:
            there is none.
        router_norm: Whether the router reads the stream after attention, divided by its root mean square and multiplied by a
            weight, instead of the experts' input. The probability of an expert is then multiplied by a weight too.
        attention_gate: Whether a head's output is multiplied by sigmoid(g), where g is a linear function of the
            layer's input, as large as the queries.
        delta_rule: Of a config of one layer (`layer`): its linear attention. None: it has attention.

    Raises:
        ValueError: A size is not a whole number from 1 to 2^31 - 1; another number is out of range; the fields
            contradict each other, for example heads that kv_heads does not divide.

    Example:
        >>> config = jc.ModelConfig(
        ...     vocab=256, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=128, max_positions=64
        ... )
        >>> jc.init_params(jax.random.key(0), config).unroll().blocks[0]["attention"]["k"]["weight"].shape
        (32, 64)
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    max_positions: int
    norm: Literal["rms", "rms_wide", "rms_plus_one", "layer"] = "rms"
    norm_eps: float = 1e-6
    norms: Literal["before", "after", "both"] = "before"
    parallel: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "gelu_sigmoid"] = "silu"
    experts: int = 0
    experts_per_token: int = 0
    normalised_experts: bool = True
    router_bias: bool = False
    mlp_limit: float | None = None
    up_plus_one: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    sinks: bool = False
    logit_softcap: float | None = None
    logit_divisor: float = 1.0
    scale_embedding: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    tied_head: bool = True
    learned_positions: bool = False
    rope: Rope | tuple[Rope, ...] = Rope()
    windows: tuple[int, ...] = ()
    layer_heads: tuple[Heads | DeltaRule, ...] = ()
    keys_as_values: bool = False
    v_norm: bool = False
    layer_scale: bool = False
    dense_ff: int = 0
    router_norm: bool = False
    attention_gate: bool = False
    delta_rule: DeltaRule | None = None

    def __post_init__(self):
        sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ff", "max_positions")
        for name in sizes:
            if not isinstance(size := getattr(self, name), int) or not 1 <= size < 2**31:
                raise ValueError(f"{name} = {size!r}: it must be a whole number from 1 to 2^31 - 1")
        numbers = ("attention_scale", "attention_softcap", "logit_softcap", "mlp_limit")
        for name in (*numbers, "embedding_scale", "residual_scale", "logit_divisor"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: it must be a positive number")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps = {self.norm_eps}: it must be at least 0 and below 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.layer_heads and len(self.layer_heads) != self.layers:
            raise ValueError(f"layer_heads names {len(self.layer_heads)} layers, the model has {self.layers}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows names {len(self.windows)} layers, the model has {self.layers}")
        if isinstance(self.rope, tuple) and len(self.rope) != self.layers:
            raise ValueError(f"rope names {len(self.rope)} layers, the model has {self.layers}")
        if len(set(self.layer_heads)) == 1:
            raise ValueError(
                "layer_heads are the same in all layers: say it with kv_heads, head_dim and keys_as_values"
            )
        if self.layer_heads:
            for i in range(self.layers):
                self.layer(i)  # checked as a model of one layer
        else:
            self._check_ropes()
            self._check_delta_rule()
        if not 0 <= self.experts_per_token <= self.experts or bool(self.experts) != bool(self.experts_per_token):
            raise ValueError(f"{self.experts_per_token} of {self.experts} experts per token: choose at least 1 of them")
        if not self.gated and (self.mlp_limit is not None or self.up_plus_one):
            raise ValueError("mlp_limit and up_plus_one are of gated MLPs, and this one has no gate")
        if not self.experts and (self.dense_ff or self.router_norm):
            raise ValueError("dense_ff and router_norm are of models with experts, and this one has none")

    def _check_delta_rule(self) -> None:
        """Raises ValueError unless the linear attention has sizes that fit each other."""
        if (rule := self.delta_rule) is None:
            return
        if self.layers > 1:
            raise ValueError("delta_rule is of one layer: name the layers that have it in layer_heads")
        if not all(isinstance(size, int) and size >= 1 for size in rule):
            raise ValueError(f"{rule}: its sizes must be whole numbers from 1 on")
        if rule.value_heads % rule.key_heads:
            raise ValueError(f"value_heads {rule.value_heads} is not a multiple of key_heads {rule.key_heads}")

    def _check_ropes(self) -> None:
        """Raises ValueError unless the rotary embeddings fit the heads, and turn the same dimensions in all layers."""
        turning = {rope.dims(self.head_dim) for rope in self.ropes if rope.kind != "none"}
        if len(turning) > 1 or any(dims % 2 or not 0 < dims <= self.head_dim for dims in turning):
            raise ValueError(
                f"rotary embeddings rotate {sorted(turning)} of head_dim {self.head_dim} dimensions: give an even number above 0, the same in all layers"
            )
        for rope in self.ropes:
            if rope.kind == "longrope" and {len(rope.short), len(rope.long)} != {rope.dims(self.head_dim) // 2}:
                raise ValueError(
                    f"longrope has {len(rope.short)} short and {len(rope.long)} long numbers: give one for each of {rope.dims(self.head_dim) // 2} frequencies"
                )

    def __repr__(self):
        """The fields, except fields in `LATER` that have their default value."""
        every = [(field.name, field.default) for field in dataclasses.fields(self)]
        told = [name for name, default in every if name not in LATER or getattr(self, name) != default]
        return f"ModelConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in told)})"

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(self.rope)) if isinstance(self.rope, tuple) else (self.rope,)

    @property
    def rope_of(self) -> tuple[int, ...]:
        """For each layer, the index into `ropes` of its rotary embedding."""
        return tuple(map(self.ropes.index, self._rope_each))

    @functools.cached_property
    def turns(self) -> tuple[tuple[Rope, int], ...]:
        """The different rotary embeddings of the layers, each with the size of the heads that it rotates."""
        return tuple(dict.fromkeys(self._turns))

    @functools.cached_property
    def turn_of(self) -> tuple[int, ...]:
        """For each layer, the index into `turns` of its rotary embedding."""
        return tuple(self.turns.index(turn) for turn in self._turns)

    @property
    def _rope_each(self) -> tuple[Rope, ...]:
        return self.rope if isinstance(self.rope, tuple) else (self.rope,) * self.layers

    @property
    def _turns(self) -> list[tuple[Rope, int]]:
        sizes = [getattr(each, "head_dim", self.head_dim) for each in self.layer_heads] or [self.head_dim] * self.layers
        return list(zip(self._rope_each, sizes, strict=True))

    @property
    def alike(self) -> bool:
        """Whether the weights of all layers have the same shapes."""
        return not self.layer_heads

    def layer(self, i: int) -> ModelConfig:
        """Describes one layer, as a model that has only this layer.

        Args:
            i: Number of the layer, from 0.

        Returns:
            Its architecture, with the layer's heads, window and rotary embedding.
        """
        return _layer(self, i)

    @property
    def kv_sizes(self) -> tuple[int, ...]:
        """For each layer, the number of entries of one token's keys, K H. Its values have as many. 0 without keys."""
        return tuple(heads.kv_heads * heads.head_dim if heads else 0 for heads in self.key_heads)

    @property
    def key_heads(self) -> tuple[Heads | None, ...]:
        """The key heads of each layer. None: the layer has linear attention, without keys."""
        each = (
            self.layer_heads
            or (self.delta_rule or Heads(self.kv_heads, self.head_dim, self.keys_as_values),) * self.layers
        )
        return tuple(heads if isinstance(heads, Heads) else None for heads in each)

    @property
    def rules(self) -> tuple[DeltaRule | None, ...]:
        """The linear attention of each layer. None: the layer has attention."""
        each = self.layer_heads or (self.delta_rule,) * self.layers
        return tuple(rule if isinstance(rule, DeltaRule) else None for rule in each)

    @property
    def recurrent(self) -> bool:
        """Whether some layer has linear attention."""
        return None in self.key_heads


@functools.lru_cache(maxsize=4096)
def _layer(config: ModelConfig, i: int) -> ModelConfig:
    own = config.layer_heads[i] if config.layer_heads else None
    heads = own._asdict() if isinstance(own, Heads) else {"delta_rule": own or config.delta_rule}
    windows = (config.windows[i],) if config.windows else ()
    rope = config.rope[i] if isinstance(config.rope, tuple) else config.rope
    return dataclasses.replace(config, layers=1, layer_heads=(), windows=windows, rope=rope, **heads)


def check_alike(config: Any, what: str) -> None:
    """Checks that the layers of a model are alike, for what needs keys and values of one shape.

    Args:
        config: Architecture of the model. A network is not checked.
        what: What needs it, for the error message.

    Raises:
        ValueError: The layers differ.
    """
    if isinstance(config, ModelConfig) and not config.alike:
        told = dict.fromkeys(
            f"{each.kv_heads} key heads of {each.head_dim}" + " that are also values" * each.keys_as_values
            if each
            else "linear attention without keys"
            for each in config.key_heads
        )
        raise ValueError(
            f"{what} need layers of one shape, and this model's have {' and '.join(sorted(told))}: send states instead"
        )


@dataclasses.dataclass(frozen=True)
class EdgeConfig:
    """An edge of a network (`jaxcomm.lmnet`): y = scale * (x + f(x)).

    f is one decoder block in the shape of the vertex that the edge leaves (Wu et al. 2026, arXiv 2505.12741).

    Attributes:
        kind: The function f: "block", attention and a gated MLP; "attention" or "mlp", one of the two; "linear", a
            matrix; or "identity", no f, so that y = scale * x.
        attention: Number of key heads: "mha", as many as query heads; "gqa", as many as the vertex has.
        residual: Whether x is added. Otherwise y = scale * f(x).
        zero_init: Whether the last matrices of f begin at 0. f(x) then begins at 0.
        scale: Initial value of the trainable factor, before division by the number of edges into the same vertex. None: no
            factor and no division.

    Raises:
        ValueError: The edge would transmit nothing: it has no residual, and starts at zero or is the identity.

    Example:
        >>> from jaxcomm.lmnet import EdgeConfig, init_network
        >>> edge = EdgeConfig(kind="mlp", zero_init=False)
        >>> network = init_network(jax.random.key(0), params, widths=(1, 2, 1), edge=edge)
        >>> jc.forward(network, prompts).shape
        (2, 3, 256)
    """

    kind: Literal["block", "attention", "mlp", "linear", "identity"] = "block"
    attention: Literal["mha", "gqa"] = "mha"
    residual: bool = True
    zero_init: bool = True
    scale: float | None = 1.0

    def __post_init__(self):
        if not self.residual and (self.zero_init or self.kind == "identity"):
            raise ValueError(
                "edges without residual carry nothing if they begin at zero or are identities: set zero_init to False"
            )


class Group(NamedTuple):
    """Vertices of one layer that share the weights of one model.

    Attributes:
        layer: Number of the layer, from 0.
        number: Number of the group in its layer, from 0.
        model: Index of the model.
        copies: Number of vertices.
    """

    layer: int
    number: int
    model: int
    copies: int


def check_widths(widths: tuple[int, ...]) -> None:
    """Checks that a network can have these numbers of vertices.

    Args:
        widths: Number of vertices of each layer.

    Raises:
        ValueError: They do not begin and end with 1, or hold a 0.
    """
    if not widths or widths[0] != 1 or widths[-1] != 1 or min(widths) < 1:
        raise ValueError(
            f"widths {widths} must begin and end with 1, and hold no 0: one vertex reads the tokens, and one writes"
        )


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The vertices of a network, and the edges between them (Wu et al. 2026, arXiv 2505.12741).

    Attributes:
        models: Architectures of the different models.
        layers: For each layer of vertices, its groups: (index of the model, number of vertices that share its weights).
        edge: The edges.
        aggregate: Input of a vertex: the "sum" of its edges, their "mean", or "concat", all of them through a matrix.
        norm: Whether interior vertices keep their model's final norm.

    Raises:
        ValueError: The first or the last layer does not have one vertex; the models have different vocabularies;
            identity edges join different widths; a model has linear attention.

    Example:
        >>> from jaxcomm.lmnet import NetworkConfig
        >>> config = NetworkConfig(models=(params.config,), layers=(((0, 1),), ((0, 4),), ((0, 1),)))
        >>> config.widths
        (1, 4, 1)
    """

    models: tuple[ModelConfig, ...]
    layers: tuple[tuple[tuple[int, int], ...], ...]
    edge: EdgeConfig = EdgeConfig()
    aggregate: Literal["sum", "mean", "concat"] = "sum"
    norm: bool = True

    def __post_init__(self):
        check_widths(self.widths)
        if any(m.recurrent for m in self.models):
            raise ValueError(
                "linear attention keeps a state, which the cache of a network has no place for: choose a model with attention in every layer"
            )
        if len({m.vocab for m in self.models}) > 1:
            raise ValueError(
                f"the vertices have vocabularies of {', '.join(str(m.vocab) for m in self.models)} tokens: all must have the output's"
            )
        widths = {m.width for m in self.models}
        if self.edge.kind == "identity" and len(widths) > 1:
            raise ValueError(f"identity edges cannot join widths {sorted(widths)}: choose another kind")

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of vertices of each layer."""
        return tuple(sum(count for _, count in layer) for layer in self.layers)

    @property
    def groups(self) -> dict[str, Group]:
        """The groups of vertices that share a layer and a model, by name: `vertex LAYER.GROUP`, both counted from 0."""
        return {
            f"vertex {i}.{g}": Group(i, g, model, count)
            for i, layer in enumerate(self.layers)
            for g, (model, count) in enumerate(layer)
        }

    @property
    def stacks(self) -> dict[str, tuple[Group, Group]]:
        """Edges between two groups, by name: `edge LAYER.GROUP-GROUP`, counted from 0."""
        every = self.groups.values()
        return {f"edge {x.layer}.{x.number}-{y.number}": (x, y) for x in every for y in every if y.layer == x.layer + 1}

    def first(self, group: Group) -> int:
        """Numbers the first vertex of a group within its layer.

        Args:
            group: One of `groups`.

        Returns:
            The number, counted from 0, group by group.
        """
        return sum(g.copies for g in self.groups.values() if g.layer == group.layer and g.number < group.number)

    @property
    def reader(self) -> ModelConfig:
        """Architecture of the vertex that reads the tokens."""
        return self.models[self.layers[0][0][0]]

    @property
    def writer(self) -> ModelConfig:
        """Architecture of the vertex that computes the logits."""
        return self.models[self.layers[-1][0][0]]

    @property
    def vocab(self) -> int:
        """Number of tokens, V."""
        return self.models[0].vocab

    @property
    def width(self) -> int:
        """Width D of vectors that can replace tokens: the width of the vertex that reads the tokens."""
        return self.reader.width

    @property
    def max_positions(self) -> int:
        """Largest number of tokens of a text: the minimum over the models."""
        return min(m.max_positions for m in self.models)
