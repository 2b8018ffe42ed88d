"""Decoding: read a prompt once (`reading.prefill`), then generate in one jitted loop until every row has stopped.

The loop writes keys and values into one cache, in place. Tokens that several continuations share (a prompt) may be in
other caches, which the loop only reads. This module handles token ids only, no text. Prompts are left-padded, so the
last token of every row is in column -1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import NEW_TOKENS, AnyArray
from jaxcomm.edits import Edit, writing_hook
from jaxcomm.language_model import LanguageModel, after, check_room
from jaxcomm.model import run
from jaxcomm.prompts import Prompts, known
from jaxcomm.reading import prefill


class Sampling(struct.PyTreeNode):
    """How to sample the next token. The steps and their order match transformers' logits warpers.

    The temperature is applied first, then top_k, then top_p. All three may be traced, so new values trigger no
    recompilation. If a traced value is out of range, no token is generated.

    Attributes:
        temperature: Divisor of the logits, a number or one for each row [B]. 0 takes the likeliest token.
        top_k: Number of likeliest tokens to keep. 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probabilities sum to at least top_p. 1 keeps all.

    Raises:
        ValueError: `temperature` or `top_k` is below 0; `top_p` is not in (0, 1].

    Example:
        >>> sampling = jc.Sampling(temperature=0.7, top_p=0.9)
        >>> keys = jax.random.split(jax.random.key(0), len(prompts))
        >>> jc.generate(params, prompts, sampling=sampling, keys=keys, max_new_tokens=2).tokens.shape
        (2, 2)
    """

    temperature: float | AnyArray = 1.0
    top_k: int | AnyArray = 0
    top_p: float | AnyArray = 1.0

    def __post_init__(self):
        for name, low, fits in (
            ("temperature", "0 (greedy) or more", lambda x: (x >= 0) & (x < np.inf)),
            ("top_k", "0 (all) or more", lambda x: x >= 0),
            ("top_p", "above 0 and at most 1", lambda x: (x > 0) & (x <= 1)),
        ):
            value = getattr(self, name)
            if isinstance(value, int | float | np.number | np.ndarray | jax.Array):  # skip JAX's pytree placeholders
                x = known(value)
                if x is not None and not np.all(fits(x)):
                    raise ValueError(f"{name} = {value}: it must be {low}")

    @property
    def greedy(self) -> bool:
        """Whether the temperature is known to be 0. Decoding then needs no random keys."""
        return (temperature := known(self.temperature)) is not None and not temperature.any()


class Generation(struct.PyTreeNode):
    """Tokens that a model generated. T is `max_new_tokens`.

    A row ends early if its logits are NaN (after an invalid traced value or an overflow). From there on its tokens are
    -1, and the first of these has the log-probability NaN.

    Attributes:
        tokens: Token ids [B, T]; -1 after the end of a row.
        logprobs: Log-probability of each token in nats, [B, T], under the model's own distribution, before temperature
            and cuts. 0 after the end of a row.
        lengths: Number of tokens of each row, [B]. A stop token counts.

    Example:
        >>> jc.generate(params, prompts, max_new_tokens=2).lengths
        Array([2, 2], dtype=int32)
    """

    tokens: Int[AnyArray, "B T"]
    logprobs: Float[AnyArray, "B T"]
    lengths: Int[AnyArray, "B"]


def check_finite(out: Generation) -> None:
    """Raises FloatingPointError if a row's logits were NaN. Such a row would otherwise look like an empty answer."""
    if (rows := np.flatnonzero(np.isnan(np.asarray(out.logprobs)).any(axis=-1))).size:
        raise FloatingPointError(
            f"the logits of row {rows[0]} are not numbers: a layer or a token out of range under jit, or values beyond float16 (load the model as bfloat16 or float32)"
        )


def bucket(length: int, limit: int, smallest: int = 32) -> int:
    """Rounds a prompt's length up, so that prompts of similar lengths share one compiled program.

    The lengths are 1, 32, 48, 64, 96, 128, 192 and 256, then they grow by about an eighth: 288, 320, .., 512, 576, .. .
    The steps are smaller there because padding a long prompt costs more than compiling another program.

    Args:
        length: Number of tokens of the prompt.
        limit: Largest number of columns.
        smallest: Smallest number of columns for more than one token.

    Returns:
        Number of columns to pad to, at most `limit`.

    Raises:
        ValueError: The prompt is longer than `limit`.

    Example:
        >>> from jaxcomm.decoding import bucket
        >>> [bucket(length, limit=4096) for length in (1, 5, 100, 300)]
        [1, 32, 128, 320]
    """
    if length > limit:
        raise ValueError(
            f"a prompt of {length} tokens does not fit: the model's positions leave room for {limit}; shorten it"
        )
    size = smallest if length > 1 else 1
    while size < length:
        power = size & (size - 1) == 0
        size += (1 << (size.bit_length() - 4)) if size >= 256 else size // 2 if power else size // 3
    return min(size, limit)


def check_keys(keys: Any, rows: int, row: str = "row") -> None:
    """Raises ValueError unless there is one random key for each row."""
    if keys is None or np.shape(keys)[:1] != (rows,):
        given = "none" if keys is None else f"an array of shape {np.shape(keys)}"
        raise ValueError(
            f"sampling needs keys, one per {row}, {rows} in all: jax.random.split(jax.random.key(seed), {rows}); got {given}"
        )


def warp(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the sampling distribution: divided by the temperature, -inf where `sampling` cuts. The largest is 0.

    At temperature 0 the probability is shared by the likeliest tokens."""
    logits -= jnp.max(logits, axis=-1, keepdims=True)  # or a small temperature would make them infinite
    logits /= jnp.maximum(_by_row(sampling.temperature, logits), jnp.finfo(logits.dtype).tiny)
    cuts = jnp.any(jnp.asarray(sampling.top_k) > 0) | jnp.any(jnp.asarray(sampling.top_p) < 1)
    return jax.lax.cond(cuts, lambda logits: cut(logits, sampling), lambda logits: logits, logits)


def _by_row(value: Any, logits: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    values = jnp.asarray(value, logits.dtype).reshape(-1)
    if values.size not in (1, len(logits)):
        raise ValueError(f"{values.size} temperatures for {len(logits)} rows: give one, or one for each row")
    return jnp.broadcast_to(values, logits.shape[:1])[:, None]


def cut(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Set logits outside top_k and top_p to -inf. This sorts the vocabulary, which is slower than a small model's step."""
    ordered = -jnp.sort(-logits, axis=-1)
    k = jnp.where(jnp.asarray(sampling.top_k) > 0, jnp.asarray(sampling.top_k), logits.shape[-1])
    rank = jnp.arange(logits.shape[-1])
    kept = jnp.where(rank < k, ordered, -jnp.inf)
    mass_before = jnp.cumsum(jax.nn.softmax(kept, axis=-1), axis=-1) - jax.nn.softmax(kept, axis=-1)
    inside = (mass_before < sampling.top_p) | (rank == 0) | (jnp.asarray(sampling.top_p) >= 1)
    kept = jnp.where(inside, kept, jnp.inf)
    threshold = jnp.min(jnp.where(kept == -jnp.inf, jnp.inf, kept), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def choose(logits: Float[Array, "B V"], sampling: Sampling | None, keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
    """The next token of every row: the argmax without `sampling` or at temperature 0, else a sample with the row's key.
    -1 where the logits are NaN, or `sampling` is out of range."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # of NaN, if there is one
    valid = ~jnp.isnan(jnp.take_along_axis(logits, likeliest[:, None], axis=-1)[:, 0])
    if sampling is None:
        return jnp.where(valid, likeliest, -1)
    assert keys is not None  # `check_keys`
    drawn = jax.vmap(jax.random.categorical)(keys, warp(logits, sampling)).astype(jnp.int32)
    temperature = _by_row(sampling.temperature, logits)[:, 0]
    valid &= (temperature >= 0) & (jnp.asarray(sampling.top_k) >= 0) & (jnp.asarray(sampling.top_p) > 0)
    return jnp.where(valid, jnp.where(temperature == 0, likeliest, drawn), -1)


class Decoding(TypedDict, total=False):
    """Options of `decode`, `generate` and `communicate`.

    Attributes:
        max_new_tokens: Largest number of new tokens, default 16. Each number has its own compiled program.
        sampling: How to sample tokens. None, the default: greedy decoding.
        keys: Random key of each row, [B]. Greedy decoding needs none.
        stop_tokens: Tokens that end a row. Default: none.
    """

    max_new_tokens: int
    sampling: Sampling | None
    keys: Key[Array, "B"] | None
    stop_tokens: Sequence[Any] | AnyArray


class DecodingState(struct.PyTreeNode):
    """Decoding after t tokens of each row. The newest token is not in the cache yet.

    Attributes:
        t: Number of tokens generated so far.
        token: The newest token of each row, [B].
        done: Whether each row has ended, [B].
        out: The tokens generated so far.
        cache: The key/value cache that the loop writes to.
        begin: Position of the first new token of each row, [B].
        sampling: As in `Decoding`.
        keys: As in `Decoding`.
        stop_tokens: As in `Decoding`.
    """

    t: Int[Array, ""]
    token: Int[Array, "B"]
    done: Bool[Array, "B"]
    out: Generation
    cache: KVCache
    begin: Int[Array, "B"]
    sampling: Sampling | None
    keys: Key[Array, "B"] | None
    stop_tokens: Int[Array, "_"]

    def emit(self, logits: Float[Array, "B V"]) -> DecodingState:
        """Samples the next token of every row.

        Args:
            logits: Logits [B, V] of the next token.

        Returns:
            The state with one more token.
        """
        t = self.t
        drawn = None if self.keys is None else jax.vmap(jax.random.fold_in, (0, None))(self.keys, t)
        token = choose(logits, self.sampling, drawn)
        every = jax.nn.log_softmax(logits, axis=-1)
        logprob = jnp.take_along_axis(every, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
        logprob, broken = jnp.where(token < 0, jnp.nan, logprob), token < 0
        out = Generation(
            tokens=jnp.asarray(self.out.tokens).at[:, t].set(jnp.where(self.done, -1, token)),
            logprobs=jnp.asarray(self.out.logprobs).at[:, t].set(jnp.where(self.done, 0.0, logprob)),
            lengths=self.out.lengths + (~self.done & ~broken).astype(jnp.int32),
        )
        done = self.done | broken | jnp.isin(token, self.stop_tokens)
        return self.replace(t=t + 1, token=token, done=done, out=out)


def start_decoding(
    logits: Float[Array, "B V"],
    cache: KVCache,
    *,
    max_new_tokens: int = NEW_TOKENS,
    sampling: Sampling | None = None,
    keys: Key[Array, "B"] | None = None,
    stop_tokens: Sequence[Any] | AnyArray = (),
) -> DecodingState:
    """Samples the first token after prefilled prompts, and extends the cache for the others.

    Args:
        logits: Logits [B, V] after the prompts' last tokens.
        cache: Keys and values of the prompts.
        max_new_tokens: As in `Decoding`.
        sampling: As in `Decoding`.
        keys: As in `Decoding`.
        stop_tokens: As in `Decoding`.

    Returns:
        The state after one token.

    Raises:
        ValueError: `max_new_tokens` is below 1; tokens are drawn without a key for each row.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: it must be at least 1")
    rows = logits.shape[0]
    if sampling is not None:
        check_keys(keys, rows)
    blank = Generation(
        tokens=jnp.full((rows, max_new_tokens), -1, jnp.int32),
        logprobs=jnp.zeros((rows, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
    )
    none, done = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    room, begin = cache.extend(max_new_tokens - 1), jnp.max(cache.positions, axis=-1) + 1  # the last is never read
    stops = jnp.asarray(stop_tokens, jnp.int32)
    return DecodingState(jnp.int32(0), none, done, blank, room, begin, sampling, keys, stops).emit(logits)


def continue_decoding(
    params: LanguageModel,
    state: DecodingState,
    until: Any,
    *,
    past: Sequence[KVCache] = (),
    edits: Sequence[Edit] = (),
) -> DecodingState:
    """Generates until each row has `until` tokens or every row is done, with all rows in one `while_loop`.

    A caller that inspects the text in between (for stop strings, or to stream it) can call this repeatedly with a larger
    `until`, and may mark rows as done.

    Args:
        params: The model, or a network (without edits).
        state: The state to continue from.
        until: Number of tokens, an int or traced.
        past: Key/value caches of earlier tokens. They are not changed.
        edits: Edits of the model's states. Those with `every_step` apply to each new token.

    Returns:
        The later state.
    """
    first = state.cache.positions.shape[-1] - (state.out.tokens.shape[1] - 1)

    def step(s: DecodingState) -> DecodingState:
        positions, column = (s.begin + s.t - 1)[:, None], first + s.t - 1
        attended = Attended(past, s.cache.announce(positions, column), column)
        hook = writing_hook(params, positions, edits)
        logits, cache, _ = run(params, s.token[:, None], positions, hook, attended=attended)
        return s.replace(cache=cache).emit(logits[:, 0])

    return jax.lax.while_loop(lambda s: (s.t < until) & ~jnp.all(s.done), step, state)


write_until = jax.jit(continue_decoding, donate_argnames="state")
"""`continue_decoding` as one compiled program. It reuses (donates) the memory of the state it is given."""


@compiled(prompts={}, static=("max_new_tokens",))
def decode(
    params: LanguageModel,
    logits: Float[Array, "B V"],
    cache: KVCache,
    *,
    past: Sequence[KVCache] = (),
    edits: Sequence[Edit] = (),
    **decoding: Unpack[Decoding],
) -> Generation:
    """Generates after prefilled prompts until a stop token or `max_new_tokens`.

    Token t of row b is sampled with the key fold_in(keys[b], t). So a row's text does not depend on the other rows.

    Args:
        params: The model, or a network (without edits).
        logits: Logits [B, V] after the prompts, as `prefill` returned them.
        cache: Keys and values of the prompts, as `prefill` returned them.
        past: Key/value caches of the tokens before the prompts. They are not changed.
        edits: Edits of the model's states. Those with `every_step` apply to each new token.
        **decoding: Options of `Decoding`.

    Returns:
        The generated tokens.

    Raises:
        ValueError: `max_new_tokens` is below 1; caches and new tokens exceed the model's positions; a cache is of another
            model, or has other rows; tokens are drawn without a key for each row; an edit is invalid.

    Example:
        >>> logits, cache = jc.prefill(params, prompts)
        >>> jc.decode(params, logits, cache, max_new_tokens=2).tokens.shape
        (2, 2)
    """
    state = start_decoding(logits, cache, **decoding)
    return continue_decoding(params, state, state.out.tokens.shape[1], past=past, edits=edits).out


@compiled(prompts={}, texts={"continuations": "params"})
def score(
    params: LanguageModel,
    logits: Float[Array, "B V"],
    cache: KVCache,
    continuations: Int[AnyArray, "B C T"],
    *,
    past: Sequence[KVCache] = (),
) -> tuple[Float[Array, "B C T"], Bool[Array, "B C T"]]:
    """Scores given continuations of prefilled prompts, token by token.

    All C continuations of a prompt share the keys and values of that prompt.

    Args:
        params: The model, or a network.
        logits: Logits [B, V] after the prompts, as `prefill` returned them.
        cache: Keys and values of the prompts, as `prefill` returned them.
        continuations: Token ids [B, C, T], with -1 after the end of each continuation.
        past: Caches of what the model read before the prompts. They are not changed.

    Returns:
        The log-probability of each token in nats, [B, C, T], and whether no other token is likelier, [B, C, T]. After
        the end of a continuation they are 0 and True. For a continuation without tokens they are NaN and False.

    Raises:
        ValueError: T is 0; `continuations` has another number of prompts; a token is outside the vocabulary, or stands
            after a -1.

    Example:
        >>> logits, cache = jc.prefill(params, prompts)
        >>> texts = np.array([[[7, 8], [9, -1]], [[7, 8], [9, -1]]])
        >>> logprobs, likeliest = jc.score(params, logits, cache, texts)
        >>> logprobs.shape
        (2, 2, 2)
    """
    return score_with(params.read, params.logits, logits, cache, continuations, past=past)


def score_with(
    read: Callable[..., tuple[Array, Any]],
    head: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    logits: Float[Array, "B V"],
    cache: KVCache,
    continuations: Int[AnyArray, "B C T"],
    *,
    past: Sequence[KVCache] = (),
) -> tuple[Float[Array, "B C T"], Bool[Array, "B C T"]]:
    """Does the work of `score` inside a compiled program, with any function that reads tokens.

    Args:
        read: Function read(tokens, positions, attended=..), like `LanguageModel.read`.
        head: Function that computes logits from the states that `read` returns.
        logits: As for `score`.
        cache: As for `score`.
        continuations: As for `score`.
        past: As for `score`.

    Returns:
        As `score`.

    Raises:
        ValueError: T is 0; `continuations` has another number of prompts.
    """
    if continuations.ndim != 3 or len(continuations) != len(logits):
        raise ValueError(
            f"continuations are {continuations.shape} for {len(logits)} prompts: give [prompts, continuations of each, tokens]"
        )
    B, C, T = continuations.shape
    if not T:
        raise ValueError("a text to score has no tokens")
    real, empty = continuations >= 0, jnp.arange(T) == 0
    empty &= continuations[..., :1] < 0
    tokens = jnp.where(real, continuations, 0)
    logprobs, best = token_logprobs(logits[:, None], tokens[:, :, 0])
    if T > 1:
        positions = jnp.asarray(after((cache,), B))[:, :, None] + jnp.arange(T - 1, dtype=jnp.int32)
        positions = jnp.where(real[:, :, 1:], positions, -1).reshape(B, -1)
        given = tokens[:, :, :-1].reshape(B, -1)
        attended = Attended((*past, cache), branches=C if C > 1 else None)
        h, _ = read(given, positions, attended=attended)
        # Logits of all tokens at once would not fit: [tokens, V].
        predict = lambda x: token_logprobs(head(x[0][None, None])[0, 0], x[1])
        rest = jax.lax.map(predict, (h.reshape(-1, h.shape[-1]), tokens[:, :, 1:].reshape(-1)), batch_size=LOGITS)
        join = lambda first, more: jnp.concatenate([first[..., None], more.reshape(B, C, T - 1)], axis=-1)
        logprobs, best = join(logprobs, rest[0]), join(best, rest[1])
    else:
        logprobs, best = logprobs[..., None], best[..., None]
    return jnp.where(real, logprobs, jnp.where(empty, jnp.nan, 0.0)), (best | ~real) & ~empty


LOGITS = 512
"""Number of tokens whose logits `score` holds in memory at once."""
LANES = 128
"""Number of parallel partial sums in `top_and_total`."""


def top_and_total(logits: Float[Array, "*n V"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """The largest logit, and the logarithm of the sum of all exponentials.

    The sum is split into lanes, each with its own maximum. XLA on CPU sums a row sequentially, which would take a quarter
    of the time of the matrix product that computes the logits.
    """
    lanes = LANES if logits.shape[-1] % LANES == 0 else 1
    rows = logits.reshape(*logits.shape[:-1], -1, lanes)
    most = jnp.max(rows, axis=-2)
    sums, top = jnp.sum(jnp.exp(rows - most[..., None, :]), axis=-2), jnp.max(most, axis=-1)
    return top, top + jnp.log(jnp.sum(sums * jnp.exp(most - top[..., None]), axis=-1))


def token_logprobs(logits: Float[Array, "*#n V"], tokens: Int[Array, "*n"]) -> tuple[Array, Array]:
    """Log-probability of each token, and whether no token is likelier. (argmax would take ten times as long as max.)"""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    top, total = top_and_total(logits)
    return picked - total, picked >= top


@compiled(static=("max_new_tokens",))
def generate(
    params: LanguageModel,
    prompts: Prompts,
    *,
    past: Sequence[KVCache] = (),
    edits: Sequence[Edit] = (),
    **decoding: Unpack[Decoding],
) -> Generation:
    """Reads prompts and generates after them.

    Args:
        params: The model, or a network (without edits).
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        past: Key/value caches of the tokens before the prompts: the model's own (`prefill`) or another's
            (`receive_cache`).
        edits: Edits of the model's states: steering, ablation, patching, messages (`jaxcomm.edits`).
        **decoding: Options of `Decoding`.

    Returns:
        The generated tokens.

    Raises:
        ValueError: A prompt is empty; past, prompt and new tokens exceed the model's positions; past is of another model, or
            has other rows; tokens are drawn without a key for each row; an edit is invalid.

    Example:
        >>> jc.generate(params, prompts, max_new_tokens=2).tokens.shape
        (2, 2)
    """
    check_room(params, prompts, decoding.get("max_new_tokens", NEW_TOKENS))
    logits, cache = prefill(params, prompts, past=past, edits=edits)
    return decode(params, logits, cache, past=past, edits=edits, **decoding)
