"""`jaxcomm read`: inspect messages from A to B."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .. import options

if TYPE_CHECKING:  # commands load nothing before they run
    from jaxcomm.agent import Agent
    from jaxcomm.protocols import Inspection

    from ..games import Game, Wording


MEANT = {
    "activation": ("graft", "target", "placeholder"),
    "deltas": ("ask", "tell", "max_message_tokens"),
}
"""Options of a single channel, beside those of `options.PrefixOptions`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read(options.GameOptions, options.PrefixOptions):
    """Inspect the messages of a game: what was sent, what B predicts after each layer (logit lens), and what B says. For a state: nearest tokens and a patchscope. For keys and values: the tokens that each of B's layers attends to, and A's thoughts. For deltas: how A's state changed at each token. For a bridge: how much comes in at each layer.

    Example: jaxcomm read --a pair:b --b pair:b --k 4 --j 1 --out runs/read
    """

    typed: ClassVar = "read"

    a: options.LayeredSender
    b: options.Receiver
    game: str = "countries"
    """countries, tip_sheets, or a file of your own (as jaxcomm play's --game)."""
    channel: Literal["activation", "kv", "latent", "deltas", "bridge"] = "activation"
    """The channel, as in jaxcomm play's --protocol."""
    k: int | None = None
    """activation: A's layer, 0 (embedding) to its number of layers."""
    j: int | None = None
    """activation: B's layer, 0 (embedding) to its number of layers."""
    graft: options.Graft = "replace"
    """How B's state b and A's state a are combined."""
    n: int = 5
    """Number of items."""
    seed: int = 0
    """Seed of the items."""
    names: options.Names = "seen"
    target: str | None = None
    """activation: prompt of the patchscope, which A continues with its message in the place of the placeholder. Default: "cat -> cat; 1135 -> 1135; hello -> hello; x ->"."""
    placeholder: str = "x"
    """A word that occurs in --target once."""
    ask: str = "{prompt}"
    """deltas: template that A's prompt is put into."""
    tell: str = "{message} {prompt}"
    """deltas: template that A's message and B's prompt are put into."""
    max_message_tokens: int = 48
    """deltas: largest number of tokens of A's message."""
    max_new_tokens: int = 16
    """Largest number of tokens of a reply."""
    dtype: options.Dtype = "auto"
    out: Path | None = None
    """Folder for report.html, report.md, items.jsonl and a PNG for each item."""

    def run(self) -> None:
        """Plays the game, prints what was sent, heard and said, and writes the requested files.

        Raises:
            ValueError: An option, an agent or a game is invalid.
            OSError: A file or checkpoint does not exist, or a file cannot be written.
        """
        from .. import inspections
        from ..agents import load_agents
        from ..documents import Code, Heading, Picture, console, markdown, page, show
        from ..files import check_folder, write_lines, write_whole
        from ..games import draw
        from ..play import shown

        self._check()
        if self.out is not None:
            check_folder(self.out)
        wording = self.game_wording()
        game = draw(self.game, self.seed, self.n, names=self.names, examples=self.examples)
        a, b = load_agents(self.a, self.b, dtype=self.dtype, layers=True, **self.agent_options())
        at = f"k = {self.k}, j = {self.j}, {self.graft}" if self.channel == "activation" else self.channel
        title = f"{game.name.replace('_', ' ')}, {a.name} -> {b.name}, {at} ({game.information} information)"
        metric, _ = shown(b, wording, len(game.examples))
        looked = inspections.look(game, a, b, wording, self._inspection(game, a, b, wording))
        show(inspections.blocks(title, looked, metric), console(180))
        if self.out is None:
            return
        pictures = [
            Picture(f"item-{n}.png", x.picture(), f"Item {n}: what was sent, heard and said")
            for n, x in enumerate(looked, 1)
        ]
        blocks = inspections.blocks(title, looked, metric, pictures)
        blocks += [Heading(2, "Command"), Code(options.command_line(self))]
        for picture in pictures:
            write_whole(self.out / picture.file, picture.png)
        write_whole(self.out / "report.html", page(title, blocks).encode())
        write_whole(self.out / "report.md", markdown(blocks).encode())
        write_lines(self.out / "items.jsonl", inspections.rows(game, a, b, looked))

    def _check(self) -> None:
        """Raises ValueError for invalid options."""
        if (self.channel == "activation") != (self.k is not None and self.j is not None):
            raise ValueError("give --k (A's layer) and --j (B's layer) to read activations, or name another --channel")
        self.check_channels((self.channel,))
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for channel, names in MEANT.items():
            if self.channel != channel and (odd := [name for name in names if getattr(self, name) != default[name]]):
                raise ValueError(
                    f"--{odd[0].replace('_', '-')} does not apply to --channel {self.channel}: it is an option of {channel}"
                )

    def _inspection(self, game: Game, a: Agent, b: Agent, wording: Wording) -> Callable[..., list[Inspection]]:
        """The function that plays the game over the channel and inspects it."""
        from jaxcomm import protocols

        how: dict[str, Any] = dict(max_new_tokens=self.max_new_tokens)
        if self.channel == "activation":
            how |= dict(k=self.k, j=self.j, graft=self.graft, placeholder=self.placeholder)
            how |= {} if self.target is None else dict(target=self.target)
            return functools.partial(protocols.inspect_activation, **how)
        if self.channel == "deltas":
            talk = protocols.Conversation(ask=self.ask, tell=self.tell, max_message_tokens=self.max_message_tokens)
            return functools.partial(protocols.inspect_deltas, talk=talk, layers=self.delta_layers, **how)
        if self.channel == "bridge":
            from ..bridges.folders import load_bridge

            bridging = protocols.Bridging(load_bridge(str(self.bridge), a, b))
            return functools.partial(protocols.inspect_bridge, bridging=bridging, **how)
        maps = self.kv_maps(a, b)
        whole = protocols.Prefixing(maps=maps, place=self.place)
        layers, _ = self.layer_choice(self.seed)(game, a, b, wording, whole)
        settings = self.channel_settings(layers, maps)[self.channel]
        return functools.partial(protocols.inspect_prefix, prefix=protocols.Prefixing(**settings), **how)
