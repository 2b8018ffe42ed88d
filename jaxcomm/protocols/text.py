"""The baselines that talk in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence

from jaxcomm.agent import Agent, Prompt, Seed, vary
from jaxcomm.decoding import Sampling
from jaxcomm.protocols.base import Turn, hear


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


def message(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    ask: str = "{prompt}",
    tell: str = "{message} {prompt}",
    max_message_tokens: int = 48,
    until: Sequence[str] = (),
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> Turn:
    """A writes after its prompt (put into `ask`), to one of the strings `until`, and B reads what A wrote and its own
    prompt (put into `tell`).

    sampling, seed: of what A writes. ValueError: `check_message`'s.
    """
    check_message(ask, tell)
    asked = [put(ask, prompt) for prompt in prompts_a]
    said = hear(a, asked).write(max_message_tokens, until=until, sampling=sampling, seed=vary(seed, 1))
    return hear(
        b,
        [put(tell, prompt, message=m.text) for m, prompt in zip(said, prompts_b, strict=True)],
        details=[{"message": m.text, "asked": a.render(prompt)} for m, prompt in zip(said, asked, strict=True)],
        before=[m.spent for m in said],
    )


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
