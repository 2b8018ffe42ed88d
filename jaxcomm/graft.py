"""How a receiver's activation b becomes f(a, b) (Ramesh & Li 2025, section 3.1).

With unequal widths, d = min(D_A, D_B): f acts on the last d entries of both, b's first D_B - d stay (footnote 1).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomm.config import AnyArray

Graft = str | Callable[[Array, Array], Array]
"""A name in `GRAFTS`, or any function of the aligned parts (a, b), each [..., d], that returns [..., d]."""

GRAFTS: dict[str, Callable[[Array, Array], Array]] = {
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "replace": lambda a, b: a,
}


def resolve(graft: Graft) -> Callable[[Array, Array], Array]:
    """The function of a name. ValueError for a name that is not one."""
    if callable(graft):
        return graft
    if graft not in GRAFTS:
        raise ValueError(f"unknown graft {graft!r}: choose one of {', '.join(GRAFTS)}, or pass a function f(a, b)")
    return GRAFTS[graft]


def carry(a: Float[Array, "*n DA"], W: Float[AnyArray, "_ _"], width: int) -> Float[Array, "*n DB"]:
    """W a, for W [width, D_A]. ValueError for another shape."""
    if W.shape != (width, a.shape[-1]):
        raise ValueError(
            f"W is {W.shape}, but maps from width {a.shape[-1]} to width {width}: it must be {(width, a.shape[-1])}"
        )
    return jnp.einsum("...i,oi->...o", a.astype(W.dtype), W)


def apply_graft(
    graft: Graft, a: Float[Array, "*n DA"], b: Float[Array, "*n DB"], W: Float[AnyArray, "_ _"] | None = None
) -> Float[Array, "*n DB"]:
    """f(a, b), or f(W a, b), in b's dtype, to which a is cast. ValueError if W does not map a's width to b's, or f changes
    their shape."""
    a = a if W is None else carry(a, W, b.shape[-1])
    d = min(a.shape[-1], b.shape[-1])
    kept, old = jnp.split(b, [b.shape[-1] - d], axis=-1)
    new = resolve(graft)(a[..., a.shape[-1] - d :].astype(b.dtype), old)
    if new.shape != old.shape:
        raise ValueError(f"the graft returned {new.shape} for activations of {old.shape}: f(a, b) keeps their shape")
    return jnp.concatenate([kept, new.astype(b.dtype)], axis=-1)
