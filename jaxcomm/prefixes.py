"""Prefixes: a sender's keys and values before a receiver's prompt, in selected layers (KVComm, Shi et al. 2025, arXiv
2510.03346).

    message = send_cache(params_a, prompts_a)                  keys and values of every layer
    cache = select(receive_cache(message, params_b), chosen)   only these layers see them
    generate(params_b, prompts_b, past=[cache])                B continues after them

The selection of layers is data (`KVCache.seen`). So one compiled program serves all selections, and many selections can
share one prefix (`spread`). Layer numbers count from 1; an array has one entry for each layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcomm.attention import rows_for
from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import check_texts, compiled
from jaxcomm.config import FULL, AnyArray, ModelConfig, check_alike
from jaxcomm.decoding import score
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.layers import Hook, angles_of, rotary, rotate
from jaxcomm.model import Params, enter, run_blocks
from jaxcomm.prompts import Prompts, as_prompts, known
from jaxcomm.reading import prefill

Scheme = Literal["score", "greedy", "first", "last", "random", "every"]
"""Rule for choosing layers (`choose_layers`)."""
ROWS = 8192
"""Number of tokens that `selection_logprobs` reads at once."""


def select(
    cache: KVCache,
    layers: Bool[AnyArray, "*R L"] | Sequence[int],
    *,
    positions: Literal["after", "own"] = "after",
    sink: bool = False,
    future: bool = False,
) -> KVCache:
    """Shows a prefix to some layers only.

    Args:
        cache: Keys and values of the prefix (`messages.receive_cache`).
        layers: Layers that see it: numbers from 1, or bool [L]; or bool [R, L], separately for each of R prompts.
        positions: "after": positions of the following tokens continue from the prefix in every layer, as published.
            "own": they begin at 0, and still see the whole prefix, whose keys stay rotated for 0, 1, ...
        sink: As in the authors' code, all layers see the prefix's first token, and the first layer sees the whole prefix.
        future: The published mask. In layers that do not see the prefix, a token also sees later tokens, as many as the
            prefix is long. In the authors' code this is a bug (docs/channels.md). It needs `sink`. (With an attention
            window shorter than the prefix, a token then sees nothing, not even itself.)

    Returns:
        The prefix as these layers see it. Keys and values are not copied.

    Raises:
        ValueError: A layer is out of range; the cache is a network's; `future` without `sink`, or with positions "own"; not
            all layers, or other positions, and some layers have linear attention.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> cache = jc.select(told, [3, 4])
        >>> jc.generate(params, prompts, past=[cache], max_new_tokens=2).tokens.shape
        (2, 2)
    """
    if isinstance(cache.k, dict):
        raise ValueError("a network has no layers to choose from: name a single model")
    if future and (not sink or positions == "own"):
        raise ValueError("the published mask belongs to sink=True and to positions after the prefix")
    count = depth(cache)
    chosen = as_layers(layers, count)
    if cache.indivisible:
        whole = known(chosen)
        if positions == "own" or whole is None or not whole.all():
            check_columns(cache, "layers cannot be chosen from it")
        return cache
    seen = jnp.moveaxis(jnp.atleast_2d(jnp.asarray(chosen)), -1, 0)[..., None]  # [L, R, 1]
    real, back = cache.positions >= 0, None
    if sink:
        seen, rows = seen.at[0].set(True), max(seen.shape[1], len(real))
        first = rows_for(real & (jnp.cumsum(real, axis=1) == 1), rows)
        if future:
            moved = jnp.maximum(rows_for(jnp.sum(real, axis=1, dtype=jnp.int32), rows) - 1, 0)
            back = jnp.where(seen[..., 0], 0, moved)
        seen = seen | first
    if positions == "own":
        begin = jnp.zeros(1, jnp.int32)
        return cache.replace(seen=seen, positions=jnp.where(real, 0, -1), begin=begin)
    return cache.replace(seen=seen, back=back)


def check_parts(config: Any, name: str) -> None:
    """Checks that prefixes of a model can be used in parts: by some layers, of several senders, or after other tokens.

    Args:
        config: Architecture of the model.
        name: Its name, for the error message.

    Raises:
        ValueError: Some of its layers have linear attention.
    """
    if isinstance(config, ModelConfig) and config.recurrent:
        raise ValueError(
            f"{name} has layers with linear attention, which hold one state of all tokens: send it whole (all layers, one sender, at the start), or send states (activation)"
        )


def check_columns(cache: KVCache, what: str) -> None:
    """Checks that every layer of a cache holds keys and values of single tokens, which can be hidden, moved or joined.

    Args:
        cache: The cache.
        what: What cannot be done otherwise, for the error message.

    Raises:
        ValueError: Some layers have linear attention, and hold one state of all tokens.
    """
    if cache.indivisible:
        raise ValueError(
            f"layers with linear attention hold one state of all tokens, so {what}: send it whole (all layers, one sender, at the start), or send states (activation)"
        )


def depth(cache: KVCache) -> int:
    """Counts the layers of a cache.

    Args:
        cache: Keys and values of a single model.

    Returns:
        The number of layers, L.
    """
    return len(cache.k)


def as_layers(layers: Bool[AnyArray, "*R L"] | Sequence[int], count: int) -> AnyArray:
    """Turns layer numbers into a mask over layers.

    Args:
        layers: Numbers of layers, from 1; or bool [L] or [R, L] already.
        count: Number of layers, L.

    Returns:
        Bool [L], or the given [R, L].

    Raises:
        ValueError: A layer is out of range; the array does not have L layers.
    """
    if hasattr(layers, "dtype") and layers.dtype == bool:  # pyright: ignore[reportAttributeAccessIssue]
        entries = layers.shape[-1]  # pyright: ignore[reportAttributeAccessIssue]
        if entries != count:
            raise ValueError(f"the mask of layers has {entries} entries, the prefix {count} layers: give one for each")
        return layers  # pyright: ignore[reportReturnType]
    numbers = [int(n) for n in layers]
    if wrong := [n for n in numbers if not 1 <= n <= count]:
        raise ValueError(f"layer {wrong[0]} cannot see a prefix: this model's layers are 1 to {count}")
    return np.isin(np.arange(1, count + 1), numbers)


def join(caches: Sequence[KVCache]) -> KVCache:
    """Joins the prefixes of several senders into one, without changing the keys, as KVComm does.

    Senders that have not read each other all begin at position 0. The next token's position is the sum of their lengths.
    A sender that has read the others continues at the position where they end.

    Args:
        caches: One cache for each sender, with the same layers and rows, before `select`.

    Returns:
        The caches side by side.

    Raises:
        ValueError: The numbers of layers, rows or heads differ; some layers have linear attention.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> jc.prefixes.join([told, told]).positions.shape
        (2, 6)
    """
    if len(caches) == 1:
        return caches[0]
    for cache in caches:
        check_columns(cache, "several cannot be joined")
    shapes = lambda c: [(len(c.k), *leaf.shape[-4:-2], leaf.shape[-1]) for leaf in jax.tree.leaves(c.k)]
    if any(shapes(c) != shapes(caches[0]) for c in caches):
        told = " and ".join(sorted({f"[layers, rows, heads, head size] {list(shapes(c)[0])}" for c in caches}))
        raise ValueError(f"the senders' keys and values are {told}: they must be alike")
    beside = lambda *leaves: jnp.concatenate(leaves, axis=-2)
    k, v = jax.tree.map(beside, *[(c.k, c.v) for c in caches])
    positions = jnp.concatenate([c.positions for c in caches], axis=-1)
    return KVCache(k, v, positions, begin=jnp.sum(positions >= 0, axis=-1, dtype=jnp.int32))


def move(cache: KVCache, config: ModelConfig, by: int) -> KVCache:
    """Moves a prefix to later positions by rotating its keys.

    Tokens read at positions 0, 1, .. then have positions `by`, `by` + 1, .. . Apart from the rotation, keys and values do
    not change. Keys of a model with learned positions stay as they are.

    Args:
        cache: Keys and values of the prefix.
        config: Architecture of the model that uses the cache.
        by: Number of positions.

    Returns:
        The cache at its new positions.

    Raises:
        ValueError: Some layers have linear attention.
    """
    check_columns(cache, "it cannot be moved")
    tables = rotary(config, jnp.full((1, 1), by, jnp.int32))
    positions = jnp.where(cache.positions < 0, -1, cache.positions + by)
    begin = None if cache.begin is None else cache.begin + by
    k = cache.k
    if tables is not None:
        # The keys already include the rope's scale.
        scale = [config.ropes[n].scale for n in config.rope_of]
        turn = lambda k, n: rotate(k, tuple(x / scale[n] for x in angles_of(config, tables, n)))  # pyright: ignore
        turned = [turn(k[n], n) for n in range(config.layers)]
        k = tuple(turned) if isinstance(k, tuple) else jnp.stack(turned)
    return cache.replace(k=k, positions=positions, begin=begin)


def hide_last(cache: KVCache, count: int) -> KVCache:
    """Hides the last tokens of a prefix, for example the last thoughts of `think`.

    Args:
        cache: Keys and values of the prefix.
        count: Number of tokens.

    Returns:
        The cache without them. It keeps its columns, so no program has to be compiled again.

    Raises:
        ValueError: Some layers have linear attention.
    """
    if not count:
        return cache
    check_columns(cache, "its last tokens cannot be hidden")
    columns = cache.positions.shape[-1]
    return cache.replace(positions=jnp.where(jnp.arange(columns) < columns - count, cache.positions, -1))


def stretch(cache: KVCache, layers: int) -> KVCache:
    """Adapts a prefix to a receiver with another number of layers: each layer goes to the one at the same relative depth.

    Layer l of L_A goes to round((l + 1/2) L_B / L_A - 1/2), counted from 0, as in KVComm's code. A layer that gets none
    sees no prefix. If several go to one layer, the last one is used.

    Args:
        cache: Keys and values of the sender, all layers of it.
        layers: Number of the receiver's layers, L_B.

    Returns:
        A cache of L_B layers.

    Raises:
        ValueError: Some layers have linear attention.
    """
    count = depth(cache)
    if count == layers:
        return cache
    check_columns(cache, "it does not fit another depth")
    source = np.full(layers, -1)
    for n in range(count):
        source[min(max(round((n + 0.5) * layers / count - 0.5), 0), layers - 1)] = n
    at = lambda tree: tuple(tree[max(n, 0)] for n in source)
    k, v = at(cache.k), at(cache.v)
    if not isinstance(cache.k, tuple):
        k, v = jnp.stack(k), jnp.stack(v)
    whole = jnp.ones((count, 1, 1), bool) if cache.seen is None else cache.seen
    seen = jnp.where(jnp.asarray(source >= 0)[:, None, None], whole[np.maximum(source, 0)], False)
    return cache.replace(k=k, v=v, seen=seen)


def check_prefix(a: ModelConfig, b: ModelConfig) -> None:
    """Checks that a model can use another's keys and values unchanged.

    Args:
        a: Architecture of the sender.
        b: Architecture of the receiver.

    Raises:
        ValueError: Their key heads, head sizes or rotary embeddings differ.
    """
    mend = "give a map of keys and values (fit_kv_maps; jaxcomm fit-map --kv), or send states"
    if a.layer_heads != b.layer_heads:
        for config in (a, b):
            check_alike(config, "keys and values for another model")
    if (a.kv_heads, a.head_dim) != (b.kv_heads, b.head_dim):
        raise ValueError(
            f"A's keys are {a.kv_heads} heads of {a.head_dim} numbers, B's {b.kv_heads} heads of {b.head_dim}: {mend}"
        )
    if {a.ropes[n] for n in a.rope_of} != {b.ropes[n] for n in b.rope_of}:
        raise ValueError(f"A's and B's rotary embeddings differ: {mend}")


# Which layers --------------------------------------------------------------------------------------------------------


@compiled(static=("last",))
def attention_onto(
    params: Params, prompts: Prompts, *, past: Sequence[KVCache], last: bool = False
) -> Float[Array, "L B S"]:
    """Measures how much of its attention each layer gives to each token of a prefix.

    Args:
        params: The receiver.
        prompts: Its prompts, which follow the prefix.
        past: Keys and values of the prefix, S columns in all, and the layers that see them.
        last: Whether to measure only the prompt's last token.

    Returns:
        Shares of attention, 0 to 1: the mean over heads and prompt tokens, or for the last token only. 0 on padding. NaN in
        layers with linear attention, which have no weights.

    Raises:
        ValueError: The prompts are invalid; the prefix is of another model.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> jc.prefixes.attention_onto(params, prompts, past=[told]).shape
        (4, 2, 3)
    """
    check_room(params, prompts)
    positions = positions_of(prompts, past)
    columns = sum(cache.positions.shape[-1] for cache in past)
    counted = positions >= 0
    if last:
        counted = jnp.arange(prompts.shape[1]) == prompts.shape[1] - 1
    weight = jnp.broadcast_to(counted, prompts.shape).astype(jnp.float32)
    weight /= jnp.sum(weight, axis=1, keepdims=True)

    def at(site: str, layer: Any, x: Array, state: Array) -> tuple[Array, Array]:
        found = jnp.einsum("bnqs,bq->bs", x[..., :columns], weight) / x.shape[1]
        return x, state.at[layer - 1].set(found)

    has = jnp.asarray([heads is not None for heads in params.config.key_heads])[:, None, None]
    state = jnp.broadcast_to(jnp.where(has, 0.0, jnp.nan), (len(has), prompts.shape[0], columns))
    h, hook = enter(params, prompts.tokens, positions, Hook(at, state, frozenset(["pattern"])))
    return run_blocks(params, h, positions, attended=Attended(past), hook=hook)[2]


def attention_mass(
    params: Params, prompts: Prompts | AnyArray, *, past: Sequence[KVCache], sink: bool = False
) -> Float[Array, "L B"]:
    """Measures how much of its attention each layer gives to a prefix (KVComm, section 3.2: importance before scaling).

    Args:
        params: The receiver.
        prompts: Its prompts, which follow the prefix.
        past: Keys and values of the prefix; all layers see it.
        sink: Whether to leave out the first token of the prefix, as in the authors' code.

    Returns:
        The share of attention for each layer and row, 0 to 1: summed over the prefix, averaged over heads and the
        prompt's tokens.

    Raises:
        ValueError: As for `attention_onto`.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> jc.prefixes.attention_mass(params, prompts, past=[told]).shape
        (4, 2)
    """
    onto = attention_onto(params, as_prompts(prompts), past=past)
    if not sink:
        return jnp.sum(onto, axis=-1)
    there = [cache.positions >= 0 for cache in past]
    kept = [x & (jnp.cumsum(x, axis=1) > 1) for x in there]
    kept = jnp.concatenate([rows_for(x, onto.shape[1]) for x in kept], axis=1)
    return jnp.sum(jnp.where(kept, onto, 0), axis=-1)


def layer_scores(
    mass: Float[AnyArray, "L *B"], *, alpha: float = 1.0, centre: float | None = None, width: float = 10.0
) -> np.ndarray:
    """Computes KVComm's score of every layer (section 3.2): alpha S + (1 - alpha) P.

    S is the attention mass, scaled to 0 .. 1 over the layers. P is exp(-(l - centre)^2 / (2 width^2)), l counted from 0.

    Args:
        mass: Attention mass of the layers (`attention_mass`). It is averaged over rows.
        alpha: Weight of the attention. The paper has 1 for Llama, 0.8 for Qwen and Falcon.
        centre: Centre of the prior. Default: L / 2.
        width: Width of the prior, in layers.

    Returns:
        The scores, [L].

    Example:
        >>> jc.prefixes.layer_scores(np.array([0.2, 0.6, 0.4])).round(1)
        array([0. , 1. , 0.5])
    """
    flat = np.asarray(mass, np.float64).reshape(len(mass), -1).mean(axis=1)
    span = flat.max() - flat.min()
    scaled = (flat - flat.min()) / (span or 1.0)
    at = np.arange(len(flat)) - (len(flat) / 2 if centre is None else centre)
    return alpha * scaled + (1 - alpha) * np.exp(-(at**2) / (2 * width**2))


def choose_layers(
    scheme: Scheme, ratio: float, layers: int, *, scores: Sequence[float] | AnyArray | None = None, seed: int = 0
) -> np.ndarray:
    """Chooses ceil(ratio L) layers.

    Args:
        scheme: "score" and "greedy": the layers with the largest `scores`. "first", "last": the lowest, the highest.
            "random": drawn with `seed`; a larger ratio keeps the layers of a smaller one. "every": evenly spaced.
        ratio: Share of the layers, 0 to 1.
        layers: Number of layers, L.
        scores: One number for each layer (`layer_scores`, `greedy_scores`).
        seed: Seed of "random".

    Returns:
        Bool [L].

    Raises:
        ValueError: There is no such scheme; the ratio is not between 0 and 1; there are no scores, or not L of them.

    Example:
        >>> jc.choose_layers("last", 0.5, 4).tolist()
        [False, False, True, True]
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"unknown scheme {scheme!r}: choose one of {', '.join(get_args(Scheme))}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {ratio}: it is a share of the layers, 0 to 1")
    count = math.ceil(round(ratio * layers, 9))
    match scheme:
        case "first":
            order = np.arange(layers)
        case "last":
            order = np.arange(layers)[::-1]
        case "random":
            order = np.random.default_rng([seed, 21]).permutation(layers)
        case "every":
            order = np.unique(((np.arange(count) + 0.5) * layers / max(count, 1)).astype(int))
        case _:
            if scores is None or len(scores) != layers:
                raise ValueError(f"the scheme {scheme} needs scores, one for each of {layers} layers")
            order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    chosen = np.zeros(layers, bool)
    chosen[order[:count]] = True
    return chosen


def spread(
    prompts: Prompts | AnyArray, cache: KVCache, selections: Bool[AnyArray, "C L"], **how: Any
) -> tuple[Prompts, KVCache]:
    """Repeats prompts so that each is read under C selections of layers. The prefix is not copied.

    Args:
        prompts: The receiver's prompts, B rows.
        cache: Keys and values of the prefix, B rows or one.
        selections: The layers of each selection.
        **how: As for `select`.

    Returns:
        Prompts of B C rows (row b C + c is prompt b under selection c), and the prefix for `past`.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> many, cache = jc.prefixes.spread(prompts, told, np.eye(4, dtype=bool))
        >>> jc.generate(params, many, past=[cache], max_new_tokens=2).tokens.shape
        (8, 2)
    """
    prompts, C = as_prompts(prompts), len(selections)
    every = jnp.tile(jnp.asarray(selections), (len(prompts), 1))
    tokens, mask = (
        None if a is None else jnp.repeat(jnp.asarray(a), C, axis=0) for a in (prompts.tokens, prompts.mask)
    )
    assert tokens is not None
    return Prompts(tokens, mask), select(cache, every, **how)


@functools.partial(jax.jit, static_argnames="how")
def _selection_logprobs(params: Params, prompts: Prompts, cache: KVCache, selections, answers, before, how) -> Any:
    many, behind = spread(prompts, cache, selections, **dict(how))
    past = [*before, behind]
    logits, own = prefill(params, many, past=past)
    texts = jnp.repeat(answers, len(selections), axis=0)[:, None]
    found, best = score(params, logits, own, texts, past=past)
    shape = len(prompts), len(selections)
    return found.sum(axis=(1, 2)).reshape(shape), best.all(axis=(1, 2)).reshape(shape)


def selection_logprobs(
    params: Params,
    prompts: Prompts | AnyArray,
    cache: KVCache,
    selections: Bool[AnyArray, "C L"],
    answers: Int[AnyArray, "B T"],
    *,
    before: Sequence[KVCache] = (),
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores given answers after a prefix, under many selections of layers, in one program.

    The prefix is read and stored once. The prompts are read under all selections in parallel, in parts of `ROWS` tokens.

    Args:
        params: The receiver.
        prompts: Its prompts, which follow the prefix.
        cache: Keys and values of the prefix, whole.
        selections: The layers of each selection.
        answers: Token ids [B, T]; -1 after the end of an answer.
        before: Key/value caches of the tokens before the prefix.
        progress: Called as progress(done, all) after every part.
        **how: As for `select`.

    Returns:
        Log-probability of each answer in nats [B, C], and whether greedy decoding would generate it [B, C].

    Raises:
        ValueError: As for `select` and `score`.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> every = np.stack([jc.choose_layers("first", n / 4, 4) for n in range(5)])
        >>> logprobs, greedy = jc.selection_logprobs(params, prompts, told, every, np.array([[7, 8], [9, -1]]))
        >>> logprobs.shape
        (2, 5)
    """
    prompts, selections = as_prompts(prompts), np.asarray(selections, bool)
    check_texts(params, answers, "answers")
    select(cache, selections[0], **how)  # raises on invalid options before anything is compiled
    size = max(1, min(len(selections), ROWS // max(1, prompts.tokens.shape[0] * prompts.shape[1])))
    parts = -(-len(selections) // size)
    size = -(-len(selections) // parts)
    filled = np.concatenate([selections, np.repeat(selections[-1:], parts * size - len(selections), axis=0)])
    logprobs, greedy = [], []
    for n in range(parts):
        part = filled[n * size : (n + 1) * size]
        told = tuple(sorted(how.items()))
        found = _selection_logprobs(params, prompts, cache, part, jnp.asarray(answers), tuple(before), told)
        for kept, new in zip((logprobs, greedy), jax.device_get(found), strict=True):
            kept.append(new)
        if progress is not None:
            progress(min((n + 1) * size, len(selections)), len(selections))
    cut = lambda kept: np.concatenate(kept, axis=1)[:, : len(selections)]
    return cut(logprobs), cut(greedy)


def greedy_scores(
    params: Params,
    prompts: Prompts | AnyArray,
    cache: KVCache,
    answers: Int[AnyArray, "B T"],
    *,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> np.ndarray:
    """Ranks layers greedily: each step adds the layer that makes the right answers likeliest.

    Every step tries all layers in one program, so L layers take L passes over the prompts under L selections.

    Args:
        params: The receiver.
        prompts: Its prompts, which follow the prefix. Use items on which you do not report results.
        cache: Keys and values of the prefix, whole.
        answers: Token ids [B, T] of the right answers; -1 after the end of an answer.
        most: Number of layers to rank; the others follow in the order of the last step. Default: all.
        progress: Called as progress(done, all) after every step.
        **how: As for `select`; and `before`, as for `selection_logprobs`.

    Returns:
        One number for each layer, [L]: L for the layer added first, L - 1 for the second, and so on.

    Raises:
        ValueError: As for `selection_logprobs`.

    Example:
        >>> told = jc.receive_cache(jc.send_cache(params, prompts), params)
        >>> sorted(jc.prefixes.greedy_scores(params, prompts, told, np.array([[7], [8]])).tolist())
        [1.0, 2.0, 3.0, 4.0]
    """
    count = params.config.layers
    steps = count if most is None else min(most, count)
    scores, chosen = np.zeros(count), np.zeros(count, bool)
    means = np.zeros(count)
    for step in range(steps):
        tried = chosen | np.eye(count, dtype=bool)
        means = selection_logprobs(params, prompts, cache, tried, answers, **how)[0].mean(axis=0)
        best = int(np.argmax(np.where(chosen, -np.inf, means)))
        chosen[best], scores[best] = True, count - step
        if progress is not None:
            progress(step + 1, steps)
    rest = np.flatnonzero(~chosen)
    scores[rest[np.argsort(-means[rest], kind="stable")]] = np.arange(len(rest), 0, -1)
    return scores


def check_reach(config: ModelConfig, layers: Bool[AnyArray, "*R L"], prompt: int) -> None:
    """Checks that a prompt's last token can see part of the prefix in every chosen layer, despite sliding windows.

    If all layers are chosen, nothing is checked: the receiver then reads both texts as usual, with its windows.

    Args:
        config: Architecture of the receiver.
        layers: Layers that should see the prefix.
        prompt: Length of the receiver's longest prompt, in tokens.

    Raises:
        ValueError: A sliding window is no longer than the prompt.
    """
    chosen: np.ndarray = np.any(np.atleast_2d(np.asarray(layers)), axis=0)
    if chosen.all():
        return
    for n, window in enumerate(config.windows):
        if chosen[n] and window != FULL and window <= prompt:
            reach = [m + 1 for m, w in enumerate(config.windows) if w == FULL or w > prompt]
            raise ValueError(
                f"layer {n + 1} sees {window} tokens back, and B's prompt has {prompt}: its answer sees nothing of the prefix "
                f"there; choose among layers {reach}, or all"
            )
