"""`jaxcomm read`: what a message says, on its way from A to B."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .. import options

if TYPE_CHECKING:  # commands load nothing before they run
    from jaxcomm.agent import Agent

    from ..games import Game, Wording


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read(options.GameOptions):
    """Read the messages of a game: what was sent (nearest tokens, patchscope), what B heard layer by layer (logit lens), what B said. Of keys and values: which tokens each of B's layers looks at, and what A thought.

    Example: jaxcomm read --a pair:b --b pair:b --k 4 --j 1 --out runs/read
    """

    typed: ClassVar = "read"

    a: options.LayeredSender
    b: options.Receiver
    game: str = "countries"
    """countries, tip_sheets, or a file of your own (as jaxcomm play's --game)."""
    channel: Literal["activation", "kv", "latent"] = "activation"
    """What A sends: its state after a layer, keys and values of what it reads, or also of what it thinks in latents."""
    k: int | None = None
    """activation: A's layer, 0 (embedding) to its number of layers."""
    j: int | None = None
    """activation: B's layer, likewise."""
    layers: tuple[int, ...] = ()
    """kv, latent: numbers of B's layers that see the prefix; default: all."""
    steps: int = 5
    """latent: steps of thinking in latents."""
    graft: options.Graft = "replace"
    """How B's state b and A's state a are combined."""
    n: int = 5
    """Number of games."""
    seed: int = 0
    """Seed of the games."""
    names: options.Names = "seen"
    target: str | None = None
    """What A goes on from with its message in the place of the placeholder (a patchscope); default: "cat -> cat; 1135 -> 1135; hello -> hello; x ->"."""
    placeholder: str = "x"
    """A word that occurs in --target once."""
    max_new_tokens: int = 16
    dtype: options.Dtype = "auto"
    out: Path | None = None
    """Folder for report.html, report.md, items.jsonl and a PNG for each game."""

    def run(self) -> None:
        """Plays the game, prints what was sent, heard and said, and writes the files that are asked for.

        Raises:
            ValueError: An option, an agent or a game is not as it should be.
            OSError: A file or checkpoint does not exist, or a file cannot be written.
        """
        from ..agents import load_agents
        from ..documents import Code, Heading, Picture, console, markdown, page, show
        from ..files import check_folder, write_lines, write_whole
        from ..games import draw
        from ..play import shown

        if (self.channel == "activation") != (self.k is not None and self.j is not None):
            raise ValueError("give --k (A's layer) and --j (B's layer) to read activations, or --channel kv or latent")
        if self.out is not None:
            check_folder(self.out)
        wording = self.game_wording()
        game = draw(self.game, self.seed, self.n, names=self.names, examples=self.examples)
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, **self.agent_options())
        at = f"k = {self.k}, j = {self.j}, {self.graft}" if self.channel == "activation" else self.channel
        title = f"{game.name.replace('_', ' ')}, {a.name} -> {b.name}, {at} ({game.information} information)"
        metric, _ = shown(b, wording, len(game.examples))
        looked, room, draw_one = self._look(game, a, b, wording)
        show(room.blocks(title, looked, metric), console(180))
        if self.out is None:
            return
        pictures = [
            Picture(f"item-{n}.png", draw_one(x), f"Item {n}: what was sent, heard and said")
            for n, x in enumerate(looked, 1)
        ]
        blocks = room.blocks(title, looked, metric, pictures)
        blocks += [Heading(2, "This again"), Code(options.command_line(self))]
        for picture in pictures:
            write_whole(self.out / picture.file, picture.png)
        write_whole(self.out / "report.html", page(title, blocks).encode())
        write_whole(self.out / "report.md", markdown(blocks).encode())
        write_lines(self.out / "items.jsonl", room.rows(game, a, b, looked))

    def _look(self, game: Game, a: Agent, b: Agent, wording: Wording) -> tuple[Any, Any, Any]:
        """The items looked into, the module that tells of them, and what draws one."""
        from jaxcomm.protocols import Prefixing

        from .. import inspections, prefix_inspections

        if self.channel == "activation":
            told: dict[str, Any] = dict(placeholder=self.placeholder, max_new_tokens=self.max_new_tokens)
            told |= {} if self.target is None else dict(target=self.target)
            looked = inspections.look(game, a, b, wording, k=self.k, j=self.j, graft=self.graft, **told)
            return looked, inspections, inspections.Looked.picture
        how = Prefixing(layers=self.layers or "all", steps=self.steps if self.channel == "latent" else 0)
        followed = prefix_inspections.follow(game, a, b, wording, how, self.max_new_tokens)
        return followed, prefix_inspections, prefix_inspections.picture
