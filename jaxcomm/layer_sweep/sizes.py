"""Sizes of a sweep's chunks: how much to compute at once, so that it fits a device's memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jaxcomm.config import ModelConfig
from jaxcomm.flops import block_weights

MEMORY = 2**30
"""Bytes for a sweep's own arrays on a device that does not report its memory (CPU)."""
FULL_ROWS = 2048
"""Tokens in flight per device. On two CPU cores 550 to 6050 were equally fast, so more would only cost memory."""
SCORED_ROWS = 768
"""The same for scoring answers. A chunk goes through all blocks above its lowest j, so small chunks do less work."""
REFILLS = 8
"""Cells per slot in a chunk. At the end of a chunk slots idle for about the length of one cell, so one part in so many."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Size of a chunk: games x cells. When decoding, `slots` cells of each item are in flight."""

    games: int
    cells: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Need:
    """The quantities besides `Sizes` that a chunk's memory depends on.

    Attributes:
        sender: A's architecture.
        receiver: B's.
        itemsize: Bytes of one of B's numbers.
        columns: Number of columns of A's prompts, and of B's.
        new: Number of new tokens, or of the answers' tokens.
        decoding: Whether tokens are generated.
        sampling: Whether they are sampled.
        mapped: Whether states go through a map W.
    """

    sender: ModelConfig
    receiver: ModelConfig
    itemsize: int
    columns: tuple[int, int]
    new: int
    decoding: bool
    sampling: bool = False
    mapped: bool = False

    def bytes(self, sizes: Sizes, devices: tuple[int, int] = (1, 1)) -> int:
        """Largest number of bytes that a device needs for a chunk besides the weights.

        Letters: s bytes per number, G items, R slots of each, C cells, P columns of B's prompt, T new tokens, and B's own
        letters. (G, R and C are a device's share.) It is the largest of

            reading    G P (4 D + 2 F) s + 8 G N P^2                    (B's prompts; likewise A's)
            decoding   G R (2 L K H T s + max(8 N (P + T) + (4 D + 2 F) s, 8 V))          (sampling: 32 V)
            answers    G C max(T (8 N (P + T) + (6 D + 2 F) s), 8 V + 2 T D s)

        (F of all experts a token goes through, and of the dense MLP, and 4 D more for each expert; L K H is the sum
        over layers, if they differ. Linear attention adds 16 N (2 X + Y) bytes a token, two states of all layers for each item
        and for each row that is decoded, and a state of one layer for each answer.)

        plus what stays: the prompts' K/V and states 2 L K H G P s + (L + 1) G (D + D_A + T D) s, what is sent, edits and
        results G C ((D + D_A) s + 8 T), and the largest layer's weights and K/V (XLA on CPU copies them out of their
        stacks). With maps also 4 D D_A: one W is on the device at a time.

        Args:
            sizes: Sizes of the chunk.
            devices: Number of devices that share its games, and that share its cells.

        Returns:
            The number of bytes.
        """
        c, a, s, (columns_a, P), T = self.receiver, self.sender, self.itemsize, self.columns, self.new
        G, C = sizes.games // devices[0], sizes.cells
        R = -(-(sizes.slots if self.decoding else C) // devices[1])
        every_kv, kv = 2 * sum(c.kv_sizes) * s, 2 * max(c.kv_sizes) * s  # of all layers, of the largest
        rules = [rule for rule in c.rules if rule]
        states, state = 4 * sum(rule.numbers for rule in rules), 4 * max((rule.numbers for rule in rules), default=0)

        # Numbers per token in the MLP.
        mlp = lambda m: max(1, m.experts_per_token) * 2 * m.ff + m.experts_per_token * 4 * m.width + 2 * m.dense_ff
        reading = lambda m, P: G * P * ((4 * m.width + mlp(m)) * s + _rule(m)) + 8 * G * m.heads * P * P

        whole = dataclasses.replace(c, experts_per_token=c.experts)  # with all experts, not a token's
        layers = [whole.layer(i) for i in range(c.layers)]
        stays = (
            2 * G * states
            + G * P * every_kv
            + G * ((c.layers + 1) * (c.width + T * c.width) + (a.layers + 1) * a.width) * s
        )
        stays += G * C * ((c.width + a.width) * s + 8 * T) + max(map(block_weights, layers)) * s + G * P * kv
        stays += 4 * c.width * a.width * self.mapped
        scores = 8 * c.heads * (P + T)
        if self.decoding:
            most = max(scores + (4 * c.width + mlp(c)) * s, (32 if self.sampling else 8) * c.vocab)
            row = 2 * states + T * (every_kv + kv) + most
        else:
            row = max(state + T * (scores + (6 * c.width + mlp(c)) * s + _rule(c)), 8 * c.vocab + 2 * T * c.width * s)
        return stays + max(reading(a, columns_a), reading(c, P), G * R * row)


def _rule(config: ModelConfig) -> int:
    """Bytes of a token in linear attention: its queries, keys and values, float32, whole and in chunks, and as many in
    between. 0 without such a layer."""
    size = lambda rule: 16 * rule.value_heads * (2 * rule.key_dim + rule.value_dim)
    return max((size(rule) for rule in config.rules if rule), default=0)


def device_memory(device) -> int:
    """Bytes a sweep may use on a device: nine tenths of the free memory, or `MEMORY` if the device does not report it."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return MEMORY
    return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))


def fit_sizes(games: int, cells: int, budget: int, need: Callable[[Sizes], int], rows: int, refills: int) -> Sizes:
    """The largest chunk within `budget` bytes and with at most `rows` cells of items in flight (more would not be faster).
    The number of games is reduced last, because smaller batches of games read prompts in smaller batches.

    ValueError if not even one cell of one game fits.
    """
    even = lambda total, most: -(-total // -(-total // most))
    halves = lambda n: [-(-n // 2**i) for i in range(n.bit_length() + 1)]
    for g in halves(games):
        g = even(games, g)
        for slots in halves(min(cells, max(1, rows // g))):
            for c in sorted({even(cells, min(cells, slots * n)) for n in (1, refills)}, reverse=True):
                sizes = Sizes(g, c, even(c, min(slots, c)))
                if need(sizes) <= budget:
                    return sizes
    raise ValueError(
        f"a memory budget of {budget} bytes is too small: one cell of one game needs {need(Sizes(1, 1, 1))} besides the weights: give more memory, or shorter prompts"
    )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Games, and rows of `Grid.cells`, to compute together."""

    games: range
    cells: range

    def cut(self, sizes: Sizes) -> Iterator[Chunk]:
        """Cut into chunks of these sizes. Chunks of the same games are consecutive."""
        parts = lambda whole, size: [whole[i : i + size] for i in range(0, len(whole), size)]
        for games, cells in itertools.product(parts(self.games, sizes.games), parts(self.cells, sizes.cells)):
            yield Chunk(games, cells)
