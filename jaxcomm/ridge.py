"""Ridge regression from sums: one pass over the rows, without storing them.

`mapping` fits maps W of states this way, `kv_mapping` fits maps of keys and values. There are two sums: over the rows to
fit on, and over the held-out rows. The ridge is chosen on the held-out rows, then the map is fitted on all rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 10
"""Every tenth text is held out, to choose the ridge and to measure the error."""


class Moments(struct.PyTreeNode):
    """Sums over n rows, which are all the closed form needs.

    Attributes:
        aa: Sum of a a^T for each layer of A, [K, D_A, D_A]; of one layer, [D_A, D_A].
        ab: Sum of a b^T for each pair of layers, [K, J, D_A, D_B]; of one layer of A, [J, D_A, D_B].
        bb: Sum of the squares of b for each layer of B, [J].
    """

    aa: Float[Array, "*K DA DA"]
    ab: Float[Array, "*K J DA DB"]
    bb: Float[Array, "J"]

    @classmethod
    def of(cls, a: Float[Array, "K n DA"], b: Float[Array, "J n DB"]) -> Moments:
        """Sums the products of one batch.

        Args:
            a: Rows of A, [K, n, D_A].
            b: Rows of B, [J, n, D_B].

        Returns:
            The sums over the n rows.
        """
        return cls(jnp.einsum("knd,kne->kde", a, a), jnp.einsum("knd,jne->kjde", a, b), jnp.einsum("jnd,jnd->j", b, b))


@functools.partial(jax.jit, donate_argnums=0)
def add(sums: tuple[Moments, Moments] | None, a, b, held) -> tuple[Moments, Moments]:
    """Adds a batch to both sums: of the rows to fit on, and of the rows held out (`held` [n]). Uses full float32 precision;
    by default accelerators would round the products to TF32 or bfloat16."""
    with jax.default_matmul_precision("highest"):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        new = tuple(Moments.of(jnp.where(use[:, None], a, 0), jnp.where(use[:, None], b, 0)) for use in (~held, held))
        return new if sums is None else jax.tree.map(jnp.add, sums, new)  # pyright: ignore[reportReturnType]


class Regression(NamedTuple):
    """Maps fitted from one layer of A.

    Attributes:
        W: A map into each of B's layers, [J, D_B, D_A].
        error: Their errors on the held-out rows, [J].
        ridge: Their ridges, [J].
    """

    W: Float[Array, "*K J DB DA"]
    error: Float[Array, "*K J"]
    ridge: Float[Array, "*K J"]


def _penalty(aa: Array, ridge: Array, intercept: bool) -> Array:
    """The penalty on the diagonal of aa: ridge x n x (mean square per dimension). The intercept gets none."""
    squares = jnp.diag(aa)
    if not intercept:
        return jnp.full_like(squares, ridge * jnp.mean(squares))
    centred = squares[:-1] - aa[-1, :-1] ** 2 / aa[-1, -1]
    return jnp.full_like(squares, ridge * jnp.mean(centred)).at[-1].set(0)


def regress(fit: Moments, held: Moments, ridges: Float[Array, "n"], *, intercept: bool = False) -> Regression:
    """Fits a map from one layer of A to each layer of B. Call it inside a compiled program.

    W minimises sum_n ||W a_n - b_n||^2 + r ||W||^2 with r = ridge x n x (mean square of A's rows per dimension), so the
    ridge has no unit. For each layer of B, the ridge with the smallest error on the held-out rows is chosen. W is then
    fitted on all rows. The error is the mean square of W a - b, divided by that of b.

    With `intercept`, the last number of each of A's rows is 1, and its column of W is the intercept. It is not penalised.
    Mean squares are taken about the mean, so the error is 1 - R^2. The result is the same as for centred rows. Rows should
    not be far from 0, or float32 loses their variation.

    Args:
        fit: Sums of the rows to fit on, of one layer of A: aa [D_A, D_A], ab [J, D_A, D_B], bb [J].
        held: Sums of the rows that are held out.
        ridges: Values to choose from.
        intercept: Whether the last number of A's rows is 1.

    Returns:
        The maps, their errors and their ridges.
    """
    whole = jax.tree.map(jnp.add, fit, held)

    def solve(sums: Moments, ridge: Array) -> Array:
        factor = jax.scipy.linalg.cho_factor(sums.aa + jnp.diag(_penalty(sums.aa, ridge, intercept)))
        return jax.vmap(lambda ab: jax.scipy.linalg.cho_solve(factor, ab).T)(sums.ab)

    def error(ridge: Array) -> Array:
        W = solve(fit, ridge)
        explained = 2 * jnp.einsum("jed,jde->j", W, held.ab) - jnp.einsum("jed,df,jef->j", W, held.aa, W)
        spread = held.bb - jnp.sum(held.ab[:, -1] ** 2, axis=-1) / held.aa[-1, -1] if intercept else held.bb
        return (held.bb - explained) / spread

    errors = jax.lax.map(error, ridges)  # [ridges, J]
    best = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors), axis=0)
    if len(best) == 1:
        W = solve(whole, ridges[best[0]])
    else:  # ridge by ridge, since one factorisation serves every j
        choose = lambda i, W: jnp.where((best == i)[:, None, None], solve(whole, ridges[i]), W)
        W = jax.lax.fori_loop(0, len(ridges), choose, jnp.swapaxes(jnp.zeros_like(fit.ab), 1, 2))
    return Regression(W, jnp.take_along_axis(errors, best[None], axis=0)[0], ridges[best])


def regress_each(fit: Moments, held: Moments, ridges: Float[Array, "n"], *, intercept: bool = False) -> Regression:
    """Calls `regress` for every layer of A, one after the other.

    Args:
        fit: Sums of the rows to fit on.
        held: Sums of the rows that are held out.
        ridges: Values to choose from.
        intercept: Whether the last number of A's rows is 1.

    Returns:
        The maps [K, J, D_B, D_A], their errors and their ridges [K, J].
    """
    one = lambda at: regress(
        fit.replace(aa=at[0], ab=at[1]), held.replace(aa=at[2], ab=at[3]), ridges, intercept=intercept
    )
    return jax.lax.map(one, (fit.aa, fit.ab, held.aa, held.ab))
