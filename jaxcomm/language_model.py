"""The interface of every model, one decoder or a network of them: methods for reading and writing, positions of tokens,
and settings for training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxcomm.attention import rows_for
from jaxcomm.cache import Attended, KVCache, in_order
from jaxcomm.config import AnyArray, ModelConfig, NetworkConfig, Remat
from jaxcomm.prompts import Prompts

INVALID = -2
"""Position of every token in a row that is invalid, such as one that ends in padding, if the row was traced and could not be
refused (`jaxcomm.compiled`)."""


@runtime_checkable
class LanguageModel(Protocol):
    """The interface that reading and writing need. `Params` (one decoder) and `jaxcomm.lmnet.Network` (several) have it.

    A model is a pytree. `Params` documents the arguments and results of each method.

    Attributes:
        embed: Embedding matrix of the input tokens, [V, D].
        config: Architecture. It has vocab, width and max_positions.
        dtype: Dtype of the weights.
    """

    @property
    def config(self) -> ModelConfig | NetworkConfig: ...

    @property
    def embed(self) -> Float[Array, "V D"]: ...

    @property
    def dtype(self) -> Any: ...

    def empty_cache(self, batch: int, columns: int, *branches: int) -> KVCache: ...

    def read(
        self,
        tokens: AnyArray,
        positions: Array,
        *,
        attended: Attended = ...,
        last: bool = ...,
        training: Training = ...,
    ) -> tuple[Float[Array, "B _ D"], Any]: ...

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]: ...


def check_room(params: LanguageModel, prompts: Prompts, new: int = 0) -> None:
    """Checks that prompts and new tokens fit the model's positions.

    Args:
        params: The model, or a network.
        prompts: Its prompts.
        new: Number of new tokens after them.

    Raises:
        ValueError: The prompts have no token; their columns and the new tokens exceed the model's positions.
    """
    length, limit = prompts.shape[1], params.config.max_positions
    if not length:
        raise ValueError("empty prompt: a model needs at least one token to read")
    if length + new > limit:
        reach = max(rope.reach for rope in params.config.ropes) if isinstance(params.config, ModelConfig) else 0
        longer = f", or load the model with max_positions up to {reach}" if reach > limit else ""
        raise ValueError(
            f"{length} prompt columns + {new} new tokens exceed the model's {limit} positions: shorten the prompt{longer}"
        )


def positions_of(prompts: Prompts, past: Sequence[KVCache] = ()) -> Int[Array, "B P"]:
    """Numbers the tokens of prompts.

    Args:
        prompts: The prompts.
        past: Key/value caches of the tokens before them.

    Returns:
        Positions [B, P]: consecutive over the real tokens of each row, from the position that follows `past`; -1 on
        padding. All are `INVALID` in a row that ends in padding, or whose caches do not follow each other as linear
        attention needs them.
    """
    begin, mask = after(past, len(prompts)), prompts.mask
    if mask is None:
        places = jnp.broadcast_to(begin + jnp.arange(prompts.shape[1], dtype=jnp.int32), prompts.shape)
    else:
        places = jnp.where(mask, begin + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1)
        places = jnp.where(mask[:, -1:], places, INVALID)
    if len(past) > 1 and past[-1].indivisible:
        places = jnp.where(in_order(past, len(prompts))[:, None], places, INVALID)
    return places


def after(caches: Sequence[KVCache], rows: int) -> Int[Array, "_ 1"] | int:
    """Finds the first position after all tokens in the caches.

    Args:
        caches: The caches. They may have fewer rows, each shared by consecutive prompts (`attention.rows_for`).
        rows: Number of prompts.

    Returns:
        Positions [B, 1] (B is 1 if all caches have one row), or 0 without caches.
    """
    return functools.reduce(jnp.maximum, [rows_for(c.after(), rows)[:, None] for c in caches], 0)


class Training(NamedTuple):
    """Settings of a pass for which a gradient is computed.

    Attributes:
        documents: Number of the text that each token belongs to, [B, T], in order, if rows hold several texts. The
            texts do not see each other. It excludes past and cache.
        remat: What the backward pass recomputes, block by block (`config.Remat`).
        mesh: Rows are distributed over all devices of this mesh. The weights of a block are gathered when needed.
        learned: Which tokens are learned, [B, T]. The tokens before them in a text are its prompt. Only bridges use it.
        told: The tokens that another model reads (`training.Told`). Only bridges use it.
        step: Number of the step and of its part, int32 [2], for random numbers. None: no random numbers.
    """

    documents: Int[Array, "B T"] | None = None
    remat: Remat = "off"
    mesh: Mesh | None = None
    learned: Bool[Array, "B T"] | None = None
    told: Any = None
    step: Int[Array, "2"] | None = None

    def places(self, positions: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], int | None]:
        """Computes positions for attention masks.

        The positions of a row's texts are moved so far apart that no text is in the window of the next. So masks that use
        only positions also keep packed texts apart.

        Args:
            positions: Positions [B, T] of the tokens.

        Returns:
            Positions [B, T], and how far back a query sees (None: to the first token).
        """
        if self.documents is None:
            return positions, None
        longest = positions.shape[1]
        return jnp.where(positions < 0, -1, positions + 2 * longest * self.documents), longest

    def fetched(self, h: Array, weights: Any) -> tuple[Array, Any]:
        """Constrains the placement of the stream and of a layer's weights for fully sharded training.

        Rows stay on their devices, and weights are gathered. Without the constraint XLA may gather all rows instead,
        which are larger.

        Args:
            h: The stream.
            weights: Weights of the layer.

        Returns:
            Both, with these constraints if there is a mesh.
        """
        if (mesh := self.mesh) is None:
            return h, weights
        put = lambda a, *spec: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P(*spec)))
        return put(h, mesh.axis_names), jax.tree.map(put, weights)

    def checkpointed(self, fn: Callable) -> Callable:
        """Wraps a function in `jax.checkpoint` with the policy named by `remat`.

        Args:
            fn: The function.

        Returns:
            The function, or `fn` itself with remat "off".
        """
        if self.remat == "off":
            return fn
        policy = jax.checkpoint_policies.dots_saveable if self.remat == "products" else None
        return jax.checkpoint(fn, policy=policy)


PLAIN = Training()
"""One text in every row, and no recomputation in the backward pass."""
