"""Weight-only int8: every matrix of the blocks, and a separate head, as integers with one scale per output.

The integers are cast to the activations' dtype (exactly: 8 bits fit), multiplied, and the product is scaled. Embeddings,
norms and biases are not quantised. Weights need half the memory of bfloat16; benchmarks/int8.py measures the cost in KL.
The quantisation and the array type are qwix's (extra `int8`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.model import Params


def quantise(params: Params) -> Params:
    """Converts the matrices of a model to int8, on their devices.

    The original model must fit into memory together with the new one. `load_agent(.., int8=True)` quantises each matrix as it
    is read, and never holds both.

    Args:
        params: The model.

    Returns:
        The model with the matrices of its blocks, and its separate head, in int8. Embeddings, norms and biases stay as
        they are.

    Raises:
        ValueError: The package qwix is missing.
    """
    return jax.tree_util.tree_map_with_path(in_int8, params)


def in_int8(path: tuple, leaf: jax.Array) -> Any:
    """Quantises one leaf of a model if it is a matrix of the blocks, or the separate head.

    Args:
        path: The leaf's path in `Params`, as `jax.tree_util.tree_map_with_path` gives it.
        leaf: The weight.

    Returns:
        The int8 matrix (`quantise_matrix`), or the leaf as it is.

    Raises:
        ValueError: The package qwix is missing.
    """
    if importlib.util.find_spec("qwix") is None:
        raise ValueError("int8 weights need qwix: pip install 'jaxcomm[int8]'")
    part = getattr(path[0], "name", getattr(path[0], "key", None))
    matrix = part == "head" or (part == "blocks" and is_matrix(path))
    return jax.block_until_ready(quantise_matrix(leaf)) if matrix else leaf


NOT_SAVED = "int8 weights cannot be saved: save the model they were made of, and quantise it when it is loaded"


def check_not_int8(params: Params, why: str = NOT_SAVED) -> None:
    """Checks that no weight of a model is int8.

    Args:
        params: The model.
        why: Message of the error.

    Raises:
        ValueError: A weight is int8.
    """
    matrix = lambda leaf: hasattr(leaf, "qvalue")
    if any(map(matrix, jax.tree.leaves(params, is_leaf=matrix))):
        raise ValueError(why)


def is_matrix(path: tuple) -> bool:
    """Whether a leaf of a block is a matrix, not a norm's weight or a bias.

    Args:
        path: The leaf's path.
    """
    return path[-1].key == "weight" and not path[-2].key.endswith("norm")


@jax.jit
def quantise_matrix(weight: jax.Array) -> Any:
    """Quantises a matrix, with one scale for each output.

    Args:
        weight: The matrix [.., out, in].

    Returns:
        qwix's QArray: int8 values [.., out, in], and scales [.., out, 1] in the weight's dtype.
    """
    import qwix  # optional

    with jax.numpy_dtype_promotion("standard"):
        return qwix.quantize(weight, jnp.int8, channelwise_axes=tuple(range(weight.ndim - 1)))
