"""What several commands are asked for in the same words, and how a command is typed again."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Annotated, Any, Literal

import tyro

from .games.wording import Reads

_told = lambda text: tyro.conf.arg(help=text)
_SINGLE = "a checkpoint folder (either form), a .gguf file, real:smollm2, a hub id (also id@revision)"
_PAIR = "or pair:a / pair:b for the embedded pair."
Sender = Annotated[str, _told(f"Sender: {_SINGLE}, a network's run folder, {_PAIR}")]
LayeredSender = Annotated[str, _told(f"Sender: {_SINGLE}, {_PAIR}")]
"""One whose layers are named: no network."""
Receiver = Annotated[str, _told("Receiver, likewise.")]
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
        "Also run every protocol that sends with these in place of the messages. other: another item's message, so that the gain is parted into presence and content; generated: B writes the message itself, from its own prompt; mean, moments (noise with mean and covariance of the messages), noise (of the same norm), zero, adversarial; unrelated: after an unrelated sentence; self: B's own state; equal-flops, equal-bytes: a written message that costs as much."
    ),
]
SystemA = Annotated[str, _told("System prompt of A; of a raw prompt, its first paragraph.")]
SystemB = Annotated[str, _told("Likewise, of B.")]
ChatArgs = Annotated[
    tuple[str, ...], _told("What the chat template is given besides: NAME=VALUE, such as enable_thinking=false.")
]
Names = Annotated[Literal["seen", "new"], _told("People and companies the embedded pair has read of, or others.")]
TopP = Annotated[float, _told("Sample from the most likely tokens that hold this share; needs --temperature.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    _told("auto: the checkpoint's own; on CPU, where XLA is slow in two bytes, float32."),
]
Tensor = Annotated[int, _told("Cut every weight matrix over so many devices; the rest share the questions.")]
Int8 = Annotated[bool, _told("Keep weight matrices in 8 bits (needs jaxcomm[int8]).")]
Cluster = Annotated[
    str | None, _told("Several processes, each with its share: auto (TPU pods, Slurm), or HOST:PORT,COUNT,INDEX.")
]
Resume = Annotated[bool, _told("Go on with the run in the folder.")]


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
    """What A reads before it sends: only its statement, or the statement and then B's question."""
    system_a: SystemA = ""
    system_b: SystemB = ""
    chat: bool = False
    """Put prompts through each tokenizer's chat template instead of reading them raw."""
    prompts_a: Literal["raw", "chat"] | None = None
    """How A alone reads, in place of --chat."""
    prompts_b: Literal["raw", "chat"] | None = None
    """How B alone reads, likewise."""
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


def command_line(command: Any) -> str:
    """Writes the command that runs a command again, in a new folder.

    Args:
        command: The command. Its attribute `typed` is its name, as it is typed.

    Returns:
        The line to type in a shell. Settings that have their default are left out.
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
