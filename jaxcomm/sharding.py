"""Where arrays live when there is more than one device.

Every axis of a weight has a name (`logical_axes`), and rules say along which axis of a mesh it is cut (`RULES`): "tensor" by
heads, feed-forward width and vocabulary, "fsdp" by the model's width. Every other axis of a mesh is for data. Functions do
not know of meshes: parameters are placed, and XLA carries the placement through.

Two models may live on different devices (`deliver`): what one sends the other is then all that moves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm.config import ModelConfig
from jaxcomm.model import LanguageModel, Params

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
RULES: Mapping[str, str] = {
    "vocab": TENSOR, "heads": TENSOR, "kv_heads": TENSOR, "ff": TENSOR, "width": FSDP,
}  # fmt: skip
"""Logical axis -> axis of a mesh. Axes that are not named here are whole on every device."""

_MATRICES = {
    "q": ("heads", "width"), "k": ("kv_heads", "width"), "v": ("kv_heads", "width"), "o": ("width", "heads"),
    "gate": ("ff", "width"), "up": ("ff", "width"), "down": ("width", "ff"), "router": ("experts", "width"),
}  # fmt: skip
"""Of the linear weights [out, in]."""


def logical_axes(params: Params) -> Params:
    """The names of every weight's axes, as a `PartitionSpec` in its place: layers, experts, vocab, positions, width, heads,
    kv_heads (both times head_dim), head_dim, ff. Of the weights or their shapes, in either layout."""

    def name(path, leaf):
        keys: list[Any] = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        scales = keys[-1] == "scale"  # one per output, [.., out, 1]
        if keys[-1] in ("qvalue", "scale"):  # of a matrix in int8
            keys = keys[:-1]
        if keys[0] != "blocks":
            first = {"embed": ["vocab"], "head": ["vocab"], "positions": ["positions"], "norm": []}[keys[0]]
            return P(*first, None if scales else "width")
        module, kind = keys[-2:]
        if module in _MATRICES:
            own = _MATRICES[module] if kind == "weight" else _MATRICES[module][:1]
            own = (own[0], None) if scales else own
        elif module in ("q_norm", "k_norm"):
            each = {"q_norm": "heads", "k_norm": "kv_heads"}[module]
            own = ("head_dim",) if params.config.qk_norm == "head" else (each,)
        else:
            own = ("width",)
        stacked = ["layers"] * (not params.unrolled)
        experts = ["experts"] * (leaf.ndim - len(own) - len(stacked))
        return P(*stacked, *experts, *own)

    return jax.tree_util.tree_map_with_path(name, params)


def shardings(params: Params, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Params:
    """Where every weight (or its shape) lies on a mesh, by the rules.

    What an axis does not divide (4 key heads on 8 devices) is whole on every device. Of the mesh only the devices and the
    axes' names count: types are set to Auto, and "fsdp" and "tensor" come last, whatever they were.
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
    """How many pieces an axis has that must not be cut."""
    sizes = {"heads": c.heads, "kv_heads": c.kv_heads, "ff": c.ff, "vocab": c.vocab, "width": c.width}
    return sizes | {"head_dim": c.head_dim, "experts": c.experts, "layers": c.layers, "positions": c.max_positions}


def shard(params: Params, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Params:
    """Weights on the devices of `mesh` (`shardings`)."""
    return jax.tree.map(jax.device_put, params, shardings(params, mesh, rules))


def mesh_of(params: LanguageModel) -> Mesh | None:
    """The mesh the weights were placed on; of one device if they were put there; None if nobody said where they live."""
    sharding = getattr(params.embed, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    if getattr(params.embed, "committed", False) and len(params.embed.devices()) == 1:
        return Mesh(np.array([*params.embed.devices()]), (DATA,), axis_types=(AxisType.Auto,))
    return None


def deliver(x: Any, params: LanguageModel) -> Any:
    """x, whole, on every device that the model lives on. Within a program nothing happens: it has one set of devices."""
    if isinstance(x, Tracer) or isinstance(params.embed, Tracer):
        return x
    return put(mesh_of(params), x)


def by_rows(params: LanguageModel, tree: Any) -> Any:
    """Arrays whose rows are cut over the data axis of the model's mesh, if it divides them; else as they are."""
    mesh = mesh_of(params)
    if mesh is None or DATA not in mesh.shape:
        return tree
    return jax.tree.map(lambda a: a if len(a) % mesh.shape[DATA] else put(mesh, a, DATA), tree)


def move(params: Params, mesh: Mesh) -> Params:
    """The same buffers under another mesh of the same devices in the same order. (jit takes one mesh at a time.)

    ValueError: they lie on other devices, or are cut along an axis that is not for weights.
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
    """Whole on every device of this process; as they are if there is one device, or they have been placed already."""
    return params if mesh_of(params) else put(all_devices(), params)


def sweep_mesh(mesh: Mesh, games: int) -> Mesh:
    """The same devices as (games, cells, fsdp, tensor): as many of the data devices for the games as divide their number,
    the rest for the cells, so that no device waits for want of a game."""
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
    """All devices of this process as (data, fsdp, tensor). ValueError: fsdp x tensor does not divide them."""
    devices = np.array(jax.local_devices())
    if len(devices) % (fsdp * tensor):
        raise ValueError(f"weights cannot be cut over {fsdp * tensor} of {len(devices)} devices: name a divisor")
    return Mesh(devices.reshape(-1, fsdp, tensor), (DATA, FSDP, TENSOR), axis_types=(AxisType.Auto,) * 3)


def put(mesh: Mesh | None, tree: Any, *spec) -> Any:
    """Every leaf on the mesh with its first axes cut as `spec` says; as it is without a mesh."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def constrain(mesh: Mesh | None, x: jax.Array, *spec) -> jax.Array:
    """Inside jit: x with its first axes cut as `spec` says, the others left to XLA."""
    if mesh is None:
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - len(spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec, *free)))


def fsdp_shardings(tree: Any, mesh: Mesh) -> Any:
    """For every leaf (an array, or its shape): cut along the longest axis that the mesh's "fsdp" axis divides, else whole.

    Only the last two axes are looked at: those before them are of a stack, and a loop over it would have to fetch every
    step's.
    """
    n = mesh.shape[FSDP]

    def place(leaf):
        axes = range(max(0, len(leaf.shape) - 2), len(leaf.shape))
        cut = max((axis for axis in axes if leaf.shape[axis] % n == 0), key=lambda axis: leaf.shape[axis], default=None)
        return NamedSharding(mesh, P(*(FSDP if axis == cut else None for axis in range(len(leaf.shape)))))

    return jax.tree.map(place, tree)


@functools.cache
def all_devices() -> Mesh | None:
    """Every device of this process as one data axis; None if there is only one."""
    devices = np.array(jax.local_devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None
