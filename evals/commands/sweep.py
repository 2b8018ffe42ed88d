"""`jaxcomm sweep`: games at every layer pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from . import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(options.GameOptions):
    """Play games at every layer pair: maps of accuracy and of the answer's log-probability, and what the best layers are
    worth on questions they were not chosen on.

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
    """B's layers, likewise."""
    grafts: tuple[options.Graft, ...] = ("replace",)
    decode: int | None = None
    """Also write so many tokens in every cell, and count the texts that are right; else only the answer's tokens are read."""
    text: str | None = None
    """Fit a map W for every (k, j) on this file, one sentence per line, or on "statements": the games' own, of no game."""
    into: int | None = None
    """Fit W into this layer of B instead of the one it is grafted at; needs --text."""
    n: int | None = None
    """Number of games; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Which games are drawn, and how they are halved."""
    names: options.Names = "seen"
    memory: float | None = None
    """GiB a device may use beside the weights; default: what is free where the device tells, else 1. A run may go on with less."""
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1
    int8: options.Int8 = False
    cluster: options.Cluster = None

    def run(self) -> None:
        """Sweeps into the run folder.

        Raises:
            ValueError, OSError: `sweeps.run.run`'s, what is said of an agent, and options that mean nothing.
        """
        from .. import processes
        from ..agents import load, read_as
        from ..sweeps import run
        from ..sweeps.grid import layers
        from ..sweeps.parts import SweepSettings

        processes.join(self.cluster)
        if self.into is not None and self.text is None:
            raise ValueError("--into says where W maps to: it needs --text to fit W on")
        if self.decode is not None and self.decode < 1:
            raise ValueError(f"--decode {self.decode}: it must be at least 1")
        reading, wording = self.agent_options(), self.game_wording()
        a, b = load(self.a, self.b, dtype=self.dtype, layers=True, tensor=self.tensor, int8=self.int8, **reading)
        settings = SweepSettings(
            games=self.games,
            ks=tuple(sorted(self.ks)) if self.ks is not None else tuple(layers(a)),
            js=tuple(sorted(self.js)) if self.js is not None else tuple(layers(b)),
            memory=None if self.memory is None else int(self.memory * 2**30),
            wording=wording,
            **{
                name: getattr(self, name)
                for name in ("grafts", "decode", "text", "into", "n", "seed", "names", "examples")
            },
        )
        recorded = {"a": self.a, "b": self.b, "chat_a": a.chat, "chat": b.chat, "int8": self.int8} | read_as((a, b))
        run.run(settings, a, b, self.out, resume=self.resume, command=options.command_line(self), recorded=recorded)
