"""The baselines that talk in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxcomm.agent import Agent, Prompt
from jaxcomm.protocols.base import Spent, Turn, Writing, start_turn


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
        **how: `Conversation`.

    Returns:
        B's turn. Details of a Reply: A's last message, what A read first, and of several turns everything that was said.
    """
    talk = Conversation(**how)
    heard_a = [put(talk.ask, prompt) for prompt in prompts_a]
    asked, heard_b = [a.render(prompt) for prompt in heard_a], []
    said, spent = [[] for _ in prompts_b], [Spent() for _ in prompts_b]

    def say(agent: Agent, heard: Sequence[Prompt], n: int) -> list[str]:
        """What the agent writes, as the n-th message of all."""
        written = talk.write(start_turn(agent, heard), n)
        for i, m in enumerate(written):
            spent[i] += m.spent
            said[i].append(m.text)
        return [m.text for m in written]

    for n in range(talk.turns):
        messages = say(a, heard_a, 2 * n + 1)
        if n == talk.turns - 1:
            break
        if n == 0:
            heard_b = [_turns(put(talk.reply, x, message=m)) for x, m in zip(prompts_b, messages, strict=True)]
        else:
            heard_b = [[*x, _turn("user", m)] for x, m in zip(heard_b, messages, strict=True)]
        back = say(b, heard_b, 2 * n + 2)
        heard_b = [[*x, _turn("assistant", r)] for x, r in zip(heard_b, back, strict=True)]
        both = zip(heard_a, messages, back, strict=True)
        heard_a = [[*_turns(x), _turn("assistant", m), _turn("user", r)] for x, m, r in both]
    told = [put(talk.tell, x, message=own[-1]) for x, own in zip(prompts_b, said, strict=True)]
    if talk.turns > 1:
        told = [[*x, _turn("user", text(y))] for x, y in zip(heard_b, told, strict=True)]
    details = [
        {"message": own[-1], "asked": first} | ({"said": own} if talk.turns > 1 else {})
        for own, first in zip(said, asked, strict=True)
    ]
    return start_turn(b, told, details=details, before=spent)


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
