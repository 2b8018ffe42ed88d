"""The arms of an evaluation: every protocol and control, and how each converses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxcomm.agent import Agent, Prompt
from jaxcomm.protocols import Back, Panel, Turn, activation, cipher_debate, debate, exchange, message, skyline
from jaxcomm.protocols.base import start_turn

from .. import biographies
from .settings import EvalSettings, answer_kind, check


@dataclasses.dataclass(frozen=True)
class Team:
    """The agents of an evaluation.

    Attributes:
        a: Who sends.
        b: Who answers.
        others: More who send, or debate.
        judge: Who checks the facts of biographies; None: b.
        maps: W of each sender, for activation-w.
    """

    a: Agent
    b: Agent
    others: Sequence[Agent] = ()
    judge: Agent | None = None
    maps: Sequence[Any] | None = None

    @property
    def senders(self) -> tuple[Agent, ...]:
        return (self.a, *self.others)

    @property
    def checker(self) -> Agent:
        return self.b if self.judge is None else self.judge


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions of one task that an arm is asked at once.

    Attributes:
        agents: Those it is between, the one that answers last.
        prompts_a, prompts_b: What those who send read, and what the one who answers does.
        task: Its name.
        writing: until, sampling and seed of what they write.
    """

    agents: Sequence[Agent]
    prompts_a: Sequence[Prompt]
    prompts_b: Sequence[Prompt]
    task: str
    writing: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One protocol among these agents, as it is evaluated."""

    name: str
    agents: tuple[Agent, ...]
    converse: Callable[[Batch], Turn | Panel]
    message_tokens: int = 0
    """What an agent may write besides its answer, and another has to read."""
    alone: bool = False
    """Only the one that answers hears anything, so it can score a text without a prompt."""
    draws: bool = True
    """Texts can be sampled; what says everything in vectors cannot."""
    shuffled: bool = False
    """A reads what it is given in another question of the task, whatever the batch."""
    reads: str | None = None
    """What the sender reads (`games.wording.Reads`); None: nobody sends."""


def arms(settings: EvalSettings, team: Team) -> Iterator[Arm]:
    """One for every protocol and control.

    Raises:
        ValueError: `settings.check`'s.
    """
    check(settings, len(team.senders), team.maps is not None)
    pair, everybody = (team.a, team.b), (*team.senders, team.b)
    talks, reads = settings.max_message_tokens, settings.sender_reads
    for protocol in settings.protocols:
        if protocol in ("single", "sender"):
            yield Arm(protocol, (team.b if protocol == "single" else team.a,), _alone, alone=True)
        if protocol == "skyline":
            yield Arm(protocol, pair, _skyline)
        if protocol == "message":
            yield Arm(protocol, pair, functools.partial(_message, settings), talks, reads=reads)
        if protocol == "debate":
            yield Arm(protocol, everybody, functools.partial(_debate, settings), talks, reads=reads)
        if protocol == "cipher":
            yield Arm(protocol, everybody, functools.partial(_cipher, settings), talks, draws=False, reads=reads)
        if protocol == "exchange":
            yield Arm(protocol, everybody, functools.partial(_exchange, settings), settings.think, reads=reads)
        if protocol in ("activation", "activation-w"):
            yield from _activations(settings, protocol, everybody, team.maps if protocol == "activation-w" else None)


def _activations(
    settings: EvalSettings, protocol: str, agents: tuple[Agent, ...], maps: Sequence[Any] | None
) -> Iterator[Arm]:
    """The activation, and what stands in for it."""
    for control in (None, *settings.controls):
        shuffled = control == "shuffled"
        # In a batch, "shuffled" would be of its neighbours; the harness takes another question of the task.
        send = functools.partial(_activation, settings, maps, None if shuffled else control)
        name = protocol if control is None else f"{protocol}, {control}"
        yield Arm(name, agents, send, settings.think, shuffled=shuffled, reads=settings.sender_reads)


def _alone(batch: Batch) -> Turn:
    return start_turn(batch.agents[-1], batch.prompts_b)


def _skyline(batch: Batch) -> Turn:
    a, b = batch.agents
    return skyline(a, b, batch.prompts_a, batch.prompts_b)


def _message(settings: EvalSettings, batch: Batch) -> Turn:
    a, b = batch.agents
    words: dict[str, Any] = dict(ask=settings.ask, tell=settings.tell, max_message_tokens=settings.max_message_tokens)
    return message(a, b, batch.prompts_a, batch.prompts_b, **words, **batch.writing)


def _seats(batch: Batch) -> tuple[tuple[Agent, ...], tuple[Sequence[Prompt], ...]]:
    """Who sits in a debate, B first, and what each is asked."""
    *senders, b = batch.agents
    return (b, *senders), (batch.prompts_b, *[batch.prompts_a] * len(senders))


def _talk(settings: EvalSettings, batch: Batch, rounds: int) -> dict[str, Any]:
    """What debates in words and in vectors have in common. rounds: the protocol's own number."""
    form = biographies.TASK_FORM if batch.task == biographies.TASK else settings.form
    rounds = rounds if settings.rounds is None else settings.rounds
    return dict(rounds=rounds, form=form, max_message_tokens=settings.max_message_tokens)


def _debate(settings: EvalSettings, batch: Batch) -> Panel:
    votes: dict[str, Any] = dict(answer=answer_kind(settings, batch.task), tie=settings.tie)
    return debate(*_seats(batch), **votes, **_talk(settings, batch, 2), **batch.writing)


def _cipher(settings: EvalSettings, batch: Batch) -> Turn | Panel:
    vectors: dict[str, Any] = dict(stop=settings.stop, temperatures=settings.temperatures, partial=settings.partial)
    return cipher_debate(*_seats(batch), **vectors, **_talk(settings, batch, 3))


def _sent(settings: EvalSettings) -> dict[str, Any]:
    """What activations in one direction and in both have in common."""
    return dict(j=settings.j, graft=settings.graft, where=settings.where, think=settings.think)


def _activation(settings: EvalSettings, maps: Sequence[Any] | None, control: str | None, batch: Batch) -> Turn:
    *senders, b = batch.agents
    n = len(senders)
    own: dict[str, Any] = dict(k=settings.k * (n // len(settings.k)), W=maps, control=control)
    return activation(senders, b, [batch.prompts_a] * n, batch.prompts_b, **own, **_sent(settings), **batch.writing)


def _exchange(settings: EvalSettings, batch: Batch) -> Turn | Panel:
    a, b = batch.agents
    own: dict[str, Any] = dict(k=settings.k[0], back=Back(settings.k_back, settings.j_back))
    own |= dict(answer=answer_kind(settings, batch.task), tie=settings.tie)
    return exchange(a, b, batch.prompts_a, batch.prompts_b, **own, **_sent(settings), **batch.writing)
