"""The map W from A's activation space to B's, in closed form.

Ramesh & Li (section 3.1) learn one W per (k, j) by gradient descent on ||W h_A[k] - h_B[j]||^2 over final tokens of the
same sentences. The minimiser needs only sums over sentences, so one pass over the text serves every (k, j) and no
activation outlives its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from jaxcomm.config import AnyArray
from jaxcomm.model import Params, check_layer, hidden_states

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 10
"""Every tenth sentence is kept back to choose the ridge on."""


class Maps(struct.PyTreeNode):
    """W [K, J, D_B, D_A] from each of K layers of A to each of J layers of B; ridge [K, J], the one chosen;
    error [K, J]: of a fit without the held-out sentences on these, as a share of the mean square of h_B[j]."""

    W: Any
    ridge: Any
    error: Any


class Moments(struct.PyTreeNode):
    """Sums over n sentences: aa [K, D_A, D_A], ab [K, J, D_A, D_B], bb [J] (of squares)."""

    aa: Any
    ab: Any
    bb: Any

    @classmethod
    def of(cls, a: Float[Array, "K n DA"], b: Float[Array, "J n DB"]) -> Moments:
        return cls(jnp.einsum("knd,kne->kde", a, a), jnp.einsum("knd,jne->kjde", a, b), jnp.einsum("jnd,jnd->j", b, b))


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: tuple[Moments, Moments] | None, a, b, held):
    """Moments of the sentences to fit on and of those `held` [n] out, with these added. float32 at full precision
    (accelerators would round the products to TF32 or bfloat16)."""
    with jax.default_matmul_precision("highest"):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        new = tuple(Moments.of(jnp.where(use[:, None], a, 0), jnp.where(use[:, None], b, 0)) for use in (~held, held))
        return new if sums is None else jax.tree.map(jnp.add, sums, new)


@jax.jit
def _solve(fit: Moments, held: Moments, ridges) -> Maps:
    def solve(aa, ab, ridge):
        """W [J, D_B, D_A] at one k."""
        penalty = ridge * jnp.trace(aa) / aa.shape[0] * jnp.eye(aa.shape[0], dtype=aa.dtype)
        factor = jax.scipy.linalg.cho_factor(aa + penalty)
        return jax.vmap(lambda ab: jax.scipy.linalg.cho_solve(factor, ab).T)(ab)

    def at(moments):
        (aa, ab), (held_aa, held_ab) = moments

        def error(ridge):
            W = solve(aa, ab, ridge)
            explained = 2 * jnp.einsum("jed,jde->j", W, held_ab) - jnp.einsum("jed,df,jef->j", W, held_aa, W)
            return 1 - explained / held.bb

        errors = jax.lax.map(error, ridges)  # [ridges, J]
        best = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors), axis=0)
        # Once more with every sentence: ridge by ridge, since one factorisation serves every j.
        choose = lambda i, W: jnp.where((best == i)[:, None, None], solve(aa + held_aa, ab + held_ab, ridges[i]), W)
        W = jax.lax.fori_loop(0, len(ridges), choose, jnp.swapaxes(jnp.zeros_like(ab), 1, 2))
        return Maps(W, ridges[best], jnp.take_along_axis(errors, best[None], axis=0)[0])

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(at, ((fit.aa, fit.ab), (held.aa, held.ab)))


_states = jax.jit(functools.partial(hidden_states, last=True))


def fit_maps(
    params_a: Params,
    params_b: Params,
    batches: Iterable[tuple[tuple[AnyArray, AnyArray], tuple[AnyArray, AnyArray]]],
    *,
    ks: Sequence[int],
    js: Sequence[int],
    ridges: Sequence[float] = RIDGES,
) -> Maps:
    """W[k, j] = argmin_W sum_n ||W a_n - b_n||^2 + r ||W||^2 for every (k, j), from one pass over the text.

    batches: ((tokens_a, mask_a), (tokens_b, mask_b)), [n, P] each, of the same n sentences in both models' tokens.
    r = ridge x the mean square of A's states per dimension x sentences, so `ridge` has no unit. It is chosen for each
    (k, j) on every tenth sentence, after fitting on the others; W is then fitted on all.

    Memory: one batch's states, and five times K D_A^2 + K J D_A D_B float32 numbers (two sums, a batch's own two, the
    result): for large models take few layers at a time. ValueError: a layer out of range, no ridge, fewer than ten
    sentences, batches of unequal numbers of sentences.
    """
    if not len(ks) or not len(js) or not len(ridges):
        raise ValueError("ks, js and ridges need at least one value each")
    for k in ks:
        check_layer(params_a, k)
    for j in js:
        check_layer(params_b, j, "j")
    sums, seen = None, 0
    for (tokens_a, mask_a), (tokens_b, mask_b) in batches:
        if len(tokens_a) != len(tokens_b):
            raise ValueError(
                f"a batch has {len(tokens_a)} sentences for A and {len(tokens_b)} for B: give both the same"
            )
        a = _states(params_a, tokens_a, mask=mask_a)[np.array(ks)]
        b = _states(params_b, tokens_b, mask=mask_b)[np.array(js)]
        held = (seen + np.arange(len(tokens_a))) % HELD_OUT == HELD_OUT - 1
        sums, seen = _add(sums, a, b, held), seen + len(tokens_a)
    if sums is None or seen < HELD_OUT:
        raise ValueError(f"{seen} sentences: fitting W needs at least {HELD_OUT}, one of which is held out")
    return _solve(*sums, jnp.asarray(ridges, jnp.float32))
