"""`jaxcomm lmnet train | compare | show`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from ..networks.settings import Recipe, Shape
from . import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Shape, Recipe):
    """Train a network's edges (its vertices stay as they are), or all of it.

    Example: jaxcomm lmnet train --vertices Qwen/Qwen2.5-0.5B --widths 1 4 4 4 1 --text hub:HuggingFaceFW/fineweb-edu:sample-10BT:train:text --columns 1024 --dtype bfloat16 --remat all --out runs/stage-1
    """

    typed: ClassVar = "lmnet train"

    out: Path
    """Run folder: checkpoints, metrics.jsonl, tensorboard. It is the network to every other command (--b OUT)."""
    text: str = "two-places"
    """two-places or two-hop (questions about the embedded pair's world), a file with texts between empty lines, FILE.jsonl with "text", or
    with "prompt" and "answer", or hub:NAME:CONFIG:SPLIT:FIELD."""
    examples: int | None = None
    """Only so many texts, again and again."""
    train: Literal["edges", "all"] = "edges"
    """The paper's first stage, or its second."""
    start: Path | None = None
    """Begin from this run's network (the second stage from the first)."""
    seed: int = 0
    """Order of the texts."""
    unroll: bool = False
    """The program takes the vertices' layers one by one: on CPU a step is faster, and takes some three times as long to compile."""
    resume: options.Resume = False

    def run(self) -> None:
        import rich

        from jaxcomm.lmnet import size

        from ..agents import load, network
        from ..networks.folders import train_network, vertex_dtype
        from ..networks.training import keep_freed_memory

        keep_freed_memory()
        agents = load(*self.vertices, dtype=vertex_dtype(self.train, self.dtype), layers=True)
        start = None if self.start is None else network(str(self.start), dtype="float32").params
        made = train_network(self, agents, words=options.command_line(self), start=start)
        edges = size(made.edges) + size(made.joints)
        rich.print(
            f"{self.out}: {self.steps} steps; {edges:,} numbers on the edges, {size(made.models):,} in the vertices"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Shape, Recipe):
    """Customisation with little data: a network's edges against LoRA of the same size, on the same questions, for every seed.

    Example: jaxcomm lmnet compare --steps 1000 --learning-rates 5e-4 1e-3 2e-3 --out runs/compare
    """

    typed: ClassVar = "lmnet compare"

    out: Path
    """Run folder: every finished training, results.jsonl, report.txt, curves.png."""
    text: str = "two-places"
    """two-places, two-hop, or FILE.jsonl with a "prompt" and an "answer" per line."""
    test: Path | None = None
    """FILE.jsonl of questions to be tested on; the first two have their own."""
    questions: int = 200
    """So many to choose the learning rate on, and as many others to report."""
    examples: int | None = None
    """Learn from only so many."""
    learning_rates: tuple[float, ...] = ()
    """Each is tried with every seed, for both; the best on the first questions is reported on the others. Default: the one."""
    seeds: int = 5
    """Of how edges and adapters begin, and of the order of the texts."""
    resume: options.Resume = False

    def run(self) -> None:
        from ..agents import load
        from ..networks import compare
        from ..networks.training import keep_freed_memory

        keep_freed_memory()
        compare.run(self, load(*self.vertices, dtype=self.dtype, layers=True), words=options.command_line(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Which words a network's wires carry after a prompt: as text, and as a picture of the network.

    Example: jaxcomm lmnet show runs/two-places --prompt "Alice is at the Colosseum. Bob is at Meteora. Which countries are they located in?" --out wires
    """

    typed: ClassVar = "lmnet show"

    network: Annotated[Path, tyro.conf.Positional]
    """Run folder of jaxcomm lmnet train."""
    prompt: str
    out: Path = Path("wires")
    """Folder for wires.txt and wires.png."""
    words: int = 3
    """So many of each wire."""
    chat: bool = False

    def run(self) -> None:
        from ..agents import load
        from ..documents import console
        from ..files import write_whole
        from ..networks import wires

        (agent,) = load(str(self.network), chat=self.chat)
        read = wires.read(agent, self.prompt, self.words)
        out, text = console(160), wires.text(read)
        out.print(text, markup=False, highlight=False)
        write_whole(self.out / "wires.txt", f"{text}\n".encode())
        write_whole(self.out / "wires.png", wires.picture(read))
        out.print(f"{self.out}: wires.txt, wires.png")


@dataclasses.dataclass(frozen=True)
class Lmnet:
    """Networks of language models with trainable edges: train, compare with LoRA, look inside."""

    typed: ClassVar = "lmnet"

    do: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[Compare, tyro.conf.subcommand("compare")]
            | Annotated[Show, tyro.conf.subcommand("show")]
        ]
    ]

    def run(self) -> None:
        self.do.run()
