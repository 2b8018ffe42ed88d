"""The baselines that talk in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomm.agent import Agent, Prompt, Seed, vary
from jaxcomm.generate import Sampling
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
    """B reads A's prompt and its own, one after the other: all there is to know."""
    return hear(b, [put("{text} {prompt}", y, text=text(x)) for x, y in zip(prompts_a, prompts_b, strict=True)])


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
    prompt (put into `tell`)."""
    asked = hear(a, [put(ask, prompt) for prompt in prompts_a])
    said = asked.write(max_message_tokens, until=until, sampling=sampling, seed=vary(seed, 1))
    return hear(
        b,
        [put(tell, prompt, message=m.text) for m, prompt in zip(said, prompts_b, strict=True)],
        details=[{"message": m.text, "message_tokens": len(m.written)} for m in said],
        flops=[m.flops for m in said],
    )


def put(template: str, prompt: Prompt, **parts: str) -> Prompt:
    """A prompt put into a template, as {prompt}; in a conversation, its last turn is."""
    if isinstance(prompt, str):
        return template.format(prompt=prompt, **parts)
    *before, last = prompt
    return [*before, {**last, "content": template.format(prompt=last["content"], **parts)}]


def text(prompt: Prompt) -> str:
    """A prompt as running text: of a conversation, its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
