"""Trained bridges: small networks that map one model's keys and values to another's. Both models stay frozen.

    make     init_c2c(key, params_a, params_b) or init_gated(key, params_a, params_b)
    train    `jaxcomm.training`, with Pair(params_a, params_b) as the frozen part
    use      fuse([bridge], B's cache, [A's cache]), or remember(bridge, A's cache), for `past`

`C2C` is the fuser of Cache-to-Cache (Fu et al. 2025, arXiv 2510.03215). A and B read the same prompt. The fuser changes
B's keys and values at all tokens but the last, using A's. `Gated` is a small bridge in the spirit of Draft-KV (arXiv
2609.34754). A reads a text that B never sees. The bridge maps A's keys and values, and B attends to them and to its own.

In training a row holds several texts. Each text has a prompt, which is not learned, and then tokens that are learned.
`model.Training` tells a bridge which tokens are which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxcomm.cache import Attended, KVCache
from jaxcomm.config import AnyArray, ModelConfig, check_alike
from jaxcomm.fingerprint import identity
from jaxcomm.language_model import Training
from jaxcomm.model import Params
from jaxcomm.training import positions_in

COLDEST = 1e-3
"""Temperature of the gates at the last training step."""
EPSILON = 1e-6


class Pair(NamedTuple):
    """The two frozen models of a bridge, in training.

    Attributes:
        a: The sender.
        b: The receiver.
    """

    a: Params
    b: Params


class Shape(NamedTuple):
    """Sizes of the two models' keys and values.

    Attributes:
        layers: Number of A's layers, and of B's.
        heads: Number of A's key heads, and of B's.
        sizes: Size of a head of A, and of B.
        asking: Number of B's query heads.
    """

    layers: tuple[int, int]
    heads: tuple[int, int]
    sizes: tuple[int, int]
    asking: int

    @property
    def widths(self) -> tuple[int, int]:
        """Width of one token's keys in one layer, for A and for B."""
        return self.heads[0] * self.sizes[0], self.heads[1] * self.sizes[1]


def shape_of(a: ModelConfig, b: ModelConfig) -> Shape:
    """Lists the sizes of two models' keys and values.

    Args:
        a: Architecture of the sender.
        b: Architecture of the receiver.

    Returns:
        Their sizes.

    Raises:
        ValueError: The layers of one of them differ in their key heads.
    """
    for config in (a, b):
        check_alike(config, "bridges")
    return Shape((a.layers, b.layers), (a.kv_heads, b.kv_heads), (a.head_dim, b.head_dim), b.heads)


class _Bridge(struct.PyTreeNode):
    """Common fields of both kinds of bridges: identities of the models (None: not checked), and sizes."""

    weights: PyTree[Float[Array, "..."]]
    shape: Shape = struct.field(pytree_node=False)
    sender: str | None = struct.field(pytree_node=False, default=None)
    receiver: str | None = struct.field(pytree_node=False, default=None)


class C2C(_Bridge):
    """The fuser of Cache-to-Cache (arXiv 2510.03215): it changes B's keys and values of a prompt, using A's.

    For each of B's layers, and separately for keys and values: the heads of A and of B are flattened and concatenated. A
    linear layer with bias maps them to `hidden` numbers, and one FFN block follows. From there, one FFN block and a linear
    layer give a weight for each head (a sigmoid); another FFN block and a linear layer give the projected keys or values.
    B's keys or values become own + gate * weight * projected. Keys are used as stored, rotated. Layers are aligned from
    the top: the lowest layers of the deeper model have no partner.

    Each layer has one gate for keys and one for values. A gate is open if its logit is above 0. It starts at 0, closed. In
    training the gate is sigmoid((logit + g) / T) with g = -log(-log u) for every row, head and token. T falls from 1 to
    0.001 over `steps` steps, geometrically. g depends only on `seed` and the step, so a resumed run draws the same g.

    The paper does not define the FFN block. Here it is x + down(gelu(up(norm(x)))), with the same width inside, an RMS
    norm and the exact GELU; the matrices have biases. Matrices start as normal with variance 1 / fan-in, biases at 0.

    Attributes:
        weights: Leaves [2, n, ...] for keys and values, and for the n = min(L_A, L_B) layers that have a partner:
            "enter", "block", "weigh", "project", and "gate", whose "bias" holds the logits. (Biases have no weight decay.)
        shape: Sizes of the two models' keys and values.
        sender: Identity of A (`fingerprint.identity`). None: it is not checked.
        receiver: Identity of B (`fingerprint.identity`). None: it is not checked.
        steps: Number of training steps over which T falls.
        seed: Random seed for training.
        aligned: Whether A and B tokenize prompts differently. Tokens are then aligned by characters (`Agent.align`).

    Example:
        >>> from jaxcomm import bridges
        >>> bridge = bridges.init_c2c(jax.random.key(0), params, params, hidden=8)
        >>> bridge.open.tolist()
        [[False, False, False, False], [False, False, False, False]]
    """

    steps: int = struct.field(pytree_node=False, default=1)
    seed: int = struct.field(pytree_node=False, default=0)
    aligned: bool = struct.field(pytree_node=False, default=False)

    @property
    def hidden(self) -> int:
        """Width of the fuser."""
        return self.weights["enter"]["bias"].shape[-1]

    @property
    def open(self) -> Bool[Array, "2 n"]:
        """Which gates are open, for keys and for values, in the layers that have a partner."""
        return self.weights["gate"]["bias"] > 0

    def join(self, frozen: Pair) -> Bridged:
        """Makes the model for training.

        Args:
            frozen: The two models.

        Returns:
            The receiver with this bridge. It fuses the sender's keys and values of every prompt into its own.
        """
        return Bridged(self, frozen.a, frozen.b)


class Gated(_Bridge):
    """A small bridge, in the spirit of Draft-KV (arXiv 2609.34754): A's keys and values become a memory that B also attends to.

    For each of B's layers, the bridge takes A's keys and values in the layer at the same relative depth, each scaled to a
    root mean square of 1. Two low-rank linear maps without bias give keys and values for B. B's queries attend to them with
    a separate softmax. The result, times tanh(gate) of the layer and the query head, is added to B's own attention. Gates
    start at 0, closed: B's results are then bit for bit unchanged. B does not rotate the memory's keys, and sees them from
    any distance. A message of zeros gives a memory of zeros, which adds nothing.

    Attributes:
        weights: "down" [2, L_B, r, 2 K_A H_A] and "up" [2, L_B, K_B H_B, r], for keys and values; "gate", whose "bias"
            [L_B, N_B] holds the gates.
        shape: Sizes of the two models' keys and values.
        sender: Identity of A (`fingerprint.identity`). None: it is not checked.
        receiver: Identity of B (`fingerprint.identity`). None: it is not checked.

    Example:
        >>> from jaxcomm import bridges
        >>> bridge = bridges.init_gated(jax.random.key(0), params, params, rank=2)
        >>> bridges.size(bridge)
        3088
    """

    @property
    def rank(self) -> int:
        """Rank of the maps, r."""
        return self.weights["down"].shape[-2]

    @property
    def open(self) -> Bool[Array, "L N"]:
        """Which gates are not 0."""
        return self.weights["gate"]["bias"] != 0

    def join(self, frozen: Pair) -> Bridged:
        """Makes the model for training.

        Args:
            frozen: The two models.

        Returns:
            The receiver with this bridge. It has a memory of the texts that the sender has read.
        """
        return Bridged(self, frozen.a, frozen.b)


def size(bridge: Any) -> int:
    """Counts the trained parameters.

    Args:
        bridge: A bridge, or any tree of arrays.

    Returns:
        The number of entries in all leaves.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(bridge))


def check_bridge(bridge: C2C | Gated, a: Params, b: Params) -> None:
    """Checks that a bridge belongs to two models.

    Args:
        bridge: The bridge.
        a: The sender.
        b: The receiver.

    Raises:
        ValueError: Their keys and values have other sizes; it was made for other models.
    """
    if (found := shape_of(a.config, b.config)) != bridge.shape:
        told = lambda s: " -> ".join(
            f"{n} layers of {h} heads of {d}" for n, h, d in zip(s.layers, s.heads, s.sizes, strict=True)
        )
        raise ValueError(f"this bridge is from {told(bridge.shape)}, these models have {told(found)}: train another")
    for name, params, expected in (("A", a, bridge.sender), ("B", b, bridge.receiver)):
        if expected is not None and (own := identity(params)) != expected:
            raise ValueError(f"this bridge was made for model {expected} as {name}, this one is {own}: train another")


# Made ---------------------------------------------------------------------------------------------------------------


def init_c2c(
    key: Key[Array, ""], params_a: Params, params_b: Params, *, hidden: int = 1024, steps: int = 1, seed: int = 0
) -> C2C:
    """Makes a C2C bridge (fuser) with closed gates.

    Args:
        key: Random key of the weights.
        params_a: The sender.
        params_b: The receiver.
        hidden: Width of the fuser. The paper has 1024.
        steps: Number of training steps over which the gates' temperature falls.
        seed: Random seed for training.

    Returns:
        The fuser, float32.

    Raises:
        ValueError: `hidden` or `steps` is below 1; the layers of a model differ in their key heads.

    Example:
        >>> from jaxcomm import bridges
        >>> bridges.init_c2c(jax.random.key(0), params, params, hidden=8).weights["enter"]["weight"].shape
        (2, 4, 8, 128)
    """
    if hidden < 1 or steps < 1:
        raise ValueError(f"hidden = {hidden}, steps = {steps}: both must be at least 1")
    shape = shape_of(params_a.config, params_b.config)
    n, (width_a, width_b) = min(shape.layers), shape.widths
    keys = iter(jax.random.split(key, 9))
    bias = lambda wide: jnp.zeros((2, n, wide))

    def linear(out: int, width: int) -> dict[str, Array]:
        weight = width**-0.5 * jax.random.normal(next(keys), (2, n, out, width))
        return {"weight": weight, "bias": bias(out)}

    def block() -> dict[str, Any]:
        scale = jnp.ones((2, n, hidden))
        return {"norm": {"scale": scale}, "up": linear(hidden, hidden), "down": linear(hidden, hidden)}

    weights = {
        "enter": linear(hidden, width_a + width_b),
        "block": block(),
        "weigh": {"block": block(), "out": linear(shape.heads[1], hidden)},
        "project": {"block": block(), "out": linear(width_b, hidden)},
        "gate": {"bias": jnp.zeros((2, n))},
    }
    return C2C(weights, shape, identity(params_a), identity(params_b), steps, seed)


def init_gated(key: Key[Array, ""], params_a: Params, params_b: Params, *, rank: int = 8) -> Gated:
    """Makes a gated bridge with closed gates.

    Args:
        key: Random key of the weights.
        params_a: The sender.
        params_b: The receiver.
        rank: Rank of the maps, r. With 8, Qwen3-8B -> Qwen2.5-0.5B has 0.8 M parameters.

    Returns:
        The bridge, float32.

    Raises:
        ValueError: The rank is below 1; the layers of a model differ in their key heads.

    Example:
        >>> from jaxcomm import bridges
        >>> bridges.init_gated(jax.random.key(0), params, params, rank=2).weights["down"].shape
        (2, 4, 2, 128)
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: the maps need at least 1")
    shape = shape_of(params_a.config, params_b.config)
    layers, (width_a, width_b) = shape.layers[1], shape.widths
    down, up = jax.random.split(key)
    draw = lambda key, out, width: width**-0.5 * jax.random.normal(key, (2, layers, out, width))
    gate = {"bias": jnp.zeros((layers, shape.asking))}
    weights = {"down": draw(down, rank, 2 * width_a), "up": draw(up, width_b, rank), "gate": gate}
    return Gated(weights, shape, identity(params_a), identity(params_b))


# C2C ----------------------------------------------------------------------------------------------------------------


def _linear(weights: Any, x: Float[Array, "B P X"]) -> Float[Array, "B P Y"]:
    return jnp.einsum("bpx,yx->bpy", x, weights["weight"]) + weights["bias"]


def _ffn(weights: Any, x: Float[Array, "B P X"]) -> Float[Array, "B P X"]:
    norm = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    inside = jax.nn.gelu(_linear(weights["up"], x * norm * weights["norm"]["scale"]), approximate=False)
    return x + _linear(weights["down"], inside)


def _moved(
    weights: Any, own: Float[Array, "B K P H"], other: Float[Array, "B J P G"], gate: Float[Array, "#B #K #P"]
) -> Float[Array, "B K P H"]:
    """The change to add to the keys, or the values, of one layer."""
    flat = lambda x: jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)
    x = _ffn(weights["block"], _linear(weights["enter"], jnp.concatenate([flat(other), flat(own)], axis=-1)))
    weight = jax.nn.sigmoid(_linear(weights["weigh"]["out"], _ffn(weights["weigh"]["block"], x)))  # [B, P, K]
    made = _linear(weights["project"]["out"], _ffn(weights["project"]["block"], x))
    heads = jnp.swapaxes(made.reshape(*made.shape[:2], own.shape[1], -1), 1, 2)
    return (gate * jnp.swapaxes(weight, 1, 2))[..., None] * heads


def gates(bridge: C2C, step: Int[Array, "2"] | None, sizes: tuple[int, ...]) -> Float[Array, "2 n *_"]:
    """Computes the values of the gates.

    Args:
        bridge: The fuser.
        step: Number of the training step and of its part. None: no random numbers.
        sizes: Number of rows, of heads and of tokens, B, K and P.

    Returns:
        Without a step, 0 or 1 for each gate, [2, n, 1, 1, 1]. In training, sigmoid((logit + g) / T), [2, n, B, K, P].
    """
    logits = bridge.weights["gate"]["bias"][..., None, None, None]
    if step is None:
        return (logits > 0).astype(logits.dtype)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(bridge.seed), step[0]), step[1])
    drawn = jax.random.gumbel(key, (*logits.shape[:2], *sizes), logits.dtype)
    share = step[0].astype(jnp.float32) / max(1, bridge.steps - 1)
    cold = jnp.exp(jnp.log(COLDEST) * jnp.minimum(share, 1.0)).astype(logits.dtype)
    return jax.nn.sigmoid((logits + drawn) / cold)


def _stacked(leaf: Any) -> Array:
    return jnp.stack(leaf) if isinstance(leaf, tuple) else leaf


def fuse(
    bridges: Sequence[C2C],
    own: KVCache,
    others: Sequence[KVCache],
    columns: Sequence[Int[AnyArray, "B P"] | None] | None = None,
    *,
    step: Int[Array, "2"] | None = None,
    again: Callable = lambda fn: fn,
) -> KVCache:
    """Fuses senders' keys and values of a text into the receiver's, in all layers at once.

    Args:
        bridges: A fuser for each sender. Their changes are summed.
        own: Keys and values of the receiver, P tokens.
        others: Keys and values of each sender.
        columns: For each sender, the column of its token that corresponds to each of the receiver's; negative if there is
            none. None: both have the same tokens, and they end in the same column.
        step: Number of the training step and of its part (`gates`). None: gates are open or closed.
        again: Wrapper for the function of every layer in training (`model.Training.checkpointed`).

    Returns:
        The receiver's keys and values, changed where gates are open. Tokens without a sender's token are not changed.

    Example:
        >>> from jaxcomm import bridges
        >>> bridge = bridges.init_c2c(jax.random.key(0), params, params, hidden=8)
        >>> own = jc.prefill(params, prompts)[1]
        >>> bool(jnp.array_equal(bridges.fuse([bridge], own, [own]).k, own.k))
        True
    """
    both = jnp.stack([_stacked(own.k), _stacked(own.v)])
    total = both.astype(jnp.float32)
    for i, (bridge, other) in enumerate(zip(bridges, others, strict=True)):
        count, kind = bridge.weights["gate"]["bias"].shape[1], bridge.weights["gate"]["bias"].dtype
        top = lambda x, count=count, kind=kind: x[:, -count:].astype(kind)
        heard, there = _aligned(own, other, None if columns is None else columns[i])
        opened = gates(bridge, step, both.shape[2:5])
        given = bridge.weights, top(both), top(heard), opened
        flat = jax.tree.map(lambda a, count=count: a.reshape(2 * count, *a.shape[2:]), given)
        added = jax.lax.map(lambda x: again(_moved)(*x), flat).astype(jnp.float32)
        added = jnp.where(there[:, None, :, None], added, 0)
        total = total.at[:, -count:].add(added.reshape(2, count, *added.shape[1:]))
    # With closed gates the keys and values stay bit for bit the same.
    k, v = total.astype(both.dtype)
    if isinstance(own.k, tuple):
        k, v = tuple(k), tuple(v)
    return own.replace(k=k, v=v)


def _aligned(own: KVCache, other: KVCache, columns: Any) -> tuple[Float[Array, "2 L B K P H"], Bool[Array, "B P"]]:
    """A sender's keys and values in the receiver's columns, and which of them exist."""
    both = jnp.stack([_stacked(other.k), _stacked(other.v)])
    P, S = own.positions.shape[1], other.positions.shape[1]
    at = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32) + (S - P), own.positions.shape)
    at = at if columns is None else jnp.asarray(columns, jnp.int32)
    inside = jnp.clip(at, 0, S - 1)
    there = (at >= 0) & (at < S) & (jnp.take_along_axis(other.positions, inside, axis=1) >= 0) & (own.positions >= 0)
    return jnp.take_along_axis(both, inside[None, None, :, None, :, None], axis=4), there


# Gated --------------------------------------------------------------------------------------------------------------


def sources(shape: Shape) -> np.ndarray:
    """Finds, for each of B's layers, the layer of A at the same relative depth.

    Args:
        shape: Sizes of the two models.

    Returns:
        Numbers of layers, from 0, [L_B].
    """
    a, b = shape.layers
    return np.clip(np.round((np.arange(b) + 0.5) * a / b - 0.5), 0, a - 1).astype(int)


def remember(
    bridge: Gated, other: KVCache, positions: Int[Array, "B S"] | None = None, reach: int | None = None
) -> KVCache:
    """Makes a memory from a sender's cache, for `past`. The receiver's prompt then begins at position 0.

    Args:
        bridge: The bridge.
        other: Keys and values of the sender, S tokens.
        positions: Position of each column for the receiver's queries; -1 for an empty column. None: all are at 0.
        reach: How far back the memory is seen. None: without limit.

    Returns:
        Keys and values of the receiver's layers, with gates.

    Example:
        >>> from jaxcomm import bridges
        >>> bridge = bridges.init_gated(jax.random.key(0), params, params, rank=2)
        >>> memory = bridges.remember(bridge, jc.prefill(params, prompts)[1])
        >>> bool(jnp.array_equal(jc.prefill(params, prompts, past=[memory])[0], jc.prefill(params, prompts)[0]))
        True
    """
    layers, weights = sources(bridge.shape), bridge.weights
    kind, dtype = weights["down"].dtype, jax.tree.leaves(other.k)[0].dtype
    both = jnp.stack([_stacked(other.k)[layers], _stacked(other.v)[layers]]).astype(kind)
    _, L, B, _, S, _ = both.shape
    x = both.transpose(1, 2, 4, 0, 3, 5).reshape(L, B, S, 2, -1)
    x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    low = jnp.einsum("plrf,lbsf->plbsr", weights["down"], x.reshape(L, B, S, -1))
    made = jnp.einsum("pler,plbsr->plbse", weights["up"], low)
    k, v = jnp.swapaxes(made.reshape(2, L, B, S, bridge.shape.heads[1], -1), 3, 4).astype(dtype)
    places = jnp.where(other.positions >= 0, 0, -1) if positions is None else positions
    gate = jnp.tanh(weights["gate"]["bias"].astype(jnp.float32))
    return KVCache(k, v, places, begin=jnp.zeros(1, jnp.int32), gate=gate, reach=reach)


# In training --------------------------------------------------------------------------------------------------------


class Bridged(struct.PyTreeNode):
    """A receiver with a bridge, for training (`LanguageModel`). `read` needs `training`.

    Attributes:
        bridge: The bridge.
        a: The sender.
        b: The receiver.
    """

    bridge: C2C | Gated
    a: Params
    b: Params

    @property
    def config(self) -> ModelConfig:
        """Architecture of the receiver."""
        return self.b.config

    def read(
        self, tokens: Int[AnyArray, "B T"], positions: Int[Array, "B T"], *, training: Training
    ) -> tuple[Float[Array, "B T D"], None]:
        """Reads packed texts: the sender first, then the receiver.

        Args:
            tokens: Token ids [B, T] of the receiver.
            positions: Their positions; -1 on padding.
            training: Which tokens form a text, which tokens are learned, and the sender's tokens.

        Returns:
            The receiver's stream before the final norm. With C2C it is meaningless at a prompt's tokens except the last;
            they are not learned.
        """
        kind = _read_fused if isinstance(self.bridge, C2C) else _read_beside
        return kind(self, tokens, positions, training), None

    @property
    def embed(self) -> Float[Array, "V D"]:
        """Embedding matrix of the receiver."""
        return self.b.embed

    @property
    def dtype(self) -> Any:
        """Dtype of the receiver's weights."""
        return self.b.dtype

    def empty_cache(self, batch: int, columns: int, *branches: int) -> KVCache:
        """Makes an empty cache of the receiver.

        Args:
            batch: Number of rows.
            columns: Number of tokens that it has room for.
            *branches: Number of branches, if there are any.

        Returns:
            The cache.
        """
        return self.b.empty_cache(batch, columns, *branches)

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes logits from the result of `read`.

        Args:
            h: The stream before the final norm.

        Returns:
            Logits [B, T, V], float32.
        """
        return self.b.logits(h)


def _kept(model: Params, tokens: Any, positions: Array, training: Training) -> KVCache:
    """Keys and values of packed texts, without gradients."""
    empty, plain = model.empty_cache(*positions.shape), training._replace(remat="off")
    cache = model.read(tokens, positions, attended=Attended(cache=empty), training=plain)[1]
    return jax.lax.stop_gradient(cache.replace(positions=positions))


def answered(learned: Bool[Array, "B T"], positions: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Marks the last token of each prompt and all tokens after it, in packed texts.

    Args:
        learned: Which tokens are learned. The tokens before the first learned one in a text are its prompt.
        positions: Position of each token in its text; -1 on padding.

    Returns:
        Which tokens attend to the fused cache.
    """
    columns = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
    follows = jnp.concatenate([learned[:, 1:] & (positions[:, 1:] > 0), jnp.zeros_like(learned[:, :1])], axis=1)
    latest = jax.lax.cummax(jnp.where(follows, columns, -1), axis=1)
    return (latest >= columns - positions) & (positions >= 0)


def _read_fused(model: Bridged, tokens: Any, positions: Array, training: Training) -> Array:
    """A and B read the texts. The prompts' keys and values are fused. B reads the last tokens and the answers again."""
    bridge: Any = model.bridge
    assert training.learned is not None
    after = answered(training.learned, positions)
    alone = training._replace(learned=None, told=None, step=None)
    own, columns = _kept(model.b, tokens, positions, alone), None
    if (told := training.told) is None:
        other = _kept(model.a, tokens, positions, alone)
    else:
        documents, columns = jnp.asarray(told.documents), told.columns
        other = _kept(model.a, told.tokens, positions_in(documents), alone._replace(documents=documents))
    fused = fuse([bridge], own, [other], [columns], step=training.step, again=training.checkpointed)
    places = training.places(positions)[0]
    past = fused.replace(positions=jnp.where(after, -1, places))
    attended = Attended([past])
    return model.b.read(tokens, jnp.where(after, positions, -1), attended=attended, training=training)[0]


def _read_beside(model: Bridged, tokens: Any, positions: Array, training: Training) -> Array:
    """A reads its own texts. B reads its texts, each with the memory of A's text."""
    bridge: Any = model.bridge
    if (told := training.told) is None:
        raise ValueError("the sender of this bridge reads a text of its own: give documents of three parts")
    documents = jnp.asarray(told.documents)
    own = training._replace(documents=documents, learned=None, told=None, step=None)
    there = positions_in(documents)
    other = _kept(model.a, told.tokens, there, own)
    # A text's memory gets the position at which the text begins in B's mask (`Training.places`). No other text reaches it.
    longest = positions.shape[1]
    memory = remember(bridge, other, jnp.where(there < 0, -1, 2 * longest * documents), longest)
    return model.b.read(tokens, positions, attended=Attended([memory]), training=training)[0]
