"""Identify a model by a hash of its architecture, dtype and weights."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.config import ModelConfig
from jaxcomm.language_model import LanguageModel
from jaxcomm.model import Params

if TYPE_CHECKING:  # networks' controls are made of messages, which know their sender's hash
    from jaxcomm.lmnet import Network


def fingerprint(params: LanguageModel) -> str:
    """Hashes the architecture, the dtype and every weight of a model.

    Args:
        params: The model, or a network. Stacked and unrolled layers give the same hash.

    Returns:
        16 hexadecimal digits of a SHA-256 hash.

    Example:
        >>> from jaxcomm.fingerprint import fingerprint
        >>> fingerprint(params.unroll()) == fingerprint(params)
        True
    """
    if not isinstance(params, Params):
        network = cast("Network", params)  # the only other kind of model
        digest = hashlib.sha256(repr((network.config, network.dtype.name)).encode())
        digest.update("".join(map(fingerprint, network.models)).encode())
        for leaf in jax.tree.leaves((network.edges, network.joints)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]
    if params.unrolled and params.config.alike:
        blocks = list(zip(*map(jax.tree.leaves, params.blocks), strict=True))
    else:
        blocks = [[leaf] for leaf in jax.tree.leaves(params.blocks)]
    others = [[leaf] for leaf in jax.tree.leaves((params.embed, params.positions, params.norm, params.head))]
    return fingerprint_of(params.config, params.dtype, [leaf_digest(*leaf) for leaf in (*blocks, *others)])


def fingerprint_of(config: ModelConfig, dtype: np.dtype, digests: Iterable[bytes]) -> str:
    """Computes the same hash as `fingerprint` from hashes of the single weights.

    Args:
        config: Architecture of the model.
        dtype: Dtype of the weights.
        digests: `leaf_digest` of every leaf: those of the blocks, then embedding, positions, norm and head.

    Returns:
        16 hexadecimal digits of a SHA-256 hash.
    """
    return hashlib.sha256(repr((config, dtype.name)).encode() + b"".join(digests)).hexdigest()[:16]


def leaf_digest(*parts: jax.Array | np.ndarray) -> bytes:
    """Hashes one leaf of a model.

    Args:
        *parts: The leaf of stacked layers, or the leaf of each layer in order. Both give the same hash.

    Returns:
        The SHA-256 hash, 32 bytes.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.digest()


SAMPLES = 16
"""How many numbers of each weight `identity` uses."""
_IDENTITIES: dict[tuple[int, ...], tuple[list[weakref.ref], str]] = {}


def identity(params: Params) -> str:
    """Names a model by its architecture and a sample of its weights.

    It uses `SAMPLES` numbers of each weight, so it is fast enough for every message. It is the same for stacked and
    unrolled layers, on every device, and in every dtype that holds the weights exactly. It cannot prove that a folder is
    undamaged; `fingerprint` can.

    Args:
        params: The model.

    Returns:
        12 hexadecimal digits of a SHA-256 hash.
    """
    leaves = jax.tree.leaves(params)
    key = tuple(map(id, leaves))
    if key in _IDENTITIES and all(ref() is leaf for ref, leaf in zip(_IDENTITIES[key][0], leaves, strict=True)):
        return _IDENTITIES[key][1]
    drawn = np.asarray(_samples(params), np.float32).tobytes()
    name = hashlib.sha256(repr(params.config).encode() + drawn).hexdigest()[:12]
    _IDENTITIES[key] = [weakref.ref(leaf) for leaf in leaves], name
    weakref.finalize(leaves[0], _IDENTITIES.pop, key, None)
    return name


@jax.jit
def _samples(params: Params) -> jax.Array:
    def draw(leaf: jax.Array) -> jax.Array:
        flat = leaf.reshape(-1)
        return flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)].astype(jnp.float32)

    if not params.config.alike:
        blocks = jnp.stack(list(map(draw, jax.tree.leaves(params.blocks))))
    elif params.unrolled:
        blocks = jnp.stack([jnp.stack(list(map(draw, jax.tree.leaves(layer)))) for layer in params.blocks])
    else:
        blocks = jnp.stack([jax.vmap(draw)(leaf) for leaf in jax.tree.leaves(params.blocks)], axis=1)
    others = jax.tree.leaves((params.embed, params.positions, params.norm, params.head))
    return jnp.concatenate([blocks.reshape(-1), *map(draw, others)])
