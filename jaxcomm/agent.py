"""An agent: a model together with its tokenizer. The only place where strings enter the core."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np

from jaxcomm.decoding import Generation, bucket, left_pad

CHAT_DATE = "26 Jul 2024"
"""Templates that write a date (Llama 3.x) write this one, so that a prompt is the same tokens every day."""

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a conversation: turns with a `role` and a `content`, as chat templates take them."""


Seed = int | np.integer | Sequence[int] | np.ndarray
"""Of all rows together, or one for each."""


class TooLong(ValueError):
    """A prompt, with what is to follow it, has more tokens than the model has positions."""


@dataclasses.dataclass(frozen=True)
class Agent:
    """params (`Params`, or a network: `jaxcomm.model.LanguageModel`), a transformers tokenizer, and the tokens it stops at.

    chat: put every prompt through the tokenizer's chat template as a user's turn, instead of reading it raw.
    longest: prompts of more tokens lose their first ones; None refuses what does not fit.
    ValueError: tokenizer and model disagree on the vocabulary, or `chat` without a template.
    """

    params: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    name: str = "agent"
    chat: bool = False
    longest: int | None = None

    def __post_init__(self):
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= self.params.config.vocab:
            raise ValueError(
                f"{self.name}: the tokenizer knows token {largest}, the model has {self.params.config.vocab}: they do not belong together"
            )
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError(f"{self.name}: this tokenizer has no chat template; use raw prompts")

    def render(self, prompt: Prompt) -> str:
        """What the tokenizer is given: the raw text (of a conversation, its turns as paragraphs), or the chat template's
        rendering, which writes its own special tokens. An assistant's turn at the end is one the agent has begun."""
        if not self.chat:
            return prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        begun = turns[-1]["role"] == "assistant"
        how = dict(tokenize=False, add_generation_prompt=not begun, continue_final_message=begun, date_string=CHAT_DATE)
        try:
            return self.tokenizer.apply_chat_template(turns, **how)
        except jinja2.TemplateError as error:
            if turns[0]["role"] != "system" or len(turns) < 2:
                raise ValueError(f"{self.name}'s chat template refuses the conversation: {error}") from error
        # Gemma's, for one, knows no system turn: what it says goes before what the user says first.
        system, first, *rest = turns
        joined = {**first, "content": f"{system['content'].rstrip()}\n\n{first['content']}"}
        return self.tokenizer.apply_chat_template([joined, *rest], **how)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, raw or as a chat turn."""
        return self.tokenizer.encode(self.render(prompt), add_special_tokens=not self.chat)

    def rows(self, prompts: Sequence[Prompt], new: int = 0) -> list[list[int]]:
        """Token ids of every prompt. ValueError: an empty one, or one that leaves no room for `new` tokens."""
        for row, prompt in enumerate(prompts):
            if not (prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)).strip():
                raise ValueError(f"empty prompt at row {row}")
        rows = [self.encode(p)[-self.longest if self.longest else None :] for p in prompts]
        self.check_room(rows, new)
        return rows

    def check_room(self, rows: Sequence[Sequence[int]], new: int) -> None:
        """TooLong: a prompt that leaves no room for `new` tokens."""
        length, limit = max(map(len, rows), default=0), self.params.config.max_positions - new
        if length > limit:
            raise TooLong(
                f"a prompt of {length} tokens does not fit: the model's positions leave room for {limit}; shorten it"
            )

    def read(self, prompts: Sequence[Prompt], new: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded tokens and mask [B, P], P a bucket that leaves room for `new` tokens. ValueError: as `rows`."""
        rows = self.rows(prompts, new)
        return left_pad(rows, bucket(max(map(len, rows), default=0), self.params.config.max_positions - new))

    def follow(self, prompt: Prompt, continuation: str) -> list[int]:
        """Tokens of a continuation as they follow a prompt: those of both together, without as many as the prompt has
        alone (lm-evaluation-harness' rule). Space between the two belongs to the continuation.

        ValueError: the prompt ends in space that its last word and the continuation's first share a token with.
        """
        text, read = self.render(prompt), self.encode(prompt)
        whole = self.tokenizer.encode(text + continuation, add_special_tokens=not self.chat)
        if whole[: len(read)] != read and text != text.rstrip():
            raise ValueError(
                f"the prompt ends in space ({text[-20:]!r}): begin the text {continuation!r} with it instead"
            )
        return whole[len(read) :]

    def spell(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Tokens [B, T] of each answer as they follow its prompt, -1 after the end: the tokenizer's own spelling, after a
        space, or in a chat as a turn begins.

        ValueError: an empty answer, or one whose first letters change how the prompt's end is cut into tokens.
        """
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            begin = self.encode(prompt)
            if self.chat:
                row = self.tokenizer.encode(answer, add_special_tokens=False)
            else:
                whole = self.encode(f"{prompt} {answer}")
                if whole[: len(begin)] != begin:
                    raise ValueError(
                        f"{answer!r} does not follow {prompt!r} in tokens: end the prompt with punctuation"
                    )
                row = whole[len(begin) :]
            if not row:
                raise ValueError(f"the answer {answer!r} has no tokens")
            rows.append(row)
        spelled = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        for i, row in enumerate(rows):
            spelled[i, : len(row)] = row
        return spelled

    def text(self, out: Generation) -> list[str]:
        """What was written, row by row, without special tokens and surrounding space."""
        out = jax.device_get(out)
        rows = [row[:n] for row, n in zip(out.tokens, out.lengths, strict=True)]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Token strings as the tokenizer spells them; a model may have more tokens than its tokenizer (padding)."""
        ids = [int(i) for i in ids]
        spelled = self.tokenizer.convert_ids_to_tokens(ids)
        return [f"<{i}>" if token is None else token for i, token in zip(ids, spelled, strict=True)]


def row_keys(seed: Seed, rows: int) -> jax.Array:
    """A random key for every row, from one seed or from a seed for each."""
    if np.ndim(seed) == 0:
        return jax.random.split(jax.random.key(int(seed)), rows)  # pyright: ignore[reportArgumentType]
    return jax.vmap(jax.random.key)(np.asarray(seed, np.uint32))


def vary(seed: Seed, n: int) -> Seed:
    """The n-th of the seeds that one stands for. Those of rows are spread, since neighbours may have neighbouring ones."""
    if np.ndim(seed) == 0:
        return int(seed) + n  # pyright: ignore[reportArgumentType]
    return (np.asarray(seed, np.uint64) + np.uint64(n * 2654435761)) % np.uint64(2**32)
