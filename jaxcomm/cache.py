"""Keys and values of tokens already read, as a pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from jaxcomm.layers import Segment


class KVCache(struct.PyTreeNode):
    """Keys and values of S columns for every layer.

    k, v: [L, B, K, S, H], or a tuple of L arrays [B, K, S, H], laid out as the blocks of the `Params` that made them
    (`jaxcomm.model`). positions: [B, S], the position of the token in each column, -1 where there is none (left
    padding, columns not yet written). Attention needs nothing else to mask, so the order of columns means nothing.
    With C branches (`layers.Segment`): [.., K, C, S, H] and [B, C, S].

    Of a network (`jaxcomm.lmnet`), k and v are trees of such, and `layer` and `write` belong to their parts.
    """

    k: Any
    v: Any
    positions: Any

    def extend(self, columns: int) -> KVCache:
        """The same with so many free columns after it."""
        free = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, columns), (0, 0)])
        positions = jnp.pad(self.positions, [(0, 0)] * (self.positions.ndim - 1) + [(0, columns)], constant_values=-1)
        return KVCache(jax.tree.map(free, self.k), jax.tree.map(free, self.v), positions)

    def announce(self, positions: Int[Array, "B T"], column) -> KVCache:
        """The positions of tokens that are, or are about to be, written into columns `column`.. (of every branch)."""
        new = positions.reshape(*self.positions.shape[:-1], -1)
        return self.replace(positions=jax.lax.dynamic_update_slice_in_dim(self.positions, new, column, axis=-1))

    def layer(self, i) -> Segment:
        """What layer i attends to; i counts from 0 and may be traced if the cache is stacked."""
        if isinstance(self.k, tuple):
            return self.k[i], self.v[i], self.positions
        index = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
        return index(self.k), index(self.v), self.positions

    def write(self, i, k: Array, v: Array, column) -> KVCache:
        """Layer i's keys and values [B, K, T, H] into columns `column`.. (`announce` says whose)."""
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
