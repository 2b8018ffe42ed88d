"""How much of a sweep is computed at once, so that it fits a device's memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from jaxcomm.config import ModelConfig
from jaxcomm.flops import block_weights

MEMORY = 2**30
"""Bytes for a sweep's own arrays on a device that does not say how much it has (CPU)."""
FULL_ROWS = 2048
"""Tokens in flight per device; on two CPU cores 550 to 6050 of them were equally fast, so more only cost memory."""
SCORED_ROWS = 768
"""The same where answers are scored: a chunk goes through all blocks above its lowest j, so small ones do less."""
REFILLS = 8
"""Cells per slot in a chunk: the last ones leave slots idle, for about one cell's length of so many."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is computed at once: games x cells, with `slots` cells of a game in flight when decoding."""

    games: int
    cells: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Need:
    """What a chunk's memory depends on besides its `Sizes`.

    Attributes:
        sender: A's architecture.
        receiver: B's.
        itemsize: Bytes of one of B's numbers.
        columns: Of A's prompts, and of B's.
        new: Tokens that are written, or of the answers.
        decoding: Whether anything is written.
        sampling: Whether it is drawn.
        mapped: Whether states go through a W.
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
        """Most bytes a device needs for a chunk beside the weights.

        With s the bytes of a number, G games, R slots of each, C cells, P columns of B's prompt, T new tokens and B's own
        letters (G and R, C a device's share of them), the largest of

            reading    G P (4 D + 2 F) s + 8 G N P^2                    (B's prompts; likewise A's)
            decoding   G R (2 L K H T s + max(8 N (P + T) + (4 D + 2 F) s, 8 V))          (sampling: 32 V)
            answers    G C max(T (8 N (P + T) + (6 D + 2 F) s), 8 V + 2 T D s)

        (F of all experts a token goes through, and 4 D more for each of them)

        plus what stays: the prompts' K/V and states 2 L K H G P s + (L + 1) G (D + D_A + T D) s, what is sent, edits and
        results G C ((D + D_A) s + 8 T), and one layer's weights and K/V (XLA on CPU copies them out of their stacks).
        With maps also 4 D D_A: one W is on the device at a time.

        Args:
            sizes: Of the chunk.
            devices: How many share its games, and its cells.
        """
        c, a, s, (columns_a, P), T = self.receiver, self.sender, self.itemsize, self.columns, self.new
        G, C = sizes.games // devices[0], sizes.cells
        R = -(-(sizes.slots if self.decoding else C) // devices[1])
        kv = 2 * c.kv_heads * c.head_dim * s

        # What a token's way through the MLP takes.
        mlp = lambda m: max(1, m.experts_per_token) * 2 * m.ff + m.experts_per_token * 4 * m.width
        reading = lambda m, P: G * P * (4 * m.width + mlp(m)) * s + 8 * G * m.heads * P * P

        every = dataclasses.replace(c, experts_per_token=c.experts)  # a layer's, not a token's
        stays = c.layers * G * P * kv + G * ((c.layers + 1) * (c.width + T * c.width) + (a.layers + 1) * a.width) * s
        stays += G * C * ((c.width + a.width) * s + 8 * T) + block_weights(every) * s + G * P * kv
        stays += 4 * c.width * a.width * self.mapped
        scores = 8 * c.heads * (P + T)
        if self.decoding:
            most = max(scores + (4 * c.width + mlp(c)) * s, (32 if self.sampling else 8) * c.vocab)
            row = (c.layers + 1) * T * kv + most
        else:
            row = max(T * (scores + (6 * c.width + mlp(c)) * s), 8 * c.vocab + 2 * T * c.width * s)
        return stays + max(reading(a, columns_a), reading(c, P), G * R * row)


def device_memory(device) -> int:
    """Bytes a sweep may take on a device: nine tenths of what is free, or `MEMORY` where the device does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return MEMORY
    return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))


def fit_sizes(games: int, cells: int, budget: int, need: Callable[[Sizes], int], rows: int, refills: int) -> Sizes:
    """The largest chunk that stays within `budget` bytes and has no more than `rows` cells of games in flight, which is
    enough to be fast. Games are cut last: every cut reads prompts in smaller batches, and none is read twice.

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
        f"a memory budget of {budget} bytes is too small: one cell of one game needs {need(Sizes(1, 1, 1))} beside the weights"
    )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Games, and rows of `Grid.cells`, that are computed together."""

    games: range
    cells: range

    def cut(self, sizes: Sizes) -> Iterator[Chunk]:
        """Into chunks of these sizes; those of the same games follow each other."""
        parts = lambda whole, size: [whole[i : i + size] for i in range(0, len(whole), size)]
        for games, cells in itertools.product(parts(self.games, sizes.games), parts(self.cells, sizes.cells)):
            yield Chunk(games, cells)
