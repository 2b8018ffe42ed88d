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
        a: The sender.
        b: The agent that answers.
        others: Further senders or debaters.
        judge: The agent that checks the facts of biographies. None: it is `b`.
        maps: The map W of each sender, [D_B, D_A] each, for "activation-w". None: there is none.
    """

    a: Agent
    b: Agent
    others: Sequence[Agent] = ()
    judge: Agent | None = None
    maps: Sequence[Any] | None = None

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
    """Questions of one task that an arm is asked at once.

    Attributes:
        agents: The agents of the arm. The last one answers.
        prompts_a: What the senders read, for each question.
        prompts_b: What the answering agent reads, for each question.
        task: Name of the task.
        writing: Settings of what the agents write: until (stop strings), sampling, and seed.
    """

    agents: Sequence[Agent]
    prompts_a: Sequence[Prompt]
    prompts_b: Sequence[Prompt]
    task: str
    writing: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of an evaluation: a protocol among these agents.

    Attributes:
        name: Its name in the results, such as "activation, zero".
        agents: The agents. The last one answers.
        converse: Lets the agents read and communicate, up to the turn in which the answer is written or scored.
        message_tokens: Largest number of tokens that an agent may write before its answer, and another has to read.
        alone: Whether there is only one agent. Then a text can be scored without a prompt.
        draws: Whether texts can be sampled. They cannot if everything is said in vectors.
        shuffled: Whether A reads what belongs to another question of the task (the control "shuffled").
        reads: What the sender reads (`games.wording.Reads`). None: no agent sends.
    """

    name: str
    agents: tuple[Agent, ...]
    converse: Callable[[Batch], Turn | Panel]
    message_tokens: int = 0
    alone: bool = False
    draws: bool = True
    shuffled: bool = False
    reads: str | None = None


def arms(settings: EvalSettings, team: Team) -> Iterator[Arm]:
    """Makes one arm for every protocol, and one for every control of an activation.

    Args:
        settings: The settings of the evaluation.
        team: The agents.

    Yields:
        The arms.

    Raises:
        ValueError: The settings do not make sense (`settings.check`).
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
