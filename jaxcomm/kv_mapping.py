"""Maps of keys and values from A to B, models of unequal size, in closed form (arXiv 2608.03893).

    fit      fit_kv_maps(params_a, params_b, batches) -> KVMaps, from one pass over text
    use      map_cache(maps, cache of A, params_a, params_b) -> KVCache of B, for `past`
    judge    maps.k.r2, maps.v.r2 on held-out texts; attention_cosine, which predicts better whether B can use the map

Keys are mapped before their rotation, because two models may rotate them differently. Each layer of B has its own ridge
regression, from all heads of the layers of A that explain it best.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxcomm.alignment import PADDING
from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import check_cache, compiled
from jaxcomm.config import AnyArray, ModelConfig, check_alike
from jaxcomm.fingerprint import identity
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.layers import Hook, rotary, rotate
from jaxcomm.model import Params, enter, run_blocks
from jaxcomm.prompts import Prompts, as_prompts, known
from jaxcomm.reading import prefill
from jaxcomm.ridge import HELD_OUT, RIDGES, Moments, add, regress

KVBatches = Iterable[tuple[Prompts, Prompts] | tuple[Prompts, Prompts, Int[AnyArray, "n PB"]]]
"""The same n texts in A's tokens [n, P_A] and in B's [n, P_B]. With different tokenizers also columns [n, P_B]: for each
token of B, the column of the corresponding token of A; negative if there is none (`Agent.align`)."""


class LayerMaps(struct.PyTreeNode):
    """Maps into the keys, or the values, of every layer of B. J is the number of B's layers, n the number of sources.

    Attributes:
        W: Maps [J, K_B H_B, n K_A H_A], from all heads of the n layers of A to all heads of the layer.
        bias: Intercepts [J, K_B H_B].
        sources: The layers of A, counted from 1, for each layer of B, [J, n], in order.
        r2: Share of the variance on held-out texts that the map explains, [J]. The map measured here was fitted without
            them. But ridge and layers are chosen on these texts, so on average r2 is slightly too high.
        ridge: The chosen ridge [J]. It has no unit.

    Example:
        >>> texts = jc.left_pad([[n, n + 1, 3] for n in range(40)])
        >>> maps = jc.fit_kv_maps(params, params, [(texts, texts)], sources=2, stride=1)
        >>> maps.k.W.shape, maps.k.sources.shape
        ((4, 64, 128), (4, 2))
    """

    W: Float[Array, "J E F"]
    bias: Float[Array, "J E"]
    sources: Int[Array, "J n"]
    r2: Float[Array, "J"]
    ridge: Float[Array, "J"]


class KVMaps(struct.PyTreeNode):
    """Maps from A's keys and values to B's, the result of `fit_kv_maps`.

    Attributes:
        k: Maps of the keys, before their rotation.
        v: Maps of the values.
        sender: Identity of A (`fingerprint.identity`). None: it is not checked.
        receiver: Identity of B (`fingerprint.identity`). None: it is not checked.

    Example:
        >>> texts = jc.left_pad([[n, n + 1, 3] for n in range(40)])
        >>> maps = jc.fit_kv_maps(params, params, [(texts, texts)], sources=2, stride=1)
        >>> maps.sender == maps.receiver
        True
    """

    k: LayerMaps
    v: LayerMaps
    sender: str | None = struct.field(pytree_node=False, default=None)
    receiver: str | None = struct.field(pytree_node=False, default=None)


# Keys as they are before their rotation -----------------------------------------------------------------------------


def _turn(
    config: ModelConfig,
    k: Float[Array, "L B S K H"],
    positions: Int[Array, "B S"],
    layers: Sequence[int],
    *,
    back: bool,
) -> Float[Array, "L B S K H"]:
    """Rotate the keys of these layers (counted from 1) as the model does, or undo the rotation (`back`)."""
    if (tables := rotary(config, positions)) is None:
        return k
    ropes = np.array(config.rope_of)[np.array(layers) - 1]
    cos, sin = (table[ropes] for table in tables)
    if back:
        # The tables include the scale once. To undo the rotation, they must hold its inverse.
        scale = np.array([config.ropes[i].scale for i in ropes], np.float32)[:, None, None, None]
        cos, sin = cos / scale**2, -sin / scale**2
    return jax.vmap(rotate)(k, (cos, sin))


def _unturned(
    config: ModelConfig, cache: KVCache, columns: Int[Array, "B S"] | None, layers: Sequence[int]
) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
    """Keys before rotation, and values, of these layers at these columns (None: all), float32."""
    chosen = np.array(layers) - 1

    def pick(a: Any) -> Array:
        a = jnp.stack([a[i] for i in chosen]) if isinstance(a, tuple) else a[chosen]
        a = jnp.swapaxes(a, 2, 3).astype(jnp.float32)
        return a if columns is None else jnp.take_along_axis(a, columns[None, :, :, None, None], axis=2)

    positions = cache.positions
    if columns is not None:
        positions = jnp.take_along_axis(positions, columns, axis=1)
    return _turn(config, pick(cache.k), positions, layers, back=True), pick(cache.v)


# Rows, from text ----------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows (tokens) of one batch, for keys and for values: a [1, R, F + 1] with 1 in the last column, and b [J, R, E].
    Missing rows are all 0. Also the origins that were subtracted from both."""

    a: tuple[Array, ...]
    b: tuple[Array, ...]
    origin: tuple[tuple[Array, ...], tuple[Array, ...]]


@functools.partial(jax.jit, static_argnames=("configs", "ks", "stride"))
def _rows(
    caches: tuple[KVCache, KVCache],
    columns: Int[Array, "n PB"],
    texts: Int[Array, "n"],
    origin: Any,
    *,
    configs: tuple[ModelConfig, ModelConfig],
    ks: tuple[int, ...],
    stride: int,
) -> _Rows:
    """Take every `stride`-th token of each text. texts: numbers of the texts; they set the first token to take."""
    places_a, places_b = (cache.positions for cache in caches)
    length = jnp.sum(places_b >= 0, axis=1, dtype=jnp.int32)[:, None]
    # Start at a different token in each text, held-out ones too. So every position is sampled as often as it occurs,
    # including the first, which is unlike all others.
    begin = ((texts + texts // HELD_OUT) % stride)[:, None]
    place = begin + stride * jnp.arange(-(-places_b.shape[1] // stride), dtype=jnp.int32)
    of_b = jnp.minimum(places_b.shape[1] - length + place, places_b.shape[1] - 1)
    of_a = jnp.take_along_axis(columns, of_b, axis=1)
    there = (place < length) & (of_a >= 0)
    of_a = jnp.maximum(of_a, 0)
    there = (there & (jnp.take_along_axis(places_a, of_a, axis=1) >= 0)).reshape(-1)
    js = range(1, configs[1].layers + 1)
    flat = lambda x: x.reshape(len(x), len(there), -1)  # [L, R, K H]
    wide = lambda x: jnp.moveaxis(flat(x), 0, 1).reshape(1, len(there), -1)
    a = [wide(x) for x in _unturned(configs[0], caches[0], of_a, ks)]
    b = [flat(x) for x in _unturned(configs[1], caches[1], of_b, js)]
    if origin is None:
        # Subtract the mean, so that float32 keeps the variation: keys with biases are far from 0.
        n = jnp.maximum(jnp.sum(there, dtype=jnp.float32), 1)
        mean = lambda x: jnp.sum(jnp.where(there[:, None], x, 0), axis=1, keepdims=True) / n
        origin = jax.tree.map(mean, (tuple(a), tuple(b)))
    moved = lambda xs, at: [jnp.where(there[:, None], x - x0, 0) for x, x0 in zip(xs, at, strict=True)]
    one = there[None, :, None].astype(jnp.float32)
    a, b = moved(a, origin[0]), moved(b, origin[1])
    return _Rows(tuple(jnp.concatenate([x, one], axis=-1) for x in a), tuple(b), origin)


def _batches(params_a: Params, params_b: Params, batches: KVBatches) -> Iterator[tuple[Any, Any, Any, np.ndarray]]:
    """Both models' caches, the columns, and the texts' numbers.

    ValueError: texts or columns do not fit each other, at the end: there are fewer than ten texts.
    """
    seen = 0
    for batch in batches:
        a, b = map(as_prompts, batch[:2])
        n = len(a)
        if n != len(b):
            raise ValueError(f"a batch has {n} texts for A and {len(b)} for B: give both the same")
        columns = _same(a, b, seen) if len(batch) == 2 else _columns(batch[2], a, b.shape)
        yield prefill(params_a, a)[1], prefill(params_b, b)[1], columns, seen + np.arange(n, dtype=np.int32)
        seen += n
    if seen < HELD_OUT:
        raise ValueError(f"{seen} texts: two models are matched on at least {HELD_OUT}, one of them held out")


def _same(a: Prompts, b: Prompts, seen: int) -> Int[Array, "n PB"]:
    """Columns for texts that are the same tokens for both models."""
    lengths = [None if prompts.real is None else prompts.real.sum(axis=1) for prompts in (a, b)]
    if lengths[0] is not None and lengths[1] is not None and (other := lengths[0] != lengths[1]).any():
        row = int(np.argmax(other))
        raise ValueError(
            f"text {seen + row} has {lengths[0][row]} tokens for A and {lengths[1][row]} for B: say which belong together "
            "(columns, Agent.align)"
        )
    columns = jnp.arange(b.shape[1], dtype=jnp.int32) + (a.shape[1] - b.shape[1])
    return jnp.broadcast_to(columns, b.shape)


def _columns(columns: Any, a: Prompts, shape: tuple[int, int]) -> Int[Array, "n PB"]:
    """The given columns, after checks."""
    if np.shape(columns) != shape:
        raise ValueError(f"columns are {np.shape(columns)} for B's tokens {shape}: give one for each")
    return _in_range(columns, a.shape[1])


def _in_range(columns: Any, limit: int) -> Int[Array, "n PB"]:
    """Columns of A. Their range is checked unless they are traced."""
    values = known(columns)
    if values is not None and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"columns are whole numbers, got {values.dtype}")
    if values is not None and values.size and values.max() >= limit:
        raise ValueError(f"column {values.max()} is out of range: A's tokens have columns 0 to {limit - 1}")
    return jnp.asarray(columns, jnp.int32)


# In closed form -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("ks", "sources"))
def _solve(
    fit: Moments,
    held: Moments,
    origin: tuple[Array, Array],
    ridges: Float[Array, "r"],
    *,
    ks: tuple[int, ...],
    sources: int,
) -> LayerMaps:
    """Compute the maps from sums. The sums treat all of A's layers `ks`, side by side, as one layer."""
    last = fit.aa.shape[-1] - 1
    inside = jnp.arange(last, dtype=jnp.int32).reshape(len(ks), -1)
    with_one = lambda layers: jnp.append(inside[layers].reshape(-1), last)
    part = lambda sums, rows: sums.aa[0][rows][:, rows]

    def alone(k: Array) -> Array:
        """1 - R^2 [J] of the regression from one layer of A."""
        rows = with_one(k)
        of = lambda sums: Moments(part(sums, rows), sums.ab[0][:, rows], sums.bb)
        return regress(of(fit), of(held), ridges, intercept=True).error

    def together(at: tuple[Array, Array]) -> tuple[Array, ...]:
        """The map into layer j from the chosen layers."""
        j, layers = at
        rows = with_one(layers)
        of = lambda sums: Moments(part(sums, rows), sums.ab[0, j][rows][None], sums.bb[j][None])
        W, error, ridge = regress(of(fit), of(held), ridges, intercept=True)
        W, moved = W[0, :, :-1], W[0, :, -1]
        return W, moved + origin[1][j, 0] - W @ origin[0][0, 0, rows[:-1]], 1 - error[0], ridge[0]

    with jax.default_matmul_precision("highest"):
        errors = jax.lax.map(alone, jnp.arange(len(ks), dtype=jnp.int32))  # [ks, J]
        best = jax.lax.top_k(-jnp.where(jnp.isnan(errors), jnp.inf, errors).T, sources)[1]
        best = jnp.sort(best, axis=1)
        W, bias, r2, ridge = jax.lax.map(together, (jnp.arange(len(best), dtype=jnp.int32), best))
    return LayerMaps(W, bias, jnp.asarray(ks, jnp.int32)[best], r2, ridge)


def fit_kv_maps(
    params_a: Params,
    params_b: Params,
    batches: KVBatches,
    *,
    sources: int = 8,
    ks: Sequence[int] | None = None,
    ridges: Sequence[float] = RIDGES,
    stride: int = 4,
) -> KVMaps:
    """Fits the map from A's keys and values to B's in closed form, in one pass over text (arXiv 2608.03893).

    The rows of the regression are tokens: every `stride`-th token of each text. Keys are taken before rotation. (Learned
    positions cannot be removed: they are part of the model's input.) Each layer of B is fitted separately, for keys and
    for values. First, a ridge regression with intercept from each single layer of A measures how much variance that layer
    explains on held-out texts. Then one ridge regression from all heads of the best `sources` layers gives the map. Every
    tenth text is held out. The ridge is chosen there, relative to the mean variance of the features; then the map is
    fitted on all texts. The paper uses a ridge of 0.01 and stores every row; here only sums are stored.

    Memory, in float32 numbers, with F = len(ks) K_A H_A and G = L_B K_B H_B: the sums need 4 F (F + G), and about half
    as much again while a batch is added. Each row of a batch needs 2 (F + G). The result has 2 sources K_A H_A G. For
    Qwen 3 14B as A, F is 40960, and the sums need 25 GiB besides the part with G. If that is too much, name fewer layers
    in `ks`.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        batches: The same n texts in A's tokens and in B's; with different tokenizers also the columns (`KVBatches`).
        sources: Number of A's layers that a map reads. If `ks` has fewer, all of them.
        ks: Layers of A to choose from, 1 .. L_A. Default: all.
        ridges: Values of the ridge to choose from.
        stride: Distance between sampled tokens.

    Returns:
        The maps.

    Raises:
        ValueError: The layers of a model differ in their key heads; a layer is out of range; `ks` or `ridges` is empty; `sources` or `stride` is below 1; there are fewer
            than ten texts, or too few rows; a batch has different numbers of texts for A and B; A and B have different
            numbers of tokens and no columns are given; columns have a wrong shape or are out of range.

    Example:
        >>> texts = jc.left_pad([[n, n + 1, 3] for n in range(40)])
        >>> maps = jc.fit_kv_maps(params, params, [(texts, texts)], sources=1, stride=1)
        >>> maps.v.sources[:, 0].tolist()
        [1, 2, 3, 4]
    """
    for params in (params_a, params_b):
        check_alike(params.config, "maps of keys and values")
    layers = tuple(range(1, params_a.config.layers + 1) if ks is None else map(int, ks))
    if not layers or not len(ridges):
        raise ValueError("ks and ridges need at least one value each")
    if sources < 1 or stride < 1:
        raise ValueError(f"sources = {sources}, stride = {stride}: both must be at least 1")
    if wrong := [k for k in layers if not 1 <= k <= params_a.config.layers]:
        raise ValueError(
            f"k = {wrong[0]} is out of range: A has keys and values in layers 1 to {params_a.config.layers}"
        )
    configs, origin = (params_a.config, params_b.config), None
    sums: list[Any] = [None, None]
    for *caches, columns, texts in _batches(params_a, params_b, batches):
        a, b, origin = _rows(tuple(caches), columns, texts, origin, configs=configs, ks=layers, stride=stride)
        held = np.repeat(texts % HELD_OUT == HELD_OUT - 1, a[0].shape[1] // len(texts))
        sums = [add(old, x, y, held) for old, x, y in zip(sums, a, b, strict=True)]
    assert origin is not None  # without texts, `_batches` raised
    counts = [int(moments.aa[0, -1, -1]) for moments in sums[0]]
    if min(counts) < 2:
        raise ValueError(
            f"{counts[0]} rows to fit on and {counts[1]} held out are too few: give more or longer texts, or a smaller stride"
        )
    solve = functools.partial(
        _solve, ridges=jnp.asarray(ridges, jnp.float32), ks=layers, sources=min(sources, len(layers))
    )
    k, v = (solve(*both, at) for both, at in zip(sums, zip(*origin, strict=True), strict=True))
    return KVMaps(k, v, identity(params_a), identity(params_b))


# In use -------------------------------------------------------------------------------------------------------------


def map_cache(
    maps: KVMaps,
    cache: KVCache,
    params_a: Params | ModelConfig,
    params_b: Params,
    columns: Int[AnyArray, "B PB"] | None = None,
) -> KVCache:
    """Maps A's keys and values to B's. With them B continues as if it had read A's text.

    The rotation of A's keys is undone, the keys are mapped, and then rotated for their positions in B.

    Args:
        maps: The maps.
        cache: Keys and values of A, [L_A, B, K_A, S, H_A].
        params_a: The sender A, or its architecture.
        params_b: The receiver B.
        columns: If B has another tokenizer: for each of B's tokens, the column of A's corresponding token
            (`Agent.align`); -1 on padding, -2 if A has no such token. B's tokens get positions 0, 1, .. in each row. None:
            B uses A's tokens and positions.

    Returns:
        Keys and values of B, for `past` of `prefill`, `decode` and `generate`, [L_B, B, K_B, S or P_B, H_B]. Columns
        without a token are 0, with position -1.

    Raises:
        ValueError: The maps belong to other models; the cache is not A's; the columns have another number of rows or are
            out of range.

    Example:
        >>> texts = jc.left_pad([[n, n + 1, 3] for n in range(40)])
        >>> maps = jc.fit_kv_maps(params, params, [(texts, texts)], stride=1)
        >>> mapped = jc.map_cache(maps, jc.prefill(params, prompts)[1], params, params)
        >>> jc.generate(params, prompts, past=[mapped], max_new_tokens=2).tokens.shape
        (2, 2)
    """
    check_cache(params_a, cache)
    _check_models(maps, params_a, params_b)
    places = cache.positions
    if columns is not None:
        if np.ndim(columns) != 2 or len(columns) != len(places):
            raise ValueError(
                f"columns are {np.shape(columns)} for a cache of {len(places)} rows: give one row for each"
            )
        columns = _in_range(columns, places.shape[1])
    config_a = params_a if isinstance(params_a, ModelConfig) else params_a.config
    found = _map(maps.k, maps.v, cache, columns, configs=(config_a, params_b.config), dtype=params_b.dtype)
    if not params_b.unrolled:
        return found
    return found.replace(k=tuple(found.k), v=tuple(found.v))


def _check_models(maps: KVMaps, params_a: Params | ModelConfig, params_b: Params) -> None:
    """Raises ValueError if the maps belong to other models. Maps without identities are not checked."""
    for name, params, expected in (("A", params_a, maps.sender), ("B", params_b, maps.receiver)):
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params))
        if expected is None or isinstance(params, ModelConfig) or traced:
            continue
        if (found := identity(params)) != expected:
            raise ValueError(f"these maps were fitted for model {expected} as {name}, this one is {found}: fit others")
    for params in (params_a, params_b):
        check_alike(getattr(params, "config", params), "maps of keys and values")
    c, (layers, size, _) = params_b.config, maps.v.W.shape
    if (layers, size) != (c.layers, c.kv_heads * c.head_dim):
        raise ValueError(
            f"these maps make {layers} layers of {size} numbers, B has {c.layers} of {c.kv_heads * c.head_dim}: fit others"
        )


@functools.partial(jax.jit, static_argnames=("configs", "dtype"))
def _map(
    k: LayerMaps, v: LayerMaps, cache: KVCache, columns: Any, *, configs: tuple[ModelConfig, ModelConfig], dtype: Any
) -> KVCache:
    """`map_cache` as one compiled program, with stacked layers."""
    a, b = configs
    places = cache.positions
    if columns is not None:
        there = (columns >= 0) & (jnp.take_along_axis(places, jnp.maximum(columns, 0), axis=1) >= 0)
        numbers = jnp.cumsum(columns != PADDING, axis=1, dtype=jnp.int32) - 1
        columns, places = jnp.maximum(columns, 0), jnp.where(there, numbers, -1)
    heads = (b.kv_heads, b.head_dim)
    layers = range(1, b.layers + 1)

    def mapped(maps: LayerMaps, x: Array) -> Array:
        def one(at: tuple[Array, Array, Array]) -> Array:
            W, bias, sources = at
            W = W.reshape(W.shape[0], len(sources), a.kv_heads, a.head_dim)
            y = jnp.einsum("enkh,nbskh->bse", W, x[sources - 1]) + bias
            return y.reshape(*y.shape[:2], *heads)

        return jax.lax.map(one, (maps.W, maps.bias, maps.sources))

    with jax.default_matmul_precision("highest"):
        keys, values = map(mapped, (k, v), _unturned(a, cache, columns, range(1, a.layers + 1)))
    keys = _turn(b, keys, places, layers, back=False)
    empty = (places == -1)[None, :, :, None, None]
    keys, values = (jnp.swapaxes(jnp.where(empty, 0, x), 2, 3).astype(dtype) for x in (keys, values))
    return KVCache(keys, values, places)


# Judged -------------------------------------------------------------------------------------------------------------


@compiled(prompts={"context": "params_b", "question": "params_b"})
def attention_cosine(params_b: Params, context: Prompts, question: Prompts, mapped: KVCache) -> Float[Array, "L"]:
    """Compares, for each layer, B's attention output from mapped keys and values with the output from its own.

    In each layer, the attention output of the question's tokens is computed twice (site "z", before the output matrix):
    with B's own keys and values of the context, and with mapped ones in that layer only. The result is the cosine of the
    two over all heads, averaged over tokens. (arXiv 2608.03893: it predicts how well B still answers; R^2 does not.)

    Args:
        params_b: The receiver B.
        context: The mapped text, in B's tokens [B, P].
        question: The text that follows it, [B, Q].
        mapped: Keys and values of the context, as `map_cache` returns them.

    Returns:
        The cosines, [L].

    Raises:
        ValueError: Prompts are invalid or exceed the model's positions; the numbers of rows differ; the cache is not B's.

    Example:
        >>> own = jc.prefill(params, prompts)[1]
        >>> jc.attention_cosine(params, prompts, prompts, own).round(3).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    check_alike(params_b.config, "maps of keys and values")
    check_cache(params_b, mapped)
    if not len(context) == len(question) == len(mapped.positions):
        raise ValueError(
            f"{len(context)} contexts, {len(question)} questions, {len(mapped.positions)} rows of mapped keys: give as many of each"
        )
    check_room(params_b, question, context.shape[1])
    own = prefill(params_b, context)[1]
    positions = jnp.concatenate([positions_of(question, [own])] * 2)
    real = positions[: len(question)] >= 0

    def at(site: str, layer: Any, x: Array, found: Array) -> tuple[Array, Array]:
        """The second half of the rows reads mapped keys in every layer. After each layer it gets the first half's stream."""
        if site == "resid_post":
            return jnp.concatenate([x[: len(question)]] * 2), found
        one, other = x.astype(jnp.float32).reshape(2, *real.shape, -1)
        norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
        cosine = jnp.mean(jnp.sum(one * other, axis=-1) / norms, where=real)
        return x, found.at[layer - 1].set(cosine)

    hook = Hook(at, jnp.zeros(params_b.config.layers, jnp.float32), frozenset(("z", "resid_post")))
    tokens = jnp.concatenate([jnp.asarray(question.tokens)] * 2)
    h, hook = enter(params_b, tokens, positions, hook)
    return run_blocks(params_b, h, positions, attended=Attended([_both(own, mapped)]), hook=hook)[2]


def _both(*caches: KVCache) -> KVCache:
    """Concatenate the rows of caches, with stacked layers and equal numbers of columns."""
    columns = max(cache.positions.shape[1] for cache in caches)
    stacked = [
        cache.replace(**{x: jnp.stack(a) for x in "kv" if isinstance(a := getattr(cache, x), tuple)})
        for cache in caches
    ]
    k, v, positions = zip(
        *[(c.k, c.v, c.positions) for c in (c.extend(columns - c.positions.shape[1]) for c in stacked)], strict=True
    )
    return KVCache(jnp.concatenate(k, axis=1), jnp.concatenate(v, axis=1), jnp.concatenate(positions))
