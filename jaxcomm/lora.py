"""Low-rank adaptation (Hu et al., ICLR 2022), the baseline for methods that train few weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxcomm.int8 import check_not_int8
from jaxcomm.model import Params

TARGETS = ("q", "q_gate", "k", "v", "qkv", "o", "gate", "up", "down")


class LoRA(struct.PyTreeNode):
    """Low-rank updates of the blocks' linear weights: W + (alpha / r) up down (Hu et al. 2022, section 4.1).

    Attributes:
        factors: For each weight [.., out, in] named in `TARGETS`, by its path in the blocks: {"down": [.., r, in],
            "up": [.., out, r]}, float32. The leading axes are the stacked layers and experts.
        alpha: Scale of the update. It has no unit.
    """

    factors: dict[str, dict[str, Float[Array, "*_ _ _"]]]
    alpha: float = struct.field(pytree_node=False)

    def join(self, frozen: Params) -> Params:
        """Adds the updates to a model.

        Args:
            frozen: The model that the factors were made for, with its layers in the same layout.

        Returns:
            The model with updated weights.

        Raises:
            ValueError: The model's layers are stacked and the factors' are unrolled, or the reverse; the model has int8
                weights.
        """
        if strange := self.factors.keys() - {jax.tree_util.keystr(path) for path, _ in _targets(frozen)}:
            raise ValueError(
                f"the model has no {min(strange)}: its layers must be laid out as those the factors were made for (stack, unroll)"
            )

        def move(path, weight):
            factor = self.factors.get(jax.tree_util.keystr(path))
            if factor is None:
                return weight
            scale = jnp.asarray(self.alpha / factor["down"].shape[-2], jnp.float32)
            return weight + (scale * factor["up"] @ factor["down"]).astype(weight.dtype)

        return frozen.replace(blocks=jax.tree_util.tree_map_with_path(move, frozen.blocks))


def init_lora(key: Array, params: Params, rank: int, alpha: float | None = None) -> LoRA:
    """Makes LoRA factors for a model. Initially they do not change its output.

    `up` begins at 0. `down` is normal with variance 1 / in.

    Args:
        key: Random key.
        params: The model.
        rank: The rank r, at least 1.
        alpha: Scale of the update. Default: 2 r, so that alpha / r is 2.

    Returns:
        The factors, for all weights named in `TARGETS`.

    Raises:
        ValueError: The rank is below 1; the model has int8 weights.

    Example:
        >>> from jaxcomm.lora import init_lora
        >>> lora = init_lora(jax.random.key(0), params, rank=2)
        >>> bool(jnp.allclose(jc.forward(lora.join(params), prompts), jc.forward(params, prompts)))
        True
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: LoRA needs at least 1")
    factors = {}
    for n, (path, weight) in enumerate(_targets(params)):
        *stack, out, width = weight.shape
        down = jax.random.normal(jax.random.fold_in(key, n), (*stack, rank, width)) * width**-0.5
        factors[jax.tree_util.keystr(path)] = {"down": down, "up": jnp.zeros((*stack, out, rank))}
    return LoRA(factors, 2.0 * rank if alpha is None else alpha)


def rank_of_size(params: Params, numbers: int) -> int:
    """Finds the rank at which the LoRA factors have about a given size.

    Args:
        params: The model.
        numbers: Wanted number of entries in all factors together.

    Returns:
        The rank whose factors come closest to this number, at least 1.

    Raises:
        ValueError: The model has int8 weights.
    """
    each = sum(
        weight.size // weight.shape[-1] // weight.shape[-2] * sum(weight.shape[-2:]) for _, weight in _targets(params)
    )
    return max(1, round(numbers / each))


def _targets(params: Params) -> list[tuple[Any, Array]]:
    check_not_int8(params, "LoRA changes weights, and int8 weights cannot change: give the model they were made of")
    leaves = jax.tree_util.tree_leaves_with_path(params.blocks)
    return [(path, w) for path, w in leaves if path[-1].key == "weight" and path[-2].key in TARGETS]
