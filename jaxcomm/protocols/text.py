"""The baselines that talk in text, or not at all (Ramesh & Li, section 4.1): silent, skyline, message."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomm.agent import Agent
from jaxcomm.flops import generation_flops
from jaxcomm.generate import Sampling
from jaxcomm.protocols.base import Reply, replies


def _answer(b: Agent, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling | None, seed: int) -> list[Reply]:
    tokens, mask = b.read(prompts, max_new_tokens)
    out = b.write(tokens, mask, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    return replies(b, tokens, mask, out, [{} for _ in prompts], [0] * len(prompts))


def silent(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[str],
    prompts_b: Sequence[str],
    *,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Reply]:
    """B alone."""
    return _answer(b, prompts_b, max_new_tokens, sampling, seed)


def skyline(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[str],
    prompts_b: Sequence[str],
    *,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Reply]:
    """B reads A's prompt and its own, one after the other: all there is to know."""
    together = [f"{x} {y}" for x, y in zip(prompts_a, prompts_b, strict=True)]
    return _answer(b, together, max_new_tokens, sampling, seed)


def message(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[str],
    prompts_b: Sequence[str],
    *,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
    ask: str = "{prompt}",
    tell: str = "{message} {prompt}",
    max_message_tokens: int = 48,
) -> list[Reply]:
    """A writes after its prompt (put into `ask`), B reads what A wrote and its own prompt (put into `tell`)."""
    tokens, mask = a.read([ask.format(prompt=p) for p in prompts_a], max_message_tokens)
    out = a.write(tokens, mask, max_new_tokens=max_message_tokens, sampling=sampling, seed=seed + 1)
    messages = a.text(out)
    cost = [generation_flops(a.params.config, int(m.sum()), int(n)) for m, n in zip(mask, out.lengths, strict=True)]
    prompts = [tell.format(message=m, prompt=p) for m, p in zip(messages, prompts_b, strict=True)]
    tokens, mask = b.read(prompts, max_new_tokens)
    out = b.write(tokens, mask, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    return replies(b, tokens, mask, out, [{"message": m} for m in messages], cost)
