"""The baselines that talk in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxcomm.agent import Agent, Prompt
from jaxcomm.messages import Message
from jaxcomm.protocols.base import Sent, Spent, Turn, Writing, start_turn


def silent(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **unused: Any) -> Turn:
    """B alone. (Nothing is written before B's turn, so `Writing` changes nothing, here and in the next two.)"""
    Writing(**unused)
    return start_turn(b, prompts_b)


def sender(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **unused: Any) -> Turn:
    """A alone, asked what B is."""
    Writing(**unused)
    return start_turn(a, prompts_b)


def skyline(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **unused: Any) -> Turn:
    """B reads A's prompt and its own, one after the other: all there is to know. Where A reads what B does, B reads it once."""
    Writing(**unused)
    both = zip(prompts_a, prompts_b, strict=True)
    return start_turn(b, [y if text(x) == text(y) else put("{text} {prompt}", y, text=text(x)) for x, y in both])


REPLY = "{message}\n\n{prompt}\n\nAsk your partner what you still need to know."


@dataclasses.dataclass(frozen=True)
class Conversation(Writing):
    """How A tells B: the options of `message`.

    Attributes:
        ask: What A's prompt is put into.
        tell: What A's message and B's prompt are put into.
        turns: How often A writes. Before the last time, B reads A's message and its own prompt and writes back; each keeps the
            conversation as it took part in it.
        reply: What A's message and B's prompt are put into, when B is to write back.
        max_message_tokens, until, sampling, seed: `Writing`'s.

    Raises:
        ValueError: Words without their {places}, or no turn.
    """

    max_message_tokens: int = 48
    ask: str = "{prompt}"
    tell: str = "{message} {prompt}"
    turns: int = 1
    reply: str = REPLY

    def __post_init__(self):
        check_message(self.ask, self.tell)
        check_words("reply", self.reply, {"message"}, {"message", "prompt"})
        if self.turns < 1:
            raise ValueError(f"turns = {self.turns}: A writes at least once")


def message(a: Agent, b: Agent, prompts_a: Sequence[Prompt], prompts_b: Sequence[Prompt], **how: Any) -> Turn:
    """A writes after its prompt, and B reads what A wrote and its own prompt.

    Args:
        a: Who writes.
        b: Who reads.
        prompts_a: What A reads, one for each game.
        prompts_b: What B is asked.
        **how: Options of `Conversation`.

    Returns:
        B's turn. Details of a Reply: A's last message, what A read first, and of several turns everything that was said.

    Raises:
        ValueError: Unequal numbers of prompts, an empty prompt, or one that leaves no room.

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
        """Keeps what was said and spent, and returns what was said."""
        for i, (x, cost) in enumerate(zip(texts := sent.message.text or (), sent.spent, strict=True)):
            said[i].append(x)
            spent[i] += cost
        return texts

    for n in range(talk.turns - 1):
        messages = note(send_text(a, heard_a, talk, 2 * n + 1))
        if n == 0:
            heard_b = [_turns(put(talk.reply, x, message=m)) for x, m in zip(prompts_b, messages, strict=True)]
        else:
            heard_b = [[*_turns(x), _turn("user", m)] for x, m in zip(heard_b, messages, strict=True)]
        back = note(send_text(b, heard_b, talk, 2 * n + 2))
        heard_b = [[*_turns(x), _turn("assistant", r)] for x, r in zip(heard_b, back, strict=True)]
        both = zip(heard_a, messages, back, strict=True)
        heard_a = [[*_turns(x), _turn("assistant", m), _turn("user", r)] for x, m, r in both]
    sent = send_text(a, heard_a, talk, 2 * talk.turns - 1)
    note(sent)
    details = [
        {"message": own[-1], "asked": a.render(put(talk.ask, x))} | ({"said": own} if talk.turns > 1 else {})
        for own, x in zip(said, prompts_a, strict=True)
    ]
    return receive_text(b, prompts_b, Sent(sent.message, details, spent), talk, heard_b)


def send_text(a: Agent, prompts: Sequence[Prompt], talk: Conversation, n: int = 1) -> Sent:
    """An agent writes a message after each of its prompts.

    Args:
        a: Who writes.
        prompts: What it reads, as it reads it.
        talk: How it writes.
        n: Which message of the conversation it is: each draws with seeds of its own.

    Returns:
        Messages of text.
    """
    written = talk.write(start_turn(a, prompts), n)
    texts = tuple(reply.text for reply in written)
    return Sent(Message(text=texts), [{"message": x} for x in texts], [reply.spent for reply in written])


def receive_text(
    b: Agent, prompts_b: Sequence[Prompt], sent: Sent, talk: Conversation, heard: Sequence[Prompt] = ()
) -> Turn:
    """An agent reads messages and its own prompts.

    Args:
        b: Who reads.
        prompts_b: Its own prompts.
        sent: Messages of text, one for each of them.
        talk: How it is told.
        heard: The conversations before, as it took part in them.

    Returns:
        Its turn.

    Raises:
        ValueError: The messages hold no text, or are not one for each prompt.
    """
    if sent.message.text is None or len(sent.message) != len(prompts_b):
        raise ValueError(f"{len(sent.message.text or ())} texts for {len(prompts_b)} prompts: give one for each")
    told = [put(talk.tell, x, message=m) for x, m in zip(prompts_b, sent.message.text, strict=True)]
    if heard:
        told = [[*_turns(x), _turn("user", text(y))] for x, y in zip(heard, told, strict=True)]
    return start_turn(b, told, details=sent.details, before=sent.spent)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(prompt: Prompt) -> list[Mapping[str, str]]:
    """A prompt as a conversation."""
    return [_turn("user", prompt)] if isinstance(prompt, str) else list(prompt)


def check_message(ask: str, tell: str, prefix: str = "") -> None:
    """ValueError: words of a `message` that lack a place for what is put into them, or have another. prefix: of their names."""
    check_words(f"{prefix}ask", ask, {"prompt"}, {"prompt"})
    check_words(f"{prefix}tell", tell, {"message", "prompt"}, {"message", "prompt"})


def check_words(name: str, words: str, needed: Collection[str], allowed: Collection[str]) -> None:
    """ValueError: a template that lacks one of the `needed` places, or has one that is not `allowed`."""
    try:
        found = {field for _, field, *_ in string.Formatter().parse(words) if field is not None}
    except ValueError:  # a brace that stands alone
        found = {"{"}
    if not set(needed) <= found <= set(allowed):
        places = " and ".join(f"{{{place}}}" for place in sorted(needed or allowed))
        raise ValueError(f"{name} {words!r}: it must have {places} and no other braces ({{{{ is a brace itself)")


def put(template: str, prompt: Prompt, **parts: str) -> Prompt:
    """A prompt put into a template, as {prompt}; in a conversation, its last turn that is a user's is."""
    if isinstance(prompt, str):
        return template.format(prompt=prompt, **parts)
    turns, at = list(prompt), _last(prompt)
    turns[at] = {**turns[at], "content": template.format(prompt=turns[at]["content"], **parts)}
    return turns


def text(prompt: Prompt) -> str:
    """A prompt as running text: of a conversation, its last turn that is a user's."""
    return prompt if isinstance(prompt, str) else prompt[_last(prompt)]["content"]


def _last(turns: Sequence[Mapping[str, str]]) -> int:
    """The last turn that is not one the agent has begun to write itself."""
    return next(i for i in reversed(range(len(turns))) if turns[i]["role"] != "assistant")
