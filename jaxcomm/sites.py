"""Sites: the activations of a model that can be read and edited, and the token positions to do it at.

Names follow TransformerLens. Layers count from 1 (docs/sites.md compares TransformerLens, nnsight and transformers).
In one block, with `norms="before"`:

    resid_pre -> norm -> q, k, v -> norms, rotation -> pattern -> z -> W_o -> attn_out     resid_mid = resid_pre + attn_out
    resid_mid -> norm -> MLP -> mlp_out                                                    resid_post = resid_mid + mlp_out

resid_pre of layer i is resid_post of layer i - 1; resid_post of layer 0 is what enters the first block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxcomm.config import AnyArray, ModelConfig
from jaxcomm.prompts import Prompts, known

Layer = int | np.integer | Int[AnyArray, ""]
"""Counted from 1; 0 is what enters the first block. May be traced."""

Positions = str | int | np.integer | Sequence[int | np.integer] | slice | Int[AnyArray, "B *n"] | Bool[AnyArray, "B P"]
"""Which tokens of every row (`Site`)."""


class Kind(NamedTuple):
    """Description of a site: its axes (letters of `config.py`), and which activation it is."""

    axes: str
    holds: str
    layered: bool = True
    """Every layer has one."""
    writable: bool = True


SITES: dict[str, Kind] = {
    "embed": Kind("B T D", "vectors of the tokens, before learned positions are added", layered=False),
    "resid_pre": Kind("B T D", "the stream that enters the block"),
    "resid_mid": Kind("B T D", "the stream between attention and MLP; where they are parallel there is none"),
    "resid_post": Kind("B T D", "the stream that leaves the block"),
    "attn_out": Kind("B T D", "what attention adds to the stream (after its own norm, where there is one)"),
    "mlp_out": Kind("B T D", "what the MLP, or the experts, add to the stream (after their norm, where there is one)"),
    "q": Kind("B T N H", "queries as their matrix makes them: before their norm and rotation"),
    "k": Kind("B T K H", "keys, likewise"),
    "v": Kind("B T K H", "values"),
    "z": Kind(
        "B T N H",
        "each head's output: weighted values (times its gate, where there is one), before the output matrix",
    ),
    "pattern": Kind("B N T S", "attention weights, after the softmax", writable=False),
    "logits": Kind("B T V", "logits, after the soft-cap", layered=False),
}
"""name -> description."""

HEADS = ("q", "k", "v", "z", "pattern")
"""Sites with an axis of heads."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a model: an activation, its layer, and the token positions.

    Attributes:
        name: One of `SITES`.
        layer: Number of the layer, 1 .. L (0 .. L of resid_post). It may be traced. None for embed and logits.
        positions: Which tokens of each row, without padding, counted from either end: "last", "all", an int, a sequence
            of ints, or a slice; an array of ints, [B] or [B, n], with separate positions for each row; or a mask [B, P]
            (`Agent.find` makes one from words). A single position ("last", an int, an array [B]) adds no axis to the
            activations that are read, as in NumPy.
        heads: Which heads. None: all.

    Raises:
        ValueError: There is no such site; it has no layers, or needs one; it has no heads; the positions are invalid.

    Example:
        >>> jc.Site("resid_post", 20, positions="last")
        Site(name='resid_post', layer=20, positions='last', heads=None)
    """

    name: str
    layer: Layer | None = None
    positions: Positions = "all"
    heads: int | Sequence[int] | None = None

    def __post_init__(self):
        kind = SITES.get(self.name)
        if kind is None:
            raise ValueError(f"unknown site {self.name!r}: choose one of {', '.join(SITES)}")
        if kind.layered == (self.layer is None):
            raise ValueError(f"{self.name} " + ("needs a layer" if kind.layered else "has no layers: leave it out"))
        if np.ndim(self.layer):  # pyright: ignore[reportArgumentType]
            raise ValueError(f"the layer of {self.name} is {self.layer}: give one number, and a site for each layer")
        if self.heads is not None and self.name not in HEADS:
            raise ValueError(f"{self.name} has no heads: they are of {', '.join(HEADS)}")
        if self.heads is not None and not np.size(self.heads):
            raise ValueError(f"heads of {self.name} are empty: name at least one, or leave them out")
        if isinstance(self.heads, list | range):
            object.__setattr__(self, "heads", tuple(self.heads))
        if isinstance(self.positions, list | tuple | range):
            plain = tuple(int(p) if isinstance(p, np.integer) else p for p in self.positions)
            object.__setattr__(self, "positions", plain)
        if isinstance(self.positions, str) and self.positions not in ("last", "all"):
            raise ValueError(f"unknown positions {self.positions!r}: choose 'last' or 'all', or give numbers")
        step = self.positions.step if isinstance(self.positions, slice) else None
        if step is not None and step < 1:
            raise ValueError(f"positions {self.positions}: a slice's step must be at least 1")

    def tree_flatten(self):
        """Flattens the site as a pytree. JAX calls this.

        Returns:
            The parts that may be traced (layer, array of positions), and the static parts.
        """
        fixed, array = self.positions, None
        if isinstance(fixed, jax.Array | np.ndarray):
            fixed, array = None, self.positions
        if isinstance(fixed, slice):  # not hashable before Python 3.12
            fixed = (slice, fixed.start, fixed.stop, fixed.step)
        return (self.layer, array), (self.name, fixed, self.heads)

    @classmethod
    def tree_unflatten(cls, fixed, children):
        """Rebuilds a site from its parts, without checks. JAX calls this.

        Args:
            fixed: Name, other positions, and heads.
            children: Layer, and array of positions.

        Returns:
            The site.
        """
        (name, positions, heads), (layer, array) = fixed, children
        if isinstance(positions, tuple) and positions and positions[0] is slice:
            positions = slice(*positions[1:])
        site = object.__new__(cls)  # unchecked: JAX puts other things in the place of arrays
        for field, value in zip(
            ("name", "layer", "positions", "heads"),
            (name, layer, positions if array is None else array, heads),
            strict=True,
        ):
            object.__setattr__(site, field, value)
        return site

    @property
    def single(self) -> bool:
        """Whether the site has one position per row. Activations read there have no axis of positions."""
        p = self.positions
        return p == "last" if isinstance(p, str) else self.numbered and np.ndim(p) < 1 + _is_array(p)  # pyright: ignore[reportArgumentType]

    @property
    def last(self) -> bool:
        """Whether the position is "last" by name."""
        return isinstance(self.positions, str) and self.positions == "last"

    @property
    def numbered(self) -> bool:
        """Whether the positions are given by number. Every row must then have a token at each."""
        p = self.positions
        return not isinstance(p, str | slice) and not (_is_array(p) and p.dtype == bool)


def _is_array(positions: Any) -> TypeGuard[AnyArray]:
    """Whether positions are an array or a NumPy scalar."""
    return hasattr(positions, "dtype")


def as_site(place: Any) -> Site:
    """Return a `Site` unchanged. Turn a layer number into the site of the residual stream after it, at the last token."""
    return place if isinstance(place, Site) else Site("resid_post", place, "last")


class Columns(NamedTuple):
    """Chosen tokens of every row, in order. Rows with fewer chosen tokens are aligned at the end.

    index [B, n]: their columns; None: all columns. valid [B, n]: whether a row has the token; None: all rows have all.
    """

    index: Int[Array, "B n"] | None  # pyright: ignore[reportIncompatibleMethodOverride] (tuples have an `index`)
    valid: Bool[Array, "B n"] | None

    def since(self, first: int) -> Columns:
        """The same columns of an array that begins at column `first`."""
        if first == 0:
            return self
        if self.index is None:
            return Columns(None, None if self.valid is None else self.valid[:, first:])
        there = self.index >= first
        return Columns(jnp.maximum(self.index - first, 0), there if self.valid is None else self.valid & there)

    def take(self, x: Array) -> Array:
        """[B, T, ...] -> [B, n, ...]."""
        if self.index is None:
            return x
        return jnp.take_along_axis(x, self.index.reshape(*self.index.shape, *(1,) * (x.ndim - 2)), axis=1)

    def put(self, x: Array, new: Array) -> Array:
        """x with `new` [B, n, ...] in the chosen columns."""
        if self.index is None:
            return new if self.valid is None else jnp.where(_wide(self.valid, x), new, x)
        index = self.index if self.valid is None else jnp.where(self.valid, self.index, x.shape[1])
        return x.at[jnp.arange(len(x))[:, None], index].set(new, mode="drop")


def _wide(valid: Array, like: Array) -> Array:
    return valid.reshape(*valid.shape, *(1,) * (like.ndim - 2))


def columns_of(positions: Any, places: Int[Array, "B T"]) -> Columns:
    """The columns that a site's positions name. places: position of each column's token in its row (-1: padding)."""
    B, T = places.shape
    real = places >= 0
    if isinstance(positions, str):
        last = jnp.full((B, 1), T - 1, jnp.int32)
        return Columns(None, real) if positions == "all" else Columns(last, None)
    length = real.sum(axis=1, keepdims=True, dtype=jnp.int32)
    if isinstance(positions, slice):
        positions = _sliced(positions, jnp.arange(T, dtype=jnp.int32) - (T - length), length)
    by_row = hasattr(positions, "dtype") and np.ndim(positions) > 0
    if by_row and positions.dtype == bool:
        chosen = positions & real
        index = jnp.argsort(chosen, axis=1, stable=True).astype(jnp.int32)
        return Columns(index, jnp.take_along_axis(chosen, index, axis=1))
    wanted = jnp.asarray(positions, jnp.int32)
    wanted = wanted.reshape(B, -1) if by_row else jnp.broadcast_to(wanted.reshape(1, -1), (B, wanted.size))
    return Columns(jnp.where(wanted < 0, T + wanted, T - length + wanted), (wanted >= -length) & (wanted < length))


def _sliced(cut: slice, number: Int[Array, "B T"], length: Int[Array, "B 1"]) -> Bool[Array, "B T"]:
    """Which tokens a slice selects. number: number of each token in its row (below 0: padding)."""
    step = 1 if cut.step is None else cut.step
    from_end = lambda at, default: default if at is None else at if at >= 0 else jnp.maximum(length + at, 0)
    begin, end = from_end(cut.start, 0), from_end(cut.stop, length)
    return (number >= begin) & (number < end) & ((number - begin) % step == 0)


def heads_of(x: Array, site: Site) -> Array:
    """x at the heads that a site names."""
    if site.heads is None:
        return x
    return x[:, np.array(site.heads)] if site.name == "pattern" else x[..., np.array(site.heads), :]


def read_at(x: Array, site: Site, places: Int[Array, "B T"]) -> Array:
    """A site's activation x [B, T, ...] at the site's positions: [B, n, ...], or [B, ...] for a single position. Where a
    row has no such token it is 0, or NaN for positions given by number. For a pattern, positions select queries."""
    pattern = site.name == "pattern"
    x = heads_of(x, site)
    x = jnp.moveaxis(x, -2, 1) if pattern else x
    columns = columns_of(site.positions, places).since(places.shape[1] - x.shape[1])
    found = columns.take(x)
    if columns.valid is not None:
        found = jnp.where(_wide(columns.valid, found), found, jnp.nan if site.numbered else 0)
    if pattern:
        found = jnp.moveaxis(found, 1, -2)
        return found[..., 0, :] if site.single else found
    return found[:, 0] if site.single else found


def differs(config: ModelConfig, name: str) -> bool:
    """Whether the activations at a site have other shapes in other layers of a model, or some layer has no such site.

    Args:
        config: Architecture of the model.
        name: Name of the site.

    Returns:
        Whether they differ. The layer must then be a concrete number, not a traced value.
    """
    if not isinstance(config, ModelConfig) or config.alike:
        return False
    return name in HEADS if config.recurrent else bool({"K", "H"} & {*SITES[name].axes.split()})


def check_site(config: ModelConfig, site: Site, what: str = "site") -> None:
    """Raises ValueError unless the model has such a site. A traced layer is not checked.

    Args:
        config: Architecture of the model. A network has no sites.
        site: The site.
        what: Its name in an error message.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{what} {site.name}: a network has no layers to be read or edited at; name a single model")
    if site.name == "resid_mid" and config.parallel:
        raise ValueError(
            "this family has no resid_mid: attention and MLP both read resid_pre; name attn_out, or resid_post"
        )
    first, layer = 0 if site.name == "resid_post" else 1, known(site.layer)
    if layer is not None and not (
        np.issubdtype(layer.dtype, np.integer) and np.all((layer >= first) & (layer <= config.layers))
    ):
        raise ValueError(
            f"layer {site.layer} is out of range: {site.name} of this model has layers {first} to {config.layers}"
        )
    if layer is not None and site.name in HEADS and config.key_heads[int(layer) - 1] is None:
        raise ValueError(
            f"layer {site.layer} has linear attention, so it has no {site.name}: name attn_out, or a layer with attention ({', '.join(str(n + 1) for n, heads in enumerate(config.key_heads) if heads)})"
        )
    if site.heads is None:
        return
    heads = config.heads
    if site.name in ("k", "v"):
        numbers = range(config.layers) if layer is None else np.ravel(layer) - 1
        heads = min(config.layer(int(n)).kv_heads for n in numbers)
    if wrong := [h for h in np.atleast_1d(site.heads) if not 0 <= h < heads]:
        raise ValueError(f"head {wrong[0]} is out of range: {site.name} has heads 0 to {heads - 1}")


def check_positions(site: Site, prompts: Prompts) -> None:
    """Raises ValueError unless every row of the prompts has the site's positions. Traced values are not checked."""
    p, (rows, columns) = site.positions, prompts.shape
    lengths = None if prompts.real is None else prompts.real.sum(axis=1)
    if isinstance(p, str | slice):
        return
    if _is_array(p) and np.ndim(p):
        wanted_shape = (rows, columns) if p.dtype == bool else (rows, *np.shape(p)[1:2])
        if np.shape(p) != wanted_shape:
            raise ValueError(f"positions are {np.shape(p)} for prompts {(rows, columns)}: give every row its own")
    values = known(p)
    if values is None or lengths is None:
        return
    if values.dtype == bool:
        if not (row := (values & (np.arange(columns) >= columns - lengths[:, None])).any(axis=1)).all():
            raise ValueError(f"the mask of positions chooses no token of row {int(np.argmin(row))}")
        return
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"positions {p!r}: give whole numbers, or a mask")
    each = (
        values.reshape(rows, -1)
        if _is_array(p) and np.ndim(p)
        else np.broadcast_to(values.reshape(1, -1), (rows, values.size))
    )
    wrong = (each >= lengths[:, None]) | (each < -lengths[:, None])
    if wrong.any():
        row, at = np.argwhere(wrong)[0]
        raise ValueError(f"position {each[row, at]} is out of range: row {row} has {lengths[row]} tokens")
