"""Linear attention by the gated delta rule (Yang et al. 2024, arXiv 2412.06464), with the short convolution before it.

Pure functions of queries, keys, values and a state. `layers.DeltaNet` is the layer, `cache.DeltaState` the state between calls.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcomm.cache import DeltaState
from jaxcomm.config import DeltaRule

CHUNK = 64
"""Number of tokens that `delta_rule` reads at once."""


def blank_state(rule: DeltaRule, dtype: Any, *rows: int) -> DeltaState:
    """The state before any token, with these leading axes."""
    return DeltaState(
        jnp.zeros((*rows, rule.kernel - 1, rule.channels), dtype),
        jnp.zeros((*rows, rule.value_heads, rule.key_dim, rule.value_dim), jnp.float32),
    )


def convolve(
    kernel: Float[Array, "E W"], before: Float[Array, "B _ E"], x: Float[Array, "B T E"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T E"], Float[Array, "B _ E"]]:
    """A causal convolution of each channel, over W tokens. before: the W - 1 tokens before x. Padding on the left of x, which
    is 0, is left out. Returns the result, and the W - 1 tokens before the next call."""
    T, W = x.shape[1], kernel.shape[1]
    padding = jnp.sum(jnp.cumprod(positions < 0, axis=1, dtype=jnp.int32), axis=1)[:, None, None]
    whole = jnp.pad(x, [(0, 0), (W - 1, 0), (0, 0)])
    column = jnp.arange(T + W - 1, dtype=jnp.int32)[None, :, None] - padding  # counted from the end of the padding
    for n in range(W - 1):
        whole = jnp.where(column == n, before[:, n : n + 1].astype(x.dtype), whole)
    taps = [kernel[:, n].astype(jnp.float32) * whole[:, n : n + T].astype(jnp.float32) for n in range(W)]
    return functools.reduce(jnp.add, taps).astype(x.dtype), whole[:, T:]


def split_heads(rule: DeltaRule, x: Float[Array, "B T E"]) -> tuple[Array, Array, Array]:
    """Queries and keys [B, T, N, X], of length 1 (queries: 1 / sqrt(X)), and values [B, T, N, Y], all float32. Each query
    and key head serves consecutive value heads."""
    wide, keys = x.astype(jnp.float32), rule.key_heads * rule.key_dim
    of = lambda part, heads: part.reshape(*x.shape[:2], heads, -1)
    q, k = (of(wide[..., n * keys :][..., :keys], rule.key_heads) for n in range(2))
    q, k = (a * jax.lax.rsqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-6) for a in (q, k))
    q, k = (jnp.repeat(a, rule.value_heads // rule.key_heads, axis=2) for a in (q * rule.key_dim**-0.5, k))
    return q, k, of(wide[..., 2 * keys :], rule.value_heads)


def delta_rule(
    memory: Float[Array, "B N X Y"],
    q: Float[Array, "B T N X"],
    k: Float[Array, "B T N X"],
    v: Float[Array, "B T N Y"],
    decay: Float[Array, "B T N"],
    strength: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N Y"], Float[Array, "B N X Y"]]:
    """The gated delta rule over tokens t, for each head (Yang et al. 2024, arXiv 2412.06464, equation 10):

        S_t = exp(decay_t) S_(t-1) + strength_t k_t (v_t - exp(decay_t) S_(t-1)^T k_t)^T,   o_t = S_t^T q_t

    Tokens are read in chunks. Within a chunk the writes u of all tokens solve a triangular system (section 3.3 there); from
    chunk to chunk only S is carried. A token of strength 0 and decay 0 changes nothing.

    Args:
        memory: S before the first token.
        q: Queries.
        k: Keys.
        v: Values.
        decay: Logarithm of the factor on S, at most 0.
        strength: How much of the difference is written, 0 to 1.

    Returns:
        The o of each token, and S after the last one, float32.
    """
    T = q.shape[1]
    product = functools.partial(jnp.einsum, precision="highest")  # S carries errors on to all later tokens
    size = min(CHUNK, T)
    count = -(-T // size)

    def chunked(a: Array) -> Array:  # [chunks, B, N, size, ..]
        a = jnp.pad(a, [(0, 0), (0, count * size - T), *[(0, 0)] * (a.ndim - 2)])
        return jnp.moveaxis(a.reshape(len(a), count, size, *a.shape[2:]), (1, 3), (0, 2))

    def read(S: Array, given: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, decay, strength = given
        total = jnp.cumsum(decay, axis=-1)
        # Sums from j to i, each on its own: a difference of two totals would lose digits where the decay is fast.
        after = jnp.tril(jnp.broadcast_to(decay[..., :, None], (*decay.shape, size)), -1)
        between = jnp.tril(jnp.exp(jnp.cumsum(after, axis=-2)))
        since, left = jnp.exp(total)[..., None], between[..., -1, :, None]
        system = product("bnix,bnjx->bnij", k * strength[..., None], k) * between
        asked = (v - since * product("bnix,bnxy->bniy", k, S)) * strength[..., None]
        u = jax.lax.linalg.triangular_solve(system, asked, left_side=True, lower=True, unit_diagonal=True)
        out = since * product("bnix,bnxy->bniy", q, S)
        out += product("bnij,bnjy->bniy", product("bnix,bnjx->bnij", q, k) * between, u)
        return since[..., -1:, :] * S + product("bnix,bniy->bnxy", k * left, u), out

    memory, out = jax.lax.scan(read, memory, tuple(map(chunked, (q, k, v, decay, strength))))
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(len(q), count * size, *v.shape[2:])[:, :T], memory
