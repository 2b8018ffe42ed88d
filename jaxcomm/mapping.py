"""The map W from A's activation space to B's, in closed form.

Ramesh & Li (section 3.1) learn W by gradient descent on ||W h_A[k] - h_B[j]||^2 over final tokens of the same
sentences; the minimiser has a formula, and one pass over the sentences serves every (k, j).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def fit_maps(
    states_a: Float[Array, "LA n DA"], states_b: Float[Array, "LB n DB"], *, ridge: float = 1e-3
) -> Float[Array, "LA LB DB DA"]:
    """W[k, j] = argmin_W sum_n ||W a_n - b_n||^2 + r ||W||^2, for the states of n sentences at every layer.

    r = ridge x the mean square of that layer's states per dimension x n, so `ridge` has no unit. float32 at full
    precision (accelerators would round the Gram matrices to TF32 or bfloat16). The result holds every map: pass a slice
    of the states, states_a[k : k + 1], for one.
    """
    with jax.default_matmul_precision("highest"):
        return _fit_maps(states_a, states_b, ridge)


@jax.jit
def _fit_maps(states_a, states_b, ridge):
    a, b = states_a.astype(jnp.float32), states_b.astype(jnp.float32)

    def one_layer(a):
        gram = a.T @ a
        penalty = ridge * jnp.trace(gram) / a.shape[1] * jnp.eye(a.shape[1], dtype=jnp.float32)
        factor = jax.scipy.linalg.cho_factor(gram + penalty)
        return jax.vmap(lambda b: jax.scipy.linalg.cho_solve(factor, a.T @ b).T)(b)

    return jax.lax.map(one_layer, a)
