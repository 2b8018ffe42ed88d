"""What tells one model from another: a hash of its architecture, dtype and weights."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from jaxcomm.lmnet import Network
from jaxcomm.model import Params


def fingerprint(params: Params | Network) -> str:
    """Of architecture, dtype and every weight; the same for stacked and unrolled layers."""
    digest = hashlib.sha256(repr((params.config, params.dtype.name)).encode())
    if isinstance(params, Network):
        digest.update("".join(map(fingerprint, params.models)).encode())
        for leaf in jax.tree.leaves((params.edges, params.joints)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()[:16]
    blocks = params.blocks if params.unrolled else None
    for i in range(params.config.layers):
        layer = blocks[i] if blocks else jax.tree.map(lambda a, i=i: a[i], params.blocks)
        for leaf in jax.tree.leaves(layer):
            digest.update(np.asarray(leaf).tobytes())
    for leaf in jax.tree.leaves((params.embed, params.positions, params.norm, params.head)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
