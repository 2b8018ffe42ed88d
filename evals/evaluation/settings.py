"""An evaluation as it is asked for, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxcomm.agent import Agent
from jaxcomm.compiled import check_layer
from jaxcomm.decoding import Sampling
from jaxcomm.protocols.text import check_message

from ..games.wording import Reads, Wording

PROTOCOLS = (
    "single", "sender", "skyline", "message", "debate", "cipher", "activation", "activation-w", "exchange",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """An evaluation as it is asked for (`jaxcomm eval --help` says what the fields mean)."""

    tasks: tuple[str, ...]
    protocols: tuple[str, ...] = ("single",)
    controls: tuple[str, ...] = ()
    data: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    n: int | None = None
    seed: int = 0
    names: str = "seen"
    wording: str = "paper"
    instruction: str | None = None
    sender_reads: Reads = "statement"
    few_shot: int | None = None
    k: tuple[int, ...] = ()
    j: int | None = None
    k_back: int | None = None
    j_back: int | None = None
    graft: str = "replace"
    where: str = "last"
    think: int = 0
    rounds: int | None = None
    form: str = "harness"
    answer: str | None = None
    tie: Literal["first", "last"] = "first"
    temperatures: tuple[float, ...] = ()
    stop: Literal["argmax", "nearest", "none"] = "argmax"
    partial: Literal["off", "entropy", "maxprob"] = "off"
    ask: str = "{prompt}"
    tell: str = "{message}\n\n{prompt}"
    max_message_tokens: int = 256
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    batch_size: int = 16
    truncate: bool = False
    released_scoring: bool = False
    judge_by: str = "text"

    @property
    def sampling(self) -> Sampling | Literal["task"] | None:
        """None is greedy."""
        if self.temperature is None:
            return "task"
        return Sampling(self.temperature, 0, self.top_p) if self.temperature else None


def answer_kind(settings: EvalSettings, task: str) -> str:
    """How a debate's votes are counted: numbers in GSM8K, letters in MMLU, else the first line as it stands."""
    kinds = {"gsm": "numeric", "mmlu": "choice"}
    return settings.answer or next((kind for name, kind in kinds.items() if task.startswith(name)), "text")


def check(settings: EvalSettings, senders: int, mapped: bool) -> None:
    """Says what is missing, or means nothing, before anything is loaded or computed.

    Args:
        settings: What is asked for.
        senders: How many agents send.
        mapped: Whether there is a W.

    Raises:
        ValueError: One line about the first such thing.
    """
    Wording(settings.wording, settings.instruction, settings.sender_reads)
    activates = [p for p in settings.protocols if p in ("activation", "activation-w", "exchange")]
    if activates and (not settings.k or settings.j is None):
        raise ValueError(f"{activates[0]} needs --k (A's layer) and --j (B's layer)")
    if activates and len(settings.k) not in (1, senders):
        raise ValueError(f"--k names {len(settings.k)} layers for {senders} senders: give one, or one for each")
    if "activation-w" in settings.protocols and not mapped:
        raise ValueError("activation-w needs --map, a folder that jaxcomm fit-map wrote for this pair")
    if "activation-w" in settings.protocols and senders > 1:
        raise ValueError("activation-w has a W from A alone: leave out --others")
    if "exchange" in settings.protocols and senders > 1:
        raise ValueError("exchange is between two: leave out --others")
    if "cipher" in settings.protocols and len(settings.temperatures) != senders + 1:
        raise ValueError(f"cipher needs --temperatures, {senders + 1} numbers: of B, of A, and of each of --others")
    if settings.controls and not {"activation", "activation-w"} & set(settings.protocols):
        raise ValueError("--controls stand in for an activation: they need the protocol activation or activation-w")
    if settings.where == "all" and activates and settings.graft != "sum":
        raise ValueError(f"--where all needs --graft sum: {settings.graft} would overwrite the whole prompt")
    if settings.where == "all" and settings.controls:
        raise ValueError("--controls stand in for one state per question: leave out --where all")
    if settings.temperature and "cipher" in settings.protocols:
        raise ValueError("cipher draws nothing, its --temperatures soften what it says: leave out --temperature")
    if settings.temperature is not None and settings.temperature < 0:
        raise ValueError(f"--temperature {settings.temperature}: it must be 0 (greedy) or above")
    if not settings.temperature and settings.top_p < 1:
        raise ValueError("--top-p cuts what is sampled from: it needs --temperature above 0")
    ones = ("n", "rounds", "batch_size", "max_new_tokens", "max_message_tokens")
    for name, smallest in (dict.fromkeys(ones, 1) | {"think": 0, "few_shot": 0}).items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least {smallest}")
    check_message(settings.ask, settings.tell, "--")


def check_layers(settings: EvalSettings, senders: Sequence[Agent], b: Agent) -> None:
    """Looks for every layer that is named, before anything is computed.

    Raises:
        ValueError: An agent does not have it.
    """
    for sender, k in zip(senders, settings.k * (len(senders) // max(len(settings.k), 1)), strict=False):
        check_layer(sender.params, k)
    if settings.j is not None:
        check_layer(b.params, settings.j, "j")
    if "exchange" in settings.protocols:
        check_layer(b.params, settings.k[0] if settings.k_back is None else settings.k_back, "k_back")
        check_layer(senders[0].params, settings.j if settings.j_back is None else settings.j_back, "j_back")
