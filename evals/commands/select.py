"""`jaxcomm select`: choose B's layers that see A's keys and values, the number of A's thoughts, and the layer of deltas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .. import options

if TYPE_CHECKING:  # commands load nothing before they run
    from jaxcomm.agent import Agent

    from ..documents import Block
    from ..games import Game
    from ..runs import RunFolder

Sweeping = Callable[["RunFolder", Callable[[str], None]], "tuple[list[Block], list[dict[str, Any]]]"]
"""(folder, progress) -> blocks of a report, and records."""

MEANT = {
    "kv": ("schemes", "ratios", "ways", "place", "alpha", "calibration"),
    "latent": ("schemes", "ratios", "ways", "place", "alpha", "calibration", "steps", "thought"),
    "deltas": ("delta_layers", "ask", "tell", "max_message_tokens"),
}
"""Options of each channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select(options.GameOptions):
    """Sweep the settings of a channel, and measure content in every cell. kv: which layers of B see A's keys and values, for every scheme and ratio. latent: also how many of A's thoughts. deltas: after which layer A's deltas are added. (For layers of activations: jaxcomm sweep.)

    Example: jaxcomm select --a pair:b --b pair:b --n 40 --out runs/layers
    """

    typed: ClassVar = "select"

    a: options.LayeredSender
    b: options.Receiver
    out: Path
    """Run folder: finished pieces, report.html, report.md, pictures, results.jsonl."""
    resume: options.Resume = False
    channel: Literal["kv", "latent", "deltas"] = "kv"
    """The channel whose settings are swept."""
    game: str = "countries"
    """countries, tip_sheets, or a file of your own."""
    schemes: tuple[Literal["score", "greedy", "first", "last", "random", "every"], ...] = (
        "score",
        "first",
        "last",
        "random",
    )
    """score: by KVComm's score; greedy: one layer after the other, each time the one that makes right answers likeliest; every: evenly spaced."""
    ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of B's layers that see the prefix."""
    ways: tuple[Literal["plain", "own", "sink", "published"], ...] = ("plain",)
    """plain: the prefix as it is; own: B's prompt begins at position 0; sink, published: as KVComm's code, without and with its mask."""
    steps: tuple[int, ...] = (0, 1, 2, 5, 10)
    """latent: numbers of A's thoughts that B sees. A thinks once, the largest number of steps."""
    thought: Literal["aligned", "identity", "soft"] = "aligned"
    """latent: what A reads in place of tokens while it thinks (as jaxcomm play's --thought)."""
    delta_layers: tuple[int, ...] = ()
    """deltas: the layers, each by itself; default: all."""
    ask: str = "{prompt}"
    """deltas: template that A's prompt is put into."""
    tell: str = "{message} {prompt}"
    """deltas: template that A's message and B's prompt are put into."""
    max_message_tokens: int = 48
    """deltas: largest number of tokens of A's message."""
    place: Literal["start", "turn"] = "start"
    """start: the prefix stands before B's prompt, as published; turn: before its last turn, after worked examples, which are then read once."""
    alpha: float = 1.0
    """score: weight of the attention; the rest is KVComm's prior."""
    calibration: str | None = None
    """score, greedy: a game or a file with the items to score layers on; default: further items of the game."""
    calibration_items: int = 8
    """score, greedy: number of items to score layers on."""
    n: int | None = None
    """Number of items; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Seed of the items and of random choices."""
    names: options.Names = "seen"
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1

    def run(self) -> None:
        """Sweeps into the run folder, and prints the tables.

        Raises:
            ValueError: An option, an agent or a game is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from ..agents import load_agents, read_as
        from ..documents import Code, Heading, Picture, console, markdown, page, show
        from ..files import write_lines
        from ..games import draw
        from ..runs import RunFolder, agent_fingerprint, surroundings

        self._check()
        out = console(180)
        game = draw(self.game, self.seed, self.n, names=self.names, examples=self.examples)
        if len(game.items) < 2:
            raise ValueError(
                f"{len(game.items)} items: every message is compared with another item's, give at least two"
            )
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, tensor=self.tensor, **self.agent_options())
        agents = a, b
        config = dataclasses.asdict(self) | dict(game.source) | read_as(agents) | surroundings()
        config |= {"fingerprints": [agent_fingerprint(agent) for agent in agents], "out": None, "resume": None}
        plan, sweep = (self._deltas if self.channel == "deltas" else self._prefixes)(game, agents)
        again, progress = options.command_line(self), lambda name: out.print(f"computing {name}")
        with RunFolder(self.out, config, plan, command=again, resume=self.resume) as folder:
            blocks, records = sweep(folder, progress)
            show(blocks, out)
            blocks = [*blocks, Heading(2, "Command"), Code(again)]
            for block in blocks:
                if isinstance(block, Picture):
                    folder.put(block.file, block.png)
            folder.put("report.html", page(f"{game.name}: {self.channel}", blocks).encode())
            folder.put("report.md", markdown(blocks).encode())
            write_lines(self.out / "results.jsonl", records)
        out.print(f"{self.out}: report.html, report.md, results.jsonl", soft_wrap=True)

    def _prefixes(self, game: Game, agents: tuple[Agent, Agent]) -> tuple[Callable[[], Any], Sweeping]:
        """kv and latent: the function that scores the layers, and the function that sweeps."""
        from jaxcomm.prefixes import check_parts, check_prefix
        from jaxcomm.protocols import Prefixing

        from .. import selections
        from ..conditions import overlap_told
        from ..prefixes import CALIBRATED, LayerChoice

        a, b = agents
        check_parts(b.single.config, b.name)
        check_prefix(a.single.config, b.single.config)
        looks: Any = next((scheme for scheme in CALIBRATED if scheme in self.schemes), None)
        choice = LayerChoice(
            (), looks, None if looks is None else 1.0, self.alpha, self.calibration, self.calibration_items, self.seed
        )
        items = None if looks is None else choice.calibration_items(game)
        steps = self.steps if self.channel == "latent" else (0,)
        wording, how = self.game_wording(), Prefixing(place=self.place, steps=max(steps), thought=self.thought)
        told = [*self._told(game), overlap_told(game)]
        if items is not None:
            told.append(f"Layers were scored on {len(items.items)} items of {items.name} that are not played.")

        def sweep(folder: RunFolder, progress: Callable[[str], None]) -> tuple[list[Block], list[dict[str, Any]]]:
            layers = b.single.config.layers
            grid = selections.Grid(self.schemes, self.ratios, self.ways, folder.plan, layers, self.seed, steps)
            found = selections.sweep(game, agents, wording, how, grid, folder, progress)
            heavy = selections.weight(game, a, b, wording)
            return selections.blocks(game, grid, found, heavy, told), selections.records(game, grid, found)

        return lambda: selections.scored_layers(self.schemes, items, agents, wording, how, self.alpha), sweep

    def _deltas(self, game: Game, agents: tuple[Agent, Agent]) -> tuple[Callable[[], Any], Sweeping]:
        """deltas: no scores, and the function that sweeps."""
        from jaxcomm.protocols.state_deltas import delta_layers

        from .. import delta_layers as layers_of_deltas
        from ..conditions import overlap_told

        talk = dict(ask=self.ask, tell=self.tell, max_message_tokens=self.max_message_tokens)
        layers = delta_layers(*agents, self.delta_layers or range(1, agents[1].single.config.layers + 1))

        def sweep(folder: RunFolder, progress: Callable[[str], None]) -> tuple[list[Block], list[dict[str, Any]]]:
            wording = self.game_wording()
            found = layers_of_deltas.sweep(game, agents, wording, layers, talk, folder, progress, self.seed)
            told = layers_of_deltas.blocks(game, layers, found, [*self._told(game), overlap_told(game)])
            return told, layers_of_deltas.records(game, layers, found)

        return dict, sweep

    def _check(self) -> None:
        """Raises ValueError for options that cannot be."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in sorted({name for own in MEANT.values() for name in own} - {*MEANT[self.channel]}):
            if getattr(self, name) != default[name]:
                users = " and ".join(channel for channel, own in MEANT.items() if name in own)
                raise ValueError(
                    f"--{name.replace('_', '-')} does not apply to --channel {self.channel}: it is an option of {users}"
                )
        for name in ("schemes", "ratios", "ways", "steps"):
            if not (given := getattr(self, name)) or len({*given}) < len(given):
                raise ValueError(f"--{name} {' '.join(map(str, given)) or 'none'}: name at least one, each once")
        if self.place == "turn" and "own" in self.ways:
            raise ValueError(
                "--ways own numbers B's prompt from 0, so nothing can stand before the prefix: leave out --place turn"
            )
        if odd := [ratio for ratio in self.ratios if not 0 <= ratio <= 1]:
            raise ValueError(f"--ratios {odd[0]}: they are shares of the layers, 0 to 1")
        if min(self.steps) < 0:
            raise ValueError(f"--steps {min(self.steps)}: A thinks 0 steps or more")
        if self.max_message_tokens < 1:
            raise ValueError(f"--max-message-tokens {self.max_message_tokens}: it must be at least 1")

    def _told(self, game: Game) -> list[str]:
        """Facts about the set-up."""
        return [
            f"{self.a} to {self.b}, {len(game.items)} items of {game.name}, seed {self.seed}, wording {self.wording}."
        ]
