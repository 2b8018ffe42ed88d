"""What tells one model from another: a hash of its architecture, dtype and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import jax
import numpy as np

from jaxcomm.config import ModelConfig
from jaxcomm.lmnet import Network
from jaxcomm.model import Params


def fingerprint(params: Params | Network) -> str:
    """Of architecture, dtype and every weight; the same for stacked and unrolled layers."""
    if isinstance(params, Network):
        digest = hashlib.sha256(repr((params.config, params.dtype.name)).encode())
        digest.update("".join(map(fingerprint, params.models)).encode())
        for leaf in jax.tree.leaves((params.edges, params.joints)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]
    layers = [jax.tree.leaves(layer) for layer in params.blocks] if params.unrolled else None
    blocks = [[leaf] for leaf in jax.tree.leaves(params.blocks)] if layers is None else list(zip(*layers, strict=True))
    others = [[leaf] for leaf in jax.tree.leaves((params.embed, params.positions, params.norm, params.head))]
    return fingerprint_of(params.config, params.dtype, [leaf_digest(*leaf) for leaf in (*blocks, *others)])


def fingerprint_of(config: ModelConfig, dtype: np.dtype, digests: Iterable[bytes]) -> str:
    """Of a model whose leaves have these digests: those of its blocks, then embedding, positions, norm and head."""
    return hashlib.sha256(repr((config, dtype.name)).encode() + b"".join(digests)).hexdigest()[:16]


def leaf_digest(*parts: jax.Array | np.ndarray) -> bytes:
    """Of a stack of layers, or of the layers one by one."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.digest()
