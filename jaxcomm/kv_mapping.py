"""The map of keys and values from A to B, models of unequal size, in closed form (arXiv 2608.03893).

    fit      fit_kv_maps(params_a, params_b, batches) -> KVMaps, from one pass over text
    use      map_cache(maps, cache of A, params_a, params_b) -> KVCache of B, for `past`
    judge    maps.k.r2, maps.v.r2 on held-out texts; attention_cosine, which says more about what B still understands

Keys are mapped as they are before their rotation, since two models turn them differently. Each layer of B has a ridge
regression of its own, on all heads of the layers of A that explain it best.
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
from jaxcomm.config import AnyArray, ModelConfig
from jaxcomm.fingerprint import identity
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.layers import Hook, rotary, rotate
from jaxcomm.model import Params, enter, run_blocks
from jaxcomm.prompts import Prompts, as_prompts, known
from jaxcomm.reading import prefill
from jaxcomm.ridge import HELD_OUT, RIDGES, Moments, add, regress

KVBatches = Iterable[tuple[Prompts, Prompts] | tuple[Prompts, Prompts, Int[AnyArray, "n PB"]]]
"""The same n texts in A's tokens [n, P_A] and in B's [n, P_B]. With different tokenizers also columns [n, P_B]: for each
token of B, the column of A's token that stands for it; negative where there is none (`Agent.align`)."""


class LayerMaps(struct.PyTreeNode):
    """Maps into the keys, or the values, of every layer of B. J is the number of B's layers, n that of `sources`.

    Attributes:
        W: Maps [J, K_B H_B, n K_A H_A], from all heads of the n layers of A to all heads of the layer.
        bias: Intercepts [J, K_B H_B].
        sources: The layers of A, counted from 1, for each layer of B, [J, n], in order.
        r2: Share of the variance on held-out texts that a map explains which did not see them, [J]. Ridge and layers
            are chosen on the same texts, so on average it is slightly too high.
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
    """The map from A's keys and values to B's, as `fit_kv_maps` returns it.

    Attributes:
        k: Maps of the keys, before their rotation.
        v: Maps of the values.
        sender: Identity of A (`fingerprint.identity`). None: it is not checked.
        receiver: Identity of B, likewise.

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
    """Keys of these layers (from 1), rotated as the model does it, or `back`."""
    if (tables := rotary(config, positions)) is None:
        return k
    ropes = np.array(config.rope_of)[np.array(layers) - 1]
    cos, sin = (table[ropes] for table in tables)
    if back:
        # Tables hold the scale once; what undoes the rotation holds its inverse.
        scale = np.array([config.ropes[i].scale for i in ropes], np.float32)[:, None, None, None]
        cos, sin = cos / scale**2, -sin / scale**2
    return jax.vmap(rotate)(k, (cos, sin))


def _unturned(
    config: ModelConfig, cache: KVCache, columns: Int[Array, "B S"] | None, layers: Sequence[int]
) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
    """Keys before their rotation, and values, of these layers at these columns (None: all), float32."""
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
    """Rows of one batch, each one token, for the keys and for the values: a [1, R, F + 1], whose last number is 1, and
    b [J, R, E], all 0 where there is no row; and the points that both are measured from."""

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
    """Every `stride`-th token of each text. texts: their numbers, which say where each begins to count."""
    places_a, places_b = (cache.positions for cache in caches)
    length = jnp.sum(places_b >= 0, axis=1, dtype=jnp.int32)[:, None]
    # Texts begin at different tokens, held-out ones too: positions count as often as they occur, and the first is as
    # unlike all others as it is.
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
        # Near the mean, so that float32 keeps what varies: keys with biases lie far from 0.
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
    """Columns of texts that are the same tokens for both."""
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
    """Columns as they are given, checked."""
    if np.shape(columns) != shape:
        raise ValueError(f"columns are {np.shape(columns)} for B's tokens {shape}: give one for each")
    return _in_range(columns, a.shape[1])


def _in_range(columns: Any, limit: int) -> Int[Array, "n PB"]:
    """Columns of A, checked as far as they are known."""
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
    """The maps, from sums of one "layer" of A, which is all of its layers `ks` side by side."""
    last = fit.aa.shape[-1] - 1
    inside = jnp.arange(last, dtype=jnp.int32).reshape(len(ks), -1)
    with_one = lambda layers: jnp.append(inside[layers].reshape(-1), last)
    part = lambda sums, rows: sums.aa[0][rows][:, rows]

    def alone(k: Array) -> Array:
        """1 - R^2 [J] of one layer of A."""
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

    Rows are tokens, every `stride`-th of each text. Keys are taken as they are before rotation. (Learned positions are
    part of what the model read, and stay.) For each layer of B, and for keys and values apart, a ridge regression with
    intercept from each single layer of A says how much of the variance that layer explains on held-out texts. From all
    heads of the best `sources` layers together, a ridge regression gives the map. Every tenth text is held out; the
    ridge is chosen there, relative to the mean variance of the features, and the map is then fitted on all texts. The
    paper's ridge is 0.01 and it keeps every row; here only sums are kept.

    Memory, in float32 numbers, with F = len(ks) K_A H_A and G = L_B K_B H_B: sums of 4 F (F + G), and while a batch is
    added about half of it again; rows of a batch, 2 (F + G) each. The result is 2 sources K_A H_A G. For Qwen 3 14B as
    A, F is 40960, and the sums are 25 GiB beside those of G: name fewer layers in `ks`, if that is too much.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        batches: The same n texts in A's tokens and in B's, and for different tokenizers the columns (`KVBatches`).
        sources: Number of A's layers that a map reads; all of `ks`, if these are fewer.
        ks: Layers of A to choose from, 1 .. L_A. Default: all.
        ridges: Values of the ridge to choose from.
        stride: Every how many tokens there is a row.

    Returns:
        The maps.

    Raises:
        ValueError: A layer is out of range; `ks` or `ridges` is empty; `sources` or `stride` is below 1; there are fewer
            than ten texts, or too few rows; a batch has different numbers of texts for A and B; texts have different
            numbers of tokens, and there are no columns; columns have another shape or are out of range.

    Example:
        >>> texts = jc.left_pad([[n, n + 1, 3] for n in range(40)])
        >>> maps = jc.fit_kv_maps(params, params, [(texts, texts)], sources=1, stride=1)
        >>> maps.v.sources[:, 0].tolist()
        [1, 2, 3, 4]
    """
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
    assert origin is not None  # no texts: refused above
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
    """Makes keys and values of B from those of A. With them B goes on as if it had read A's text.

    A's keys are turned back from their positions, mapped, and turned to their positions in B.

    Args:
        maps: The maps.
        cache: Keys and values of A, [L_A, B, K_A, S, H_A].
        params_a: The sender A, or its architecture.
        params_b: The receiver B.
        columns: For a B with another tokenizer, the column of A's token that stands for each of B's (`Agent.align`), -1
            on padding, -2 for a token of B that A has none for. B's tokens are at positions 0, 1, .. of each row. None:
            tokens and positions are A's.

    Returns:
        Keys and values of B, for `past` of `prefill`, `decode` and `generate`, [L_B, B, K_B, S or P_B, H_B]. Where
        nothing was read they are 0, with position -1.

    Raises:
        ValueError: The maps are of other models; the cache is not of A; the columns have another number of rows or are
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
    """Raises ValueError for maps of other models, as far as the models are known."""
    for name, params, expected in (("A", params_a, maps.sender), ("B", params_b, maps.receiver)):
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params))
        if expected is None or isinstance(params, ModelConfig) or traced:
            continue
        if (found := identity(params)) != expected:
            raise ValueError(f"these maps were fitted for model {expected} as {name}, this one is {found}: fit others")
    c, (layers, size, _) = params_b.config, maps.v.W.shape
    if (layers, size) != (c.layers, c.kv_heads * c.head_dim):
        raise ValueError(
            f"these maps make {layers} layers of {size} numbers, B has {c.layers} of {c.kv_heads * c.head_dim}: fit others"
        )


@functools.partial(jax.jit, static_argnames=("configs", "dtype"))
def _map(
    k: LayerMaps, v: LayerMaps, cache: KVCache, columns: Any, *, configs: tuple[ModelConfig, ModelConfig], dtype: Any
) -> KVCache:
    """`map_cache`, as one program, with stacked layers."""
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
    """Measures, layer by layer, how much what B reads from mapped keys and values is like what it reads from its own.

    In each layer, the tokens of the question read the context twice (site "z", before the output matrix): from B's own
    keys and values, and from mapped ones in that layer alone. It is the cosine of the two, over all heads, averaged over
    tokens. (arXiv 2608.03893: it predicts how well B still answers, which R^2 does not.)

    Args:
        params_b: The receiver B.
        context: What was mapped, in B's tokens [B, P].
        question: What B reads after it, [B, Q].
        mapped: Keys and values of the context, as `map_cache` returns them.

    Returns:
        The cosines, [L].

    Raises:
        ValueError: Prompts are invalid, or exceed the model's positions; rows differ in number; the cache is not of B.

    Example:
        >>> own = jc.prefill(params, prompts)[1]
        >>> jc.attention_cosine(params, prompts, prompts, own).round(3).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
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
        """The lower rows read the mapped keys, in every layer; their stream is then that of the upper ones again."""
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
    """The rows of caches, one after the other, with stacked layers and as many columns."""
    columns = max(cache.positions.shape[1] for cache in caches)
    stacked = [
        cache.replace(**{x: jnp.stack(a) for x in "kv" if isinstance(a := getattr(cache, x), tuple)})
        for cache in caches
    ]
    k, v, positions = zip(
        *[(c.k, c.v, c.positions) for c in (c.extend(columns - c.positions.shape[1]) for c in stacked)], strict=True
    )
    return KVCache(jnp.concatenate(k, axis=1), jnp.concatenate(v, axis=1), jnp.concatenate(positions))
