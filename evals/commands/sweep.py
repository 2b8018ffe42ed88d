"""`jaxcomm sweep`: games at every layer pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from .. import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(options.GameOptions):
    """Play games at every layer pair. Draw maps of accuracy and of the answer's log-probability, and report the best layers
    on items they were not chosen on.

    Example: jaxcomm sweep --a pair:b --b pair:b --out runs/b-b
    """

    typed: ClassVar = "sweep"

    a: options.LayeredSender
    b: options.Receiver
    out: Path
    """Run folder: every finished chunk, results.parquet, pictures, sweep.html, report.txt."""
    resume: options.Resume = False
    games: tuple[str, ...] = ("countries", "tip_sheets")
    """countries, tip_sheets, files of your own (as jaxcomm play's --game)."""
    ks: tuple[int, ...] | None = None
    """A's layers; default: 1 to its number of layers."""
    js: tuple[int, ...] | None = None
    """B's layers; default: 1 to its number of layers."""
    grafts: tuple[options.Graft, ...] = ("replace",)
    """How B's state b and A's state a are combined; one map for each."""
    decode: int | None = None
    """Also decode this many tokens in every cell, and count the right texts. Default: only the answer's tokens are scored."""
    content: bool = True
    """Also play every cell with another item's message, and draw maps of content. This takes twice the time."""
    pictures: Literal["cells", "contours"] = "cells"
    """How maps are drawn: one colour for each pair of layers, or contours as in the paper, which interpolate between layers."""
    text: str | None = None
    """Fit a map W for every (k, j) on this file, one sentence per line, or on "statements": sentences like those of the games,
    but of none of their items."""
    into: int | None = None
    """Fit W into this layer of B instead of j; needs --text."""
    n: int | None = None
    """Number of items; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Seed of the items, and of their halves."""
    names: options.Names = "seen"
    memory: float | None = None
    """GiB that a device may use besides the weights; default: the free memory, or 1 if the device does not report it. A run may be resumed with less."""
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1
    int8: options.Int8 = False
    cluster: options.Cluster = None

    def run(self) -> None:
        """Sweeps into the run folder, and prints the report.

        Raises:
            ValueError: An option, an agent or a game is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from .. import processes
        from ..agents import load_agents, read_as
        from ..sweeps import run
        from ..sweeps.grid import layers
        from ..sweeps.parts import SweepSettings

        processes.join(self.cluster)
        if self.into is not None and self.text is None:
            raise ValueError("--into is the layer that W maps into: it needs --text to fit W on")
        if self.decode is not None and self.decode < 1:
            raise ValueError(f"--decode {self.decode}: it must be at least 1")
        reading, wording = self.agent_options(), self.game_wording()
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, tensor=self.tensor, int8=self.int8, **reading)
        settings = SweepSettings(
            games=self.games,
            ks=tuple(sorted(self.ks)) if self.ks is not None else tuple(layers(a)),
            js=tuple(sorted(self.js)) if self.js is not None else tuple(layers(b)),
            memory=None if self.memory is None else int(self.memory * 2**30),
            wording=wording,
            **{
                name: getattr(self, name)
                for name in ("grafts", "decode", "text", "into", "n", "seed", "names", "examples", "content")
            },
        )
        recorded = {"a": self.a, "b": self.b, "chat_a": a.chat, "chat": b.chat, "int8": self.int8} | read_as((a, b))
        run.run(
            settings,
            a,
            b,
            self.out,
            resume=self.resume,
            command=options.command_line(self),
            recorded=recorded,
            style=self.pictures,
        )
