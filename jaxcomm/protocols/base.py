"""The result of every protocol: a `Turn`. It holds an agent that has read its prompts and can now write a reply or score
given texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt, TooLong
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
    write_until,
)
from jaxcomm.edits import Edit
from jaxcomm.flops import blocks_flops, generation_flops, head_flops, prefix_flops
from jaxcomm.lenses import Lens, logit_lens
from jaxcomm.messages import Message
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.protocols.passes import further, passes, texts_of
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed, derive_seed, row_keys
from jaxcomm.sharding import by_rows

STEP = 16
"""With stop strings, the text is checked every so many tokens."""
SHARED = 32
"""Prompts that share at least this many first tokens read them once for all."""

_start = jax.jit(start_decoding, static_argnames="max_new_tokens")
_first = jax.jit(lambda logits, tokens: token_logprobs(logits[:, None], tokens))


@dataclasses.dataclass(frozen=True)
class Spent:
    """Cost of one prompt for all agents together. Padding is not counted, and shared work is counted for each prompt.

    Attributes:
        flops: Floating-point operations.
        read: Number of tokens or vectors read.
        written: Number of tokens or vectors generated, or of tokens scored.
        dropped: Number of tokens that truncation removed from prompts (`Agent.longest`).
        sent: Number of bytes that agents sent to each other: states in their own dtype, texts in UTF-8.
    """

    flops: int = 0
    read: int = 0
    written: int = 0
    dropped: int = 0
    sent: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(x + y for x, y in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def total(each: Iterable[Spent]) -> Spent:
    """Adds up costs.

    Args:
        each: The costs.

    Returns:
        Their sum.
    """
    return functools.reduce(Spent.__add__, each, Spent())


@dataclasses.dataclass(frozen=True)
class Reply:
    """An agent's reply to one prompt, with a record of how it was produced.

    Attributes:
        raw: The decoded text, up to a stop string.
        ids: Its token ids, without the token that stopped it.
        read: Strings of all tokens that the agent read.
        written: Strings of all tokens that the agent generated.
        logprobs: Log-probability of each generated token, in nats. Empty for a reply in vectors, which have none.
        spent: Cost of this reply for all agents.
        details: Facts that the protocol adds, such as A's message, or layers, positions and norms of the edit.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> reply, = protocols.silent(agent, agent, [""], asked).write(4)
        >>> reply.text, len(reply.written) == reply.spent.written
        ('Jordan', True)
    """

    raw: str
    ids: tuple[int, ...]
    read: tuple[str, ...]
    written: tuple[str, ...]
    logprobs: tuple[float, ...]
    spent: Spent
    details: dict[str, Any]

    @property
    def text(self) -> str:
        """The text without surrounding space."""
        return self.raw.strip()

    @property
    def logprob(self) -> float:
        """Log-probability of the reply in nats, including the token that stopped it. NaN for a reply in vectors."""
        return sum(self.logprobs) if self.logprobs else float("nan")

    @property
    def flops(self) -> int:
        """Floating-point operations of all agents."""
        return self.spent.flops

    def row(self) -> dict[str, Any]:
        """Makes a record of the reply, in the format of results files.

        Returns:
            All fields by name, and `text`, `logprob` and `flops`.
        """
        return {"text": self.text, "logprob": self.logprob, "flops": self.flops, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of the texts that were given after one prompt.

    Attributes:
        logprobs: Log-probability of each text, in nats.
        greedy: Whether greedy decoding would write each text.
        tokens: Number of tokens of each text.
        spent: Cost for all agents. The prompt is read once for all texts.
        details: Facts that the protocol adds, as in a `Reply`.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> scored, = protocols.silent(agent, agent, [""], asked).score([[" Jordan", " Egypt"]])
        >>> scored.greedy
        (True, False)
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    tokens: tuple[int, ...]
    spent: Spent
    details: dict[str, Any]

    @property
    def flops(self) -> int:
        """Floating-point operations of all agents."""
        return self.spent.flops


@dataclasses.dataclass(frozen=True)
class Writing:
    """Options for the messages that agents write to each other, before the turn that a protocol returns.

    Attributes:
        max_message_tokens: Largest number of tokens of a message.
        until: Strings that end a message.
        sampling: How to sample tokens. None: greedy decoding. In a debate it may be one for each agent.
        seed: Seed of all games, or one for each.
    """

    max_message_tokens: int = 256
    until: Sequence[str] = ()
    sampling: Sampling | Sequence[Sampling | None] | None = None
    seed: Seed = 0

    def write(self, turn: Turn, n: int, agent: int = 0) -> list[Reply]:
        """Writes a message.

        Args:
            turn: The turn that writes it.
            n: Number of the message in the conversation. Each message is sampled with its own seeds.
            agent: Number of the agent, if each has its own `sampling`.

        Returns:
            One reply for each prompt.
        """
        sampling = self.sampling if isinstance(self.sampling, Sampling | None) else self.sampling[agent]
        seed = derive_seed(self.seed, n)
        return turn.write(self.max_message_tokens, until=self.until, sampling=sampling, seed=seed)


@dataclasses.dataclass(frozen=True)
class Sent:
    """The messages of all games, sent but not received yet.

    Attributes:
        message: States or texts, one for each item.
        details: Facts about each message, for `Reply.details`.
        spent: Cost of each message.

    Example:
        >>> from jaxcomm.protocols.base import Spent
        >>> sent = protocols.Sent(jc.Message(text=("Bob is at Petra.",)), details=[{}], spent=[Spent()])
        >>> asked = ["Which country is Bob located in?"]
        >>> protocols.receive_text(agent, asked, sent, protocols.Conversation()).write(4)[0].text
        'Jordan'
    """

    message: Message
    details: Sequence[Mapping[str, Any]]
    spent: Sequence[Spent]


class Input(NamedTuple):
    """Everything that an agent reads before its turn, as arrays.

    Attributes:
        prompts: The prompts, without the tokens whose keys and values are in `past`.
        past: Key/value caches of the tokens before them: a common start of all prompts, or another agent's.
        edits: Edits of the states while the prompts are read.
    """

    prompts: Prompts
    past: tuple[KVCache, ...] = ()
    edits: tuple[Edit, ...] = ()


def share(agent: Agent, rows: Sequence[Sequence[int]]) -> Input:
    """Makes arrays of prompts. If prompts share their first tokens (few-shot examples), those are read once.

    Args:
        agent: The agent that reads.
        rows: Token ids of each prompt.

    Returns:
        The prompts from the first token that differs, and the cache of the shared tokens before it.
    """
    first, *_, last = sorted(map(list, (rows[0], *rows)))  # in lexical order, these two differ earliest
    common = next((n for n, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    common = min(common, min(map(len, rows)) - 1)
    limit, past = agent.params.config.max_positions, ()
    if common >= SHARED and len(rows) > 1:
        begun = left_pad([first[:common]], bucket(common, limit))
        past, rows = (prefill(agent.params, begun)[1],), [row[common:] for row in rows]
    return Input(by_rows(agent.params, left_pad(rows, bucket(max(map(len, rows)), limit))), past)


@dataclasses.dataclass(frozen=True)
class Turn:
    """An agent that has read its prompts and can now write replies or score texts.

    Attributes:
        agent: The agent that writes.
        prompts: Its prompts, one for each item.
        rows: Token ids that it read for each prompt.
        logits: Logits [B, V] of the next token.
        cache: Keys and values of the prompts.
        past: Key/value caches of the tokens before the prompts. They are only read.
        details: Facts that the protocol adds for each prompt, for its `Reply`.
        before: Cost of each prompt so far.
        received: The messages that the agent received, as they arrived, for each prompt. None: there was no message.
        prefix: Number of prefix tokens that each layer sees before each prompt, [B, L]. None: there is no prefix.
        begin: Number of positions that each prompt's prefix takes, [B]. None: 0.
        ahead: Number of tokens of each prompt before the prefix.
        thought: Number of latent thinking steps before the agent writes.
        given: Everything that the agent read, for `lens`. None: it was not read in one pass.

    Example:
        >>> turn = protocols.silent(agent, agent, [""], ["Bob is at Petra. Which country is Bob located in?"])
        >>> [reply.text for reply in turn.write(4)]
        ['Jordan']
    """

    agent: Agent
    prompts: Sequence[Prompt]
    rows: Sequence[Sequence[int]]
    logits: jax.Array
    cache: KVCache
    past: tuple[KVCache, ...]
    details: Sequence[Mapping[str, Any]]
    before: Sequence[Spent]
    received: Message | None = None
    prefix: np.ndarray | None = None
    begin: np.ndarray | None = None
    ahead: int = 0
    thought: int = 0
    given: Input | None = None

    @property
    def dropped(self) -> list[int]:
        """Number of tokens that truncation removed from each prompt."""
        return dropped(self.agent, self.prompts, self.rows)

    def rendered(self, i: int) -> list[str]:
        """Renders the prompt of one answer, as the text that the tokenizer got.

        Args:
            i: Number of the prompt.

        Returns:
            One text. (A `Panel` returns one for each agent that answers.)
        """
        return [self.agent.render(self.prompts[i])]

    def write(
        self,
        max_new_tokens: int = 16,
        *,
        until: Sequence[str] = (),
        sampling: Sampling | None = None,
        seed: Seed = 0,
    ) -> list[Reply]:
        """Writes one reply to each prompt.

        A reply ends at a stop token, before the first complete stop string, or after `max_new_tokens`. Thoughts are
        generated and counted in the cost, but are not in the text. A stop string does not end a thought.

        Args:
            max_new_tokens: Largest number of tokens of a reply.
            until: Stop strings. They are not in the text.
            sampling: How to sample tokens. None: greedy decoding.
            seed: Random seed for all prompts, or one for each.

        Returns:
            One reply for each prompt.

        Raises:
            ValueError: A prompt leaves no room for so many tokens; `max_new_tokens` is below 1.
            FloatingPointError: The logits of a row are NaN.
        """
        self.check_room([max_new_tokens] * len(self.rows))
        until = [stop for stop in until if stop]  # an empty one is everywhere
        out = self._generate(max_new_tokens, until, sampling, row_keys(seed, len(self.rows)))
        check_finite(out)
        replies, lost = [], self.dropped
        for i, row in enumerate(self.rows):
            written = out.tokens[i, : out.lengths[i]]
            raw = self.agent.said(written, row, until)
            spent = self.before[i] + Spent(self.flops(i, [len(written)]), len(row), len(written), lost[i])
            logprobs = tuple(float(x) for x in out.logprobs[i, : out.lengths[i]])
            read, spelled = self.agent.tokens(row), self.agent.tokens(written)
            replies.append(
                Reply(
                    raw,
                    self._ids(written, row, raw),
                    tuple(read),
                    tuple(spelled),
                    logprobs,
                    spent,
                    dict(self.details[i]),
                )
            )
        return replies

    def flops(self, i: int, new: Sequence[int] = (1,)) -> int:
        """Counts the FLOPs of reading a prompt after its prefix, and of writing or scoring texts after it.

        Latent thinking in between is not included: `before` already counts it.

        Args:
            i: Number of the prompt.
            new: Number of tokens of each text, at least 1. The last token of a text is not read.

        Returns:
            FLOPs; a multiply-add counts 2.
        """
        config, length = self.agent.params.config, len(self.rows[i])
        prefix = () if self.prefix is None else self.prefix[i].tolist()
        after = sum(n - 1 for n in new)
        reading = generation_flops(config, length, 1) + prefix_flops(
            config, prefix, length - self.ahead, 1 + self.thought + after
        )
        context = length + self.thought
        return reading + sum(blocks_flops(config, n - 1, context=context) for n in new) + after * head_flops(config)

    def check_room(self, new: Sequence[int]) -> None:
        """Checks that prefixes, prompts, thoughts and new tokens fit the model's positions.

        Args:
            new: Number of tokens that follow each prompt.

        Raises:
            TooLong: They do not. TooLong is a ValueError.
        """
        for i, (row, more) in enumerate(zip(self.rows, new, strict=True)):
            self.agent.check_room([row], more + self.thought)
            limit = self.agent.params.config.max_positions - more - self.thought
            if self.begin is not None and self.begin[i] + len(row) > limit:
                raise TooLong(
                    f"a prefix of {self.begin[i]} tokens and a prompt of {len(row)} do not fit: the model's positions "
                    f"leave room for {limit}; shorten them"
                )

    def lens(self, layers: Sequence[int] | None = None, **how: Any) -> Lens:
        """Applies the logit lens at every layer, at the last token before the agent's answer (`lenses.logit_lens`).

        Args:
            layers: Numbers of the layers. Default: all.
            **how: `count` and `answers`, as `logit_lens` takes them.

        Returns:
            The likeliest tokens after each layer.

        Raises:
            ValueError: As for `logit_lens`; the agent did not read everything in one pass (it thought in latents, or read
                expected embeddings).
        """
        if self.given is None:
            raise ValueError("this turn was not read in one pass, so it has no logit lens: use another protocol")
        prompts, past, edits = self.given
        return logit_lens(self.agent.single, prompts, past=past, edits=edits, layers=layers, **how)

    def _generate(self, max_new_tokens, until, sampling, keys) -> Generation:
        """Generate tokens, on the host. Tokens after the one that completes a stop string are removed."""
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
        """The generated tokens whose text is within `raw`, and the thoughts before them."""
        ids = [int(token) for token in written if token not in self.agent.stop_tokens]
        while ids and len(self.agent.said(ids, row)) > len(raw):
            ids.pop()
        return tuple(ids)

    def _end(self, tokens: np.ndarray, until: Sequence[str], begin: int, row: Sequence[int]) -> int:
        """Number of tokens up to the one that completes a stop string, or more than there are if none does. Only tokens from
        `begin` on can complete one."""
        stops = lambda n: self.agent.before_stop(self.agent.beyond_thoughts(tokens[:n], row), until) is not None
        if not stops(len(tokens)):
            return np.iinfo(int).max
        return next(n for n in range(begin, len(tokens) + 1) if stops(n))

    def score(self, continuations: Sequence[Sequence[str]]) -> list[Scored]:
        """Scores given texts after each prompt. Nothing is generated.

        Args:
            continuations: The texts for each prompt. Their number may differ between prompts.

        Returns:
            Log-probabilities of the texts after each prompt.

        Raises:
            ValueError: A text has no tokens of its own, or does not fit after its prompt.
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
        """Does the same as `score` for texts given as tokens.

        Args:
            continuations: Token ids of the texts after each prompt.

        Returns:
            Log-probabilities of the texts after each prompt.

        Raises:
            ValueError: A text has no tokens, or does not fit after its prompt.
        """
        for texts in continuations:
            if not all(texts):
                raise ValueError("a text to score has no tokens")
        self.check_room([max(map(len, texts), default=1) - 1 for texts in continuations])
        logprobs, greedy = self._score_first(continuations)
        # The prompt's logits score each first token. Only texts with further tokens need another pass; short answers do not.
        for low, high in passes([[len(text) for text in texts] for texts in continuations]):
            own = [[c for c, text in enumerate(texts) if low <= len(text) <= high] for texts in continuations]
            more, wanted = self._score_longer(
                [[texts[c] for c in some] for texts, some in zip(continuations, own, strict=True)]
            )
            for i, some in enumerate(own):
                logprobs[i][some], greedy[i][some] = more[i, : len(some)], wanted[i, : len(some)]
        scored, lost = [], self.dropped
        for i, (row, texts) in enumerate(zip(self.rows, continuations, strict=True)):
            lengths = tuple(map(len, texts))
            flops = self.flops(i, lengths)
            spent = self.before[i] + Spent(flops, len(row), sum(lengths), lost[i])
            each = tuple(logprobs[i].tolist()), tuple(greedy[i].tolist())
            scored.append(Scored(*each, lengths, spent, dict(self.details[i])))
        return scored

    def _score_first(self, continuations) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probability of each text's first token, and whether no token is likelier."""
        C = max(1, *map(len, continuations))
        first = np.zeros((len(self.rows), C), np.int32)
        for i, texts in enumerate(continuations):
            first[i, : len(texts)] = [text[0] for text in texts]
        logprobs, greedy = jax.device_get(_first(self.logits, first))
        cut = lambda found: [row[: len(texts)].copy() for row, texts in zip(found, continuations, strict=True)]
        return cut(logprobs.astype(np.float64)), cut(greedy)

    def _score_longer(self, continuations) -> tuple[np.ndarray, np.ndarray]:
        """The same for whole texts of several tokens: [prompts, largest number of texts per prompt]."""
        C, T = texts_of(map(len, continuations)), max(len(text) for texts in continuations for text in texts)
        padded = np.full((len(self.rows), C, 1 + further(T)), -1, np.int32)
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
    """Lets an agent read its prompts.

    Args:
        agent: The agent that reads.
        prompts: Texts, or conversations.
        rows: Token ids to read for each prompt, if they differ from the prompts' own tokens.
        details: Facts that the protocol adds for each prompt.
        before: Cost of each prompt so far.

    Returns:
        The agent's turn.

    Raises:
        ValueError: As for `Agent.rows`.
    """
    rows = agent.rows(prompts, 1) if rows is None else rows
    given = share(agent, rows)
    logits, cache = prefill(agent.params, given.prompts, past=given.past)
    told, spent = details or [{} for _ in rows], before or [Spent() for _ in rows]
    return Turn(agent, prompts, rows, logits, cache, given.past, told, spent, given=given)


def dropped(agent: Agent, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> list[int]:
    """Counts the tokens that an agent truncated from its prompts (`Agent.longest`).

    Args:
        agent: The agent that reads.
        prompts: Texts, or conversations.
        rows: Token ids that the agent read for each prompt.

    Returns:
        The number for each prompt.
    """
    if agent.longest is None:
        return [0] * len(rows)
    return [len(agent.encode(p)) - len(row) for p, row in zip(prompts, rows, strict=True)]
