"""`jaxcomm bridge train | compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from .. import options
from ..bridges.settings import Span
from ..networks.settings import Recipe

_told = lambda text: tyro.conf.arg(help=text)
Texts = Annotated[
    str,
    _told(
        'Training texts. gated: countries (the game\'s questions; only A reads the statements), or FILE.jsonl with "told", "prompt" and "answer" per line. c2c: two-places, two-hop, or FILE.jsonl with "prompt" and "answer".'
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Span, Recipe):
    """Train a bridge from A's keys and values to B's. Both models stay frozen.

    Example: jaxcomm bridge train --a pair:a --b pair:b --kind gated --text countries --learning-rate 5e-3 --out runs/bridge
    """

    typed: ClassVar = "bridge train"

    a: options.LayeredSender
    b: options.Receiver
    out: Path
    """Run folder: checkpoints, metrics.jsonl, tensorboard. Other commands take it as the bridge (--bridge OUT)."""
    text: Texts = "countries"
    examples: int | None = None
    """Number of texts; training repeats them. Default: all."""
    seed: int = 0
    """Order of the texts."""
    chat: bool = False
    """Put prompts through each agent's chat template."""
    resume: options.Resume = False

    def run(self) -> None:
        """Trains the bridge in the run folder.

        Raises:
            ValueError: A setting, an agent or the text is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
            FloatingPointError: The loss or the gradient is not a finite number.
        """
        import numpy as np
        import rich

        from jaxcomm.bridges import size

        from ..agents import load_agents
        from ..bridges.folders import train_bridge
        from ..networks.training import keep_freed_memory

        keep_freed_memory()
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, chat=self.chat)
        made = train_bridge(self, a, b, words=options.command_line(self))
        opened = np.asarray(made.open)
        rich.print(
            f"{self.out}: {self.steps} steps; {size(made):,} numbers; {opened.sum()} of {opened.size} gates are open"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Span, Recipe):
    """Compare a bridge with a bridge from the receiver to itself, LoRA of the same size, either model alone, other items' messages, and zeros.

    Example: jaxcomm bridge compare --a pair:a --b pair:b --kind gated --rank 4 --text countries --steps 200 --learning-rates 5e-3 --out runs/compare
    """

    typed: ClassVar = "bridge compare"

    a: options.LayeredSender
    b: options.Receiver
    out: Path
    """Run folder: every finished training, results.jsonl, report.txt."""
    text: Texts = "countries"
    test: Path | None = None
    """FILE.jsonl of test questions; countries, two-places and two-hop have their own."""
    questions: int = 100
    """Number of questions to choose the learning rate on. Results are reported on as many others."""
    examples: int | None = None
    """Number of texts to learn from; default: all."""
    learning_rates: tuple[float, ...] = ()
    """Every arm is trained at each rate with every seed. The rate is chosen on the first questions and reported on the
    others. Default: --learning-rate."""
    seeds: int = 3
    """Number of seeds, for new weights and for the order of the texts."""
    chat: bool = False
    """Put prompts through each agent's chat template."""
    resume: options.Resume = False

    def run(self) -> None:
        """Compares in the run folder, and prints the report.

        Raises:
            ValueError: A setting, an agent or the text is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from ..agents import load_agents
        from ..bridges import compare
        from ..networks.training import keep_freed_memory

        keep_freed_memory()
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, chat=self.chat)
        compare.run(self, a, b, words=options.command_line(self))


@dataclasses.dataclass(frozen=True)
class Bridge:
    """Bridges between two models' keys and values: train one, or compare it with baselines."""

    typed: ClassVar = "bridge"

    do: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Compare, tyro.conf.subcommand("compare")]
        ]
    ]

    def run(self) -> None:
        """Runs the chosen subcommand."""
        self.do.run()
