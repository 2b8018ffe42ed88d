"""Low-rank adaptation (Hu et al., ICLR 2022): what training few weights of one model is compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxcomm.int8 import check_not_int8
from jaxcomm.model import Params

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LoRA(struct.PyTreeNode):
    """W + alpha / r * up down, of every linear weight [out, in] of the blocks named in `TARGETS`.

    factors: a dict by the path of each weight, of {"down": [.., r, in], "up": [.., out, r]}, float32, with the axes that its
    layers are stacked along.
    """

    factors: Any
    alpha: float = struct.field(pytree_node=False)

    def join(self, frozen: Params) -> Params:
        """The model with its weights moved. ValueError: its layers are stacked and these factors' are not, or the reverse."""
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
    """`up` begins at 0, so the model begins as it is; `down` is normal with variance 1 / in. alpha: default 2 r (the factor
    is then 2). ValueError: a rank below 1."""
    if rank < 1:
        raise ValueError(f"rank {rank}: LoRA needs at least 1")
    factors = {}
    for n, (path, weight) in enumerate(_targets(params)):
        *stack, out, width = weight.shape
        down = jax.random.normal(jax.random.fold_in(key, n), (*stack, rank, width)) * width**-0.5
        factors[jax.tree_util.keystr(path)] = {"down": down, "up": jnp.zeros((*stack, out, rank))}
    return LoRA(factors, 2.0 * rank if alpha is None else alpha)


def rank_of_size(params: Params, numbers: int) -> int:
    """The rank at which the factors hold most nearly so many numbers, at least 1."""
    each = sum(
        weight.size // weight.shape[-1] // weight.shape[-2] * sum(weight.shape[-2:]) for _, weight in _targets(params)
    )
    return max(1, round(numbers / each))


def _targets(params: Params) -> list[tuple[Any, Array]]:
    check_not_int8(params, "LoRA moves weights, and int8 ones cannot be: give it the model they were made of")
    leaves = jax.tree_util.tree_leaves_with_path(params.blocks)
    return [(path, w) for path, w in leaves if path[-1].key == "weight" and path[-2].key in TARGETS]
