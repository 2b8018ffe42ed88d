"""`jaxcomm demo` and `jaxcomm train-pair`: the embedded pair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Demo:
    """Play both games with the embedded pair. Print a table with intervals and controls, and transcripts; draw layer maps.

    Example: jaxcomm demo --out demo
    """

    typed: ClassVar = "demo"

    out: Path = Path("demo")
    """Folder for layers.png, results.jsonl and items.jsonl."""
    json: Path | None = None
    """Also write one JSON line per result here."""

    def run(self) -> None:
        """Runs the demo."""
        from ..demo import run

        run(self.out, self.json)


@dataclasses.dataclass(frozen=True)
class TrainPair:
    """Train one model of the embedded pair again, from the seed. On CPU, train both models at once, each on its own core.

    Example: jaxcomm train-pair a --out my-a
    """

    typed: ClassVar = "train-pair"

    model: Annotated[Literal["a", "b"], tyro.conf.Positional]
    """a: the sender, wider and deeper; b: the receiver."""
    out: Path
    """New folder for the checkpoint; it must not exist."""
    steps: int | None = None
    """Number of steps; default: as for the shipped model."""
    seed: int = 0
    """Seed of the weights and of the text."""

    def run(self) -> None:
        """Trains the model, and writes its checkpoint."""
        from ..pair.train import train_and_save

        train_and_save(self.model, self.out, steps=self.steps, seed=self.seed)
