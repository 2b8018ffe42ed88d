"""Attention over segments: masks, scores, and two algorithms for the softmax.

Pure functions of queries, keys, values and positions. `attend` chooses the algorithm by size: `plain` computes all scores
of its queries at once, `blocked` one tile at a time (ARCHITECTURE.md, decision 80).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Segment = tuple[Float[Array, "_ K *_ H"], Float[Array, "_ K *_ H"], Int[Array, "_ *_"]]
"""Keys, values [B, K, S, H] and positions [B, S] of earlier tokens; position -1 marks an empty column. S differs between
segments. A segment may have fewer rows than the queries: each of its rows then serves several consecutive rows of queries
(`rows_for`).

With C branches the shapes are [B, K, C, S, H] and [B, C, S]. The T queries of a row are then C groups of T / C, and each
group sees only its own branch. So many continuations of one prompt can be one row that shares the prompt's segment."""

MASKED = -1e30
BLOCK, BLOCKS = 128, 4
"""`plain` splits the queries of a text into at most BLOCKS blocks of at least BLOCK tokens."""
LONG, SCORES = 1536, 2**19
"""`blocked` is used from so many keys, and from so many scores per head."""
TILE = 256, 256
"""Largest number of queries and of keys in a tile."""


class Scoring(NamedTuple):
    """How to compute a query's scores.

    Attributes:
        scale: Factor on the product of query and key.
        softcap: Soft-cap on the scores. None: no cap.
        window: How far back a query sees. It may be traced. None: to the first token.
        sinks: One extra score for each query head [N], which has no value. None: no sinks.
    """

    scale: float
    softcap: float | None = None
    window: int | Int[Array, ""] | None = None
    sinks: Float[Array, "N"] | None = None

    def sink(self, q: Float[Array, "B K G T H"]) -> Float[Array, "B K G T 1"]:
        """The score of every query's sink, float32."""
        wide = jnp.asarray(self.sinks, jnp.float32).reshape(1, *q.shape[1:3], 1, 1)
        return jnp.broadcast_to(wide, (*q.shape[:4], 1))

    def apart(self, reach: int | None) -> Scoring:
        """The scoring for an `Aside`: the window is `reach`, and there are no sinks."""
        return self._replace(window=reach, sinks=None)


class Aside(NamedTuple):
    """A segment with its own softmax, apart from the other segments. Its result times a gate is added to theirs.

    If every gate is 0, nothing is added and the result is the same as without it. Attention windows do not apply to it.

    segment: keys, values and positions. gate: gate of each query head, [N]. reach: how far back a query sees; None: all.
    """

    segment: Segment
    gate: Float[Array, "N"]
    reach: int | None = None


def rows_for(x: Array, rows: int) -> Array:
    """Repeat x [B, ...] to so many rows: each row of x, rows / B times in succession. A single row stays single."""
    return x if len(x) in (1, rows) else jnp.repeat(x, rows // len(x), axis=0)


def grouped(x: Float[Array, "B K G T X"], keys: Array, key_positions: Array) -> Float[Array, "b n K G *C t X"]:
    """Reshape arrays of queries to match a segment's keys: n rows for each of the keys' b rows, t tokens for each branch."""
    b, branches = len(keys), key_positions.shape[1:-1]
    return x.reshape(b, len(x) // b, *x.shape[1:3], *branches, x.shape[3] // math.prod(branches), x.shape[4])


def visible(queries: Int[Array, "*#n T"], keys: Int[Array, "*#n S"], window) -> Bool[Array, "*n T S"]:
    """Whether a key exists, is not later than the query and, if `window` is not None, is within the window."""
    distance = queries[..., :, None] - keys[..., None, :]
    seen = (keys[..., None, :] >= 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def products(q: Float[Array, "b n K G *C t H"], keys: Float[Array, "b K *C S H"], how: Scoring) -> Array:
    """Scores [b, n, K, G, *C, t, S] before masks, float32."""
    score = _beside_each("bnkg...th,bk...sh->bnkg...ts", q, keys, preferred_element_type=jnp.float32) * how.scale
    return score if how.softcap is None else jnp.tanh(score / how.softcap) * how.softcap


def _beside_each(rule: str, some: Array, others: Array, **how: Any) -> Array:
    """einsum that drops the axis n if it is 1: XLA on CPU would copy arrays because of it in every layer."""
    if some.shape[1] > 1:
        return jnp.einsum(rule, some, others, **how)
    return jnp.einsum(rule.replace("n", ""), some[:, 0], others, **how)[:, None]


def attend(
    q: Float[Array, "B K G T H"],
    positions: Int[Array, "_ T"],
    segments: Sequence[Segment],
    how: Scoring,
    ordered: bool = False,
) -> Float[Array, "B K G T H"]:
    """Computes attention over all segments, with one softmax over all keys that a query sees.

    Args:
        q: Queries, G for each key head.
        positions: Their positions, one row for each row of queries, or one for all.
        segments: The segments.
        how: How to compute scores.
        ordered: Whether the last segment is the tokens' own, in order. The queries then belong to its last T tokens.

    Returns:
        The weighted mean of values for each query. A query that sees no key gets arbitrary finite numbers.
    """
    keys = sum(places.shape[-1] for _, _, places in segments)
    if keys >= LONG and q.shape[3] * keys >= SCORES:
        return blocked(q, positions, segments, how)
    blocks = query_blocks(q, positions, segments, ordered)
    return jnp.concatenate([plain(*block, how) for block in blocks], axis=3)


def beside(
    q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], part: Aside, how: Scoring
) -> Float[Array, "B K G T H"]:
    """Computes attention over an `Aside`, with its own softmax. It is 0 for a query that sees none of it.

    Args:
        q: Queries, as for `attend`.
        positions: Their positions.
        part: The segment, its gates, and how far back a query sees it.
        how: How to compute scores. The window is `part.reach`, and sinks are ignored.

    Returns:
        The gated result to add to the attention over the other segments, float32.
    """
    got = attend(q, positions, [part.segment], how.apart(part.reach))
    seen = jnp.any(visible(positions, rows_for(part.segment[2], len(positions)), part.reach), axis=-1)
    gate = part.gate.astype(jnp.float32).reshape(1, *q.shape[1:3], 1, 1)
    return jnp.where(seen[:, None, None, :, None], gate * got.astype(jnp.float32), 0)


def query_blocks(
    q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], segments: Sequence[Segment], ordered: bool
) -> Iterator[tuple[Array, Array, Sequence[Segment]]]:
    """Yields blocks of queries, their positions, and the segments that they see.

    A text's own keys come last, in order. A block sees only keys up to its end, so only five eighths of the scores are
    computed, and fewer at a time. (This saves a seventh of the time for reading 400 to 600 tokens.)
    """
    *past, (keys, values, places) = segments
    asking, columns = q.shape[3], places.shape[-1]
    size = max(BLOCK, -(-columns // BLOCKS)) if ordered else asking
    for start in range(0, asking, size):
        own, end = segments[-1], columns - asking + start + size
        if ordered and end < columns:
            own = keys[:, :, :end], values[:, :, :end], places[:, :end]
        yield q[..., start : start + size, :], positions[:, start : start + size], [*past, own]


def scores(
    q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], segments: Sequence[Segment], how: Scoring
) -> list[Float[Array, "B K G T _"]]:
    """Scores of queries for the keys of every segment, `MASKED` where a query does not see the key."""
    made = []
    for keys, _, places in segments:
        score = products(grouped(q, keys, places), keys, how)
        asked = positions.reshape(len(positions), *places.shape[1:-1], -1)
        seen = visible(asked, rows_for(places, len(positions)), how.window)
        score = jnp.where(seen[:, None, None], score.reshape(len(q), *score.shape[2:]), MASKED)
        made.append(score.reshape(*q.shape[:4], -1))
    return made


def plain(
    q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], segments: Sequence[Segment], how: Scoring
) -> Float[Array, "B K G T H"]:
    """Computes attention over all segments, with all scores at once."""
    made = scores(q, positions, segments, how)
    sink = [] if how.sinks is None else [how.sink(q)]
    # One softmax over all segments without joining them: one maximum and one sum. Divide after the product with the
    # values, where the array is smallest. (Joining and dividing scores: 13 % slower in a sweep with 256-token prompts.)
    most = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in made] + sink)
    parts = [jnp.exp(s - jax.lax.stop_gradient(most)) for s in made]
    out, total = jnp.zeros(q.shape, jnp.float32), functools.reduce(jnp.add, [jnp.sum(p, axis=-1) for p in parts])
    for score in sink:
        total += jnp.exp(score - jax.lax.stop_gradient(most))[..., 0]
    for part, (_, values, places) in zip(parts, segments, strict=True):
        out += weighted(grouped(part.astype(q.dtype), values, places), values).reshape(q.shape)
    return (out / total[..., None]).astype(q.dtype)


def pattern(
    q: Float[Array, "B K G T H"],
    positions: Int[Array, "_ T"],
    parts: Sequence[Segment | Aside],
    how: Scoring,
    ordered: bool = False,
) -> Float[Array, "B N T S"]:
    """Attention weights over all parts side by side, float32. They are recomputed for hooks that read them (`attend`).

    The weights of an `Aside` are those of its own softmax, without the gate; 0 where a query sees none of it.
    """
    segments = [part for part in parts if not isinstance(part, Aside)]
    joint = weights_over(q, positions, segments, how, ordered)
    ends = np.cumsum([places.shape[-1] for _, _, places in segments])
    shared, made = iter(jnp.split(joint, ends[:-1].tolist(), axis=-1)), []
    for part in parts:
        if isinstance(part, Aside):
            seen = visible(positions, rows_for(part.segment[2], len(positions)), part.reach)
            own = weights_over(q, positions, [part.segment], how.apart(part.reach))
            made.append(jnp.where(seen[:, None], own, 0))
        else:
            made.append(next(shared))
    return jnp.concatenate(made, axis=-1)


def weights_over(
    q: Float[Array, "B K G T H"],
    positions: Int[Array, "_ T"],
    segments: Sequence[Segment],
    how: Scoring,
    ordered: bool = False,
) -> Float[Array, "B N T S"]:
    """The weights of one softmax over all segments."""
    every = [jnp.concatenate(scores(*block, how), axis=-1) for block in query_blocks(q, positions, segments, ordered)]
    columns = every[-1].shape[-1]
    wide = [jnp.pad(s, [(0, 0)] * 4 + [(0, columns - s.shape[-1])], constant_values=MASKED) for s in every]
    joint = jnp.concatenate(wide, axis=3)
    if how.sinks is None:
        weights = jax.nn.softmax(joint, axis=-1)
    else:
        weights = jax.nn.softmax(jnp.concatenate([joint, how.sink(q)], axis=-1), axis=-1)[..., :-1]
    return weights.reshape(len(weights), -1, *weights.shape[3:])


class Sum(NamedTuple):
    """Running sums of the softmax, float32: values weighted by exp(score - most), and the sum of the weights.

    `most` starts far above `MASKED` and far below every real score. So masked keys have weight 0 from the first tile on.
    """

    out: Float[Array, "*_ H"]
    most: Float[Array, "*_ 1"]
    total: Float[Array, "*_ 1"]


def blocked(
    q: Float[Array, "B K G T H"],
    positions: Int[Array, "_ T"],
    segments: Sequence[Segment],
    how: Scoring,
    tile: tuple[int, int] = TILE,
) -> Float[Array, "B K G T H"]:
    """Computes attention over all segments tile by tile, with at most so many queries and keys in a tile.

    Neither the forward pass nor the gradient stores scores: the gradient recomputes each tile. (There is no forward mode.)
    """
    return _blocked((how.scale, how.softcap, tile), q, positions, tuple(segments), how.window, how.sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    static: tuple, q: Array, positions: Array, segments: tuple[Segment, ...], window: Any, sinks: Any
) -> Array:
    return _read(static, q, positions, segments, window, sinks)[0]


def _read(static: tuple, q: Array, positions: Array, segments: tuple[Segment, ...], window: Any, sinks: Any) -> tuple:
    """Forward pass: the result, and the arrays that the gradient needs."""
    scale, softcap, tile = static
    how = Scoring(scale, softcap, window, sinks)
    empty = lambda x, width: jnp.full((*q.shape[:4], width), x, jnp.float32)
    state = Sum(empty(0.0, q.shape[4]), empty(MASKED / 2, 1), empty(0.0, 1))
    if sinks is not None:
        state = state._replace(most=how.sink(q), total=empty(1.0, 1))
    for segment in segments:
        state = add_segment(state, Tiles(q, positions, segment, how, tile), q)
    total = jnp.where(state.total == 0, 1, state.total)
    out = (state.out / total).astype(q.dtype)
    return out, (q, positions, segments, window, sinks, out, state.most + jnp.log(total))


def _gradient(static: tuple, kept: tuple, towards: Array) -> tuple:
    """Gradients of queries, keys, values and sinks."""
    (scale, softcap, tile), (q, positions, segments, window, sinks, out, most) = static, kept
    how = Scoring(scale, softcap, window, sinks)
    wide = towards.astype(jnp.float32)
    beside = q, wide, most, jnp.sum(wide * out.astype(jnp.float32), axis=-1, keepdims=True)
    asking, found = jnp.zeros(q.shape, jnp.float32), []
    for segment in segments:
        tiles = Tiles(q, positions, segment, how, tile)
        more, keys, values = segment_gradient(tiles, *beside)
        asking, found = asking + more, [*found, (keys.astype(q.dtype), values.astype(q.dtype), None)]
    sinking = None
    if sinks is not None:  # the sink's weight reduces the weights of all keys
        sinking = -jnp.sum(jnp.exp(how.sink(q) - most) * beside[3], axis=(0, 3, 4)).reshape(-1).astype(sinks.dtype)
    return asking.astype(q.dtype), None, tuple(found), None, sinking


_blocked.defvjp(_read, _gradient)


class Tiles:
    """A segment in tiles of keys, for queries in tiles.

    Attributes:
        keys: [b, K, *C, tiles, S, H].
        values: The same shape as the keys.
        seen: Whether any query of a tile may see any key of a tile, [tiles of queries, tiles of keys].
    """

    def __init__(
        self, q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], segment: Segment, how: Scoring, tile: tuple
    ):
        self.how, self.tile, self.shape = how, tile, q.shape
        self.segment = keys, values, places = segment
        # Keep the axis order and slice later: moving the tiles to the first axis would copy all keys.
        self.keys, self.values = (cut(a, tile[1], -2) for a in (keys, values))
        asked = cut(positions.reshape(len(positions), *places.shape[1:-1], -1), tile[0], -1, -1)
        places = cut(rows_for(places, len(positions)), tile[1], -1, -1)
        asked, places = jnp.moveaxis(asked, -2, 0), jnp.moveaxis(places, -2, 0)
        self.seen = seen_tiles(asked, places, how.window)
        # [tiles, b, n, ..], as queries are, or [tiles, 1, 1, ..].
        rows = lambda a: a.reshape(len(a), *((1, 1) if a.shape[1] == 1 else (len(keys), -1)), *a.shape[2:])
        self.asked, self.places = rows(asked), rows(places)

    def over_queries(self, *arrays: Float[Array, "B K G T _"]) -> tuple[Array, ...]:
        """Move tiles of queries to the first axis: their positions, the tiles they see, and the given arrays."""
        beside = (cut(grouped(a, self.segment[0], self.segment[2]), self.tile[0], -2) for a in arrays)
        return self.asked, self.seen, *(jnp.moveaxis(a, -3, 0) for a in beside)

    def whole(self, x: Array) -> Float[Array, "B K G T _"]:
        """Join tiles of queries into one array of all queries."""
        x = jnp.moveaxis(x, 0, -3)
        tokens = self.shape[3] // math.prod(self.segment[2].shape[1:-1])
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :tokens, :].reshape(*self.shape[:4], -1)

    def over_keys(self, step: Any, state: Any, seen: Bool[Array, "S"]) -> Any:
        """Run state = step(state, j, seen[j]) for every tile j of keys.

        This is a `while` loop, which `checkpoint` and the gradient of a loop over layers treat as one operation. From a
        `scan` they would store every tile's scores.
        """
        end = len(self.places)
        body = lambda carry: (carry[0] + 1, step(carry[1], carry[0], seen[carry[0]]))
        return jax.lax.while_loop(lambda carry: carry[0] < end, body, (jnp.int32(0), state))[1]

    def at(self, j: Array) -> tuple[Array, Array, Array]:
        """Keys, values and positions of a tile."""
        pick = functools.partial(jax.lax.dynamic_index_in_dim, index=j, keepdims=False)
        return pick(self.keys, axis=-3), pick(self.values, axis=-3), pick(self.places, axis=0)

    def scores(self, q: Array, asked: Array, keys: Array, places: Array) -> Array:
        """Scores of a tile [b, n, K, G, *C, t, S], `MASKED` where a query does not see the key."""
        seen = visible(asked, places, self.how.window)[:, :, None, None]
        return jnp.where(seen, products(q, keys, self.how), MASKED)


def add_segment(state: Sum, tiles: Tiles, q: Float[Array, "B K G T H"]) -> Sum:
    """Add a segment to the running sums: a loop over tiles of queries, and inside it a loop over tiles of keys."""

    def add(state: Sum, q: Array, asked: Array, j: Array) -> Sum:
        keys, values, places = tiles.at(j)
        score = tiles.scores(q, asked, keys, places)
        most = jnp.maximum(state.most, jnp.max(score, axis=-1, keepdims=True))
        part, before = jnp.exp(score - most), jnp.exp(state.most - most)
        total = state.total * before + jnp.sum(part, axis=-1, keepdims=True)
        return Sum(state.out * before + weighted(part.astype(q.dtype), values), most, total)

    def row(_: None, given: tuple) -> tuple[None, Sum]:
        asked, seen, q, *read = given
        step = lambda read, j, some: jax.lax.cond(some, lambda read: add(read, q, asked, j), lambda read: read, read)
        return None, tiles.over_keys(step, Sum(*read), seen)

    return Sum(*map(tiles.whole, jax.lax.scan(row, None, tiles.over_queries(q, *state))[1]))


def segment_gradient(
    tiles: Tiles,
    q: Float[Array, "B K G T H"],
    towards: Float[Array, "B K G T H"],
    most: Float[Array, "B K G T 1"],
    mean: Float[Array, "B K G T 1"],
) -> tuple[Float[Array, "B K G T H"], Array, Array]:
    """Gradients of queries, and of a segment's keys and values, float32.

    Args:
        tiles: The segment.
        q: Queries.
        towards: Gradient with respect to the attention output.
        most: Log-sum-exp of the scores, so that weights are exp(score - most).
        mean: Inner product of the attention output with `towards`.
    """

    def said(q: Array, keys: Array, values: Array, given: tuple, places: Array) -> Array:
        """A scalar whose gradient is this tile's part of the gradient of attention."""
        asked, towards, most, mean = given
        weights = jnp.exp(tiles.scores(q, asked, keys, places) - most)
        return jnp.sum(weighted(weights.astype(q.dtype), values) * towards) - jnp.sum(weights * mean)

    def row(made: tuple, given: tuple) -> tuple[tuple, Array]:
        asked, seen, q, *others = given

        def step(state: tuple, j: Array, some: Array) -> tuple:
            keys, values, places = tiles.at(j)
            slopes = lambda: jax.grad(said, (0, 1, 2))(q, keys, values, (asked, *others), places)
            nothing = lambda: tuple(map(jnp.zeros_like, (q, keys, values)))
            more, *of = (a.astype(jnp.float32) for a in jax.lax.cond(some, slopes, nothing))
            pick = lambda a: jax.lax.dynamic_index_in_dim(a, j, axis=-3, keepdims=False)
            put = lambda a, x: jax.lax.dynamic_update_index_in_dim(a, pick(a) + x, j, axis=-3)
            return state[0] + more, *map(put, state[1:], of)

        asking, *found = tiles.over_keys(step, (jnp.zeros(q.shape, jnp.float32), *made), seen)
        return tuple(found), asking

    start = tuple(jnp.zeros(a.shape, jnp.float32) for a in (tiles.keys, tiles.values))
    made, asking = jax.lax.scan(row, start, tiles.over_queries(q, towards, most, mean))
    columns = tiles.segment[2].shape[-1]
    keys, values = (a.reshape(*a.shape[:-3], -1, a.shape[-1])[..., :columns, :] for a in made)
    return tiles.whole(asking), keys, values


def weighted(weights: Float[Array, "b n K G *C t S"], values: Float[Array, "b K *C S H"]) -> Array:
    """Weighted sums of values [b, n, K, G, *C, t, H], computed in the values' dtype, then cast to float32.

    (XLA on CPU has no product of bfloat16 arrays with a float32 result for this.)
    """
    return _beside_each("bnkg...ts,bk...sh->bnkg...th", weights, values).astype(jnp.float32)


def cut(x: Array, size: int, axis: int, fill: int = 0) -> Array:
    """Split an axis of x into equal tiles of at most `size`, [.., tiles, tile, ..]. The last tile is padded with `fill`."""
    axis, length = axis % x.ndim, x.shape[axis]
    count = -(-length // size)
    size = -(-length // count)
    if missing := count * size - length:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def seen_tiles(queries: Int[Array, "Q *#n t"], keys: Int[Array, "S *#n s"], window: Any) -> Bool[Array, "Q S"]:
    """Whether any query of a tile may see any key of a tile, from the extremes of their positions in each row."""
    earliest = lambda x: jnp.min(jnp.where(x >= 0, x, np.iinfo(np.int32).max), axis=-1)
    seen = jnp.max(queries, axis=-1)[:, None] >= earliest(keys)[None]
    if window is not None:
        seen &= earliest(queries)[:, None] - jnp.max(keys, axis=-1)[None] < window
    return jnp.any(seen, axis=tuple(range(2, seen.ndim)))
