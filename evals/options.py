"""Options that several commands share, and the command line that runs a command again."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .games.wording import Reads

_told = lambda text: tyro.conf.arg(help=text)
_SINGLE = "a checkpoint folder (either form), a .gguf file, real:smollm2, a hub id (also id@revision)"
_PAIR = "or pair:a / pair:b for the embedded pair."
Sender = Annotated[str, _told(f"Sender: {_SINGLE}, a network's run folder, {_PAIR}")]
LayeredSender = Annotated[str, _told(f"Sender: {_SINGLE}, {_PAIR}")]
"""An agent whose layers are named: a single model, not a network."""
Receiver = Annotated[str, _told("Receiver, named in the same way.")]
Preset = Literal["paper", "instructed", "kvcomm"]
Graft = Literal["sum", "mean", "replace"]
Control = Literal[
    "other",
    "generated",
    "mean",
    "moments",
    "noise",
    "zero",
    "adversarial",
    "unrelated",
    "self",
    "equal-flops",
    "equal-bytes",
]
Controls = Annotated[
    tuple[Control, ...],
    _told(
        "Stand-ins for messages. Every protocol that sends messages is also run with each of them. other: another item's message, which splits the gain into presence and content; generated: B writes the message itself, from its own prompt; mean, moments (noise with mean and covariance of the messages), noise (of the same norm), zero, adversarial; unrelated: A's message after an unrelated sentence; self: B's own state; equal-flops, equal-bytes: a written message that costs as much."
    ),
]
SystemA = Annotated[str, _told("System prompt of A. In a raw prompt it is the first paragraph.")]
SystemB = Annotated[str, _told("System prompt of B, used in the same way.")]
ChatArgs = Annotated[
    tuple[str, ...], _told("Further arguments of the chat template: NAME=VALUE, such as enable_thinking=false.")
]
Names = Annotated[
    Literal["seen", "new"], _told("Names of people and companies: seen in the embedded pair's training text, or new.")
]
TopP = Annotated[float, _told("Sample from the most likely tokens with this total probability; needs --temperature.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    _told("auto: the checkpoint's own; on CPU float32, because XLA is slow with two-byte dtypes there."),
]
Tensor = Annotated[
    int,
    _told(
        "Divide every weight matrix over this many devices. Each group of so many devices takes a part of the items."
    ),
]
Int8 = Annotated[bool, _told("Keep weight matrices in 8 bits (needs jaxcomm[int8]).")]
Cluster = Annotated[
    str | None,
    _told("Several processes, each with a share of the work: auto (TPU pods, Slurm), or HOST:PORT,COUNT,INDEX."),
]
Resume = Annotated[bool, _told("Continue the run in the folder.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GameOptions:
    """How a game is put to the agents."""

    wording: Preset = "paper"
    """paper: the bare statement and the bare question; instructed: the question with an instruction on the answer's form, which chat models need; kvcomm: KVComm's."""
    instruction: str | None = None
    """Wording instructed: an instruction in place of the game's own ("Answer with the country's name only.")."""
    examples: int = 0
    """Number of worked examples before the question. They are drawn in addition, and are not played."""
    sender_reads: Reads = "statement"
    """A's prompt before it sends: only the statement, or the statement and then B's question."""
    system_a: SystemA = ""
    system_b: SystemB = ""
    chat: bool = False
    """Put prompts through each tokenizer's chat template instead of reading them raw."""
    prompts_a: Literal["raw", "chat"] | None = None
    """How A reads; overrides --chat for A."""
    prompts_b: Literal["raw", "chat"] | None = None
    """How B reads; overrides --chat for B."""
    chat_args: ChatArgs = ()

    def agent_options(self) -> dict[str, Any]:
        """How A and B render prompts: arguments of `agents.load_agents`.

        Returns:
            Values of chat, chat_args and system.

        Raises:
            ValueError: A template argument is not NAME=VALUE.
        """
        from .agents import template_args

        chat = [self.chat if form is None else form == "chat" for form in (self.prompts_a, self.prompts_b)]
        return dict(chat=chat, chat_args=template_args(self.chat_args), system=(self.system_a, self.system_b))

    def game_wording(self) -> Any:
        """How the game is put to the agents.

        Returns:
            A `games.Wording`.

        Raises:
            ValueError: The wording has no place for an instruction.
        """
        from .games import Wording

        return Wording(self.wording, self.instruction, self.sender_reads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixOptions:
    """How keys and values, thoughts and deltas are sent."""

    layers: tuple[int, ...] = ()
    """kv, latent: numbers of B's layers that see the prefix; default: all."""
    scheme: Literal["score", "greedy", "first", "last", "random", "every"] | None = None
    """kv, latent: choose the share --ratio of B's layers by this rule, instead of --layers. score: by KVComm's score; greedy: those that make right answers likeliest; every: evenly spaced."""
    ratio: float | None = None
    """scheme: share of the layers to choose, above 0 and at most 1."""
    alpha: float = 1.0
    """score: weight of the attention; the rest is KVComm's prior (the paper: 1 for Llama, 0.8 for Qwen and Falcon)."""
    calibration: str | None = None
    """score, greedy: a game or FILE.jsonl with the items to score layers on; default: further items of the game. None of them is played."""
    calibration_items: int = 8
    """score, greedy: number of items to score layers on."""
    place: Literal["start", "turn"] = "start"
    """kv, latent: start: the prefix stands before B's prompt, as published; turn: before its last turn, after worked examples."""
    positions: Literal["after", "own"] = "after"
    """kv, latent: positions of B's prompt continue from the prefix (after), or begin at 0 (own)."""
    published_mask: bool = False
    """kv, latent: the mask of KVComm's code. All layers see the prefix's first token, and the first layer sees all of it. In layers that do not see the prefix, B's prompt also sees its own later tokens."""
    steps: int = 10
    """latent, thinking: number of thinking steps in latents."""
    thought: Literal["aligned", "identity", "soft"] = "aligned"
    """latent, thinking: what the model reads in place of a token. aligned: its last state through W_a (LatentMAS); identity: the state itself; soft: the expected embedding."""
    sends: Literal["kv", "thoughts"] = "kv"
    """latent: kv: keys and values of all that A has read and thought; thoughts: only the vectors it has thought."""
    kv_map: Path | None = None
    """kv, latent: folder of jaxcomm fit-map --kv, for models whose keys do not match."""
    order: Literal["parallel", "row"] = "parallel"
    """kv, latent, several senders (eval --others): each reads alone, or each continues from those before it."""
    delta_layers: tuple[int, ...] = ()
    """deltas: layers after which differences of A's states are added to B's."""
    bridge: str | None = None
    """bridge: run folder of jaxcomm bridge train, of this pair."""

    def layer_choice(self, seed: int = 0) -> Any:
        """The choice of B's layers.

        Args:
            seed: Seed of random choices.

        Returns:
            A `prefixes.LayerChoice`.

        Raises:
            ValueError: The options do not fit each other.
        """
        from .prefixes import LayerChoice

        chosen = self.layers, self.scheme, self.ratio, self.alpha, self.calibration, self.calibration_items
        return LayerChoice(*chosen, seed)

    def kv_maps(self, a: Any, b: Any) -> Any:
        """Loads the maps of keys and values.

        Args:
            a: The sender.
            b: The receiver.

        Returns:
            The maps, or None if none are named.

        Raises:
            ValueError: They belong to another pair, or there are none in the folder.
        """
        from . import maps

        return None if self.kv_map is None else maps.load_kv(self.kv_map, a, b).maps

    def channel_settings(self, layers: Any = "all", maps: Any = None) -> dict[str, dict[str, Any]]:
        """The settings of protocols that send keys and values, thoughts or deltas.

        Args:
            layers: The chosen layers.
            maps: Result of `kv_maps`.

        Returns:
            Options by name of the protocol.
        """
        seen = dict(layers=layers, maps=maps, place=self.place, positions=self.positions, order=self.order)
        seen |= dict(sink=self.published_mask, future=self.published_mask)
        thinking = dict(steps=self.steps, thought=self.thought)
        return {
            "kv": seen,
            "latent": seen | thinking | dict(sends=self.sends),
            "thinking": thinking,
            "deltas": dict(j=self.delta_layers),
        }

    def check_channels(self, protocols: tuple[str, ...]) -> None:
        """Checks that the protocols use the given options.

        Args:
            protocols: The protocols.

        Raises:
            ValueError: An option has no effect, or is missing. The message names it.
        """
        self.layer_choice()
        if self.steps < 0 or (self.steps == 0 and self.sends == "thoughts"):
            raise ValueError(f"--steps {self.steps}: it must be at least {int(self.sends == 'thoughts')}")
        if "bridge" in protocols and self.bridge is None:
            raise ValueError("bridge needs --bridge, a folder that jaxcomm bridge train wrote for this pair")
        if "deltas" in protocols and not self.delta_layers:
            raise ValueError("deltas needs --delta-layers, the layers after which they are read and added")
        means = {
            "kv and latent": (
                {"kv", "latent"},
                (
                    "layers",
                    "scheme",
                    "ratio",
                    "alpha",
                    "calibration",
                    "place",
                    "positions",
                    "published_mask",
                    "kv_map",
                    "order",
                ),
            ),
            "latent and thinking": ({"latent", "thinking"}, ("steps", "thought")),
            "latent": ({"latent"}, ("sends",)),
            "deltas": ({"deltas"}, ("delta_layers",)),
            "bridge": ({"bridge"}, ("bridge",)),
        }
        default = {field.name: field.default for field in dataclasses.fields(PrefixOptions)}
        for told, (users, names) in means.items():
            if not users & {*protocols} and (odd := [name for name in names if getattr(self, name) != default[name]]):
                raise ValueError(
                    f"--{odd[0].replace('_', '-')} does not apply to the protocol {', '.join(protocols)}: it is an option of {told}"
                )


def command_line(command: Any) -> str:
    """Writes the command line that runs a command again, in a new folder.

    Args:
        command: The command. Its attribute `typed` is its name on the command line.

    Returns:
        The line to type in a shell, without options that have their default.
    """
    words = ["jaxcomm", *command.typed.split()]
    nameless = lambda field: "Positional" in str(field.type)
    first = lambda field: nameless(field) or field.name in ("a", "b")
    for field in sorted(dataclasses.fields(command), key=first, reverse=True):
        value = getattr(command, field.name)
        if value == field.default or field.name == "resume":
            continue
        if nameless(field):
            words.append(str(value))
            continue
        words.append("--" + ("no-" if value is False else "") + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            words += [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)
