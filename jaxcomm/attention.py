"""Attention over segments: what queries see, how it is scored, and the two ways to add it up.

Pure functions of queries, keys, values and positions. `attend` chooses by size alone: `plain` makes all scores of its
queries at once, `blocked` a tile of them at a time (ARCHITECTURE.md, decision 73).
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
"""Keys, values [B, K, S, H] and positions [B, S] of earlier tokens; -1 marks an empty slot. S differs by segment. They may
have fewer rows than there are queries: each is then shared by as many consecutive rows (`rows_for`).

Or of C branches, [B, K, C, S, H] and [B, C, S]: the row's T queries are then C groups of T / C, and each group sees its
own branch only. So many continuations of one prompt are one row, which shares that prompt's segment."""

MASKED = -1e30
BLOCK, BLOCKS = 128, 4
"""`plain` takes the queries of a text in at most BLOCKS blocks of at least BLOCK tokens."""
LONG, SCORES = 1024, 2**19
"""`blocked` reads at least so many keys, and makes at least so many scores of a head."""
TILE = 256, 512
"""Most queries and keys of a tile."""


class Scoring(NamedTuple):
    """How a query's scores are made.

    Attributes:
        scale: Factor on the product of query and key.
        softcap: Scores end softly at it. None: nowhere.
        window: How far back a query sees. It may be traced. None: to the first token.
    """

    scale: float
    softcap: float | None = None
    window: int | Int[Array, ""] | None = None


def rows_for(x: Array, rows: int) -> Array:
    """x [B, ...] for so many rows: each of its own is that of rows / B consecutive ones. One stays one."""
    return x if len(x) in (1, rows) else jnp.repeat(x, rows // len(x), axis=0)


def grouped(x: Float[Array, "B K G T X"], keys: Array, key_positions: Array) -> Float[Array, "b n K G *C t X"]:
    """What queries have, beside a segment's keys: n rows for each of the keys' b, t tokens for each of its branches."""
    b, branches = len(keys), key_positions.shape[1:-1]
    return x.reshape(b, len(x) // b, *x.shape[1:3], *branches, x.shape[3] // math.prod(branches), x.shape[4])


def visible(queries: Int[Array, "*#n T"], keys: Int[Array, "*#n S"], window) -> Bool[Array, "*n T S"]:
    """Whether a key exists, is not later than the query and, if `window` is not None, is within the window."""
    distance = queries[..., :, None] - keys[..., None, :]
    seen = (keys[..., None, :] >= 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def products(q: Float[Array, "b n K G *C t H"], keys: Float[Array, "b K *C S H"], how: Scoring) -> Array:
    """Scores [b, n, K, G, *C, t, S] before masks, float32."""
    score = jnp.einsum("bnkg...th,bk...sh->bnkg...ts", q, keys, preferred_element_type=jnp.float32) * how.scale
    return score if how.softcap is None else jnp.tanh(score / how.softcap) * how.softcap


def attend(
    q: Float[Array, "B K G T H"],
    positions: Int[Array, "_ T"],
    segments: Sequence[Segment],
    how: Scoring,
    ordered: bool = False,
) -> Float[Array, "B K G T H"]:
    """Reads all segments: one softmax over everything that a query sees.

    Args:
        q: Queries, G for each head of keys.
        positions: Their positions, of each row or of all.
        segments: What there is to see.
        how: How scores are made.
        ordered: Whether the last segment is the tokens' own, in order; the queries are those of its last T.

    Returns:
        A mean of values for each query. A query that sees nothing gets some finite numbers.
    """
    keys = sum(places.shape[-1] for _, _, places in segments)
    if keys >= LONG and q.shape[3] * keys >= SCORES:
        return blocked(q, positions, segments, how)
    blocks = query_blocks(q, positions, segments, ordered)
    return jnp.concatenate([plain(*block, how) for block in blocks], axis=3)


def query_blocks(
    q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], segments: Sequence[Segment], ordered: bool
) -> Iterator[tuple[Array, Array, Sequence[Segment]]]:
    """Blocks of queries, their positions, and what they see.

    A text's own keys come last, in order: each block sees only those up to its end, so five eighths of the scores are
    made, and fewer at a time (a seventh of reading 400 to 600 tokens).
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
    """Scores of queries with every segment, `MASKED` where they do not see it."""
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
    """Reads all segments with all scores at once."""
    made = scores(q, positions, segments, how)
    # A softmax over all segments where they lie: one maximum, one sum, and the division after the values, where it
    # is smallest. (Joining the scores and dividing them: 13 % slower in a sweep over prompts of 256 tokens.)
    most = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in made])
    parts = [jnp.exp(s - jax.lax.stop_gradient(most)) for s in made]
    out, total = jnp.zeros(q.shape, jnp.float32), functools.reduce(jnp.add, [jnp.sum(p, axis=-1) for p in parts])
    for part, (_, values, places) in zip(parts, segments, strict=True):
        part = grouped(part.astype(q.dtype), values, places)
        got = jnp.einsum("bnkg...ts,bk...sh->bnkg...th", part, values).astype(jnp.float32)
        out += got.reshape(q.shape)
    return (out / total[..., None]).astype(q.dtype)


def pattern(
    q: Float[Array, "B K G T H"],
    positions: Int[Array, "_ T"],
    segments: Sequence[Segment],
    how: Scoring,
    ordered: bool = False,
) -> Float[Array, "B N T S"]:
    """Attention weights over all segments side by side, float32, made once more for those who read them (`attend`)."""
    every = [jnp.concatenate(scores(*block, how), axis=-1) for block in query_blocks(q, positions, segments, ordered)]
    columns = every[-1].shape[-1]
    wide = [jnp.pad(s, [(0, 0)] * 4 + [(0, columns - s.shape[-1])], constant_values=MASKED) for s in every]
    weights = jax.nn.softmax(jnp.concatenate(wide, axis=3), axis=-1)
    return weights.reshape(len(weights), -1, *weights.shape[3:])


class Sum(NamedTuple):
    """What queries have read so far, float32: values weighted by exp(score - most), and the weights' sum.

    `most` begins far above `MASKED` and far below every score, so that what is masked weighs nothing from the first tile on.
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
    """Reads all segments tile by tile, of at most so many queries and keys; neither it nor its gradient keeps scores."""
    empty = lambda x, width: jnp.full((*q.shape[:4], width), x, jnp.float32)
    state = Sum(empty(0.0, q.shape[4]), empty(MASKED / 2, 1), empty(0.0, 1))
    for segment in segments:
        state = add_segment(state, q, positions, segment, how, tile)
    return (state.out / jnp.where(state.total == 0, 1, state.total)).astype(q.dtype)


def add_segment(
    state: Sum, q: Float[Array, "B K G T H"], positions: Int[Array, "_ T"], segment: Segment, how: Scoring, tile: tuple
) -> Sum:
    """`state` after another segment: a loop over tiles of queries, and in it one over tiles of keys."""
    keys, values, places = segment
    asked = positions.reshape(len(positions), *places.shape[1:-1], -1)
    asked, places = cut(asked, tile[0], -1, -1), cut(rows_for(places, len(positions)), tile[1], -1, -1)
    seen = seen_tiles(asked, places, how.window)
    # [tiles, b, n, ..], as queries are, or [tiles, 1, 1, ..].
    shared = lambda a: a.reshape(len(a), *((1, 1) if a.shape[1] == 1 else (len(keys), -1)), *a.shape[2:])
    tiles = [cut(a, tile[1], -2) for a in (keys, values)]
    beside = [grouped(a, keys, segment[2]) for a in (q, *state)]

    def column(read: Sum, given: tuple, q: Array, asked: Array) -> tuple[Sum, None]:
        *given, some = given
        return jax.lax.cond(some, lambda read: add_tile(read, q, asked, *given, how), lambda read: read, read), None

    # Under `checkpoint` a gradient makes a tile's scores again, or all of them would be kept for it.
    def row(_: None, given: tuple) -> tuple[None, Sum]:
        q, asked, some, *read = given
        step = jax.checkpoint(functools.partial(column, q=q, asked=asked), prevent_cse=False)
        return None, jax.lax.scan(step, Sum(*read), (*tiles, shared(places), some))[0]

    asking, *so_far = (cut(a, tile[0], -2) for a in beside)
    _, read = jax.lax.scan(jax.checkpoint(row, prevent_cse=False), None, (asking, shared(asked), seen, *so_far))
    joined = lambda a: jnp.moveaxis(a, 0, -3).reshape(*a.shape[1:-2], -1, a.shape[-1])
    tokens = beside[0].shape[-2]
    return Sum(*(joined(a)[..., :tokens, :].reshape(*q.shape[:4], -1) for a in read))


def add_tile(
    state: Sum,
    q: Float[Array, "b n K G *C t H"],
    asked: Int[Array, "_ _ *C t"],
    keys: Float[Array, "b K *C S H"],
    values: Float[Array, "b K *C S H"],
    places: Int[Array, "_ _ *C S"],
    how: Scoring,
) -> Sum:
    """`state` after a tile of keys, at these places, that queries at these positions see or do not see."""
    seen = visible(asked, places, how.window)[:, :, None, None]
    score = jnp.where(seen, products(q, keys, how), MASKED)
    # The result does not depend on it, so neither does the gradient.
    most = jax.lax.stop_gradient(jnp.maximum(state.most, jnp.max(score, axis=-1, keepdims=True)))
    part, before = jnp.exp(score - most), jnp.exp(state.most - most)
    got = jnp.einsum("bnkg...ts,bk...sh->bnkg...th", part.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return Sum(state.out * before + got, most, state.total * before + jnp.sum(part, axis=-1, keepdims=True))


def cut(x: Array, size: int, axis: int, fill: int = 0) -> Array:
    """x in equal tiles of at most `size` along an axis, which become its first axis; the last is filled up."""
    axis, length = axis % x.ndim, x.shape[axis]
    count = -(-length // size)
    size = -(-length // count)
    if missing := count * size - length:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def seen_tiles(queries: Int[Array, "Q *#n t"], keys: Int[Array, "S *#n s"], window: Any) -> Bool[Array, "Q S"]:
    """Whether some query of a tile may see some key of another, by the extremes of their positions in each row."""
    earliest = lambda x: jnp.min(jnp.where(x >= 0, x, np.iinfo(np.int32).max), axis=-1)
    seen = jnp.max(queries, axis=-1)[:, None] >= earliest(keys)[None]
    if window is not None:
        seen &= earliest(queries)[:, None] - jnp.max(keys, axis=-1)[None] < window
    return jnp.any(seen, axis=tuple(range(2, seen.ndim)))
