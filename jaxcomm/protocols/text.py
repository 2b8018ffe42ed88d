"""Baselines that communicate in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.flops import generation_flops
from jaxcomm.messages import Message
from jaxcomm.protocols.base import Reply, Sent, Spent, Turn, Writing, start_turn
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in, worst_of_others


def silent(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **unused: Any) -> Turn:
    """B answers alone: nothing is communicated (Ramesh & Li 2025, section 4.1).

    Args:
        a: The other agent. It does nothing.
        b: The agent that answers.
        prompts_a: A's prompts. Not used.
        prompts_b: B's prompts, one for each item.
        **unused: Options of writing (`sampling`, `seed`, ..), which every protocol accepts. They have no effect, since
            nothing is generated before B's turn.

    Returns:
        B's turn.

    Raises:
        ValueError: A prompt is empty, or leaves no room.

    Example:
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> protocols.silent(agent, agent, told, asked).rendered(0)
        ['Which country is Bob located in?']
    """
    Writing(**unused)
    return start_turn(b, prompts_b)


def sender(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **unused: Any) -> Turn:
    """A answers B's prompts alone.

    Args:
        a: The agent that answers.
        b: The other agent. It does nothing.
        prompts_a: A's prompts. Not used.
        prompts_b: The prompts, one for each item. A answers them.
        **unused: Options of writing, as for `silent`. They change nothing.

    Returns:
        A's turn.

    Raises:
        ValueError: A prompt is empty, or leaves no room.

    Example:
        >>> alice = jc.Agent(agent.params, agent.tokenizer, agent.stop_tokens, name="Alice")
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> protocols.sender(alice, agent, told, asked).agent.name
        'Alice'
    """
    Writing(**unused)
    return start_turn(a, prompts_b)


def skyline(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **unused: Any) -> Turn:
    """B answers after reading A's prompt and its own, so it has all the information (Ramesh & Li 2025, section 4.1).

    Args:
        a: The other agent. It does nothing.
        b: The agent that answers.
        prompts_a: A's prompts, one for each item. B reads them first. If A's prompt equals B's, B reads it once.
        prompts_b: B's prompts, one for each item. B reads them second.
        **unused: Options of writing, as for `silent`. They change nothing.

    Returns:
        B's turn.

    Raises:
        ValueError: The numbers of prompts differ; a prompt is empty, or leaves no room.

    Example:
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> turn = protocols.skyline(agent, agent, told, asked)
        >>> turn.rendered(0), turn.write(4)[0].text
        (['Bob is at Petra. Which country is Bob located in?'], 'Jordan')
    """
    Writing(**unused)
    return start_turn(b, together(prompts_a, prompts_b))


def together(prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt]) -> list[Prompt]:
    """Puts A's prompts before B's, as `skyline` reads them.

    Args:
        prompts_a: A's prompts.
        prompts_b: B's prompts. A prompt that equals A's is returned as it is.

    Returns:
        One prompt for each item.

    Raises:
        ValueError: The numbers of prompts differ.
    """
    both = zip(prompts_a, prompts_b, strict=True)
    return [y if text(x) == text(y) else put("{text} {prompt}", y, text=text(x)) for x, y in both]


REPLY = "{message}\n\n{prompt}\n\nAsk your partner what you still need to know."


@dataclasses.dataclass(frozen=True)
class Conversation(Writing):
    """Options of `message`: how A writes and how B reads it.

    Attributes:
        max_message_tokens: Largest number of tokens of a message.
        until: Strings that end a message.
        sampling: How to sample messages. None: greedy decoding.
        seed: Random seed for all items, or one for each.
        ask: Template for A's prompt.
        tell: Template for A's message and B's prompt.
        turns: How often A writes. After every message but the last, B reads the message and its own prompt and writes
            back. Each agent keeps the conversation from its own point of view.
        reply: Template for A's message and B's prompt when B writes back.
        control: Stand-in that B gets instead of A's messages: a name in `CONTROLS`, or a `StandIn`. None: the messages.
        limits: Largest number of tokens of each item's message, if smaller than `max_message_tokens`. With 0 nothing is
            generated, read or counted as cost. None: no other limit.
        bytes: The same limit in bytes.

    Raises:
        ValueError: A template lacks one of its {places} or has an unknown one; `turns` is below 1; there is no such
            control; `limits` or `bytes` is given with several turns.

    Example:
        >>> talk = protocols.Conversation(max_message_tokens=8, tell="{prompt} {message}")
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> turn = protocols.receive_text(agent, asked, protocols.send_text(agent, told, talk), talk)
        >>> turn.rendered(0)[0].startswith("Which country is Bob located in?")
        True
    """

    max_message_tokens: int = 48
    ask: str = "{prompt}"
    tell: str = "{message} {prompt}"
    turns: int = 1
    reply: str = REPLY
    control: Control | StandIn | None = None
    limits: Sequence[int] | None = None
    bytes: Sequence[int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "control", as_stand_in(self.control))
        check_message(self.ask, self.tell)
        check_words("reply", self.reply, {"message"}, {"message", "prompt"})
        if self.turns < 1:
            raise ValueError(f"turns = {self.turns}: A writes at least once")
        if self.turns > 1 and (self.limits is not None or self.bytes is not None):
            raise ValueError(f"turns = {self.turns}: only a single message is cut to tokens or bytes")


def message(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **how: Any) -> Turn:
    """A generates a message after its prompt. B reads the message and its own prompt (Ramesh & Li 2025, section 4.1).

    Args:
        a: The agent that writes.
        b: The agent that reads.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts (the questions), one for each item.
        **how: Options of `Conversation`.

    Returns:
        B's turn. `Reply.details` holds A's last message as it arrived, A's first prompt, and, with several turns, all
        messages.

    Raises:
        ValueError: The numbers of prompts differ; a prompt is empty, or leaves no room; an option is invalid.

    Example:
        >>> told, asked = ["Bob is at Petra."], ["Which country is Bob located in?"]
        >>> turn = protocols.message(agent, agent, told, asked, max_message_tokens=8)
        >>> turn.write(4)[0].text
        'Jordan'
    """
    talk = Conversation(**how)
    heard_a: list[Prompt] = [put(talk.ask, prompt) for prompt in prompts_a]
    heard_b: list[Prompt] = []
    said, spent = [[] for _ in prompts_b], [Spent() for _ in prompts_b]

    def note(sent: Sent) -> tuple[str, ...]:
        """Stores the texts and their costs, and returns the texts."""
        for i, (x, cost) in enumerate(zip(texts := sent.message.text or (), sent.spent, strict=True)):
            said[i].append(x)
            spent[i] += cost
        return texts

    def told(n: int) -> Sent:
        """A's n-th text, or the control's stand-in for it."""
        sent = send_text(a, heard_a, talk, n)
        return sent if talk.control is None else _replaced(sent, a, b, prompts_b, talk)

    for n in range(talk.turns - 1):
        messages = note(told(2 * n + 1))
        if n == 0:
            heard_b = [_turns(put(talk.reply, x, message=m)) for x, m in zip(prompts_b, messages, strict=True)]
        else:
            heard_b = [[*_turns(x), _turn("user", m)] for x, m in zip(heard_b, messages, strict=True)]
        back = note(send_text(b, heard_b, talk, 2 * n + 2))
        heard_b = [[*_turns(x), _turn("assistant", r)] for x, r in zip(heard_b, back, strict=True)]
        both = zip(heard_a, messages, back, strict=True)
        heard_a = [[*_turns(x), _turn("assistant", m), _turn("user", r)] for x, m, r in both]
    sent = told(2 * talk.turns - 1)
    note(sent)
    details = [
        {"message": own[-1], "asked": a.render(put(talk.ask, x))} | ({"said": own} if talk.turns > 1 else {})
        for own, x in zip(said, prompts_a, strict=True)
    ]
    return receive_text(b, prompts_b, Sent(sent.message, details, spent), talk, heard_b)


def _replaced(sent: Sent, a: Agent, b: Agent, prompts_b: Sequence[Prompt], talk: Conversation) -> Sent:
    """Replace A's texts by the control's stand-in."""
    plain = dataclasses.replace(talk, control=None)
    asked = lambda prompts: [put(talk.ask, prompt) for prompt in prompts]

    def likely(message: Message, answers: Sequence[str]) -> np.ndarray:
        turn = receive_text(b, prompts_b, dataclasses.replace(sent, message=message), plain)
        return likelihoods(turn, answers)

    assert isinstance(talk.control, StandIn)
    link = Link(
        a,
        generated=lambda: send_text(b, asked(prompts_b), plain).message,
        unrelated=lambda sentence: send_text(a, asked([sentence] * len(prompts_b)), plain).message,
        own=lambda: Message(text=tuple(text(prompt) for prompt in prompts_b)),
        worst=lambda message, answers: worst_of_others(message, answers, lambda m: likely(m, answers), talk.seed),
    )
    message = talk.control(sent.message, link, talk.seed)
    return Sent(
        message, [{**told, "message": x} for told, x in zip(sent.details, message.text or (), strict=True)], sent.spent
    )


def likelihoods(turn: Turn, answers: Sequence[str]) -> np.ndarray:
    """Scores the right answer of every item.

    Args:
        turn: The turn of the agent that answers.
        answers: The right answers.

    Returns:
        Log-probability of each answer, in nats.
    """
    scored = turn.score([[answer if turn.agent.chat else f" {answer}"] for answer in answers])
    return np.array([each.logprobs[0] for each in scored])


def send_text(a: Agent, prompts: Sequence[Prompt], talk: Conversation, n: int = 1) -> Sent:
    """Lets an agent write a message after each of its prompts.

    Args:
        a: The agent that writes.
        prompts: Its prompts, one for each item.
        talk: How it writes.
        n: Number of the message in the conversation. Each message is sampled with its own seeds.

    Returns:
        Messages of text.

    Raises:
        ValueError: A prompt is empty, or leaves no room.

    Example:
        >>> sent = protocols.send_text(agent, ["Bob is at Petra."], protocols.Conversation(max_message_tokens=8))
        >>> len(sent.message), sent.spent[0].written <= 8
        (1, True)
    """
    written = talk.write(start_turn(a, prompts), n)
    texts = [reply.text for reply in written]
    spent = [reply.spent for reply in written]
    if talk.limits is not None or talk.bytes is not None:
        for i, reply in enumerate(written):
            texts[i], spent[i] = _cut(a, reply, *(None if x is None else x[i] for x in (talk.limits, talk.bytes)))
    spent = [cost + Spent(sent=len(x.encode())) for cost, x in zip(spent, texts, strict=True)]
    return Sent(Message(text=tuple(texts)), [{"message": x} for x in texts], spent)


def _cut(a: Agent, reply: Reply, tokens: int | None, most: int | None) -> tuple[str, Spent]:
    """Truncate a message to so many tokens and bytes. Returns the text and its cost."""
    ids = reply.ids[: len(reply.ids) if tokens is None else max(tokens, 0)]
    while most is not None and ids and len(a.said(ids).strip().encode()) > most:
        ids = ids[:-1]
    if len(ids) == len(reply.ids) and (tokens is None or tokens >= len(reply.written)):
        return reply.text, reply.spent
    if not ids:
        return "", Spent()
    spent = dataclasses.replace(
        reply.spent, flops=generation_flops(a.params.config, len(reply.read), len(ids)), written=len(ids)
    )
    return a.said(ids).strip(), spent


def receive_text(
    b: Agent, prompts_b: Sequence[Prompt], sent: Sent, talk: Conversation, heard: Sequence[Prompt] = ()
) -> Turn:
    """Lets an agent read messages and its own prompts.

    Args:
        b: The agent that reads.
        prompts_b: Its own prompts, one for each item.
        sent: Messages of text, one for each prompt.
        talk: How the message is put to the agent.
        heard: The conversations so far, from the agent's point of view.

    Returns:
        The agent's turn.

    Raises:
        ValueError: The messages hold no text; there is not one for each prompt; a prompt is empty, or leaves no room.

    Example:
        >>> talk = protocols.Conversation(max_message_tokens=8)
        >>> sent = protocols.send_text(agent, ["Bob is at Petra."], talk)
        >>> protocols.receive_text(agent, ["Which country is Bob located in?"], sent, talk).write(4)[0].text
        'Jordan'
    """
    if sent.message.text is None or len(sent.message) != len(prompts_b):
        raise ValueError(f"{len(sent.message.text or ())} texts for {len(prompts_b)} prompts: give one for each")
    told = [_told(talk.tell, x, m) for x, m in zip(prompts_b, sent.message.text, strict=True)]
    if heard:
        told = [[*_turns(x), _turn("user", text(y))] for x, y in zip(heard, told, strict=True)]
    turn = start_turn(b, told, details=sent.details, before=sent.spent)
    return dataclasses.replace(turn, received=sent.message)


def _told(tell: str, prompt: Prompt, message: str) -> Prompt:
    """A prompt with a message. If the message is empty, the space beside it is removed, since it would change the tokens."""
    return put(tell if message else re.sub(r"^\{message\}\s+|\s+\{message\}$", "", tell), prompt, message=message)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(prompt: Prompt) -> list[Mapping[str, str]]:
    """A prompt as a conversation."""
    return [_turn("user", prompt)] if isinstance(prompt, str) else list(prompt)


def check_message(ask: str, tell: str, prefix: str = "") -> None:
    """Checks the templates of a `message`.

    Args:
        ask: Template for A's prompt.
        tell: Template for A's message and B's prompt.
        prefix: Text to put before the names of the templates in an error.

    Raises:
        ValueError: A template lacks one of its places or has an unknown one.
    """
    check_words(f"{prefix}ask", ask, {"prompt"}, {"prompt"})
    check_words(f"{prefix}tell", tell, {"message", "prompt"}, {"message", "prompt"})


def check_words(name: str, words: str, needed: Collection[str], allowed: Collection[str]) -> None:
    """Checks the places of a template.

    Args:
        name: Name of the template in an error.
        words: The template.
        needed: Places that it must have.
        allowed: Places that it may have.

    Raises:
        ValueError: It lacks one of the `needed` places, or has one that is not `allowed`.
    """
    try:
        found = {field for _, field, *_ in string.Formatter().parse(words) if field is not None}
    except ValueError:  # an unmatched brace
        found = {"{"}
    if not set(needed) <= found <= set(allowed):
        places = " and ".join(f"{{{place}}}" for place in sorted(needed or allowed))
        raise ValueError(f"{name} {words!r}: it must have {places} and no other braces ({{{{ is a brace itself)")


def put(template: str, prompt: Prompt, **parts: str) -> Prompt:
    """Puts a prompt into a template, in the place {prompt}.

    Args:
        template: The template.
        prompt: A text, or a conversation. The template is applied to the conversation's last user turn.
        **parts: Texts for the other places.

    Returns:
        The new prompt.
    """
    if isinstance(prompt, str):
        return template.format(prompt=prompt, **parts)
    turns, at = list(prompt), _last(prompt)
    turns[at] = {**turns[at], "content": template.format(prompt=turns[at]["content"], **parts)}
    return turns


def text(prompt: Prompt) -> str:
    """Returns a prompt as running text.

    Args:
        prompt: A text, or a conversation.

    Returns:
        The text. For a conversation, the text of its last user turn.
    """
    return prompt if isinstance(prompt, str) else prompt[_last(prompt)]["content"]


def _last(turns: Sequence[Mapping[str, str]]) -> int:
    """Index of the last turn that is not an assistant's. (The agent continues an assistant's turn at the end.)"""
    return next(i for i in reversed(range(len(turns))) if turns[i]["role"] != "assistant")
