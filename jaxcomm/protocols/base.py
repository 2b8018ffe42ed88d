"""What every protocol ends in: a `Turn`, an agent that has read all it is given and now writes, or scores given texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt, row_keys
from jaxcomm.cache import KVCache
from jaxcomm.flops import blocks_flops, generation_flops, head_flops
from jaxcomm.generate import Generation, Sampling, begin, bucket, go_on, left_pad, score
from jaxcomm.model import prefill

STEP = 16
"""Tokens between two looks at the text, where there are stop strings."""
SHARED = 32
"""Tokens that prompts must have in common for them to be read once for all."""

prefill_rows = jax.jit(prefill)
_begin = jax.jit(begin, static_argnames="max_new_tokens")
_go_on = jax.jit(go_on, donate_argnames="writing")
_score = jax.jit(score)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an agent said to one prompt, and how it came to it.

    raw: the text as it was decoded, up to a stop string; read, written: token strings; logprob: of all tokens written;
    flops: of all models, without padding; details: what is the protocol's own (A's message, or layers, positions and
    norms of the edit).
    """

    raw: str
    read: tuple[str, ...]
    written: tuple[str, ...]
    logprob: float
    flops: int
    details: dict[str, Any]

    @property
    def text(self) -> str:
        """Without surrounding space."""
        return self.raw.strip()

    def row(self) -> dict[str, Any]:
        return {"text": self.text, **dataclasses.asdict(self)}


class Likelihood(NamedTuple):
    """Of a given text after one prompt: its log-probability, whether greedy decoding would write it, its tokens, and the
    FLOPs of reading both (the communication included)."""

    logprob: float
    greedy: bool
    tokens: int
    flops: int


class Shared(NamedTuple):
    """Prompts as arrays: tokens and mask [B, P], left-padded, and what all of them begin with, already read."""

    tokens: np.ndarray
    mask: np.ndarray
    past: tuple[KVCache, ...]


def share(agent: Agent, rows: Sequence[Sequence[int]]) -> Shared:
    """Prompts that begin alike (few-shot examples) are read once up to where they part."""
    first, last = min(rows), max(rows)  # the two that part first, in lexical order
    common = next((n for n, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    common = min(common, min(map(len, rows)) - 1)
    limit, past = agent.params.config.max_positions, ()
    if common >= SHARED and len(rows) > 1:
        tokens, mask = left_pad([first[:common]], bucket(common, limit))
        past, rows = (prefill_rows(agent.params, tokens, mask=mask)[1],), [row[common:] for row in rows]
    return Shared(*left_pad(rows, bucket(max(map(len, rows)), limit)), past)


@dataclasses.dataclass(frozen=True)
class Turn:
    """An agent that has read, prompt by prompt, and whose turn it is.

    rows: the tokens it read; logits [B, V] of the next one; cache, past: keys and values of the prompts, those in
    `past` only to be read; details, flops: the protocol's own, and what it cost on top of reading the prompts.
    """

    agent: Agent
    prompts: Sequence[Prompt]
    rows: Sequence[Sequence[int]]
    logits: Any
    cache: KVCache
    past: tuple[KVCache, ...]
    details: Sequence[Mapping[str, Any]]
    flops: Sequence[int]

    def write(
        self,
        max_new_tokens: int = 16,
        *,
        until: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[Reply]:
        """One reply per prompt, to its stop token, to the first of the strings `until` (not in the text), or to
        `max_new_tokens`. seed: one for all prompts, or one for each. ValueError: no room for so many tokens."""
        self.agent.check_room(self.rows, max_new_tokens)
        out = self._generate(max_new_tokens, until, sampling, row_keys(seed, len(self.rows)))
        config, tokenizer = self.agent.params.config, self.agent.tokenizer
        replies = []
        for i, row in enumerate(self.rows):
            written = out.tokens[i, : out.lengths[i]]
            raw = cut(tokenizer.decode(written, skip_special_tokens=True), until)
            flops = generation_flops(config, len(row), len(written)) + self.flops[i]
            logprob = float(out.logprobs[i].sum())
            read, spelled = self.agent.tokens(row), self.agent.tokens(written)
            replies.append(Reply(raw, tuple(read), tuple(spelled), logprob, flops, dict(self.details[i])))
        return replies

    def _generate(self, max_new_tokens, until, sampling, keys) -> Generation:
        """On the host; nothing is left after the token that completes a stop string."""
        params, stops = self.agent.params, jnp.asarray(self.agent.stop_tokens, jnp.int32)
        how = dict(sampling=sampling, keys=keys, stop_tokens=stops)
        writing = _begin(self.logits, self.cache, max_new_tokens=max_new_tokens, **how)
        if until:
            ends = np.full(len(self.rows), max_new_tokens)
            for t in range(0, max_new_tokens, STEP):
                writing = _go_on(params, writing, min(t + STEP, max_new_tokens), past=self.past, **how)
                tokens, lengths = jax.device_get((writing.out.tokens, writing.out.lengths))
                for i in np.flatnonzero((ends == max_new_tokens) & (lengths > t)):
                    ends[i] = min(ends[i], self._end(tokens[i, : lengths[i]], until, t))
                writing = writing.replace(done=writing.done | (ends < max_new_tokens))
                if np.all(writing.done):
                    break
            after = np.arange(max_new_tokens) >= ends[:, None]
            out = jax.device_get(writing.out)
            return Generation(
                np.where(after, -1, out.tokens), np.where(after, 0, out.logprobs), np.minimum(out.lengths, ends)
            )
        return jax.device_get(_go_on(params, writing, max_new_tokens, past=self.past, **how).out)

    def _end(self, tokens: np.ndarray, until: Sequence[str], begin: int) -> int:
        """Tokens up to the one that completes a stop string; more than there are if none does. None does before `begin`."""
        says = lambda n: self.agent.tokenizer.decode(tokens[:n], skip_special_tokens=True)
        if not any(stop in says(len(tokens)) for stop in until):
            return np.iinfo(int).max
        return next(n for n in range(begin, len(tokens) + 1) if any(stop in says(n) for stop in until))

    def score(self, continuations: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        """Of every given text after its prompt; each prompt may have another number of them. Nothing is written.

        ValueError: a text without tokens, or one that does not fit after its prompt.
        """
        spelled = [
            [self.agent.follow(prompt, text) for text in texts]
            for prompt, texts in zip(self.prompts, continuations, strict=True)
        ]
        return self.score_tokens(spelled)

    def score_tokens(self, continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[Likelihood]]:
        """`score` of token ids."""
        for row, texts in zip(self.rows, continuations, strict=True):
            if not all(texts):
                raise ValueError("a text to score has no tokens")
            self.agent.check_room([row], max(map(len, texts), default=1) - 1)
        C, T = max(map(len, continuations)), max(len(text) for texts in continuations for text in texts)
        padded = np.full((len(self.rows), C, 1 if T == 1 else 1 + bucket(T - 1, T + 32, 4)), -1, np.int32)
        for i, texts in enumerate(continuations):
            for c, text in enumerate(texts):
                padded[i, c, : len(text)] = text
        how = dict(past=self.past)
        logprobs, greedy = jax.device_get(_score(self.agent.params, self.logits, self.cache, padded, **how))
        logprobs, greedy = logprobs.sum(axis=-1, dtype=np.float64), greedy.all(axis=-1)
        config = self.agent.params.config

        def cost(i: int, new: int) -> int:
            blocks = blocks_flops(config, len(self.rows[i]) + new - 1)
            return self.flops[i] + blocks + new * head_flops(config)

        return [
            [
                Likelihood(float(logprobs[i, c]), bool(greedy[i, c]), len(text), cost(i, len(text)))
                for c, text in enumerate(texts)
            ]
            for i, texts in enumerate(continuations)
        ]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def hear(
    agent: Agent,
    prompts: Sequence[Prompt],
    *,
    rows: Sequence[Sequence[int]] | None = None,
    details: Sequence[Mapping[str, Any]] | None = None,
    flops: Sequence[int] | None = None,
) -> Turn:
    """The agent reads its prompts. rows: their tokens, where they are not the prompts' own. ValueError: `Agent.rows`'."""
    rows = agent.rows(prompts, 1) if rows is None else rows
    tokens, mask, past = share(agent, rows)
    logits, cache = prefill_rows(agent.params, tokens, mask=mask, past=past)
    if agent.longest is not None:
        dropped = [len(agent.encode(p)) - len(row) for p, row in zip(prompts, rows, strict=True)]
        details = [{**d, "dropped": n} for d, n in zip(details or [{}] * len(rows), dropped, strict=True)]
    return Turn(agent, prompts, rows, logits, cache, past, details or [{} for _ in rows], flops or [0] * len(rows))
