"""`jaxcomm select`: which of B's layers have to see A's keys and values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select(options.GameOptions):
    """Sweep which layers of B see A's keys and values: every scheme at every ratio, in one program, with content beside it.

    Example: jaxcomm select --a pair:b --b pair:b --n 40 --out runs/layers
    """

    typed: ClassVar = "select"

    a: options.LayeredSender
    b: options.Receiver
    out: Path
    """Run folder: finished pieces, report.html, report.md, a picture, results.jsonl."""
    resume: options.Resume = False
    game: str = "countries"
    """countries, tip_sheets, or a file of your own."""
    schemes: tuple[Literal["score", "greedy", "first", "last", "random", "every"], ...] = (
        "score",
        "first",
        "last",
        "random",
    )
    """score: KVComm's; greedy: those that make right answers likeliest, one after the other; every: evenly spaced."""
    ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ways: tuple[Literal["plain", "own", "sink", "published"], ...] = ("plain",)
    """plain; own: B's prompt begins at position 0; sink, published: as KVComm's code, without and with its mask."""
    place: Literal["start", "turn"] = "start"
    """The prefix stands before B's prompt, as published, or before its last turn, behind worked examples, which are then read once."""
    alpha: float = 1.0
    """score: weight of the attention; the rest is KVComm's prior."""
    calibration: str | None = None
    """score, greedy: a game or a file whose items are looked at; default: further items of the game."""
    calibration_items: int = 8
    n: int | None = None
    seed: int = 0
    names: options.Names = "seen"
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1

    def run(self) -> None:
        """Sweeps into the run folder, and prints the tables.

        Raises:
            ValueError: An option, an agent or a game is not as it should be, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from jaxcomm.prefixes import check_prefix
        from jaxcomm.protocols import Prefixing

        from .. import selections
        from ..agents import load_agents, read_as
        from ..documents import Code, Heading, Picture, console, markdown, page, show
        from ..files import write_lines
        from ..games import draw
        from ..prefixes import CALIBRATED, LayerChoice
        from ..runs import RunFolder, agent_fingerprint, surroundings

        self._check()
        looks: Any = next((scheme for scheme in self.schemes if scheme in CALIBRATED), None)
        choice = LayerChoice(
            (), looks, None if looks is None else 1.0, self.alpha, self.calibration, self.calibration_items, self.seed
        )
        wording, out = self.game_wording(), console(180)
        game = draw(self.game, self.seed, self.n, names=self.names, examples=self.examples)
        if len(game.items) < 2:
            raise ValueError(
                f"{len(game.items)} items: every prefix is compared with another item's, give at least two"
            )
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, tensor=self.tensor, **self.agent_options())
        check_prefix(a.single.config, b.single.config)
        items = None if looks is None else choice.calibration_items(game)
        config = dataclasses.asdict(self) | dict(game.source) | read_as((a, b)) | surroundings()
        config |= {"fingerprints": [agent_fingerprint(agent) for agent in (a, b)], "out": None, "resume": None}
        plan = lambda: selections.scored_layers(self.schemes, items, (a, b), wording, how, self.alpha)
        again, how = options.command_line(self), Prefixing(place=self.place)
        with RunFolder(self.out, config, plan, command=again, resume=self.resume) as folder:
            grid = selections.Grid(self.schemes, self.ratios, self.ways, folder.plan, b.single.config.layers, self.seed)
            found = selections.sweep(
                game, (a, b), wording, how, grid, folder, lambda name: out.print(f"computing {name}")
            )
            blocks = selections.blocks(
                game, grid, found, selections.weight(game, a, b, wording), self._told(game, items)
            )
            show(blocks, out)
            blocks += [Heading(2, "This again"), Code(again)]
            for block in blocks:
                if isinstance(block, Picture):
                    folder.put(block.file, block.png)
            folder.put("report.html", page(f"{game.name}: layers", blocks).encode())
            folder.put("report.md", markdown(blocks).encode())
            write_lines(self.out / "results.jsonl", selections.records(game, grid, found))
        out.print(f"{self.out}: report.html, report.md, results.jsonl", soft_wrap=True)

    def _check(self) -> None:
        """Raises ValueError for options that cannot be."""
        for name in ("schemes", "ratios", "ways"):
            if not (given := getattr(self, name)) or len({*given}) < len(given):
                raise ValueError(f"--{name} {' '.join(map(str, given)) or 'none'}: name at least one, each once")
        if self.place == "turn" and "own" in self.ways:
            raise ValueError(
                "--ways own numbers B's prompt from 0, so nothing can stand before the prefix: leave out --place turn"
            )
        if odd := [ratio for ratio in self.ratios if not 0 <= ratio <= 1]:
            raise ValueError(f"--ratios {odd[0]}: they are shares of the layers, 0 to 1")

    def _told(self, game, items) -> list[str]:
        """Facts about the set-up."""
        told = [
            f"{self.a} to {self.b}, {len(game.items)} items of {game.name}, seed {self.seed}, wording {self.wording}."
        ]
        if items is not None:
            told.append(f"Layers were scored on {len(items.items)} items of {items.name} that are not among them.")
        return told
