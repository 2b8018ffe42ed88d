"""The key/value cache as a pytree, and `Attended`, which says what tokens attend to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxcomm.attention import Aside, Segment, rows_for
from jaxcomm.config import AnyArray


class DeltaState(NamedTuple):
    """What a layer with linear attention keeps of all tokens that it has read (`layers.DeltaNet`).

    With C branches, C is the second axis of both arrays.

    Attributes:
        inputs: The last tokens before the convolution, [B, kernel - 1, channels]; 0 before the first token.
        memory: The matrix of each head, [B, heads, X, Y], float32.
    """

    inputs: Float[Array, "B *C _ _"]
    memory: Float[Array, "B *C _ _ _"]


class KVCache(struct.PyTreeNode):
    """Keys and values of S tokens (columns) for every layer.

    Attention masks depend on `positions` only, so the order of the columns has no meaning. In the cache of a network
    (`jaxcomm.lmnet`), k and v are dicts with an entry for each vertex and edge. `layer` and `write` then apply to the
    cache of one entry, not to the whole cache.

    Attributes:
        k: Keys [L, B, K, S, H] for stacked layers, or L arrays [B, K, S, H] for unrolled ones (`jaxcomm.model`), whose K and
            H may differ. With C branches (`attention.Segment`) the last axes are [.., K, C, S, H].
        v: Values, in the same shape.
        positions: Position of the token in each column, [B, S], or [B, C, S] with branches. It is -1 for an empty
            column: left padding, or a column that is not written yet.
        seen: Which columns each layer sees, if not all: bool [L, R, S], where R and S may be 1. R is the number of
            prompts that follow the cache. It may be a multiple of B (`rows_for`).
        begin: Position of the first token after the cache, [R] or [1]. None: the position after its last token.
        back: For causal masks between the tokens after the cache, each layer subtracts this from the keys' positions,
            [L, R] (`prefixes.select`, `future`). A token then also sees that many later tokens. None: 0.
        gate: Gates of each layer's query heads, [L, N]. The columns then have their own softmax, and its result times the
            gate is added to the other attention (`attention.Aside`). None: they share one softmax with other columns.
        reach: How far back columns with a gate are seen. None: without limit.
        states: States of the layers with linear attention, after the cache's last token; None for other layers. Such a layer
            has 0 key heads of size 0 in k and v. Empty: the model has no such layer.

    Example:
        >>> logits, cache = jc.prefill(params, prompts)
        >>> cache.k.shape
        (4, 2, 2, 3, 32)
    """

    k: PyTree[Float[Array, "..."]]
    v: PyTree[Float[Array, "..."]]
    positions: Int[Array, "B ..."]
    seen: Bool[Array, "L _ _"] | None = None
    begin: Int[Array, "_"] | None = None
    back: Int[Array, "L _"] | None = None
    gate: Float[Array, "L N"] | None = None
    reach: int | None = struct.field(pytree_node=False, default=None)
    states: tuple[DeltaState | None, ...] = ()

    def extend(self, columns: int) -> KVCache:
        """Adds empty columns at the end.

        Args:
            columns: Number of new columns.

        Returns:
            The longer cache.
        """
        free = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, columns), (0, 0)])
        positions = jnp.pad(self.positions, [(0, 0)] * (self.positions.ndim - 1) + [(0, columns)], constant_values=-1)
        return self.replace(k=jax.tree.map(free, self.k), v=jax.tree.map(free, self.v), positions=positions)

    def announce(self, positions: Int[Array, "B T"], column) -> KVCache:
        """Sets the positions of tokens whose keys and values are already written, or will be written next.

        Args:
            positions: Positions [B, T] of the tokens. With branches, T counts the tokens of all branches.
            column: Their first column, the same in every branch.

        Returns:
            The cache with these positions.
        """
        new = positions.reshape(*self.positions.shape[:-1], -1)
        return self.replace(positions=jax.lax.dynamic_update_slice_in_dim(self.positions, new, column, axis=-1))

    def layer(self, i) -> Segment | Aside:
        """Returns the part of the cache that one layer attends to.

        Args:
            i: Number of the layer, from 0. It may be traced if the layers are stacked.

        Returns:
            Keys, values and positions of the layer.
        """
        index = lambda a: a[i] if isinstance(a, tuple) else jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
        positions = self.positions
        if self.seen is not None:
            seen = index(self.seen)
            positions = jnp.where(seen, rows_for(positions, max(len(seen), len(positions))), -1)
        segment = index(self.k), index(self.v), positions
        return segment if self.gate is None else Aside(segment, index(self.gate), self.reach)

    def after(self) -> Int[Array, "_"]:
        """Finds the position of the first token after the cache.

        Returns:
            One position for each row, or one for each following prompt, or one for all.
        """
        return self.positions.max(axis=-1) + 1 if self.begin is None else self.begin

    @property
    def columns_seen(self) -> np.ndarray:
        """Number of columns that each layer sees, [L, R] (R is B, or the number of following prompts)."""
        real = np.asarray(self.positions) >= 0
        if self.seen is None:
            return np.broadcast_to(real.sum(axis=-1), (len(self.k), len(real)))
        seen = np.asarray(self.seen)
        real = np.repeat(real, max(1, seen.shape[1] // len(real)), axis=0)
        return (seen & real).sum(axis=-1)

    @property
    def bytes(self) -> np.ndarray:
        """Number of bytes of the keys and values that some layer sees, and of the states, [R]."""
        total, size = sum(leaf.nbytes for leaf in jax.tree.leaves((self.k, self.v))), max(1, self.positions.size)
        if self.seen is None:
            states = sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(self.states))
            return total // size * (np.asarray(self.positions) >= 0).sum(axis=-1) + states
        if isinstance(self.k, tuple):
            column = np.array(
                [[(k.nbytes + v.nbytes) // size] for k, v in zip(self.k, self.v, strict=True)]
            )  # by layer
        else:
            column = total // size // len(self.k)
        return (column * self.columns_seen).sum(axis=0)

    @property
    def indivisible(self) -> bool:
        """Whether it can only be used whole, because layers with linear attention hold one state of all its tokens."""
        return bool(self.states)

    def take(self, rows: AnyArray) -> KVCache:
        """Selects rows, in any order.

        Args:
            rows: Their indices.

        Returns:
            A cache with as many rows.
        """
        pick = lambda a, axis: a if a is None or a.shape[axis] == 1 < len(self.positions) else jnp.take(a, rows, axis)
        k, v = jax.tree.map(lambda a: jnp.take(a, rows, axis=-4), (self.k, self.v))
        about = dict(seen=pick(self.seen, 1), begin=pick(self.begin, 0), back=pick(self.back, 1))
        states = jax.tree.map(lambda a: jnp.take(a, rows, axis=0), self.states)
        return self.replace(k=k, v=v, states=states, positions=self.positions[rows], **about)

    def write(self, i, k: Array, v: Array, column) -> KVCache:
        """Writes keys and values of one layer. `announce` sets their positions.

        Args:
            i: Number of the layer, from 0. It may be traced if the layers are stacked.
            k: Keys [B, K, T, H].
            v: Values [B, K, T, H].
            column: First column to write.

        Returns:
            The cache with these keys and values.
        """
        k, v = (a.reshape(*a.shape[:2], *self.positions.shape[1:-1], -1, a.shape[-1]) for a in (k, v))
        if isinstance(self.k, tuple):
            put = lambda old, new: (
                *old[:i],
                jax.lax.dynamic_update_slice_in_dim(old[i], new, column, axis=-2),
                *old[i + 1 :],
            )
        else:
            put = lambda old, new: jax.lax.dynamic_update_slice(
                old, new[None], (i, *(0 for _ in new.shape[:-2]), column, 0)
            )
        return self.replace(k=put(self.k, k), v=put(self.v, v))

    def remember(self, i: int, state: DeltaState) -> KVCache:
        """Replaces the state of one layer with linear attention.

        Args:
            i: Number of the layer, from 0.
            state: Its state after the tokens that are in the cache now.

        Returns:
            The cache with this state.
        """
        return self.replace(states=(*self.states[:i], state, *self.states[i + 1 :]))


class Attended(NamedTuple):
    """The caches that tokens attend to, and the cache for their own keys and values.

    Attributes:
        past: Read-only caches to attend to.
        cache: Cache for the tokens' own keys and values. With a `column` (decoding), they are written there, the cache's
            `positions` must already include them, and tokens attend to the whole cache. Without it (prefill), they fill
            the cache.
        column: The first column to write.
        branches: Number of groups among the T tokens of a row. The groups do not see each other (`attention.Segment`).
    """

    past: Sequence[KVCache] = ()
    cache: KVCache | None = None
    column: int | Int[Array, ""] | None = None
    branches: int | None = None

    def segments(
        self, layer: Any, positions: Int[Array, "B T"], k: Array, v: Array
    ) -> tuple[tuple[Segment | Aside, ...], KVCache | None]:
        """Finds what the queries of one layer attend to.

        Args:
            layer: Number of the layer, from 0. It may be traced if the layers are stacked.
            positions: Positions [B, T] of the tokens.
            k: The tokens' own keys [B, K, T, H].
            v: Their values.

        Returns:
            The segments, and the cache with these keys and values.
        """
        own, kept = (k, v, positions), self.cache
        for back in (cache.back for cache in self.past if cache.back is not None):
            # Only the tokens' view of each other changes. (+ 0 makes a copy, since ordered keys are read in blocks.)
            own = own[0] + 0, v, jnp.where(own[2] < 0, -1, jnp.maximum(own[2] - back[layer][:, None], 0))
        if self.branches is not None:
            split = lambda a, axis: a.reshape(*a.shape[:axis], self.branches, -1, *a.shape[axis + 1 :])
            own = split(k, 2), split(v, 2), split(positions, 1)
        if self.cache is not None:
            # Write first, then read. In the other order XLA copies the whole cache at every token.
            kept = self.cache.write(layer, k, v, 0 if self.column is None else self.column)
            own = own if self.column is None else kept.layer(layer)
        return (*(p.layer(layer) for p in self.past), own), kept

    def carry(
        self,
        layer: int,
        positions: Int[Array, "B T"],
        step: Callable,
        x: PyTree[Float[Array, "B T ..."]],
        blank: DeltaState,
    ) -> tuple[Float[Array, "B T ..."], KVCache | None]:
        """Runs a layer with linear attention.

        The layer goes on from the state of the tokens' own cache; or, if that cache holds nothing before them, from the
        state of the last past cache.

        Args:
            layer: Number of the layer, from 0.
            positions: Positions [B, T] of the tokens.
            step: Function (state, x, positions) -> (result, state). It reads tokens after a state: arrays x [b, t, ..].
            x: Arrays of all tokens.
            blank: The state before any token, one row.

        Returns:
            The result for each token, and the cache with the new states.
        """
        rows, own = len(positions), self.cache
        branches = self.branches or (1 if own is None else math.prod(own.positions.shape[1:-1]))
        split = lambda a: a.reshape(rows * branches, -1, *a.shape[2:])
        flat = lambda a, axes: a.reshape(rows * branches, *a.shape[-axes:])
        each = lambda a: jnp.repeat(jnp.broadcast_to(rows_for(a, rows), (rows, *a.shape[1:])), branches, axis=0)
        state, read = jax.tree.map(each, self.past[-1].states[layer] if self.past else blank), split(positions)
        if own is not None:
            places = flat(own.positions, 1)
            first = jnp.min(jnp.where(read < 0, np.iinfo(np.int32).max, read), axis=-1, keepdims=True)
            begun = jnp.any((places >= 0) & (places < first), axis=-1)
            choose = lambda new, old: jnp.where(begun.reshape(-1, *(1,) * (old.ndim - 1)), flat(new, old.ndim - 1), old)
            state = jax.tree.map(choose, own.states[layer], state)
        out, state = step(state, jax.tree.map(split, x), read)
        if own is not None:
            own = own.remember(layer, jax.tree.map(lambda a, old: a.reshape(old.shape), state, own.states[layer]))
        return out.reshape(rows, -1, *out.shape[2:]), own


def in_order(past: Sequence[KVCache], rows: int) -> Bool[Array, "B"]:
    """Finds rows whose caches follow each other, as linear attention needs them.

    Args:
        past: The caches.
        rows: Number of prompts that follow them.

    Returns:
        Whether each cache begins after the end of the one before it.
    """
    late = np.iinfo(np.int32).max
    ends = [rows_for(cache.positions.max(axis=-1), rows) for cache in past[:-1]]
    begins = [rows_for(jnp.where(c.positions < 0, late, c.positions).min(axis=-1), rows) for c in past[1:]]
    follow = [end < begin for end, begin in zip(ends, begins, strict=True)]
    return functools.reduce(jnp.logical_and, follow, jnp.ones(rows, bool))


ALONE = Attended()
"""No caches: tokens attend only to each other."""
