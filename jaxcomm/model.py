"""A language model as pure functions: `prefix`, `suffix`, and their composition `forward`.

    h[0] = embedding, h[i] = block i of h[i-1];  prefix(params, tokens, k) = h[k];  suffix(params, h[k], k) = logits

Layers count from 1. h[L] is the stream before the final norm (Hugging Face's last hidden state is after it).
`Params` contain their architecture. So no call can combine weights with a wrong config, and jit needs no static argument.

Blocks have one of two layouts. Stacked: one tree whose leaves have a leading axis L. A loop runs over it, so program size
and compile time do not depend on L. Unrolled: a tuple of L trees and a Python loop. On CPU, XLA copies a layer out of a
stack before it multiplies by it, which almost halves decoding speed (ARCHITECTURE.md, decision 4). Both layouts give the
same numbers, accept the same calls, and allow traced layer bounds. Layers of unlike shapes are always unrolled.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from jaxcomm.cache import ALONE, Attended, KVCache
from jaxcomm.config import FULL, AnyArray, ModelConfig
from jaxcomm.language_model import INVALID, PLAIN, LanguageModel, Training
from jaxcomm.layers import NO_HOOK, Block, Hook, Surroundings, angles_of, norm_of, project, rotary, scaled
from jaxcomm.linear_attention import blank_state


class Params(struct.PyTreeNode):
    """Weights and architecture of one model.

    Attributes:
        embed: Embedding matrix [V, D].
        positions: Vectors of learned positions [max_positions, D], or None without them.
        blocks: Weights of the blocks. Stacked: one tree whose arrays are [L, ...]. Unrolled: a tuple of L trees.
        norm: Weights of the final norm.
        head: Matrix [V, D] of the head, or None if the head is the embedding matrix.
        config: The architecture.

    Example:
        >>> params.config.layers, params.embed.shape, params.unrolled
        (4, (256, 128), False)
    """

    embed: Float[Array, "V D"]
    positions: Float[Array, "_ D"] | None
    blocks: PyTree
    norm: PyTree
    head: Float[Array, "V D"] | None
    config: ModelConfig = struct.field(pytree_node=False)

    @property
    def dtype(self):
        """Dtype of the weights."""
        return self.embed.dtype

    @property
    def unrolled(self) -> bool:
        """Whether the blocks are a tuple of L trees, not one stack."""
        return isinstance(self.blocks, tuple)

    def empty_cache(self, batch: int, columns: int, *branches: int) -> KVCache:
        """Makes an empty cache, with its layers stacked or unrolled as the blocks are.

        Args:
            batch: Number of rows, B.
            columns: Number of tokens that it has room for, S.
            *branches: Number of branches, C, if there are any (`attention.Segment`).

        Returns:
            The cache.
        """
        c, states = self.config, ()
        shape = lambda heads, size: (batch, heads, *branches, columns, size)
        shapes = [shape(heads.kv_heads, heads.head_dim) if heads else shape(0, 0) for heads in c.key_heads]
        if self.unrolled:
            zeros = lambda: tuple(jnp.zeros(one, self.dtype) for one in shapes)
        else:
            zeros = lambda: jnp.zeros((c.layers, *shapes[0]), self.dtype)
        if c.recurrent:
            states = tuple(rule and blank_state(rule, self.dtype, batch, *branches) for rule in c.rules)
        positions = jnp.full((batch, *branches, columns), -1, jnp.int32)
        return KVCache(zeros(), zeros(), positions, states=states)

    def read(
        self, tokens: Int[AnyArray, "B T"] | Float[AnyArray, "B T D"], positions: Int[Array, "B T"], **how: Any
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Reads tokens (`LanguageModel`).

        Args:
            tokens: Token ids [B, T], or vectors [B, T, D] in the place of their embeddings.
            positions: Positions [B, T]; -1 on padding.
            **how: `attended`, `last` and `training`, as for `run_blocks`.

        Returns:
            h[L], and the cache, or None without one.
        """
        return run_blocks(self, embed(self, tokens, positions), positions, **how)[:2]

    def logits(self, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes logits from h[L].

        Args:
            h: h[L], the stream before the final norm.

        Returns:
            Logits [B, T, V], float32.
        """
        return unembed(self, h)

    def unroll(self) -> Params:
        """Unrolls the blocks. Unrolled blocks decode faster on CPU.

        The weights are in memory twice while the blocks are copied.

        Returns:
            The same model with unrolled blocks.

        Example:
            >>> len(params.unroll().blocks)
            4
        """
        if self.unrolled:
            return self
        layers = range(self.config.layers)
        return self.replace(blocks=tuple(jax.tree.map(operator.itemgetter(i), self.blocks) for i in layers))

    def stack(self) -> Params:
        """Stacks the blocks. A program with stacked blocks compiles faster.

        Returns:
            The same model with stacked blocks. Blocks of unlike shapes (`ModelConfig.layer_heads`) stay unrolled.
        """
        if not (self.unrolled and self.config.alike):
            return self
        return self.replace(blocks=jax.tree.map(lambda *a: jnp.stack(a), *self.blocks))


def layers_apart() -> bool:
    """Whether a model is loaded with unrolled blocks by default.

    They are unrolled on CPU, where decoding with stacked blocks takes up to 1.7 times as long (ARCHITECTURE.md,
    decision 4).
    """
    return jax.default_backend() == "cpu"


def init_params(key: Array, config: ModelConfig, dtype=jnp.float32) -> Params:
    """Draws random weights, with stacked blocks (unrolled ones if their shapes differ).

    Matrices are normal with variance 1 / fan-in. The output matrices of attention and MLP are divided by sqrt(2 L).
    Norms begin with factor 1 and bias 0. The usual fixed deviation of 0.02 suits widths in the thousands; at width 128,
    attention scores would begin near 0.

    Args:
        key: Random key.
        config: Architecture of the model.
        dtype: Dtype of the weights.

    Returns:
        The model.

    Example:
        >>> config = jc.ModelConfig(
        ...     vocab=256, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=128, max_positions=64
        ... )
        >>> jc.init_params(jax.random.key(0), config).embed.shape
        (256, 64)
    """
    keys = jax.random.split(key, 2 + config.layers)
    embed_key, head_key = keys[0], keys[1]
    h, positions = jnp.zeros((1, 1, config.width), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    tables = rotary(config, positions)

    def draw(key: Array, i: int = 0) -> PyTree:
        angles = angles_of(config, tables, i)
        alone = Surroundings(1, angles, positions, None)
        block: Any = Block(config.layer(i)).init(key, h, alone)["params"]
        for module, name in (("attention", "o"), ("delta", "o"), ("mlp", "down"), ("experts", "down")):
            if module in block:
                block[module][name]["weight"] /= np.sqrt(2 * config.layers).astype(np.float32)
        return block

    blocks = jax.vmap(draw)(keys[2:]) if config.alike else tuple(draw(key, i) for i, key in enumerate(keys[2:]))
    matrix = lambda key, rows: config.width**-0.5 * jax.random.normal(key, (rows, config.width))
    place_key = jax.random.fold_in(embed_key, 1)
    params = Params(
        embed=matrix(embed_key, config.vocab),
        positions=matrix(place_key, config.max_positions) if config.learned_positions else None,
        blocks=blocks,
        norm=norm_of(config).init(key, h)["params"],
        head=None if config.tied_head else matrix(head_key, config.vocab),
        config=config,
    )
    return jax.tree.map(lambda a: a.astype(dtype), params)


def embed(
    params: Params, tokens: Int[AnyArray, "B T"] | Float[AnyArray, "B T D"], positions: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Computes h[0], the stream that enters the first block.

    Args:
        params: The model.
        tokens: Token ids [B, T], or vectors [B, T, D] in the place of rows of the embedding matrix.
        positions: Positions [B, T]; -1 on padding.

    Returns:
        h[0], [B, T, D]. It is NaN where the position is `INVALID`, and for a token id outside the vocabulary that is
        not padding.
    """
    return enter(params, tokens, positions)[0]


def enter(
    params: Params,
    tokens: Int[AnyArray, "B T"] | Float[AnyArray, "B T D"],
    positions: Int[Array, "B T"],
    hook: Hook = NO_HOOK,
) -> tuple[Float[Array, "B T D"], Hook]:
    """Computes h[0] like `embed`, and calls a hook at the sites on the way.

    Args:
        params: The model.
        tokens: Token ids [B, T], or vectors [B, T, D].
        positions: Positions [B, T]; -1 on padding.
        hook: The hook to call at the sites.

    Returns:
        h[0] after the hook, and the hook with its new state.
    """
    tokens, valid = jnp.asarray(tokens), positions != INVALID
    if tokens.ndim == 3:
        h = tokens
    else:
        inside = (tokens >= 0) & (tokens < params.config.vocab)
        h, valid = params.embed[jnp.where(inside, tokens, 0)], valid & (inside | (positions == -1))
    if params.config.scale_embedding:
        h *= jnp.asarray(params.config.width**0.5, h.dtype)
    h = scaled(h, params.config.embedding_scale)
    h, hook = hook("embed", None, h)
    h = h if params.positions is None else h + params.positions[jnp.maximum(positions, 0)]
    return hook("resid_post", 0, jnp.where(valid[..., None], h, jnp.nan))


def unembed(params: Params, h: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Computes logits from h[L]: final norm, head, divisor and soft-cap.

    Args:
        params: The model.
        h: h[L], [B, T, D].

    Returns:
        Logits [B, T, V], float32.
    """
    return project_head(params, final_norm(params, h))


def final_norm(params: Params, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Applies the final norm. The result is what Hugging Face calls the last hidden state.

    Args:
        params: The model.
        h: h[L], [B, T, D].

    Returns:
        The normalised stream [B, T, D].
    """
    c = params.config
    normed: Any = norm_of(c).apply({"params": params.norm}, h)
    return normed


def project_head(params: Params, normed: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Computes logits after the final norm: head, divisor and soft-cap.

    Args:
        params: The model.
        normed: Result of `final_norm`, [B, T, D].

    Returns:
        Logits [B, T, V], float32.
    """
    cap, divisor = params.config.logit_softcap, params.config.logit_divisor
    logits = project(params.embed if params.head is None else params.head, normed, jnp.float32)
    logits = logits if divisor == 1 else logits / divisor
    return logits if cap is None else jnp.tanh(logits / cap) * cap


def fold_blocks(params: Params, fn: Callable, carry, start, stop):
    """Applies a function to the blocks in order: carry = fn(carry, i, weights of block i).

    Blocks count from 0 here. With traced bounds, one program serves all values. Reverse-mode gradients exist with int
    bounds in both layouts, and with traced bounds only for unrolled blocks. The loop indexes the whole stack and never
    slices it, because `stack[:k]` in a program copies it.

    Args:
        params: The model.
        fn: The function.
        carry: A pytree that the function receives and returns.
        start: First block, an int or traced.
        stop: The block after the last, an int or traced.

    Returns:
        The last carry.
    """
    traced = isinstance(start, Tracer) or isinstance(stop, Tracer)
    if not params.unrolled and not traced and (start, stop) == (0, params.config.layers):
        # scan is the same loop, but its gradient writes each layer's gradient into the stack. Indexing would add up a
        # gradient of the whole stack for every layer.
        step = lambda carry, x: (fn(carry, *x), None)
        return jax.lax.scan(step, carry, (jnp.arange(stop), params.blocks))[0]
    if not params.unrolled:
        index = lambda i: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), params.blocks)
        return jax.lax.fori_loop(start, stop, lambda i, carry: fn(carry, i, index(i)), carry)
    for i, weights in enumerate(params.blocks):
        if traced:
            run = functools.partial(fn, i=i, weights=weights)
            carry = jax.lax.cond((start <= i) & (i < stop), run, lambda carry: carry, carry)
        elif start <= i < stop:
            carry = fn(carry, i, weights)
    return carry


def run_blocks(
    params: Params,
    h: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    span: tuple[Any, Any] = (0, None),
    *,
    attended: Attended = ALONE,
    hook: Hook = NO_HOOK,
    last: bool = False,
    training: Training = PLAIN,
) -> tuple[Any, Any, Any]:
    """Runs blocks start + 1 .. stop: h[start] -> h[stop]. All functions that run blocks use it.

    Args:
        params: The model.
        h: The stream h[start], [B, T, D].
        positions: Positions [B, T] of the tokens; -1 on padding.
        span: start and stop. Default: all blocks. h is NaN for traced bounds that are out of range.
        attended: Caches that the tokens attend to besides each other.
        hook: The hook to call at every site on the way. It is not called at resid_post of layer 0: `enter` does that.
        last: Whether to return only the last token's h[stop], [B, 1, D]. The bounds must be ints. With unrolled blocks,
            block `stop` then computes keys and values of all tokens, but skips queries and MLP of earlier tokens. (With
            stacked blocks this block would have to be compiled a second time.)
        training: Settings of a pass for which a gradient is computed.

    Returns:
        h[stop], the cache, and the hook's state.

    Raises:
        ValueError: Rows hold several texts, and the model has linear attention.
    """
    c = params.config
    start, stop = span[0], c.layers if span[1] is None else span[1]
    if c.recurrent and training.documents is not None:
        raise ValueError(
            "a model with linear attention cannot be trained on packed rows, where its state would go from one text to the next: train another model"
        )
    tables = rotary(c, positions)
    places, longest = training.places(positions)
    reach = [min(w if w != FULL else np.iinfo(np.int32).max, longest or np.iinfo(np.int32).max) for w in c.windows]

    def step(carry, i, weights, first=0):
        h, cache, state = carry
        h, weights = training.fetched(h, weights)
        window = jnp.asarray(reach, jnp.int32)[i] if any(c.windows) else longest
        caches, own = attended._replace(cache=cache), hook._replace(state=state)
        around = Surroundings(i + 1, angles_of(c, tables, i), places, window, caches, first, own)
        block: Any = Block(c.layer(0 if c.alike else i))
        h = block.apply({"params": weights}, h, around)
        return h, around.kept, around.hook.state

    again = lambda carry, i, weights: training.checkpointed(lambda *x: step(x[0], i, x[1]))(carry, weights)
    carry = h, attended.cache, hook.state
    if last and params.unrolled:
        carry = fold_blocks(params, step, carry, start, stop - 1)
        return step(carry, stop - 1, params.blocks[stop - 1], first=h.shape[1] - 1)
    h, cache, state = fold_blocks(params, step if training.remat == "off" else again, carry, start, stop)
    if isinstance(start, Tracer) or isinstance(stop, Tracer):
        h = jnp.where((start >= 0) & (start <= stop) & (stop <= c.layers), h, jnp.nan)
    return h[:, -1:] if last else h, cache, state


def run(
    params: LanguageModel,
    tokens: Int[AnyArray, "B T"] | Float[AnyArray, "B T D"],
    positions: Int[Array, "B T"],
    hook: Hook = NO_HOOK,
    *,
    attended: Attended = ALONE,
    last: bool = False,
) -> tuple[Float[Array, "B _ V"], KVCache | None, Any]:
    """Runs a model from tokens to logits, and calls a hook at all sites. (A network has no sites and no hook.)

    Args:
        params: The model, or a network.
        tokens: Token ids [B, T], or vectors [B, T, D].
        positions: Positions [B, T]; -1 on padding.
        hook: The hook to call at the sites.
        attended: Caches that the tokens attend to besides each other.
        last: Whether to compute only the last token's logits.

    Returns:
        Logits [B, T, V] or [B, 1, V], the cache, and the hook's state.
    """
    if not hook.sites:
        h, cache = params.read(tokens, positions, attended=attended, last=last)
        return params.logits(h), cache, hook.state
    single: Any = params
    h, hook = enter(single, tokens, positions, hook)
    h, cache, state = run_blocks(single, h, positions, attended=attended, hook=hook, last=last)
    logits, hook = hook._replace(state=state)("logits", None, single.logits(h))
    return jnp.where(jnp.reshape(hook.valid, (-1, 1, 1)), logits, jnp.nan), cache, hook.state
