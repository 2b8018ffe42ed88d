"""What communication costs, counted three ways: by the formulas of Ramesh & Li (section 3.2), exactly for the
architecture with a KV cache (`jaxcomm.flops`), and by XLA for the programs that run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import rich.table

from jaxcomm.communication import read_prompt, resume
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.decoding import continue_decoding, start_decoding
from jaxcomm.edits import apply_graft
from jaxcomm.flops import blocks_flops, generation_flops, graft_flops, paper_activation, paper_message
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
"""Prompt, message and answer tokens, where none are given: a game, a longer one, a reasoned and a short answer."""


def shape(name: str) -> ModelConfig:
    """The architecture of one of `SHAPES`, of the embedded pair, or of a checkpoint (its weights are not read)."""
    if name in SHAPES:
        return SHAPES[name]
    return architecture(pair.checkpoint(name))


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOPs of one question. paper: None where the paper has no formula."""

    protocol: str
    paper: int | None
    exact: int
    compiled: int | None


def counts(
    a: ModelConfig, b: ModelConfig, P: int, M: int, T: int, k: int, j: int, *, compiled: bool
) -> Iterator[Count]:
    """ValueError: layers or numbers of tokens that cannot be.

    P prompt tokens (of each agent), M of a message, T of the answer. Debates are of A and B, two rounds; what each says
    before has M tokens, and both responses stand before the prompt in the last (the form "harness", without its words)."""
    for name, layer, config in (("k", k, a), ("j", j, b)):
        if not 0 <= layer <= config.layers:
            raise ValueError(f"{name} = {layer} is out of range: this model's layers are 0 to {config.layers}")
    if min(P, M, T) < 1:
        raise ValueError(f"{P} prompt, {M} message and {T} answer tokens: give at least one of each")
    xla = lambda count: count() if compiled else None
    write = lambda c, p, t: generation_flops(c, p, t)
    yield Count("single", None, write(b, P, T), xla(lambda: xla_writing(b, P, T)))
    yield Count(
        "message",
        paper_message(a, b, P, M, T),
        write(a, P, M) + write(b, P + M, T),
        xla(lambda: xla_writing(a, P, M) + xla_writing(b, P + M, T)),
    )
    rounds = lambda one: one(a, P, M) + one(b, P, M) + one(a, P + 2 * M, T) + one(b, P + 2 * M, T)
    yield Count("debate", None, rounds(write), xla(lambda: rounds(xla_writing)))
    said = [(a, M), (b, M), (b, M), (b, T)]  # A's through A's matrix and B's, B's through its own: only B listens last
    speak = lambda one, mix: one(a, P, M) + one(b, P, M) + one(b, P + 2 * M, T) + sum(n * mix(c) for c, n in said)
    yield Count(
        "cipher", None, speak(write, lambda c: 2 * c.width * c.vocab), xla(lambda: speak(xla_writing, xla_mixing))
    )
    for name, mapped in (("activation", False), ("activation-w", True)):
        exact = blocks_flops(a, P, blocks=k) + graft_flops(a, b, mapped) + write(b, P, T)
        measured = lambda mapped=mapped: xla_activation(a, b, P, T, k, j, mapped)
        yield Count(name, paper_activation(a, b, P, T, k, mapped), exact, xla(measured))


def xla_writing(config: ModelConfig, prompt: int, new: int) -> int:
    """Reading a prompt, then `new` - 1 steps of the decoding loop over a cache with room for all."""
    read = _layered(config, lambda p: jax.jit(prefill).lower(p, _ints(1, prompt)))
    return read + (new - 1) * _step(config, prompt, new)


def xla_mixing(config: ModelConfig) -> int:
    """One expected embedding."""
    shaped = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, config.vocab), (config.vocab, config.width)))
    return _flops(jax.jit(lambda p, table: jnp.einsum("bv,vd->bd", p, table)).lower(*shaped))


def xla_activation(a: ModelConfig, b: ModelConfig, prompt: int, new: int, k: int, j: int, mapped: bool) -> int:
    """A up to k, B's prompt, the edit, and the edited token's way through B once more."""
    W = jax.ShapeDtypeStruct((b.width, a.width), jnp.float32) if mapped else None
    sent = _layered(a, lambda p: jax.jit(lambda p, t: send(p, t, p.config.layers)).lower(p, _ints(1, prompt)), k)
    read = _layered(b, lambda p: jax.jit(read_prompt).lower(p, _ints(1, prompt)))
    state = lambda c: jax.ShapeDtypeStruct((1, c.width), jnp.float32)
    edit = jax.jit(lambda x, y, W: apply_graft("replace", x, y, W)).lower(state(a), state(b), W)

    def edited(p):
        shaped = jax.eval_shape(read_prompt, p, _ints(1, prompt))
        return jax.jit(lambda p, q, h: resume(p, q, h, 0)).lower(p, shaped, state(b))

    again = _layered(b, edited, b.layers - j)
    return sent + read + _flops(edit) + again + (new - 1) * _step(b, prompt, new)


def _step(config: ModelConfig, prompt: int, new: int) -> int:
    def lower(p):
        cache = jax.eval_shape(lambda: p.empty_cache(1, prompt))
        logits = jax.ShapeDtypeStruct((1, config.vocab), jnp.float32)
        writing = jax.eval_shape(lambda x, c: start_decoding(x, c, max_new_tokens=new), logits, cache)
        return jax.jit(continue_decoding).lower(p, writing, new)

    return 0 if new < 2 else _layered(config, lower)


def _layered(config: ModelConfig, lower: Callable, layers: int | None = None) -> int:
    """The count for so many layers (default: all), from those of one and of two: XLA counts a loop's body once, so layers
    have to be unrolled, and many of them take long to build."""
    one, two = (_flops(lower(_abstract(dataclasses.replace(config, layers=n, windows=())))) for n in (1, 2))
    return one + (two - one) * ((config.layers if layers is None else layers) - 1)


def _abstract(config: ModelConfig):
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config).unroll())


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _flops(lowered) -> int:
    return int(lowered.cost_analysis().get("flops", 0))  # a copy has none


def table(title: str, found: list[Count]) -> rich.table.Table:
    """Counts in GFLOPs, and as shares of message's."""
    shown = rich.table.Table(title=title, title_justify="left")
    for name in ("protocol", "paper's formula", "exact, KV cache", "XLA", "of message: paper's", "exact"):
        shown.add_column(name, justify="left" if name == "protocol" else "right")
    giga = lambda x: "" if x is None else f"{x / 1e9:,.3g}" if x < 1e12 else f"{x / 1e9:,.0f}"
    message = next(c for c in found if c.protocol == "message")
    for c in found:
        share = "" if c.paper is None or message.paper is None else f"{c.paper / message.paper:.2f}"
        shown.add_row(
            c.protocol, giga(c.paper), giga(c.exact), giga(c.compiled), share, f"{c.exact / message.exact:.2f}"
        )
    return shown
