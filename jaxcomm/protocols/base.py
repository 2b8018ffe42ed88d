"""What every protocol ends in: a `Turn`, an agent that has read all it is given and now writes, or scores given texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt, Seed, derive_seed, row_keys, write_until
from jaxcomm.cache import KVCache
from jaxcomm.config import AnyArray
from jaxcomm.decoding import (
    Generation,
    Sampling,
    bucket,
    check_finite,
    score,
    start_decoding,
    token_logprobs,
)
from jaxcomm.flops import generation_flops, scoring_flops
from jaxcomm.messages import Message
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.reading import prefill
from jaxcomm.sharding import by_rows

STEP = 16
"""Tokens between two looks at the text, where there are stop strings."""
SHARED = 32
"""Tokens that prompts must have in common for them to be read once for all."""

_start = jax.jit(start_decoding, static_argnames="max_new_tokens")
_first = jax.jit(lambda logits, tokens: token_logprobs(logits[:, None], tokens))


@dataclasses.dataclass(frozen=True)
class Spent:
    """What all agents together did for one prompt: FLOPs, tokens read and written (vectors, too), without padding and as if
    nothing were shared, and tokens that were cut off prompts (`Agent.longest`)."""

    flops: int = 0
    read: int = 0
    written: int = 0
    dropped: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(x + y for x, y in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def total(each: Iterable[Spent]) -> Spent:
    return functools.reduce(Spent.__add__, each, Spent())


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an agent said to one prompt, and how it came to it.

    raw: the text as it was decoded, up to a stop string; ids: its tokens, without the one that stopped it; read, written: token
    strings, of all that were; logprob: of all tokens written; spent: on this reply, by all agents; details: what is the protocol's own (A's message, or layers, positions and norms
    of the edit).
    """

    raw: str
    ids: tuple[int, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]
    logprob: float
    spent: Spent
    details: dict[str, Any]

    @property
    def text(self) -> str:
        """Without surrounding space."""
        return self.raw.strip()

    @property
    def flops(self) -> int:
        """Of all agents."""
        return self.spent.flops

    def row(self) -> dict[str, Any]:
        return {"text": self.text, "flops": self.flops, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Texts that were given after one prompt: of each its log-probability, whether greedy decoding would write it, and its
    number of tokens.

    spent: by all agents, the prompt read once for all texts; details: as a `Reply`'s.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]
    spent: Spent
    details: dict[str, Any]

    @property
    def flops(self) -> int:
        """Of all agents."""
        return self.spent.flops


@dataclasses.dataclass(frozen=True)
class Writing:
    """How agents write what they say to each other, before the turn that a protocol returns.

    Attributes:
        max_message_tokens: At most so many tokens each time.
        until: Strings that end a message.
        sampling: None is greedy; of a debate perhaps one for each agent.
        seed: One for all games, or one for each.
    """

    max_message_tokens: int = 256
    until: Sequence[str] = ()
    sampling: Sampling | Sequence[Sampling | None] | None = None
    seed: Seed = 0

    def write(self, turn: Turn, n: int, agent: int = 0) -> list[Reply]:
        """The n-th message of all, by one of the agents."""
        sampling = self.sampling if isinstance(self.sampling, Sampling | None) else self.sampling[agent]
        seed = derive_seed(self.seed, n)
        return turn.write(self.max_message_tokens, until=self.until, sampling=sampling, seed=seed)


@dataclasses.dataclass(frozen=True)
class Sent:
    """What was sent in every game, and has not been received yet.

    Attributes:
        message: States or text, one for each game.
        details: What a `Reply` tells of each.
        spent: What each cost.
    """

    message: Message
    details: Sequence[Mapping[str, Any]]
    spent: Sequence[Spent]


class Shared(NamedTuple):
    """Prompts as arrays, and what all of them begin with, already read."""

    prompts: Prompts
    past: tuple[KVCache, ...]


def share(agent: Agent, rows: Sequence[Sequence[int]]) -> Shared:
    """Prompts that begin alike (few-shot examples) are read once up to where they part."""
    first, *_, last = sorted(map(list, (rows[0], *rows)))  # the two that part first, in lexical order
    common = next((n for n, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    common = min(common, min(map(len, rows)) - 1)
    limit, past = agent.params.config.max_positions, ()
    if common >= SHARED and len(rows) > 1:
        begun = left_pad([first[:common]], bucket(common, limit))
        past, rows = (prefill(agent.params, begun)[1],), [row[common:] for row in rows]
    return Shared(by_rows(agent.params, left_pad(rows, bucket(max(map(len, rows)), limit))), past)


@dataclasses.dataclass(frozen=True)
class Turn:
    """An agent that has read, prompt by prompt, and whose turn it is.

    rows: the tokens it read; logits [B, V] of the next one; cache, past: keys and values of the prompts, those in
    `past` only to be read; details: the protocol's own; before: what was spent until then.
    """

    agent: Agent
    prompts: Sequence[Prompt]
    rows: Sequence[Sequence[int]]
    logits: jax.Array
    cache: KVCache
    past: tuple[KVCache, ...]
    details: Sequence[Mapping[str, Any]]
    before: Sequence[Spent]

    @property
    def dropped(self) -> list[int]:
        """Tokens that were cut off each prompt."""
        return dropped(self.agent, self.prompts, self.rows)

    def rendered(self, i: int) -> list[str]:
        """What was read before the i-th answer, as the tokenizer was given it; of a panel, by each who answers."""
        return [self.agent.render(self.prompts[i])]

    def write(
        self,
        max_new_tokens: int = 16,
        *,
        until: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: Seed = 0,
    ) -> list[Reply]:
        """One reply per prompt, to its stop token, to whichever of the strings `until` is complete first (it is not in the
        text), or to `max_new_tokens`. Thoughts are written and paid for, and are not in the text; no stop string ends them. seed: one for all prompts, or one for each. ValueError: no room for so many tokens."""
        self.agent.check_room(self.rows, max_new_tokens)
        until = [stop for stop in until if stop]  # an empty one is everywhere
        out = self._generate(max_new_tokens, until, sampling, row_keys(seed, len(self.rows)))
        check_finite(out)
        config = self.agent.params.config
        replies, lost = [], self.dropped
        for i, row in enumerate(self.rows):
            written = out.tokens[i, : out.lengths[i]]
            raw = self.agent.said(written, row, until)
            flops = generation_flops(config, len(row), len(written))
            spent = self.before[i] + Spent(flops, len(row), len(written), lost[i])
            logprob = float(out.logprobs[i].sum())
            read, spelled = self.agent.tokens(row), self.agent.tokens(written)
            replies.append(
                Reply(
                    raw,
                    self._ids(written, row, raw),
                    tuple(read),
                    tuple(spelled),
                    logprob,
                    spent,
                    dict(self.details[i]),
                )
            )
        return replies

    def _generate(self, max_new_tokens, until, sampling, keys) -> Generation:
        """On the host; nothing is left after the token that completes a stop string."""
        params, stops = self.agent.params, jnp.asarray(self.agent.stop_tokens, jnp.int32)
        how = dict(max_new_tokens=max_new_tokens, sampling=sampling, keys=keys, stop_tokens=stops)
        state = _start(self.logits, self.cache, **how)
        if until:
            ends = np.full(len(self.rows), max_new_tokens)
            for t in range(0, max_new_tokens, STEP):
                state = write_until(params, state, min(t + STEP, max_new_tokens), past=self.past)
                tokens, lengths = jax.device_get((state.out.tokens, state.out.lengths))
                for i in np.flatnonzero((ends == max_new_tokens) & (lengths > t)):
                    row = self.rows[int(i)]
                    ends[i] = min(ends[i], self._end(tokens[i, : lengths[i]], until, t, row))
                state = state.replace(done=state.done | (ends < max_new_tokens))
                if np.all(state.done):
                    break
            after = np.arange(max_new_tokens) >= ends[:, None]
            out = jax.device_get(state.out)
            return Generation(
                np.where(after, -1, out.tokens), np.where(after, 0, out.logprobs), np.minimum(out.lengths, ends)
            )
        return jax.device_get(write_until(params, state, max_new_tokens, past=self.past).out)

    def _ids(self, written: AnyArray, row: Sequence[int], raw: str) -> tuple[int, ...]:
        """Of the tokens written after a prompt, those whose text is within `raw`, and the thoughts before them."""
        ids = [int(token) for token in written if token not in self.agent.stop_tokens]
        while ids and len(self.agent.said(ids, row)) > len(raw):
            ids.pop()
        return tuple(ids)

    def _end(self, tokens: np.ndarray, until: Sequence[str], begin: int, row: Sequence[int]) -> int:
        """Tokens up to the one that completes a stop string; more than there are if none does. None does before `begin`."""
        stops = lambda n: self.agent.before_stop(self.agent.beyond_thoughts(tokens[:n], row), until) is not None
        if not stops(len(tokens)):
            return np.iinfo(int).max
        return next(n for n in range(begin, len(tokens) + 1) if stops(n))

    def score(self, continuations: Sequence[Sequence[str]]) -> list[Scored]:
        """Of the texts given after each prompt, which may be another number for each. Nothing is written.

        ValueError: a text without tokens of its own, or one that does not fit after its prompt.
        """
        pairs = zip(self.prompts, continuations, strict=True)
        return self.score_tokens([[self._follow(prompt, text) for text in texts] for prompt, texts in pairs])

    def _follow(self, prompt: Prompt, text: str) -> list[int]:
        tokens = self.agent.follow(prompt, text)
        if text and not tokens:
            raise ValueError(
                f"the text {text!r} shares its token with the prompt's end ({self.agent.render(prompt)[-20:]!r}): end the prompt where a word ends"
            )
        return tokens

    def score_tokens(self, continuations: Sequence[Sequence[Sequence[int]]]) -> list[Scored]:
        """`score` of token ids."""
        for row, texts in zip(self.rows, continuations, strict=True):
            if not all(texts):
                raise ValueError("a text to score has no tokens")
            self.agent.check_room([row], max(map(len, texts), default=1) - 1)
        logprobs, greedy = self._score_first(continuations)
        # Tokens after the first are read; of most short answers there are none.
        longer = [[c for c, text in enumerate(texts) if len(text) > 1] for texts in continuations]
        if any(longer):
            more, wanted = self._score_longer(
                [[texts[c] for c in own] for texts, own in zip(continuations, longer, strict=True)]
            )
            for i, own in enumerate(longer):
                logprobs[i][own], greedy[i][own] = more[i, : len(own)], wanted[i, : len(own)]
        scored, lost = [], self.dropped
        for i, (row, texts) in enumerate(zip(self.rows, continuations, strict=True)):
            lengths = tuple(map(len, texts))
            flops = scoring_flops(self.agent.params.config, len(row), lengths)
            spent = self.before[i] + Spent(flops, len(row), sum(lengths), lost[i])
            each = tuple(logprobs[i].tolist()), tuple(greedy[i].tolist())
            scored.append(Scored(*each, lengths, spent, dict(self.details[i])))
        return scored

    def _score_first(self, continuations) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each text's first token, its log-probability and whether none is likelier."""
        C = max(1, *map(len, continuations))
        first = np.zeros((len(self.rows), C), np.int32)
        for i, texts in enumerate(continuations):
            first[i, : len(texts)] = [text[0] for text in texts]
        logprobs, greedy = jax.device_get(_first(self.logits, first))
        cut = lambda found: [row[: len(texts)].copy() for row, texts in zip(found, continuations, strict=True)]
        return cut(logprobs.astype(np.float64)), cut(greedy)

    def _score_longer(self, continuations) -> tuple[np.ndarray, np.ndarray]:
        """Of texts of several tokens, all of them: [prompts, most texts of one]."""
        C, T = max(map(len, continuations)), max(len(text) for texts in continuations for text in texts)
        padded = np.full((len(self.rows), C, T if T <= 5 else 1 + bucket(T - 1, T + 32, 4)), -1, np.int32)
        for i, texts in enumerate(continuations):
            for c, text in enumerate(texts):
                padded[i, c, : len(text)] = text
        logprobs, greedy = jax.device_get(score(self.agent.params, self.logits, self.cache, padded, past=self.past))
        return logprobs.sum(axis=-1, dtype=np.float64), greedy.all(axis=-1)


def start_turn(
    agent: Agent,
    prompts: Sequence[Prompt],
    *,
    rows: Sequence[Sequence[int]] | None = None,
    details: Sequence[Mapping[str, Any]] | None = None,
    before: Sequence[Spent] | None = None,
) -> Turn:
    """The agent reads its prompts. rows: their tokens, where they are not the prompts' own. ValueError: `Agent.rows`'."""
    rows = agent.rows(prompts, 1) if rows is None else rows
    shared = share(agent, rows)
    logits, cache = prefill(agent.params, shared.prompts, past=shared.past)
    nothing = [{} for _ in rows], [Spent() for _ in rows]
    return Turn(agent, prompts, rows, logits, cache, shared.past, details or nothing[0], before or nothing[1])


def dropped(agent: Agent, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that an agent that cuts prompts (`longest`) cut off each."""
    if agent.longest is None:
        return [0] * len(rows)
    return [len(agent.encode(p)) - len(row) for p, row in zip(prompts, rows, strict=True)]
