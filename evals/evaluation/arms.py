"""The arms of an evaluation: protocols and controls, each with a function that lets the agents communicate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxcomm.agent import Agent, Prompt
from jaxcomm.protocols import (
    Back,
    Panel,
    StandIn,
    Turn,
    activation,
    bridge,
    cipher_debate,
    debate,
    deltas,
    exchange,
    kv,
    latent,
    message,
    skyline,
    thinking,
)
from jaxcomm.protocols.base import start_turn
from jaxcomm.protocols.text import put

from .. import biographies
from ..hearing import EQUAL, fitting_tokens, heard
from .settings import SENDS, EvalSettings, answer_kind, check


@dataclasses.dataclass(frozen=True)
class Team:
    """The agents of an evaluation.

    Attributes:
        a: The sender.
        b: The agent that answers.
        others: Further senders or debaters.
        judge: The agent that checks the facts of biographies. None: it is `b`.
        maps: The map W of each sender, [D_B, D_A] each, for "activation-w". None: there is none.
        kv_maps: Maps of A's keys and values to B's. None: B uses them unchanged.
        layers: B's layers that see a prefix, if a scheme chose them. None: the settings name them.
        calibrated: A's prompts in the calibration items. None of these items may be asked.
        bridge: The bridge from `a` to `b`, for "bridge". None: there is none.
    """

    a: Agent
    b: Agent
    others: Sequence[Agent] = ()
    judge: Agent | None = None
    maps: Sequence[Any] | None = None
    kv_maps: Any = None
    layers: tuple[int, ...] | None = None
    calibrated: Sequence[str] = ()
    bridge: Any = None

    @property
    def senders(self) -> tuple[Agent, ...]:
        """The agents that send: `a` and the others."""
        return (self.a, *self.others)

    @property
    def checker(self) -> Agent:
        """The agent that checks the facts of biographies."""
        return self.b if self.judge is None else self.judge


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions of one task that an arm answers in one batch.

    Attributes:
        agents: The agents of the arm. The last one answers.
        prompts_a: The senders' prompts, for each question.
        prompts_b: The answering agent's prompts, for each question.
        task: Name of the task.
        writing: Settings of what the agents write: until (stop strings), sampling, and seed.
        answers: The right answer of each question, for controls.
        order: For each question, the index of the question whose message it gets under the control "other".
    """

    agents: Sequence[Agent]
    prompts_a: Sequence[Prompt]
    prompts_b: Sequence[Prompt]
    task: str
    writing: Mapping[str, Any]
    answers: Sequence[str] = ()
    order: Sequence[int] | None = None

    def control(self, name: str | None) -> StandIn | None:
        """A control with the right answers."""
        return None if name is None else StandIn(name, answers=self.answers, order=self.order)  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of an evaluation: a protocol among these agents.

    Attributes:
        name: Its name in the results, such as "activation, zero".
        agents: The agents. The last one answers.
        converse: Lets the agents read and communicate, up to the turn in which the answer is written or scored.
        message_tokens: Largest number of tokens of the messages that another agent has to read.
        alone: Whether there is only one agent. Then a text can be scored without a prompt.
        draws: Whether texts can be sampled. They cannot if all messages are vectors.
        control: Stand-in for the messages (`jaxcomm.protocols.CONTROLS`). None: the messages.
        reads: Contents of the sender's prompt (`games.wording.Reads`). None: no agent sends.
    """

    name: str
    agents: tuple[Agent, ...]
    converse: Callable[[Batch], Turn | Panel]
    message_tokens: int = 0
    alone: bool = False
    draws: bool = True
    control: str | None = None
    reads: str | None = None

    @property
    def pooled(self) -> bool:
        """Whether its control uses the messages of all questions in a batch. Results then depend on the batches."""
        return self.control in ("mean", "moments", "adversarial")


def arms(settings: EvalSettings, team: Team) -> Iterator[Arm]:
    """Makes one arm for every protocol, and one for every control of protocols that send. B alone is always included.

    Args:
        settings: The settings of the evaluation.
        team: The agents.

    Yields:
        The arms.

    Raises:
        ValueError: The settings are inconsistent (`settings.check`).
    """
    check(settings, len(team.senders), team.maps is not None)
    if team.layers is not None:
        chosen: Any = dict(layers=team.layers, scheme=None, ratio=None, calibration=None)
        settings = dataclasses.replace(settings, **chosen)
    pair, everybody = (team.a, team.b), (*team.senders, team.b)
    sends = [p for p in settings.protocols if p in SENDS]
    alone = ("single",) if sends and settings.controls and "single" not in settings.protocols else ()
    for protocol in (*alone, *settings.protocols):
        if protocol in ("single", "sender"):
            yield Arm(protocol, (team.b if protocol == "single" else team.a,), _alone, alone=True)
        elif protocol == "skyline":
            yield Arm(protocol, pair, _skyline)
        elif protocol == "thinking":
            yield Arm(protocol, (team.b,), functools.partial(_thinking, settings))
        else:
            two = protocol in ("message", "deltas", "bridge")
            trained = {"kv": team.kv_maps, "latent": team.kv_maps, "activation-w": team.maps, "bridge": team.bridge}
            yield from _channel(settings, protocol, pair if two else everybody, trained.get(protocol))


def _channel(settings: EvalSettings, protocol: str, agents: tuple[Agent, ...], trained: Any) -> Iterator[Arm]:
    """A protocol in which B receives a message, and its controls. trained: the maps or the bridge for the message."""
    told: dict[str, Any] = dict(reads=settings.sender_reads, draws=protocol != "cipher")
    written = protocol in ("message", "debate", "cipher", "deltas")
    told["message_tokens"] = settings.max_message_tokens if written else settings.think
    converse = functools.partial(_CONVERSE[protocol], settings, trained)
    for control in (None, *settings.controls):
        name = protocol if control is None else f"{protocol}, {control}"
        if control not in EQUAL:
            yield Arm(name, agents, functools.partial(converse, control), control=control, **told)
        elif protocol != "message":
            own = {**told, "message_tokens": settings.max_message_tokens, "draws": True}
            text = functools.partial(_equal, settings, control, functools.partial(converse, None))
            yield Arm(name, agents, text, **own)


def _alone(batch: Batch) -> Turn:
    return start_turn(batch.agents[-1], batch.prompts_b)


def _skyline(batch: Batch) -> Turn:
    a, b = batch.agents
    return skyline(a, b, batch.prompts_a, batch.prompts_b)


def _message(settings: EvalSettings, maps: Any, control: str | None, batch: Batch, **limits: Any) -> Turn:
    a, b = batch.agents[0], batch.agents[-1]
    words: dict[str, Any] = dict(ask=settings.ask, tell=settings.tell, max_message_tokens=settings.max_message_tokens)
    words |= dict(control=batch.control(control), **limits)
    return message(a, b, batch.prompts_a, batch.prompts_b, **words, **batch.writing)


def _equal(settings: EvalSettings, what: str, channel: Callable[[Batch], Turn | Panel], batch: Batch) -> Turn:
    """A text message that costs no more than a channel for the same questions."""
    notes = heard(channel(batch))
    if what == "equal-bytes":
        return _message(settings, None, None, batch, bytes=[note.sent for note in notes])
    a, b = batch.agents[0], batch.agents[-1]
    asked = [put(settings.ask, prompt) for prompt in batch.prompts_a]
    most = fitting_tokens(a, b, (asked, batch.prompts_b), notes, settings.max_message_tokens)
    return _message(settings, None, None, batch, limits=most)


def _seats(batch: Batch) -> tuple[tuple[Agent, ...], tuple[Sequence[Prompt], ...]]:
    """The agents of a debate, B first, and their prompts."""
    *senders, b = batch.agents
    return (b, *senders), (batch.prompts_b, *[batch.prompts_a] * len(senders))


def _talk(settings: EvalSettings, batch: Batch, rounds: int) -> dict[str, Any]:
    """Options that debates in text and in vectors share. rounds: the protocol's default."""
    form = biographies.TASK_FORM if batch.task == biographies.TASK else settings.form
    rounds = rounds if settings.rounds is None else settings.rounds
    return dict(rounds=rounds, form=form, max_message_tokens=settings.max_message_tokens)


def _debate(settings: EvalSettings, maps: Any, control: str | None, batch: Batch) -> Panel:
    own: dict[str, Any] = dict(answer=answer_kind(settings, batch.task), tie=settings.tie)
    own |= dict(control=batch.control(control))
    return dataclasses.replace(debate(*_seats(batch), **own, **_talk(settings, batch, 2), **batch.writing), receiver=0)


def _cipher(settings: EvalSettings, maps: Any, control: str | None, batch: Batch) -> Turn | Panel:
    own: dict[str, Any] = dict(stop=settings.stop, temperatures=settings.temperatures, partial=settings.partial)
    own |= dict(control=batch.control(control), seed=batch.writing["seed"])
    return cipher_debate(*_seats(batch), **own, **_talk(settings, batch, 3))


def _sent(settings: EvalSettings, batch: Batch, control: str | None) -> dict[str, Any]:
    """Options that activations in one direction and in both directions share."""
    how = dict(j=settings.j, graft=settings.graft, where=settings.where, think=settings.think)
    return how | dict(control=batch.control(control), **batch.writing)


def _activation(settings: EvalSettings, maps: Sequence[Any] | None, control: str | None, batch: Batch) -> Turn:
    *senders, b = batch.agents
    n = len(senders)
    own: dict[str, Any] = dict(k=settings.k * (n // len(settings.k)), W=maps, **_sent(settings, batch, control))
    return activation(senders, b, [batch.prompts_a] * n, batch.prompts_b, **own)


def _exchange(settings: EvalSettings, maps: Any, control: str | None, batch: Batch) -> Turn | Panel:
    a, b = batch.agents
    own: dict[str, Any] = dict(k=settings.k[0], back=Back(settings.k_back, settings.j_back))
    own |= dict(answer=answer_kind(settings, batch.task), tie=settings.tie, **_sent(settings, batch, control))
    return exchange(a, b, batch.prompts_a, batch.prompts_b, **own)


def _thinking(settings: EvalSettings, batch: Batch) -> Turn:
    b = batch.agents[-1]
    return thinking(b, b, (), batch.prompts_b, **settings.channel_settings()["thinking"])


def _prefix(
    protocol: Callable[..., Turn], settings: EvalSettings, maps: Any, control: str | None, batch: Batch
) -> Turn:
    *senders, b = batch.agents
    own = settings.channel_settings(settings.layers or "all", maps)[protocol.__name__]
    how = dict(own, control=batch.control(control), **batch.writing)
    return protocol(senders, b, [batch.prompts_a] * len(senders), batch.prompts_b, **how)


def _deltas(settings: EvalSettings, maps: Any, control: str | None, batch: Batch) -> Turn:
    a, b = batch.agents
    words: dict[str, Any] = dict(ask=settings.ask, tell=settings.tell, max_message_tokens=settings.max_message_tokens)
    words |= dict(control=batch.control(control), j=settings.delta_layers, **batch.writing)
    return deltas(a, b, batch.prompts_a, batch.prompts_b, **words)


def _bridge(settings: EvalSettings, made: Any, control: str | None, batch: Batch) -> Turn:
    a, b = batch.agents
    how = dict(bridge=made, control=batch.control(control), **batch.writing)
    return bridge(a, b, batch.prompts_a, batch.prompts_b, **how)


_CONVERSE: dict[str, Callable[..., Turn | Panel]] = {
    "message": _message,
    "debate": _debate,
    "cipher": _cipher,
    "activation": _activation,
    "activation-w": _activation,
    "exchange": _exchange,
    "kv": functools.partial(_prefix, kv),
    "latent": functools.partial(_prefix, latent),
    "deltas": _deltas,
    "bridge": _bridge,
}
