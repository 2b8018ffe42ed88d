"""Weight-only int8: every matrix of the blocks, and a head of its own, as whole numbers with one scale per output.

Products are taken of the activations as they are with the weights cast to their dtype (exactly: 8 bits fit), and scaled
after; embeddings, norms and biases stay. Half the memory of bfloat16; benchmarks/int8.py measures what it costs in KL.
The quantisation, and the array type, are qwix's (extra `int8`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.model import Params


def quantise(params: Params) -> Params:
    """The model with its matrices in int8, where they lay. (`load_agent(.., int8=True)` quantises each as it is read, and so
    never holds two models.)

    ValueError: qwix is missing.
    """
    return jax.tree_util.tree_map_with_path(in_int8, params)


def in_int8(path: tuple, leaf: jax.Array) -> Any:
    """A leaf of a model, quantised if it is a matrix of its blocks, or its head. ValueError: qwix is missing."""
    if importlib.util.find_spec("qwix") is None:
        raise ValueError("int8 weights need qwix: pip install 'jaxcomm[int8]'")
    part = getattr(path[0], "name", getattr(path[0], "key", None))
    matrix = part == "head" or (part == "blocks" and is_matrix(path))
    return jax.block_until_ready(quantise_matrix(leaf)) if matrix else leaf


NOT_SAVED = "int8 weights cannot be saved: save the model they were made of, and quantise it when it is loaded"


def check_not_int8(params: Params, why: str = NOT_SAVED) -> None:
    """Raises ValueError, which says why, if some of the weights are int8."""
    matrix = lambda leaf: hasattr(leaf, "qvalue")
    if any(map(matrix, jax.tree.leaves(params, is_leaf=matrix))):
        raise ValueError(why)


def is_matrix(path: tuple) -> bool:
    """Whether the leaf of a block's tree is one that is multiplied by: not a norm's weight, nor a bias."""
    return path[-1].key == "weight" and not path[-2].key.endswith("norm")


@jax.jit
def quantise_matrix(weight: jax.Array) -> Any:
    """[.., out, in] as qwix's QArray: int8 of that shape, and scales [.., out, 1] of the weight's dtype."""
    import qwix  # optional

    with jax.numpy_dtype_promotion("standard"):
        return qwix.quantize(weight, jnp.int8, channelwise_axes=tuple(range(weight.ndim - 1)))
