"""Costs of communication, counted in three ways: with the formulas of Ramesh & Li (section 3.2), exactly for the
architecture with a key/value cache (`jaxcomm.flops`), and by XLA for the compiled programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import rich.table

from jaxcomm.communication import read_prompt, resume
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.decoding import continue_decoding, start_decoding
from jaxcomm.edits import apply_graft
from jaxcomm.flops import (
    blocks_flops,
    c2c_flops,
    gated_flops,
    generation_flops,
    graft_flops,
    head_flops,
    keys_flops,
    paper_activation,
    paper_message,
    prefix_flops,
    thinking_flops,
)
from jaxcomm.messages import send
from jaxcomm.model import init_params
from jaxcomm.reading import prefill

from ..converters.agents import architecture
from . import pair

SHAPES = {
    "llama-3.2-3b": ModelConfig(128256, 3072, 28, 24, 8, 128, 8192, 131072, rope=Rope(5e5)),
    "llama-3.1-8b": ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 131072, tied_head=False, rope=Rope(5e5)),
}
"""The paper's main models."""
SETTINGS = ((16, 16, 4), (64, 64, 16), (128, 256, 128), (128, 256, 16))
"""Default numbers of prompt, message and answer tokens: a game, a longer game, a reasoned answer and a short answer."""


def shape(name: str) -> ModelConfig:
    """Finds an architecture by name. No weights are read.

    Args:
        name: A key of `SHAPES`, pair:a, pair:b, or a checkpoint (`converters.agents.architecture`).

    Returns:
        The architecture.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The architecture is not supported.
    """
    if name in SHAPES:
        return SHAPES[name]
    return architecture(pair.checkpoint(name))


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs of one question under one protocol.

    Attributes:
        protocol: Name of the protocol.
        paper: By the formula of Ramesh & Li (2025, section 3.2). None: the paper has no formula for this protocol.
        exact: Counted for the architecture, with a key/value cache (`jaxcomm.flops`).
        compiled: Counted by XLA for the compiled programs. None: not requested.
        sent: Bytes that A sends to B: two bytes per number for states, keys and values; about `TEXT` bytes per token.
    """

    protocol: str
    paper: int | None
    exact: int
    compiled: int | None
    sent: int = 0


TEXT = 4
"""Approximate number of bytes per token of English text."""
NUMBER = 2
"""Bytes per number in bfloat16, the usual dtype on accelerators."""
STEPS = 10
"""Steps of thinking in latents."""
HIDDEN, RANK = 1024, 8
"""Sizes of the bridges: the paper's for C2C, and the default for Gated."""


def counts(
    a: ModelConfig, b: ModelConfig, P: int, M: int, T: int, k: int, j: int, *, compiled: bool
) -> Iterator[Count]:
    """Counts the FLOPs of every protocol.

    A debate has two agents and two rounds. Each agent's response has M tokens in the first round. In the last round
    both responses are put before the prompt (the form "harness", without its words).

    Args:
        a: Architecture of the sender.
        b: Architecture of the receiver.
        P: Number of tokens of the prompt, for each agent.
        M: Number of tokens of a message.
        T: Number of tokens of the answer.
        k: A's state after this layer is sent.
        j: It is grafted into B after this layer.
        compiled: Whether to count with XLA too. It has to compile the programs, which takes seconds. Not for models with linear
            attention.

    Yields:
        One count for each protocol.

    Raises:
        ValueError: A layer is out of range, or a number of tokens is below 1.

    Example:
        >>> llama = SHAPES["llama-3.2-3b"]
        >>> found = {c.protocol: c for c in counts(llama, llama, 16, 16, 4, 26, 26, compiled=False)}
        >>> f"{found['activation'].exact / found['message'].exact:.2f}"
        '0.50'
    """
    for name, layer, config in (("k", k, a), ("j", j, b)):
        if not 0 <= layer <= config.layers:
            raise ValueError(f"{name} = {layer} is out of range: this model's layers are 0 to {config.layers}")
    if min(P, M, T) < 1:
        raise ValueError(f"{P} prompt, {M} message and {T} answer tokens: give at least one of each")
    # XLA counts the loop over chunks of linear attention once, however long it is.
    compiled = compiled and not (a.recurrent or b.recurrent)
    xla = lambda count: count() if compiled else None
    write = lambda c, p, t: generation_flops(c, p, t)
    yield Count("single", None, write(b, P, T), xla(lambda: xla_writing(b, P, T)))
    yield Count(
        "message",
        paper_message(a, b, P, M, T),
        write(a, P, M) + write(b, P + M, T),
        xla(lambda: xla_writing(a, P, M) + xla_writing(b, P + M, T)),
        TEXT * M,
    )
    rounds = lambda one: one(a, P, M) + one(b, P, M) + one(a, P + 2 * M, T) + one(b, P + 2 * M, T)
    yield Count("debate", None, rounds(write), xla(lambda: rounds(xla_writing)), 3 * TEXT * M)
    said = [
        (a, M),
        (b, M),
        (b, M),
        (b, T),
    ]  # A's vectors use A's and B's matrix, B's only its own: only B reads the last
    speak = lambda one, mix: one(a, P, M) + one(b, P, M) + one(b, P + 2 * M, T) + sum(n * mix(c) for c, n in said)
    yield Count(
        "cipher", None, speak(write, lambda c: 2 * c.width * c.vocab), xla(lambda: speak(xla_writing, xla_mixing)),
        NUMBER * M * (a.width + b.width),
    )  # fmt: skip
    for name, mapped in (("activation", False), ("activation-w", True)):
        exact = blocks_flops(a, P, blocks=k) + graft_flops(a, b, mapped) + write(b, P, T)
        measured = lambda mapped=mapped: xla_activation(a, b, P, T, k, j, mapped)
        yield Count(name, paper_activation(a, b, P, T, k, mapped), exact, xla(measured), NUMBER * a.width)
    yield from prefix_counts(a, b, P, T, compiled=compiled)
    again = blocks_flops(a, M, context=P, blocks=min(j, a.layers))
    yield Count("deltas", None, write(a, P, M) + again + write(b, P + M, T), None, M * (TEXT + NUMBER * a.width))


def prefix_counts(a: ModelConfig, b: ModelConfig, P: int, T: int, *, compiled: bool) -> Iterator[Count]:
    """Counts the FLOPs of protocols that send keys and values of all layers, and of thinking alone.

    Args:
        a: Architecture of the sender.
        b: Architecture of the receiver.
        P: Number of tokens of the prompt, for each agent.
        T: Number of tokens of the answer.
        compiled: Whether to count with XLA too.

    Yields:
        One count for each protocol.
    """
    seen = min(a.layers, b.layers)
    one = NUMBER * 2 * sum(a.kv_sizes)
    states = sum(
        NUMBER * rule.numbers + (4 - NUMBER) * rule.matrices for rule in a.rules if rule
    )  # matrices are float32
    told = lambda length: [0] * (b.layers - seen) + [length] * seen
    hear = lambda length: generation_flops(b, P, T) + prefix_flops(b, told(length), P, T)
    if (a.kv_heads, a.head_dim, a.layer_heads) == (b.kv_heads, b.head_dim, b.layer_heads):
        measured = (lambda: xla_keys(a, P) + xla_behind(b, P, P, T)) if compiled else lambda: None
        yield Count("kv", None, keys_flops(a, P) + hear(P), measured(), states + one * P)
        thought = blocks_flops(a, P) + thinking_flops(a, P, STEPS)
        yield Count(f"latent, {STEPS} steps", None, thought + hear(P + STEPS), None, states + one * (P + STEPS))
    write = generation_flops(b, P, T)
    if a.alike and b.alike:  # bridges refuse others
        read = keys_flops(a, P) + write
        yield Count(f"bridge c2c, {HIDDEN} wide", None, read + c2c_flops(a, b, HIDDEN, P - 1), None, one * (P - 1))
        memory = gated_flops(a, b, RANK, P) + prefix_flops(b, [P] * b.layers, P, T)
        yield Count(f"bridge gated, rank {RANK}", None, read + memory, None, one * P)
    after = blocks_flops(b, T - 1, context=P + STEPS) + (T - 1) * head_flops(b)
    thinking = generation_flops(b, P, 1) + thinking_flops(b, P, STEPS) + after
    yield Count(f"thinking, {STEPS} steps", None, thinking, None)


def xla_keys(config: ModelConfig, prompt: int) -> int:
    """Counts with XLA the FLOPs of a prompt's keys and values."""
    read = lambda p, t: prefill(p, t)[1]
    every = _layered(config, lambda p: jax.jit(read).lower(p, _ints(1, prompt)))
    last = _flops(jax.jit(lambda h, w: jnp.einsum("bd,vd->bv", h, w)).lower(*_head(config)))
    return every - last  # prefill also computes logits


def _head(config: ModelConfig) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((1, config.width), jnp.float32), jax.ShapeDtypeStruct(
        (config.vocab, config.width), jnp.float32
    )


def xla_behind(config: ModelConfig, prefix: int, prompt: int, new: int) -> int:
    """Counts with XLA the FLOPs of reading a prompt behind a prefix (seen by all layers), and of writing after it.

    Args:
        config: The architecture.
        prefix: Number of tokens of the prefix.
        prompt: Number of tokens of the prompt.
        new: Number of tokens that are written.

    Returns:
        FLOPs.
    """
    before = lambda p: jax.eval_shape(lambda: p.empty_cache(1, prefix))

    def read(p):
        return jax.jit(lambda p, t, past: prefill(p, t, past=(past,))).lower(p, _ints(1, prompt), before(p))

    return _layered(config, read) + (new - 1) * _step(config, prompt, new, before)


def xla_writing(config: ModelConfig, prompt: int, new: int) -> int:
    """Counts with XLA the FLOPs of reading a prompt and writing an answer.

    It counts the prompt, and `new` - 1 steps of the decoding loop over a cache with room for all tokens.

    Args:
        config: The architecture.
        prompt: Number of tokens of the prompt.
        new: Number of tokens that are written.

    Returns:
        FLOPs.
    """
    read = _layered(config, lambda p: jax.jit(prefill).lower(p, _ints(1, prompt)))
    return read + (new - 1) * _step(config, prompt, new)


def xla_mixing(config: ModelConfig) -> int:
    """Counts with XLA the FLOPs of one expected embedding (CIPHER)."""
    shaped = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, config.vocab), (config.vocab, config.width)))
    return _flops(jax.jit(lambda p, table: jnp.einsum("bv,vd->bd", p, table)).lower(*shaped))


def xla_activation(a: ModelConfig, b: ModelConfig, prompt: int, new: int, k: int, j: int, mapped: bool) -> int:
    """Counts with XLA the FLOPs of the protocol "activation".

    The count has five parts: A reads the prompt up to layer k; B reads its prompt; the edit; the edited token passes
    through B's layers after j once more; B writes the rest of the answer.

    Args:
        a: Architecture of the sender.
        b: Architecture of the receiver.
        prompt: Number of tokens of each prompt.
        new: Number of tokens that B writes.
        k: Layer of A.
        j: Layer of B.
        mapped: Whether the state goes through a map W.

    Returns:
        FLOPs.
    """
    W = jax.ShapeDtypeStruct((b.width, a.width), jnp.float32) if mapped else None
    whole = lambda p: jax.jit(lambda p, t: send(p, t, p.config.layers)).lower(p, _ints(1, prompt))
    sent = _layered(a, whole, slice(k))
    read = _layered(b, lambda p: jax.jit(read_prompt).lower(p, _ints(1, prompt)))
    state = lambda c: jax.ShapeDtypeStruct((1, c.width), jnp.float32)
    edit = jax.jit(lambda x, y, W: apply_graft("replace", x, y, W)).lower(state(a), state(b), W)

    def edited(p):
        shaped = jax.eval_shape(read_prompt, p, _ints(1, prompt))
        return jax.jit(lambda p, q, h: resume(p, q, h, 0)).lower(p, shaped, state(b))

    again = _layered(b, edited, slice(j, None))
    return sent + read + _flops(edit) + again + (new - 1) * _step(b, prompt, new)


def _step(config: ModelConfig, prompt: int, new: int, before: Callable[[Any], Any] | None = None) -> int:
    """before: makes the prefix of a model."""

    def lower(p):
        cache = jax.eval_shape(lambda: p.empty_cache(1, prompt))
        logits = jax.ShapeDtypeStruct((1, config.vocab), jnp.float32)
        writing = jax.eval_shape(lambda x, c: start_decoding(x, c, max_new_tokens=new), logits, cache)
        past = () if before is None else (before(p),)
        return jax.jit(lambda p, s, n, past: continue_decoding(p, s, n, past=past)).lower(p, writing, new, past)

    return 0 if new < 2 else _layered(config, lower)


def _layered(config: ModelConfig, lower: Callable, some: slice = slice(None)) -> int:
    """The count for some layers (default: all), extrapolated from models of one and of two layers of each kind. XLA counts a
    loop's body only once, so layers must be unrolled, and compiling many of them takes long."""
    kinds = [dataclasses.replace(config.layer(i), windows=()) for i in range(config.layers)]
    count = functools.cache(lambda kind, n: _flops(lower(_abstract(dataclasses.replace(kind, layers=n)))))
    another = lambda kind: count(kind, 2) - count(kind, 1)
    return count(kinds[-1], 1) - another(kinds[-1]) + sum(map(another, kinds[some]))


def _abstract(config: ModelConfig):
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config).unroll())


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _flops(lowered) -> int:
    return int(lowered.cost_analysis().get("flops", 0))  # a program that only copies has no entry


def table(title: str, found: list[Count]) -> rich.table.Table:
    """Makes the table of counts, in GFLOPs and relative to the protocol "message", with the bytes sent.

    Args:
        title: Title of the table.
        found: The counts. One of them is "message".

    Returns:
        The table.
    """
    shown = rich.table.Table(title=title, title_justify="left")
    for name in ("protocol", "paper's formula", "exact, KV cache", "XLA", "of message: paper's", "exact", "bytes"):
        shown.add_column(name, justify="left" if name == "protocol" else "right")
    giga = lambda x: "" if x is None else f"{x / 1e9:,.3g}" if x < 1e12 else f"{x / 1e9:,.0f}"
    message = next(c for c in found if c.protocol == "message")
    for c in found:
        share = "" if c.paper is None or message.paper is None else f"{c.paper / message.paper:.2f}"
        shown.add_row(
            c.protocol,
            giga(c.paper),
            giga(c.exact),
            giga(c.compiled),
            share,
            f"{c.exact / message.exact:.2f}",
            f"{c.sent:,}",
        )
    return shown
