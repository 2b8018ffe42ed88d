"""The baselines that talk in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence

from jaxcomm.agent import Agent, Prompt, Seed, vary
from jaxcomm.decoding import Sampling
from jaxcomm.protocols.base import Spent, Turn, hear


def silent(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> Turn:
    """B alone."""
    return hear(b, prompts_b)


def sender(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> Turn:
    """A alone, asked what B is."""
    return hear(a, prompts_b)


def skyline(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> Turn:
    """B reads A's prompt and its own, one after the other: all there is to know. Where A reads what B does, B reads it once."""
    both = zip(prompts_a, prompts_b, strict=True)
    return hear(b, [y if text(x) == text(y) else put("{text} {prompt}", y, text=text(x)) for x, y in both])


REPLY = "{message}\n\n{prompt}\n\nAsk your partner what you still need to know."


def message(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    ask: str = "{prompt}",
    tell: str = "{message} {prompt}",
    turns: int = 1,
    reply: str = REPLY,
    max_message_tokens: int = 48,
    until: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> Turn:
    """A writes after its prompt (put into `ask`), to one of the strings `until`, and B reads what A wrote and its own
    prompt (put into `tell`).

    turns: how often A writes. Before the last time, B reads A's message and its own prompt (put into `reply`) and writes back;
    each keeps the conversation as it took part in it. sampling, seed: of what is written before B's turn. Details: A's last
    message, what A read first, and of several turns everything that was said.

    ValueError: `check_message`'s, or no turn.
    """
    check_message(ask, tell)
    check_words("reply", reply, {"message"}, {"message", "prompt"})
    if turns < 1:
        raise ValueError(f"turns = {turns}: A writes at least once")
    heard_a = [put(ask, prompt) for prompt in prompts_a]
    asked, heard_b = [a.render(prompt) for prompt in heard_a], []
    said, spent = [[] for _ in prompts_b], [Spent() for _ in prompts_b]

    def say(agent: Agent, heard: Sequence[Prompt], n: int) -> list[str]:
        """What the agent writes, as the n-th message of all."""
        written = hear(agent, heard).write(max_message_tokens, until=until, sampling=sampling, seed=vary(seed, n))
        for i, m in enumerate(written):
            spent[i] += m.spent
            said[i].append(m.text)
        return [m.text for m in written]

    for n in range(turns):
        messages = say(a, heard_a, 2 * n + 1)
        if n == turns - 1:
            break
        if n == 0:
            heard_b = [_turns(put(reply, x, message=m)) for x, m in zip(prompts_b, messages, strict=True)]
        else:
            heard_b = [[*x, _turn("user", m)] for x, m in zip(heard_b, messages, strict=True)]
        back = say(b, heard_b, 2 * n + 2)
        heard_b = [[*x, _turn("assistant", r)] for x, r in zip(heard_b, back, strict=True)]
        both = zip(heard_a, messages, back, strict=True)
        heard_a = [[*_turns(x), _turn("assistant", m), _turn("user", r)] for x, m, r in both]
    told = [put(tell, x, message=own[-1]) for x, own in zip(prompts_b, said, strict=True)]
    if turns > 1:
        told = [[*x, _turn("user", text(y))] for x, y in zip(heard_b, told, strict=True)]
    details = [
        {"message": own[-1], "asked": first} | ({"said": own} if turns > 1 else {})
        for own, first in zip(said, asked, strict=True)
    ]
    return hear(b, told, details=details, before=spent)


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
