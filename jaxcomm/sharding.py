"""Placement of arrays on several devices.

Every axis of a weight has a name (`logical_axes`). Rules say along which mesh axis it is cut (`RULES`): "tensor" cuts
heads, feed-forward width and vocabulary; "fsdp" cuts the model's width. Every other mesh axis is for data. Functions do
not depend on a mesh: place the parameters, and XLA propagates the placement.

Two models may be on different devices. Then only messages move between them (`deliver`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm.config import ModelConfig
from jaxcomm.language_model import LanguageModel
from jaxcomm.model import Params

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
RULES: Mapping[str, str] = {
    "vocab": TENSOR, "heads": TENSOR, "kv_heads": TENSOR, "ff": TENSOR, "width": FSDP,
}  # fmt: skip
"""Logical axis -> axis of a mesh. Axes that are not named here are whole on every device."""

_MATRICES = {
    "q": ("heads", "width"), "q_gate": ("heads", "width"), "k": ("kv_heads", "width"), "v": ("kv_heads", "width"), "o": ("width", "heads"),
    "gate": ("ff", "width"), "up": ("ff", "width"), "down": ("width", "ff"), "router": ("experts", "width"),
}  # fmt: skip
"""Names of the axes of linear weights [out, in]."""


def logical_axes(params: Params) -> Params:
    """Names the axes of every weight.

    The names are layers, experts, vocab, positions, width, heads, kv_heads, head_dim, sinks, ff, delta and kernel. An axis called
    heads or kv_heads counts all dimensions of all heads (N H or K H). delta is any axis inside of linear attention, kernel
    the tokens of its convolution.

    Args:
        params: The model, or the shapes of its weights. Its layers may be stacked or unrolled.

    Returns:
        The same tree, with a `PartitionSpec` of names in the place of each weight.

    Example:
        >>> from jaxcomm.sharding import logical_axes
        >>> tuple(logical_axes(params).embed)
        ('vocab', 'width')
    """

    def name(path, leaf):
        keys: list[Any] = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        scales = keys[-1] == "scale"  # one per output, [.., out, 1]
        if keys[-1] in ("qvalue", "scale"):  # parts of an int8 matrix
            keys = keys[:-1]
        if keys[0] != "blocks":
            first = {"embed": ["vocab"], "head": ["vocab"], "positions": ["positions"], "norm": []}[keys[0]]
            return P(*first, None if scales else "width")
        module, kind = keys[-2:]
        if "delta" in keys:  # linear attention: heads are not cut
            own = ("width", "delta") if module == "o" else ("delta", "width") if leaf.ndim > 1 else ("delta",)
            own = ("delta", "kernel") if kind == "kernel" else (own[0], None) if scales else own
        elif module in _MATRICES:
            own = _MATRICES[module] if kind == "weight" else _MATRICES[module][:1]
            own = (own[0], None) if scales else own
        elif module in ("q_norm", "k_norm"):
            each = {"q_norm": "heads", "k_norm": "kv_heads"}[module]
            own = ("head_dim",) if params.config.qk_norm == "head" else (each,)
        elif kind == "sinks":
            own = ("sinks",)
        elif kind in ("layer_scale", "expert_scale"):
            own = (None if kind == "layer_scale" else "experts",)
        else:
            own = ("width",)
        stacked = ["layers"] * (not params.unrolled)
        experts = ["experts"] * (leaf.ndim - len(own) - len(stacked))
        return P(*stacked, *experts, *own)

    return jax.tree_util.tree_map_with_path(name, params)


def shardings(params: Params, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Params:
    """Returns the sharding of every weight on a mesh.

    An axis of a weight is cut along the mesh axis that `rules` names for it. It stays whole if the number of devices does
    not divide the number of its pieces (for example 4 key/value heads on 8 devices).

    Args:
        params: The model, or the shapes of its weights.
        mesh: The devices. Weights are cut along the axes "fsdp" and "tensor"; all other axes are for data. The result
            has a new mesh (data, fsdp, tensor) of the same devices with axis types Auto.
        rules: Which mesh axis cuts each logical axis (`RULES`).

    Returns:
        The same tree, with a `NamedSharding` in the place of each weight.

    Example:
        >>> from jaxcomm.sharding import local_mesh
        >>> places = jc.shardings(params, local_mesh())
        >>> jax.device_put(params, places).embed.shape
        (256, 128)
    """
    mesh = Mesh(_weights_last(mesh), (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)
    units = _units(params.config)

    def place(axes: P) -> NamedSharding:
        cut = [rules.get(axis) for axis in axes]  # pyright: ignore[reportArgumentType]
        fits = [
            name is not None and mesh.shape[name] > 1 and units[axis] % mesh.shape[name] == 0
            for axis, name in zip(axes, cut, strict=True)
        ]
        return NamedSharding(mesh, P(*(name if fit else None for name, fit in zip(cut, fits, strict=True))))

    return jax.tree.map(place, logical_axes(params), is_leaf=lambda x: isinstance(x, P))


def _units(c: ModelConfig) -> dict[Any, int]:
    """Number of indivisible pieces of each axis. If it differs by layer: a number that divides all of them."""
    kv_heads = math.gcd(*(heads.kv_heads for heads in c.key_heads if heads))
    sizes = {"heads": c.heads, "kv_heads": kv_heads, "ff": math.gcd(c.ff, c.dense_ff), "vocab": c.vocab}
    sizes |= {"width": c.width, "head_dim": c.head_dim, "experts": c.experts, "layers": c.layers}
    return sizes | {"positions": c.max_positions, "delta": 1, "kernel": 1}


def shard(params: Params, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Params:
    """Places the weights of a model on the devices of a mesh.

    Args:
        params: The model.
        mesh: The devices (`shardings`).
        rules: Which mesh axis cuts each logical axis (`RULES`).

    Returns:
        The same model on these devices. All functions of jaxcomm accept it.

    Example:
        >>> from jaxcomm.sharding import local_mesh
        >>> placed = jc.shard(params, local_mesh(fsdp=1, tensor=1))
        >>> placed.embed.sharding.mesh.axis_names
        ('data', 'fsdp', 'tensor')
    """
    return jax.tree.map(jax.device_put, params, shardings(params, mesh, rules))


def mesh_of(params: LanguageModel) -> Mesh | None:
    """Finds the mesh that a model was placed on.

    Args:
        params: The model, or a network.

    Returns:
        Its mesh; a mesh of one device if the weights were put on one device; None if they were never placed.
    """
    sharding = getattr(params.embed, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    if getattr(params.embed, "committed", False) and len(params.embed.devices()) == 1:
        return Mesh(np.array([*params.embed.devices()]), (DATA,), axis_types=(AxisType.Auto,))
    return None


def deliver(x: Any, params: LanguageModel) -> Any:
    """Copies arrays to the devices of a model, whole on every device.

    Use it to move a message from the sender's devices to the receiver's. Inside a compiled program it does nothing,
    because a program has one set of devices.

    Args:
        x: A pytree of arrays, such as a `Message`.
        params: The receiver: a model, or a network.

    Returns:
        x on the receiver's devices, or x itself if the receiver was never placed.

    Example:
        >>> from jaxcomm.sharding import local_mesh
        >>> receiver = jc.shard(params, local_mesh())
        >>> jc.deliver(jnp.ones(3), receiver).sharding.is_fully_replicated
        True
    """
    if isinstance(x, Tracer) or isinstance(params.embed, Tracer):
        return x
    return put(mesh_of(params), x)


def by_rows(params: LanguageModel, tree: Any) -> Any:
    """Distributes the rows of arrays over the data axis of a model's mesh.

    Args:
        params: The model, or a network.
        tree: A pytree of arrays [B, ...].

    Returns:
        The same tree. An array is left as it is if the data axis does not divide its rows, or if the model has no such
        axis.
    """
    mesh = mesh_of(params)
    if mesh is None or DATA not in mesh.shape:
        return tree
    return jax.tree.map(lambda a: a if len(a) % mesh.shape[DATA] else put(mesh, a, DATA), tree)


def move(params: Params, mesh: Mesh) -> Params:
    """Relabels the weights of a model with another mesh of the same devices in the same order. No data is copied.

    `jax.jit` accepts only one mesh, so two models in one program must have the same mesh.

    Args:
        params: The model, placed by `shard`.
        mesh: The new mesh. It must have the axes that the weights are cut along.

    Returns:
        The same model under the new mesh.

    Raises:
        ValueError: The weights were never placed, are on other devices, or are cut along an axis other than "fsdp" and
            "tensor".
    """
    old = mesh_of(params)
    if old is None or tuple(old.devices.flat) != tuple(mesh.devices.flat):
        raise ValueError("weights lie on other devices than the sweep: place both models' with shard(params, mesh)")

    def rename(a: jax.Array) -> jax.Array:
        spec = getattr(a.sharding, "spec", P())
        if not {name for name in spec if name is not None} <= {FSDP, TENSOR}:
            raise ValueError(f"weights are cut along {spec}: place them with shard(params, mesh)")
        shards = [shard.data for shard in a.addressable_shards]
        return jax.make_array_from_single_device_arrays(a.shape, NamedSharding(mesh, spec), shards)

    return jax.tree.map(rename, params)


def spread(params: Params) -> Params:
    """Copies a model to every device of this process.

    Args:
        params: The model.

    Returns:
        The model, whole on every device; the same object if there is one device, or if the model was already placed.
    """
    return params if mesh_of(params) else put(all_devices(), params)


def sweep_mesh(mesh: Mesh, games: int) -> Mesh:
    """Arranges the devices of a mesh for a layer sweep, as (games, cells, fsdp, tensor).

    The games axis gets the largest number that divides both the number of data devices and `games`. The cells axis gets
    the remaining factor. So no device is idle for lack of a game.

    Args:
        mesh: The devices.
        games: Number of games to compute at once.

    Returns:
        A mesh of the same devices.
    """
    devices = _weights_last(mesh)
    rows = int(np.gcd(games, len(devices)))
    names = ("games", "cells", FSDP, TENSOR)
    return Mesh(devices.reshape(rows, -1, *devices.shape[1:]), names, axis_types=(AxisType.Auto,) * 4)


def _weights_last(mesh: Mesh) -> np.ndarray:
    """Devices [data, fsdp, tensor]."""
    data = [name for name in mesh.axis_names if name not in (FSDP, TENSOR)]
    order = [mesh.axis_names.index(name) for name in (*data, FSDP, TENSOR) if name in mesh.axis_names]
    return mesh.devices.transpose(order).reshape(-1, mesh.shape.get(FSDP, 1), mesh.shape.get(TENSOR, 1))


def local_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Makes a mesh (data, fsdp, tensor) of all devices of this process.

    Args:
        fsdp: Number of pieces that the width of weights is cut into.
        tensor: Number of pieces that heads, feed-forward width and vocabulary are cut into.

    Returns:
        The mesh. The data axis gets the remaining factor of the number of devices.

    Raises:
        ValueError: fsdp x tensor does not divide the number of devices.
    """
    devices = np.array(jax.local_devices())
    if len(devices) % (fsdp * tensor):
        raise ValueError(f"weights cannot be cut over {fsdp * tensor} of {len(devices)} devices: name a divisor")
    return Mesh(devices.reshape(-1, fsdp, tensor), (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def put(mesh: Mesh | None, tree: Any, *spec) -> Any:
    """Places every array of a pytree on a mesh.

    Args:
        mesh: The devices, or None.
        tree: A pytree of arrays.
        *spec: The mesh axis that cuts the first, second, ... axis of every array. The other axes are not cut.

    Returns:
        The tree on the mesh, or the tree itself if `mesh` is None.
    """
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def constrain(mesh: Mesh | None, x: jax.Array, *spec) -> jax.Array:
    """Constrains, inside a compiled program, how an array is cut along mesh axes.

    Args:
        mesh: The devices, or None.
        x: The array.
        *spec: The mesh axis that cuts the first, second, ... axis of x. XLA chooses for the other axes.

    Returns:
        x with this constraint, or x itself if `mesh` is None.
    """
    if mesh is None:
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - len(spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec, *free)))


def fsdp_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of any pytree for fully sharded training.

    Each array is cut along the longer of those of its last two axes that the mesh axis "fsdp" divides. It stays whole if
    "fsdp" divides neither. Earlier axes are never cut: they are stacked layers, and a loop over them would have to fetch
    every layer from another device.

    Args:
        tree: A pytree of arrays, or of their shapes.
        mesh: A mesh with the axis "fsdp".

    Returns:
        The same tree, with a `NamedSharding` in the place of each array.
    """
    n = mesh.shape[FSDP]

    def place(leaf):
        axes = range(max(0, len(leaf.shape) - 2), len(leaf.shape))
        cut = max((axis for axis in axes if leaf.shape[axis] % n == 0), key=lambda axis: leaf.shape[axis], default=None)
        return NamedSharding(mesh, P(*(FSDP if axis == cut else None for axis in range(len(leaf.shape)))))

    return jax.tree.map(place, tree)


@functools.cache
def all_devices() -> Mesh | None:
    """Makes a mesh of all devices of this process with one axis, "data".

    Returns:
        The mesh, or None if there is only one device.
    """
    devices = np.array(jax.local_devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None
