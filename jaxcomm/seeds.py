"""Random seeds for text-level functions: one for all rows, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

Seed = int | np.integer | Sequence[int] | np.ndarray
"""One seed for all rows (each row still gets its own random stream), or one for each row. With its own seed, a row gets
the same random numbers in any batch."""


def row_keys(seed: Seed, rows: int) -> jax.Array:
    """A random key for every row, from one seed or from a seed for each."""
    if np.ndim(seed) == 0:
        return jax.random.split(jax.random.key(int(seed)), rows)  # pyright: ignore[reportArgumentType]
    return jax.vmap(jax.random.key)(np.asarray(seed, np.uint32))


def derive_seed(seed: Seed, n: int) -> Seed:
    """The n-th seed derived from `seed`. Seeds of rows are hashed first, so that neighbouring rows get unrelated streams."""
    if np.ndim(seed) == 0:
        return int(seed) + n  # pyright: ignore[reportArgumentType]
    return (np.asarray(seed, np.uint64) + np.uint64(n * 2654435761)) % np.uint64(2**32)


def one_seed(seed: Seed) -> int:
    """One seed for all rows, derived from the rows' seeds. Use it for random choices that concern all rows."""
    return int(np.asarray(seed, np.uint64).sum() % 2**32)
