"""Where arrays live when there is more than one device.

A mesh has a "tensor" axis (one model's matrices are cut along it) or not; every other axis is for data. Functions do not
know of meshes: parameters are placed, and XLA carries the placement through.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm.model import Params

TENSOR = "tensor"
_CUT = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}
"""Which axis of a linear weight [out, in] is cut: outputs of what fans out, inputs of what comes together."""


def shard(params: Params, mesh: Mesh) -> Params:
    """Weights on the devices of `mesh` (`shardings`)."""
    return jax.tree.map(jax.device_put, params, shardings(params, mesh))


def shardings(params: Params, mesh: Mesh) -> Params:
    """Where every weight (or its shape) lies on a mesh: matrices cut along its "tensor" axis by heads, feed-forward width
    and vocabulary, everything else on every device.

    What the axis does not divide (4 key heads on 8 devices) is whole on every device. Of the mesh only the devices and
    the axes' names count: types are set to Auto, and "tensor" comes last, whatever they were.
    """
    devices = _tensor_last(mesh)
    mesh = Mesh(devices, ("data", TENSOR), axis_types=(AxisType.Auto,) * 2)
    c, n = params.config, devices.shape[1]
    units = {"q": c.heads, "o": c.heads, "k": c.kv_heads, "v": c.kv_heads, "gate": c.ff, "up": c.ff, "down": c.ff}

    def place(path, leaf):
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        spec: list[Any] = [None] * leaf.ndim
        if names[0] in ("embed", "head") and c.vocab % n == 0:
            spec[0] = TENSOR
        elif len(names) > 2 and names[-2] in _CUT and units[names[-2]] % n == 0:
            axis = _CUT[names[-2]]
            if names[-1] == "weight":
                spec[leaf.ndim - 2 + axis] = TENSOR
            elif axis == 0:
                spec[-1] = TENSOR
        return NamedSharding(mesh, P(*spec if n > 1 else ()))

    return jax.tree_util.tree_map_with_path(place, params)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh the weights were placed on, or None if they are on one device."""
    sharding = getattr(params.embed, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def move(params: Params, mesh: Mesh) -> Params:
    """The same buffers under another mesh of the same devices in the same order. (jit takes one mesh at a time.)

    ValueError: they lie on other devices, or are cut along an axis that is not "tensor".
    """
    old = mesh_of(params)
    if old is None or tuple(old.devices.flat) != tuple(mesh.devices.flat):
        raise ValueError("weights lie on other devices than the sweep: place both models' with shard(params, mesh)")

    def rename(a: jax.Array) -> jax.Array:
        spec = getattr(a.sharding, "spec", P())
        if not {name for name in spec if name is not None} <= {TENSOR}:
            raise ValueError(f"weights are cut along {spec}: place them with shard(params, mesh)")
        shards = [shard.data for shard in a.addressable_shards]
        return jax.make_array_from_single_device_arrays(a.shape, NamedSharding(mesh, spec), shards)

    return jax.tree.map(rename, params)


def spread(params: Params) -> Params:
    """Whole on every device of this process; as they are if there is one device, or they have been placed already."""
    return params if mesh_of(params) else put(all_devices(), params)


def grid(mesh: Mesh, games: int) -> Mesh:
    """The same devices as (games, cells, tensor): as many of the data devices for the games as divide their number, the
    rest for the cells, so that no device waits for want of a game."""
    devices = _tensor_last(mesh)
    rows = int(np.gcd(games, len(devices)))
    return Mesh(
        devices.reshape(rows, -1, devices.shape[1]), ("games", "cells", TENSOR), axis_types=(AxisType.Auto,) * 3
    )


def _tensor_last(mesh: Mesh) -> np.ndarray:
    """Devices [data, tensor]."""
    names = mesh.axis_names
    if TENSOR not in names:
        return mesh.devices.reshape(-1, 1)
    return np.moveaxis(mesh.devices, names.index(TENSOR), -1).reshape(-1, mesh.shape[TENSOR])


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


FSDP = "fsdp"


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


def data_mesh(fsdp: int = 1) -> Mesh | None:
    """All devices of this process as ("data", "fsdp"); None if there is only one. ValueError: `fsdp` does not divide them."""
    devices = np.array(jax.local_devices())
    if len(devices) % fsdp:
        raise ValueError(f"weights cannot be cut over {fsdp} of {len(devices)} devices: name a divisor")
    return (
        Mesh(devices.reshape(-1, fsdp), ("data", FSDP), axis_types=(AxisType.Auto,) * 2) if len(devices) > 1 else None
    )


@functools.cache
def all_devices() -> Mesh | None:
    """Every device of this process as one data axis; None if there is only one."""
    devices = np.array(jax.local_devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None
