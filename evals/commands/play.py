"""`jaxcomm play`: a game under one protocol or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .. import options

if TYPE_CHECKING:  # commands load nothing before they run
    from ..documents import Block
    from ..play import Outcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class Play(options.GameOptions, options.PrefixOptions):
    """Play a game with any pair of checkpoints, under one protocol or several, with controls. Print a table and transcripts.

    Example: jaxcomm play --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.2-3B-Instruct --game countries --protocol silent skyline message activation --k 26 --j 26
    """

    typed: ClassVar = "play"

    a: options.Sender
    b: options.Receiver
    game: str = "countries"
    """countries, tip_sheets, or a file of your own: FILE.jsonl, with prompt_a, prompt_b, answer and optionally choices in every line."""
    protocol: tuple[
        Literal[
            "silent",
            "skyline",
            "message",
            "debate",
            "cipher",
            "activation",
            "exchange",
            "kv",
            "latent",
            "thinking",
            "deltas",
            "bridge",
        ],
        ...,
    ] = ("activation",)
    """kv: A's keys and values before B's prompt; latent: the same, with those of A's latent thoughts; thinking: B alone thinks in latents; deltas: A's written message, with the changes of A's state; bridge: A's keys and values through a trained bridge."""
    k: int | None = None
    """A's layer, 0 (embedding) to its number of layers; activation and exchange."""
    j: int | None = None
    """B's layer, 0 (embedding) to its number of layers; activation and exchange."""
    graft: options.Graft = "replace"
    """How B's state b and A's state a are combined."""
    where: Literal["last", "all"] = "last"
    """activation, exchange: edit the prompt's last token, or all (graft sum; appendix B.1)."""
    control: options.Controls = ("other",)
    probe: int = 200
    """Number of further items to train a probe on, which predicts the answer from messages. A game of your own has none."""
    n: int | None = None
    """Number of items; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Seed of the items, of sampling, and of noise."""
    names: options.Names = "seen"
    choices: bool = True
    """Also score the right answer among the game's choices; this decodes nothing."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: options.TopP = 1.0
    ask: str = "{prompt}"
    """message: template of the prompt after which A writes. Real models have to be asked, such as: "{prompt} Tell your partner what you know." """
    tell: str = "{message} {prompt}"
    """message: template of what B reads."""
    turns: int = 1
    """message: number of A's messages; after each but the last, B writes back."""
    form: Literal["harness", "plain"] = "plain"
    """debate, cipher: words around the prompts."""
    rounds: int | None = None
    """debate, cipher: number of answers of each agent; default: 2 (debate), 3 (cipher)."""
    temperatures: tuple[float, float] = (0.1, 0.4)
    """cipher: the temperatures of B and of A. B answers, so its temperature must be lower."""
    max_message_tokens: int = 48
    """Largest number of tokens of a message."""
    max_new_tokens: int = 16
    """Largest number of tokens of a reply."""
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1
    int8: options.Int8 = False
    cluster: options.Cluster = None
    out: Path | None = None
    """Folder for report.html, report.md, a picture, results.jsonl and items.jsonl."""
    json: Path | None = None
    """Write one JSON line per result here."""
    items: Path | None = None
    """Write one JSON line per item and condition here: rendered prompts, tokens read and written, positions, norms."""

    def run(self) -> None:
        """Plays the game, prints the tables, and writes the requested files.

        Raises:
            ValueError: An option, an agent or a game is invalid.
            OSError: A file or checkpoint does not exist, or a file cannot be written.
        """
        from jaxcomm.decoding import Sampling
        from jaxcomm.protocols import Prefixing

        from .. import conditions, processes
        from ..agents import load_agents, read_as
        from ..files import check_file, check_folder
        from ..games import draw
        from ..play import PlaySettings

        processes.join(self.cluster)
        for path in (self.json, self.items):
            check_file(path)
        if self.out is not None:
            check_folder(self.out)
        self._check()
        wording = self.game_wording()
        game = draw(self.game, self.seed, self.n, names=self.names, examples=self.examples)
        controls = [control for control in self.control if control != "other" or len(game.items) > 1]
        if len(game.items) < 2 and (made := {"mean", "moments", "adversarial"} & {*self.control}):
            raise ValueError(f"--control {min(made)} needs at least two items: leave it out, or play more (--n)")
        a, b = load_agents(self.a, self.b, dtype=self.dtype, tensor=self.tensor, int8=self.int8, **self.agent_options())
        layers, told, maps = "all", {}, self.kv_maps(a, b)
        if {"kv", "latent"} & {*self.protocol}:
            how = Prefixing(maps=maps, place=self.place)
            layers, told = self.layer_choice(self.seed)(game, a, b, wording, how)
        made = self._protocol_settings(layers, maps)
        if "bridge" in self.protocol:
            from ..bridges.folders import load_bridge

            made["bridge"], told = {"bridge": load_bridge(str(self.bridge), a, b)}, {**told, "bridge": self.bridge}
        every = conditions.conditions(self.protocol, made, controls)
        sampling = Sampling(self.temperature, 0, self.top_p) if self.temperature > 0 else None
        drawn = {"int8": self.int8} | read_as((a, b)) | told
        settings = PlaySettings(wording, self.choices, self.max_new_tokens, sampling, self.seed, drawn)
        outcomes = list(conditions.play_all(game, every, a, b, settings))
        if processes.first():
            more = conditions.further_messages(every, game, a, b, settings, self.probe)
            blocks = conditions.blocks(every, outcomes, a, b, wording, more)
            self._report(outcomes, blocks, conditions.moved(every, outcomes))

    def _report(self, outcomes: Sequence[Outcome], blocks: list[Block], moved: Sequence[dict[str, float]]) -> None:
        """Prints the blocks, and writes them and the results where they are asked for."""
        from ..documents import Code, Heading, Picture, console, markdown, page, show
        from ..files import write_lines, write_whole

        show(blocks, console(180))
        results, rows = [o.summary() for o in outcomes], [row for o in outcomes for row in o.rows()]
        rows = [row | more for row, more in zip(rows, moved, strict=True)]
        for path, lines in ((self.json, results), (self.items, rows)):
            if path is not None:
                write_lines(path, lines)
        if self.out is not None:
            blocks = [*blocks, Heading(2, "Command"), Code(options.command_line(self))]
            title = f"{outcomes[0].game.name}, {outcomes[0].pair}"
            for block in blocks:
                if isinstance(block, Picture):
                    write_whole(self.out / block.file, block.png)
            write_whole(self.out / "report.html", page(title, blocks).encode())
            write_whole(self.out / "report.md", markdown(blocks).encode())
            write_lines(self.out / "results.jsonl", results)
            write_lines(self.out / "items.jsonl", rows)

    def _protocol_settings(self, layers: Any, maps: Any) -> dict[str, dict[str, Any]]:
        """The settings of each protocol."""
        talk: dict[str, Any] = dict(form=self.form, max_message_tokens=self.max_message_tokens)
        rounds = lambda default: default if self.rounds is None else self.rounds
        own: dict[str, dict[str, Any]] = {
            "message": dict(ask=self.ask, tell=self.tell, turns=self.turns, max_message_tokens=self.max_message_tokens),
            "debate": dict(talk, rounds=rounds(2), tie="last"),
            "cipher": dict(talk, rounds=rounds(3), temperatures=self.temperatures[::-1]),
            "activation": dict(k=self.k, j=self.j, graft=self.graft, where=self.where),
            "exchange": dict(k=self.k, j=self.j, graft=self.graft, where=self.where, tie="first"),
        }
        channels = self.channel_settings(layers, maps)
        channels["deltas"] |= dict(ask=self.ask, tell=self.tell, max_message_tokens=self.max_message_tokens)
        return own | channels

    def _check(self) -> None:
        from jaxcomm.protocols.text import check_message

        from ..play import SENDS

        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature}: it must be 0 (greedy) or more")
        if self.top_p < 1 and not self.temperature:
            raise ValueError("--top-p needs --temperature above 0: without it decoding is greedy")
        for name in ("n", "rounds", "turns", "max_message_tokens", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        for name, given in (("protocol", self.protocol), ("control", self.control)):
            if len(set(given)) < len(given) or not (given or name == "control"):
                raise ValueError(f"--{name} {' '.join(given) or 'none'}: name at least one, each once")
        grafts = [protocol for protocol in ("activation", "exchange") if protocol in self.protocol]
        if not grafts and (self.k, self.j, self.graft, self.where) != (None, None, "replace", "last"):
            raise ValueError(
                f"--k, --j, --graft and --where do not apply to the protocol {', '.join(self.protocol)}: leave them out, or name activation"
            )
        self.check_channels(self.protocol)
        if self.control not in ((), ("other",)) and not {*SENDS} & {*self.protocol}:
            raise ValueError(
                f"--control does not apply to the protocol {', '.join(self.protocol)}, which sends nothing: leave it out"
            )
        if grafts and (self.k is None or self.j is None):
            raise ValueError(f"{grafts[0]} needs --k (A's layer) and --j (B's layer)")
        if self.where == "all" and self.graft != "sum":
            raise ValueError(f"--where all needs --graft sum: {self.graft} would overwrite the whole prompt")
        if self.probe < 0:
            raise ValueError(f"--probe {self.probe}: it must be at least 0")
        if {"equal-flops", "equal-bytes"} & {*self.control} and self.turns > 1:
            raise ValueError(
                f"--turns {self.turns}: a message of equal cost has one turn; leave out equal-flops and equal-bytes"
            )
        if "message" in self.protocol:
            check_message(self.ask, self.tell, "--")
        if "cipher" in self.protocol and self.temperature:
            raise ValueError("cipher does not sample, it only uses --temperatures: leave out --temperature")
        if self.temperatures[0] >= self.temperatures[1]:
            raise ValueError(
                f"--temperatures {self.temperatures[0]} {self.temperatures[1]}: B's must be lower, since it answers"
            )
