"""Edits change a site's state while a model reads or writes: steering, ablation, patching and communication.

An edit holds a pure function change(state, message, context) -> state. Only `apply` calls it. `model.run_blocks` goes
through the blocks and passes the activation of every site to the hook that calls `apply`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from jaxcomm.config import AnyArray
from jaxcomm.layers import Hook
from jaxcomm.prompts import Prompts, known
from jaxcomm.sites import SITES, Columns, Layer, Site, check_positions, check_site, columns_of, differs, read_at

if TYPE_CHECKING:
    from jaxcomm.messages import Message


class Context(NamedTuple):
    """The site, layer and positions that an edit's function gets besides the state.

    Attributes:
        site: Name of the site.
        layer: Number of the layer; None for a site without layers. It may be traced. In a patching map each row has its
            own layer.
        positions: Position of each chosen token in its row, [B, n], counted on from a past; -1 where a row has fewer than n.

    Example:
        >>> after_first = lambda state, message, context: jnp.where(context.positions[..., None] > 0, state, 0)
        >>> edit = jc.Edit(jc.Site("attn_out", 2), after_first)
        >>> jc.forward(params, prompts, edits=[edit]).shape
        (2, 3, 256)
    """

    site: str
    layer: Layer | None
    positions: Array


Change = Callable[[Array, Any, Context], Array]
"""A function (state [B, n, ...], message [B, n, ...], context) -> state. It gets the states of the n chosen tokens of
every row. `message` is `Edit.message`, or None if the edit has none."""


class Edit(struct.PyTreeNode):
    """A change of one site.

    Attributes:
        site: Which activation, at which positions of the prompt.
        change: `replace`, `add(v)`, `scale(c)`, `project_out(v)`, `Graft(f, W)`, or a function of your own (`Change`).
            A function is part of the compiled program: define it once, and give it arrays through `message`.
        message: Second argument of the change: an array [B, ...], the same for every chosen token; an array [B, n, ...],
            aligned with the chosen tokens at their ends; or a `Message`. None: no message.
        every_step: Whether every generated token is edited too, not only the prompt.

    Raises:
        ValueError: The site can only be read, not edited.

    Example:
        >>> edit = jc.Edit(jc.Site("mlp_out", 2, positions=[-2, -1]), jc.scale(0.0))
        >>> jc.generate(params, prompts, edits=[edit], max_new_tokens=2).tokens.shape
        (2, 2)
    """

    site: Site
    change: Change | Graft
    message: Message | AnyArray | None = None
    every_step: bool = struct.field(pytree_node=False, default=False)

    def __post_init__(self):
        if isinstance(self.site, Site) and not SITES[self.site.name].writable:
            raise ValueError(f"{self.site.name} can be read and not edited: edit z, or q and k")
        if callable(self.change) and not _is_pytree(self.change):
            object.__setattr__(self, "change", Partial(self.change))


def _is_pytree(change: Any) -> bool:
    return not jax.tree_util.all_leaves([change])


# Changes ------------------------------------------------------------------------------------------------------------


def replace(state: Array, message: Array, context: Context | None = None) -> Array:
    """Replaces the state by the message (patching).

    Args:
        state: State [B, n, ...] of the chosen tokens.
        message: Anything that broadcasts to the state.
        context: Not used.

    Returns:
        The message, in the state's shape and dtype.

    Example:
        >>> jc.replace(jnp.zeros((1, 2, 2)), jnp.ones((1, 1, 2)))
        Array([[[1., 1.],
                [1., 1.]]], dtype=float32)
    """
    return jnp.broadcast_to(_fitting(message, state, "the message"), state.shape).astype(state.dtype)


def _fitting(value: Any, state: Array, what: str) -> Array:
    """`value` as an array. Raises ValueError unless it broadcasts to the state."""
    value = jnp.asarray(value)
    both = zip(reversed(value.shape), reversed(state.shape), strict=False)
    if value.ndim > state.ndim or any(n not in (1, size) for n, size in both):
        raise ValueError(
            f"{what} is {value.shape}, the state {state.shape}: give what broadcasts to it, such as a vector [{state.shape[-1]}]"
        )
    return value


def add(vector: Any) -> Change:
    """Makes the change state + vector (steering).

    Args:
        vector: A vector [D], a number, or anything that broadcasts to the state [B, n, ...].

    Returns:
        The change, for an `Edit`.

    Example:
        >>> jc.add(jnp.ones(2))(jnp.zeros((1, 1, 2)), None, None)
        Array([[[1., 1.]]], dtype=float32)
    """
    return Partial(_add, vector)


def _add(vector: Any, state: Array, message: Any, context: Any) -> Array:
    return state + _fitting(vector, state, "the vector to add").astype(state.dtype)


def scale(factor: Any) -> Change:
    """Makes the change state * factor. A factor of 0 ablates.

    Args:
        factor: A number, or anything that broadcasts to the state [B, n, ...].

    Returns:
        The change, for an `Edit`.

    Example:
        >>> jc.scale(0.5)(jnp.ones((1, 1, 2)), None, None)
        Array([[[0.5, 0.5]]], dtype=float32)
    """
    return Partial(_scale, factor)


def _scale(factor: Any, state: Array, message: Any, context: Any) -> Array:
    return state * _fitting(factor, state, "the factor").astype(state.dtype)


def project_out(direction: Any) -> Change:
    """Makes the change that removes the state's component along a direction (directional ablation).

    Args:
        direction: A vector [D], of any length but 0; or several, [.., D], that broadcast to the state [B, n, .., D].

    Returns:
        The change, for an `Edit`.

    Raises:
        ValueError: The direction has length 0.

    Example:
        >>> jc.project_out(jnp.array([2.0, 0.0]))(jnp.ones((1, 1, 2)), None, None)
        Array([[[0., 1.]]], dtype=float32)
    """
    if (values := known(direction)) is not None and not np.linalg.norm(values.astype(np.float32), axis=-1).all():
        raise ValueError("the direction to project out has length 0: nothing lies along it")
    return Partial(_project_out, direction)


def _project_out(direction: Any, state: Array, message: Any, context: Any) -> Array:
    unit = _fitting(direction, state, "the direction").astype(jnp.float32)
    unit /= jnp.linalg.norm(unit, axis=-1, keepdims=True)
    wide = state.astype(jnp.float32)
    return (wide - jnp.sum(wide * unit, axis=-1, keepdims=True) * unit).astype(state.dtype)


GRAFTS: dict[str, Callable[[Array, Array], Array]] = {
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "replace": lambda a, b: a,
}
"""f(a, b) of Ramesh & Li (2025, section 3.1): a is A's activation, b is B's."""


GraftFunction = str | Callable[[Array, Array], Array]
"""A name in `GRAFTS`, or a function f(a, b) of the aligned parts."""


class Graft(struct.PyTreeNode):
    """The change that replaces B's activation b by f(a, b), or by f(W a, b) (Ramesh & Li 2025, section 3.1).

    With unequal widths and no W, d = min(D_A, D_B): f acts on the last d entries of both, and the first D_B - d entries
    of b stay (footnote 1).

    Attributes:
        f: A name in `GRAFTS`, or a function of the aligned parts (a, b), [..., d] each, that returns [..., d].
        W: The map [D_B, D_A], or None.

    Raises:
        ValueError: There is no graft of this name. When the graft is called: W does not map a's width to b's; f changes
            the shape.

    Example:
        >>> narrow, wide = jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 3))
        >>> jc.Graft("replace")(wide, narrow)
        Array([[[0., 1., 1.]]], dtype=float32)
    """

    f: GraftFunction = struct.field(pytree_node=False, default="replace")
    W: Float[AnyArray, "_ _"] | None = None

    def __post_init__(self):
        if not callable(self.f) and self.f not in GRAFTS:
            raise ValueError(f"unknown graft {self.f!r}: choose one of {', '.join(GRAFTS)}, or pass a function f(a, b)")

    def __call__(self, state: Array, message: Any, context: Any = None) -> Array:
        return apply_graft(self.f, message, state, self.W)

    def flops(self, width_a: int, width_b: int) -> int:
        """Counts the floating-point operations for one state.

        Args:
            width_a: Width of A, D_A.
            width_b: Width of B, D_B.

        Returns:
            The operations of W a, if there is a map, plus D_B for the sum, mean or copy itself.
        """
        return width_b + (2 * width_a * width_b if self.W is not None else 0)


def as_graft(graft: Graft | str | Callable[[Array, Array], Array]) -> Graft:
    """Makes a graft from a name or a function f.

    Args:
        graft: A graft, the name of an f, or a function f(a, b).

    Returns:
        The graft.
    """
    return graft if isinstance(graft, Graft) else Graft(graft)


def through_map(a: Float[Array, "*n DA"], W: Float[AnyArray, "_ _"], width: int) -> Float[Array, "*n DB"]:
    """Applies a map, W a.

    Args:
        a: Activations [..., D_A].
        W: The map [width, D_A].
        width: Width that the map must have.

    Returns:
        W a, [..., width].

    Raises:
        ValueError: W has another shape.
    """
    if W.shape != (width, a.shape[-1]):
        raise ValueError(
            f"W is {W.shape}, but maps from width {a.shape[-1]} to width {width}: it must be {(width, a.shape[-1])}"
        )
    return jnp.einsum("...i,oi->...o", a.astype(W.dtype), W)


def apply_graft(
    f: str | Callable[[Array, Array], Array],
    a: Float[Array, "*n DA"],
    b: Float[Array, "*n DB"],
    W: Float[AnyArray, "_ _"] | None = None,
) -> Float[Array, "*n DB"]:
    """Computes f(a, b), or f(W a, b), in b's dtype (`Graft`).

    Args:
        f: A name in `GRAFTS`, or a function f(a, b).
        a: A's activations [..., D_A].
        b: B's activations [..., D_B].
        W: The map [D_B, D_A], or None.

    Returns:
        B's new activations [..., D_B].

    Raises:
        ValueError: W does not map a's width to b's; f changes the shape.

    Example:
        >>> jc.apply_graft("mean", jnp.ones(2), jnp.zeros(3))
        Array([0. , 0.5, 0.5], dtype=float32)
    """
    a = a if W is None else through_map(a, W, b.shape[-1])
    d = min(a.shape[-1], b.shape[-1])
    kept, old = jnp.split(b, [b.shape[-1] - d], axis=-1)
    new = (f if callable(f) else GRAFTS[f])(a[..., a.shape[-1] - d :].astype(b.dtype), old)
    if new.shape != old.shape:
        raise ValueError(f"the graft returned {new.shape} for activations of {old.shape}: f(a, b) keeps their shape")
    return jnp.concatenate([kept, new.astype(b.dtype)], axis=-1)


# How they are applied -----------------------------------------------------------------------------------------------


def apply(edit: Edit, x: Array, *, layer: Any, columns: Columns, places: Int[Array, "B T"]) -> Array:
    """Apply an edit to a site's activation x [B, T, ...] at these columns, and return the result."""
    heads = (...,) if edit.site.heads is None else (..., np.array(edit.site.heads), slice(None))
    columns = columns.since(places.shape[1] - x.shape[1])
    places = places[:, places.shape[1] - x.shape[1] :]
    old = columns.take(x)
    state, valid, message = old[heads], columns.valid, edit.message
    message, sent = _opened(message)
    if message is not None and message.ndim == state.ndim - 1:
        message = jnp.broadcast_to(message[:, None], (len(message), state.shape[1], *message.shape[1:]))
    elif message is not None:
        message, told = _aligned(message, sent, state)
        valid = told if valid is None else valid & told
    positions = columns.take(places)
    positions = positions if valid is None else jnp.where(valid, positions, -1)
    new = edit.change(state, message, Context(edit.site.name, layer, positions))
    if jnp.shape(new) != state.shape:
        raise ValueError(
            f"the edit of {edit.site.name} returned {jnp.shape(new)} for a state of {state.shape}: return the state's shape"
        )
    return columns._replace(valid=valid).put(x, old.at[heads].set(new.astype(x.dtype)))


def _opened(message: Message | AnyArray | None) -> tuple[Array | None, AnyArray | None]:
    """The states of a message, and a mask of the states that are present. A mask of None: all are present."""
    if message is None or isinstance(message, jax.Array | np.ndarray):
        return None if message is None else jnp.asarray(message), None
    return jnp.asarray(message.state_array()), message.valid


def _aligned(message: Array, sent: AnyArray | None, state: Array) -> tuple[Array, Array]:
    """Align a message [B, m, ...] with a state [B, n, ...] at their ends. Also returns which tokens got a message."""
    n, (B, tokens) = min(message.shape[1], state.shape[1]), state.shape[:2]
    pad = lambda a: jnp.pad(a[:, a.shape[1] - n :], ((0, 0), (tokens - n, 0), *((0, 0),) * (a.ndim - 2)))
    return pad(message), pad(jnp.ones((B, message.shape[1]), bool) if sent is None else sent)


class Read(NamedTuple):
    """Which activations of one site to keep: those of `layers` [n] (may be traced), at the site's positions and heads."""

    site: Site
    layers: Sequence[Layer | None]


def hook_of(params: Any, places: Int[Array, "B T"], edits: Sequence[Edit] = (), reads: Sequence[Read] = ()) -> Hook:
    """The hook of one forward pass over tokens at these places. It applies the edits and stores the activations that
    `reads` names: one array [layers, ...] for each read. A site is edited before it is read."""
    for x in (*edits, *reads):
        layers = x.layers if isinstance(x, Read) else [x.site.layer]
        if differs(params.config, x.site.name) and not all(map(is_number, layers)):
            raise ValueError(
                f"{x.site.name} is not the same in all layers of this model: name its layer by a whole number, not by a traced one"
            )
    columns = [columns_of(edit.site.positions, places) for edit in edits]
    kept = tuple(_room(params, read, places) for read in reads)

    def at(name: str, layer: Any, x: Array, kept: Any) -> tuple[Array, Any]:
        for edit, chosen in zip(edits, columns, strict=True):
            if edit.site.name == name:
                change = functools.partial(apply, edit, layer=layer, columns=chosen, places=places)
                x = _where_layer(edit.site.layer, layer, change, x)
        pairs = zip(kept, reads, strict=True)
        return x, tuple(_keep(old, x, r, layer, places) if r.site.name == name else old for old, r in pairs)

    valid = jnp.ones(len(places), bool)
    for edit, chosen in zip(edits, columns, strict=True):
        if edit.site.layer is not None:
            layer = jnp.asarray(edit.site.layer)
            valid &= (layer >= int(edit.site.name != "resid_post")) & (layer <= params.config.layers)
        if edit.site.numbered:
            assert chosen.valid is not None  # a number may be there or not
            valid &= chosen.valid.all(axis=1)
    return Hook(at, kept, frozenset(x.site.name for x in (*edits, *reads)), valid)


def writing_hook(params: Any, places: Int[Array, "B 1"], edits: Sequence[Edit]) -> Hook:
    """The hook of one decoding step. It applies the edits that have `every_step`, at the new token."""
    every = [edit.replace(site=dataclasses.replace(edit.site, positions="all")) for edit in edits if edit.every_step]
    return hook_of(params, places, every)


def _room(params: Any, read: Read, places: Int[Array, "B T"]) -> Array:
    """An array of NaN in the shape of the stored activations. The NaN remain where a traced layer is out of range."""
    (B, T), c = places.shape, params.config
    if differs(c, read.site.name):
        each = [c.layer(int(n) - 1) for n in read.layers]  # pyright: ignore[reportArgumentType]
        if len({(one.kv_heads, one.head_dim) for one in each}) > 1:
            raise ValueError(
                f"{read.site.name} is not the same in all layers of this model: read layers of one shape at a time (layers=[..])"
            )
        c = each[0]
    sizes = {"B": B, "T": T, "S": T, "D": c.width, "N": c.heads, "K": c.kv_heads, "H": c.head_dim, "V": c.vocab}
    shape = [sizes[letter] for letter in SITES[read.site.name].axes.split()]
    dtype = jnp.float32 if read.site.name in ("logits", "pattern") else params.dtype
    found = jax.eval_shape(lambda x: read_at(x, read.site, places), jax.ShapeDtypeStruct(shape, dtype))
    return jnp.full((len(read.layers), *found.shape), jnp.nan, dtype)


def _keep(kept: Array, x: Array, read: Read, layer: Any, places: Int[Array, "B T"]) -> Array:
    """Store x in `kept`, if its layer is one of those to read."""
    if layer is None:
        slot, here = 0, True
    elif is_number(layer) and all(map(is_number, read.layers)):
        if layer not in read.layers:
            return kept
        slot, here = read.layers.index(layer), True
    else:
        hits = jnp.stack([jnp.asarray(wanted, jnp.int32) for wanted in read.layers]) == layer
        slot, here = jnp.argmax(hits), jnp.any(hits)
    found = read_at(x, read.site, places)
    if here is not True:
        found = jnp.where(here, found, jax.lax.dynamic_index_in_dim(kept, slot, keepdims=False))
    return jax.lax.dynamic_update_index_in_dim(kept, found, slot, 0)


def _where_layer(wanted: Any, layer: Any, change: Callable[[Array], Array], x: Array) -> Array:
    """Return change(x) at the wanted layer, else x. A wanted layer of None means a site that has no layers."""
    if wanted is None or (is_number(wanted) and is_number(layer)):
        return change(x) if wanted is None or int(wanted) == int(layer) else x
    return jax.lax.cond(jnp.equal(wanted, layer), change, lambda x: x, x)


def is_number(layer: Any) -> bool:
    """Whether a layer is a concrete number, not a traced value."""
    return isinstance(layer, int | np.integer)


# How they are checked -----------------------------------------------------------------------------------------------


def checked(params: Any, edits: Sequence[Edit], prompts: Prompts | None) -> tuple[Edit, ...]:
    """Check edits and prepare them for a compiled program: messages lose the identity of their sender.

    Args:
        params: The model.
        edits: The edits.
        prompts: The prompts that the model reads; None where it generates.

    Raises:
        ValueError: An edit is invalid. Traced values are not checked.
    """
    if not isinstance(edits, list | tuple):
        raise ValueError(f"edits are a list, got a {type(edits).__name__}: write edits=[edit]")
    for n, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            raise ValueError(f"edit {n} is a {type(edit).__name__}: make it with jaxcomm.Edit(site, change)")
        check_site(params.config, edit.site)
        changed_by = edit.change.func if isinstance(edit.change, Partial) else edit.change
        if edit.message is None and (changed_by is replace or isinstance(changed_by, Graft)):
            raise ValueError(f"edit {n} of {edit.site.name} needs a message and has none: give Edit(.., message=..)")
    if prompts is not None:
        _check_edits(params, edits, prompts)
    anonymous = lambda message: message.anonymous() if hasattr(message, "states") else message
    return tuple(edit.replace(message=anonymous(edit.message)) for edit in edits)


def _check_edits(params: Any, edits: Sequence[Edit], prompts: Prompts) -> None:
    rows = len(prompts)
    real = prompts.real
    for edit in edits:
        check_positions(edit.site, prompts)
        message = edit.message
        if not (message is None or isinstance(message, jax.Array | np.ndarray) or hasattr(message, "states")):
            raise ValueError(
                f"the message is a {type(message).__name__}: give an array with a row for each prompt, or a Message"
            )
        if message is not None and not isinstance(message, jax.Array | np.ndarray):
            message.check_fits(params, edit.change)
        states, _ = _opened(message)
        if states is not None and states.ndim < 2:
            raise ValueError(f"the message is {states.shape}: give [prompts, ...], a row for each prompt")
        if states is not None and len(states) != rows:
            raise ValueError(f"{len(states)} messages for {rows} prompts: give one for each")
    if real is not None:
        for (m, one), (n, other) in itertools.combinations(enumerate(edits), 2):
            _check_apart(m, one, n, other, real)


def _check_apart(m: int, one: Edit, n: int, other: Edit, real: np.ndarray) -> None:
    """Raises ValueError if two edits change the same numbers. Traced layers and positions are not checked."""
    (x, at), (y, there) = _place(one.site), _place(other.site)
    heads = [None if h is None else {*np.atleast_1d(h).tolist()} for h in (one.site.heads, other.site.heads)]
    apart = heads[0] is not None and heads[1] is not None and not heads[0] & heads[1]
    if x != y or at is NotImplemented or at != there or apart:
        return
    first, second = (_chosen(site.positions, real) for site in (one.site, other.site))
    if first is not None and second is not None and (both := first & second).any():
        row, column = np.argwhere(both)[0]
        position, layer = column - (real.shape[1] - real[row].sum()), "" if at is None else f" {at}"
        raise ValueError(
            f"edits {m} and {n} both change {x}{layer} at position {position} of row {row}: make them one function"
        )


def _place(site: Site) -> tuple[str, Any]:
    """Name and layer of a site; resid_pre of layer i counts as resid_post of i - 1. NotImplemented: the layer is traced."""
    if site.layer is None:
        return site.name, None
    layer = known(site.layer)
    if layer is None or layer.ndim:
        return site.name, NotImplemented
    return ("resid_post", int(layer) - 1) if site.name == "resid_pre" else (site.name, int(layer))


def _chosen(positions: Any, real: np.ndarray) -> np.ndarray | None:
    """The columns that these positions name; None if the positions are traced."""
    if hasattr(positions, "dtype") and known(positions) is None:
        return None
    with jax.ensure_compile_time_eval():
        index, valid = columns_of(positions, jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1))
    if index is None:
        return real
    chosen = np.zeros(real.shape, bool)
    valid = np.ones(index.shape, bool) if valid is None else np.asarray(valid)
    for row, (own, there) in enumerate(zip(np.asarray(index), valid, strict=True)):
        chosen[row, own[there]] = True
    return chosen
