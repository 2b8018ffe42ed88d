"""Latent thoughts (LatentMAS, Zou et al. 2025, arXiv 2511.20639): a model reads its own final state instead of a token.

After a prompt, the state h after the final norm becomes the next input, e = h W_a. This repeats for m steps, and no token
is generated. The message is the keys and values of prompt and thoughts, or the inputs e. W_a is a closed-form map from
final states to the space of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.messages import Message
from jaxcomm.model import Params, final_norm, project_head
from jaxcomm.prompts import Prompts
from jaxcomm.sites import Site

Thought = Literal["aligned", "identity", "soft"]
"""The next input. "aligned": h W_a, scaled to the mean norm of embeddings, as published. "identity": h, scaled to that
norm. "soft": the expected embedding of the next token."""
RIDGE = 1e-5
"""The authors' value."""


class Thoughts(struct.PyTreeNode):
    """A model's state after m thinking steps after its prompts.

    Attributes:
        vectors: The inputs of the thinking steps, [B, m, D], in the space of rows of the embedding matrix.
        logits: Logits of the next token, [B, V].
        cache: Keys and values of prompts and thoughts; the thoughts are the last m columns.

    Example:
        >>> thoughts = jc.think(params, prompts, steps=2)
        >>> jc.decode(params, thoughts.logits, thoughts.cache, max_new_tokens=2).tokens.shape
        (2, 2)
    """

    vectors: Float[Array, "B m D"]
    logits: Float[Array, "B V"]
    cache: KVCache

    def message(self) -> Message:
        """The thoughts as a message of states. `messages.receive` puts them in the place of embeddings.

        Returns:
            States [B, m, D] at the site `embed`.
        """
        return Message(self.vectors, jnp.ones(self.vectors.shape[:2], bool), Site("embed"))


@jax.jit
def realignment(params: Params) -> Float[Array, "D D"]:
    """Computes W_a = (U^T U + 1e-5 I)^-1 U^T E (LatentMAS, section 3.1). U is the head's matrix, E the embedding matrix.

    With tied embeddings it is nearly the identity.

    Args:
        params: The model.

    Returns:
        The matrix, float32. It maps a state h to h W_a.

    Example:
        >>> jc.latents.realignment(params).shape
        (128, 128)
    """
    table = params.embed.astype(jnp.float32)
    head = table if params.head is None else params.head.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        gram = head.T @ head + RIDGE * jnp.eye(head.shape[1], dtype=jnp.float32)
        return jax.scipy.linalg.solve(gram, head.T @ table, assume_a="pos")


@compiled(static=("steps", "thought"))
def think(
    params: Params,
    prompts: Prompts,
    *,
    steps: int,
    thought: Thought = "aligned",
    W: Float[AnyArray, "D D"] | None = None,
    past: Sequence[KVCache] = (),
) -> Thoughts:
    """Reads prompts, and then thinks in latents for m steps.

    Prompts are padded on the left, so every row starts to think at its own last token. All steps run in one loop.

    Args:
        params: The model.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        steps: Number of steps, m. With 0 the model only reads.
        thought: The next input of a thinking step.
        W: Result of `realignment`, for "aligned". None: it is computed.
        past: Key/value caches of the tokens before the prompts. They are not changed.

    Returns:
        Vectors, logits and cache.

    Raises:
        ValueError: There is no such thought; the number of steps is negative; the prompts are invalid, or leave no room.

    Example:
        >>> thoughts = jc.think(params, prompts, steps=3)
        >>> thoughts.vectors.shape, thoughts.cache.positions.shape
        ((2, 3, 128), (2, 6))
    """
    if thought not in ("aligned", "identity", "soft"):
        raise ValueError(f"unknown thought {thought!r}: choose aligned, identity or soft")
    if steps < 0:
        raise ValueError(f"steps = {steps}: a model thinks for 0 steps or more")
    check_room(params, prompts, steps)
    (B, P), positions = prompts.shape, positions_of(prompts, past)
    if thought == "aligned" and W is None and steps:
        W = realignment(params)
    norm = jnp.mean(jnp.linalg.norm(params.embed.astype(jnp.float32), axis=-1))

    def following(h: Array) -> Array:
        """The next input after a final state [B, 1, D]."""
        normed = final_norm(params, h)
        if thought == "soft":
            p = jax.nn.softmax(project_head(params, normed), axis=-1).astype(params.dtype)
            return jnp.einsum("btv,vd->btd", p, params.embed, preferred_element_type=jnp.float32).astype(params.dtype)
        e = normed.astype(jnp.float32)
        if thought == "aligned":
            e = jnp.einsum("btd,de->bte", e, W, precision="highest")
        return (e * norm / jnp.maximum(jnp.linalg.norm(e, axis=-1, keepdims=True), 1e-6)).astype(params.dtype)

    def step(m: Any, carry: Any) -> Any:
        h, cache, vectors = carry
        e = following(h)
        at, column = positions[:, -1:] + 1 + m, P + m
        h, cache = params.read(e, at, attended=Attended(past, cache.announce(at, column), column))
        return h, cache, jax.lax.dynamic_update_slice_in_dim(vectors, e, m, axis=1)

    h, cache = params.read(prompts.tokens, positions, attended=Attended(past, params.empty_cache(B, P)), last=True)
    cache = cache.replace(positions=positions).extend(steps)
    carry = h, cache, jnp.zeros((B, steps, params.config.width), params.dtype)
    h, cache, vectors = jax.lax.fori_loop(0, steps, step, carry) if steps else carry
    return Thoughts(vectors, project_head(params, final_norm(params, h))[:, 0], cache)
