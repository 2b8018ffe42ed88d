"""`jaxcomm lmnet train | compare | show | control`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from .. import options
from ..networks.settings import Recipe, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Shape, Recipe):
    """Train a network's edges (its vertices stay frozen), or the whole network.

    Example: jaxcomm lmnet train --vertices Qwen/Qwen2.5-0.5B --widths 1 4 4 4 1 --text hub:HuggingFaceFW/fineweb-edu:sample-10BT:train:text --columns 1024 --dtype bfloat16 --remat all --out runs/stage-1
    """

    typed: ClassVar = "lmnet train"

    out: Path
    """Run folder: checkpoints, metrics.jsonl, tensorboard. Every other command takes it as the network (--b OUT)."""
    text: str = "two-places"
    """two-places or two-hop (questions about the embedded pair's world), a file with texts between empty lines, FILE.jsonl with "text", or
    with "prompt" and "answer", or hub:NAME:CONFIG:SPLIT:FIELD."""
    examples: int | None = None
    """Number of texts; training repeats them. Default: all."""
    train: Literal["edges", "all"] = "edges"
    """edges: the paper's first stage; all: its second."""
    start: Path | None = None
    """Begin from this run's network (such as the second stage from the first)."""
    seed: int = 0
    """Order of the texts."""
    resume: options.Resume = False

    def run(self) -> None:
        """Trains the network in the run folder.

        Raises:
            ValueError: A setting, a vertex or the text is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
            FloatingPointError: The loss or the gradient is not a finite number.
        """
        import rich

        from jaxcomm.lmnet import Network, size

        from ..agents import load_agents, network
        from ..networks.folders import train_network, vertex_dtype
        from ..networks.training import keep_freed_memory

        keep_freed_memory()
        agents = load_agents(*self.vertices, dtype=vertex_dtype(self.train, self.dtype), layers=True)
        start = None if self.start is None else network(str(self.start), dtype="float32").params
        assert start is None or isinstance(start, Network)
        made = train_network(self, agents, words=options.command_line(self), start=start)
        edges = size(made.edges) + size(made.joints)
        rich.print(
            f"{self.out}: {self.steps} steps; {edges:,} numbers on the edges, {size(made.models):,} in the vertices"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Shape, Recipe):
    """Compare a network's edges with LoRA of the same size, training of the whole vertex, and a larger model from scratch, on the same questions, for every seed and number of training texts.

    Example: jaxcomm lmnet compare --arms LoRA all scratch --equal tokens flops --examples 16 64 256 1024 4096 --learning-rates 5e-4 2e-3 --out runs/compare
    """

    typed: ClassVar = "lmnet compare"

    out: Path
    """Run folder: every finished training, results.jsonl, report.txt, curves.png, learning.png."""
    arms: tuple[Literal["LoRA", "all", "scratch"], ...] = ("LoRA",)
    """Arms to compare the edges with. LoRA: adapters with as many numbers; all: the vertex itself, every weight; scratch: a new model with as many numbers as the network."""
    equal: tuple[Literal["tokens", "flops"], ...] = ("tokens",)
    """Budget, equal to that of the edges: tokens, or FLOPs of training, which allow a smaller model more steps."""
    text: str = "two-places"
    """two-places, two-hop, or FILE.jsonl with a "prompt" and an "answer" per line."""
    test: Path | None = None
    """FILE.jsonl of test questions; two-places and two-hop have their own."""
    questions: int = 200
    """Number of questions to choose the learning rate on. Results are reported on as many others."""
    examples: tuple[int, ...] = ()
    """Numbers of texts to learn from, one after the other; default: all."""
    retain: Path | None = None
    """FILE.jsonl of questions that the vertex can already answer. They are asked again after training. two-places and two-hop have their own."""
    learning_rates: tuple[float, ...] = ()
    """Every arm is trained at each rate with every seed. The rate is chosen on the first questions and reported on the others.
    Default: --learning-rate."""
    seeds: int = 5
    """Number of seeds, for new edges and adapters and for the order of the texts."""
    resume: options.Resume = False

    def run(self) -> None:
        """Compares edges with LoRA in the run folder, and prints the report.

        Raises:
            ValueError: A setting, a vertex or the text is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from ..agents import load_agents
        from ..networks import compare
        from ..networks.training import keep_freed_memory

        keep_freed_memory()
        compare.run(self, load_agents(*self.vertices, dtype=self.dtype, layers=True), words=options.command_line(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Show the likeliest words of the states at a network's vertices and edges after a prompt, as text and as a picture.

    Example: jaxcomm lmnet show runs/two-places --prompt "Alice is at the Colosseum. Bob is at Meteora. Which countries are they located in?" --out wires
    """

    typed: ClassVar = "lmnet show"

    network: Annotated[Path, tyro.conf.Positional]
    """Run folder of jaxcomm lmnet train."""
    prompt: str
    """The prompt that the network reads."""
    out: Path = Path("wires")
    """Folder for wires.txt and wires.png."""
    words: int = 3
    """Number of words for each wire."""
    chat: bool = False
    """Put the prompt through the chat template."""

    def run(self) -> None:
        """Prints the words on the wires, and writes wires.txt and wires.png.

        Raises:
            ValueError: The folder holds no network, or the prompt is too long.
            OSError: A file cannot be written.
        """
        from ..agents import load_agents
        from ..documents import console
        from ..files import write_whole
        from ..networks import wires

        (agent,) = load_agents(str(self.network), chat=self.chat)
        read = wires.read(agent, self.prompt, self.words)
        out, text = console(160), wires.text(read)
        out.print(text, markup=False, highlight=False)
        write_whole(self.out / "wires.txt", f"{text}\n".encode())
        write_whole(self.out / "wires.png", wires.picture(read))
        out.print(f"{self.out}: wires.txt, wires.png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """Measure the messages on a network's edges in a game: presence and content, for all edges and for each layer's.

    Example: jaxcomm lmnet control runs/two-places --game countries --control mean noise --each --out runs/edges
    """

    typed: ClassVar = "lmnet control"

    network: Annotated[Path, tyro.conf.Positional]
    """Run folder of jaxcomm lmnet train."""
    game: str = "countries"
    """countries, tip_sheets, or a file of your own (as jaxcomm play's --game). The network reads what A and B read together."""
    control: tuple[Literal["other", "mean", "moments", "noise", "zero"], ...] = ("other", "zero")
    """Controls in place of the edges' own messages. other (another item's) and zero split the gain, and are always included."""
    each: bool = False
    """Also control every edge alone."""
    n: int | None = None
    """Number of items; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Seed of the items and of the draws."""
    names: options.Names = "seen"
    dtype: options.Dtype = "auto"
    out: Path | None = None
    """Folder for report.html, report.md and results.jsonl."""

    def run(self) -> None:
        """Reads the game under every control, prints the tables, and writes the requested files.

        Raises:
            ValueError: The folder holds no network; an option or a game is invalid.
            OSError: A file or checkpoint does not exist, or a file cannot be written.
        """
        from ..agents import load_agents
        from ..documents import Code, Heading, console, markdown, page, show
        from ..files import check_folder, write_lines, write_whole
        from ..games import draw
        from ..networks import controls

        if self.out is not None:
            check_folder(self.out)
        game = draw(self.game, self.seed, self.n, names=self.names)
        (agent,) = load_agents(str(self.network), dtype=self.dtype)
        found = controls.control(agent, game, self.control, each=self.each, seed=self.seed)
        blocks = list(controls.blocks(found))
        show(blocks, console(180))
        if self.out is not None:
            blocks += [Heading(2, "Command"), Code(options.command_line(self))]
            write_whole(self.out / "report.html", page(f"{game.name}, edges of {agent.name}", blocks).encode())
            write_whole(self.out / "report.md", markdown(blocks).encode())
            write_lines(self.out / "results.jsonl", found.rows())


@dataclasses.dataclass(frozen=True)
class Lmnet:
    """Networks of language models with trainable edges: train, compare with LoRA, look inside, control their messages."""

    typed: ClassVar = "lmnet"

    do: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[Compare, tyro.conf.subcommand("compare")]
            | Annotated[Show, tyro.conf.subcommand("show")]
            | Annotated[Control, tyro.conf.subcommand("control")]
        ]
    ]

    def run(self) -> None:
        """Runs the chosen subcommand."""
        self.do.run()
