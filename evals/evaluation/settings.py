"""The settings of an evaluation, and checks of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxcomm.agent import Agent
from jaxcomm.compiled import check_layer
from jaxcomm.decoding import Sampling
from jaxcomm.protocols.text import check_message

from ..games.wording import Wording
from .options import EvalOptions

SENDS = {"message", "debate", "cipher", "activation", "activation-w", "exchange", "kv", "latent", "deltas", "bridge"}
"""Protocols in which B receives a message. They have controls."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings(EvalOptions):
    """The settings of an evaluation.

    Attributes:
        tasks: Names of tasks, of lm-evaluation-harness or of this project.
        data: Local records of a task: a file, or a folder with one file for each split.
    """

    tasks: tuple[str, ...]
    data: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def sampling(self) -> Sampling | Literal["task"] | None:
        """How tokens are sampled. None: decoding is greedy. "task": as each task specifies."""
        if self.temperature is None:
            return "task"
        return Sampling(self.temperature, 0, self.top_p) if self.temperature else None


def answer_kind(settings: EvalSettings, task: str) -> str:
    """Chooses how to parse answers for the vote of a debate.

    Args:
        settings: The settings of the evaluation. If `answer` is set, it is used.
        task: Name of the task.

    Returns:
        "numeric" for GSM8K (numbers), "choice" for MMLU (letters), else "text" (the first line).
    """
    kinds = {"gsm": "numeric", "mmlu": "choice"}
    return settings.answer or next((kind for name, kind in kinds.items() if task.startswith(name)), "text")


def check(settings: EvalSettings, senders: int, mapped: bool) -> None:
    """Checks the settings of an evaluation before anything is loaded or computed.

    Args:
        settings: The settings.
        senders: Number of agents that send.
        mapped: Whether there is a map W.

    Raises:
        ValueError: A setting is missing, or has no effect with the others. The message names the first one.
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
        raise ValueError("activation-w has only a W from A: leave out --others")
    if "bridge" in settings.protocols and senders > 1:
        raise ValueError("bridge has only a bridge from A: leave out --others")
    if "exchange" in settings.protocols and senders > 1:
        raise ValueError("exchange is between two agents: leave out --others")
    if "cipher" in settings.protocols and len(settings.temperatures) != senders + 1:
        raise ValueError(f"cipher needs --temperatures, {senders + 1} numbers: of B, of A, and of each of --others")
    if settings.controls not in ((), ("other",)) and not SENDS & {*settings.protocols}:
        raise ValueError(
            f"--controls stand in for messages, {', '.join(settings.protocols)} sends none: leave them out, or name one of {', '.join(sorted(SENDS))}"
        )
    if len({*settings.controls}) < len(settings.controls):
        raise ValueError(f"--controls {' '.join(settings.controls)}: name each once")
    if settings.where == "all" and activates and settings.graft != "sum":
        raise ValueError(f"--where all needs --graft sum: {settings.graft} would overwrite the whole prompt")
    if settings.temperature and "cipher" in settings.protocols:
        raise ValueError("cipher does not sample, it only uses --temperatures: leave out --temperature")
    if settings.temperature is not None and settings.temperature < 0:
        raise ValueError(f"--temperature {settings.temperature}: it must be 0 (greedy) or above")
    if not settings.temperature and settings.top_p < 1:
        raise ValueError("--top-p needs --temperature above 0: without it decoding is greedy")
    ones = ("n", "rounds", "batch_size", "max_new_tokens", "max_message_tokens")
    for name, smallest in (dict.fromkeys(ones, 1) | {"think": 0, "few_shot": 0}).items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least {smallest}")
    check_message(settings.ask, settings.tell, "--")
    settings.check_channels(settings.protocols)
    if settings.scheme in ("score", "greedy") and settings.calibration is None:
        raise ValueError(
            f"--scheme {settings.scheme} needs items that are not reported on: name a game or a file with --calibration"
        )


def check_layers(settings: EvalSettings, senders: Sequence[Agent], b: Agent) -> None:
    """Checks that the agents have the layers that the settings name, before anything is computed.

    Args:
        settings: The settings of the evaluation.
        senders: The agents that send.
        b: The agent that answers.

    Raises:
        ValueError: An agent does not have the layer.
    """
    for sender, k in zip(senders, settings.k * (len(senders) // max(len(settings.k), 1)), strict=False):
        check_layer(sender.params, k)
    if settings.j is not None:
        check_layer(b.params, settings.j, "j")
    if "exchange" in settings.protocols:
        check_layer(b.params, settings.k[0] if settings.k_back is None else settings.k_back, "k_back")
        check_layer(senders[0].params, settings.j if settings.j_back is None else settings.j_back, "j_back")
