"""An agent: a model together with its tokenizer. Everything below this module takes token ids, not strings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from jaxcomm.alignment import PADDING, align, within
from jaxcomm.cache import KVCache
from jaxcomm.compiled import check_past
from jaxcomm.config import NEW_TOKENS, AnyArray
from jaxcomm.decoding import Decoding, Generation, bucket, check_finite, start_decoding, write_until
from jaxcomm.edits import Edit, checked
from jaxcomm.language_model import LanguageModel
from jaxcomm.latents import realignment
from jaxcomm.lenses import nearest_tokens, patchscope
from jaxcomm.messages import Message
from jaxcomm.model import Params
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed, row_keys
from jaxcomm.templates import written
from jaxcomm.tokenizer import Tokenizer

THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
"""Tokens that begin and end a thinking block (Qwen 3, distillations of R1; Magistral)."""

TARGET = "cat -> cat; 1135 -> 1135; hello -> hello; x ->"
"""Target prompt of a patchscope: the examples of Ghandeharioun et al. (2024), which ask the model to repeat a word."""

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a conversation: a list of turns with `role` and `content`, the format of chat templates."""


class TooLong(ValueError):
    """A prompt and its new tokens need more positions than the model has."""


@dataclasses.dataclass(frozen=True)
class Agent:
    """A model, its tokenizer, and the tokens it stops at.

    Attributes:
        params: The model: `Params`, or a network (`jaxcomm.lmnet`).
        tokenizer: A fast tokenizer of transformers. It may have more tokens than the model. Prompts with such a token are
            refused.
        stop_tokens: Tokens that end a reply.
        name: Name of the agent in errors and records.
        chat: Whether to put prompts through the tokenizer's chat template, as a user's turn. Otherwise they are read raw.
        longest: Largest number of tokens of a prompt. A longer prompt is truncated at its start; the tokens that the
            tokenizer adds to the start of every text are kept. None: a prompt that does not fit is refused.
        chat_args: Further arguments of the chat template, such as {"enable_thinking": False}, or tools.
        system: Text before every prompt: a system turn in a chat, otherwise a paragraph. A conversation that begins
            with a system turn keeps its own.
        revision: Commit of the hub repository that the model was loaded from, or None.

    Raises:
        ValueError: `chat` is set but the tokenizer has no chat template; `longest` is below 1.

    Example:
        >>> bob = jc.Agent(agent.params, agent.tokenizer, agent.stop_tokens, name="Bob")
        >>> asked = bob.tokenize(["Bob is at Petra. Which country is Bob located in?"], new=8)
        >>> bob.text(jc.generate(bob.params, asked, max_new_tokens=8, stop_tokens=bob.stop_tokens))
        ['Jordan']
    """

    params: LanguageModel
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    name: str = "agent"
    chat: bool = False
    longest: int | None = None
    chat_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    revision: str | None = None

    def __post_init__(self):
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError(f"{self.name}: this tokenizer has no chat template; use raw prompts")
        if self.longest is not None and self.longest < 1:
            raise ValueError(
                f"{self.name}: longest = {self.longest} leaves no room for a prompt: ask for fewer new tokens"
            )

    @property
    def single(self) -> Params:
        """The model as `Params`, for callers that need its layers.

        Raises:
            ValueError: The agent is a network, which has no layers to be split at.
        """
        if isinstance(self.params, Params):
            return self.params
        raise ValueError(f"{self.name} is a network, which has no layers to be split at: name a single model")

    def render(self, prompt: Prompt) -> str:
        """Renders a prompt as the text that the tokenizer will encode.

        Without `chat`, a text stays as it is and the turns of a conversation become paragraphs. With `chat`, the chat
        template renders the prompt, including special tokens. If the last turn is an assistant's, the agent continues it.

        Args:
            prompt: A text, or a conversation.

        Returns:
            The text, with the agent's `system` before it.

        Raises:
            ValueError: The chat template refuses the conversation.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        if not self.chat:
            return "\n\n".join(turn["content"] for turn in turns)
        try:
            return written(self.tokenizer, turns, self.chat_args)
        except ValueError as error:
            raise ValueError(f"{self.name}'s chat template refuses the conversation: {error}") from error

    def encode(self, prompt: Prompt) -> list[int]:
        """Encodes one prompt, raw or through the chat template, without truncation.

        Args:
            prompt: A text, or a conversation.

        Returns:
            Its token ids.

        Raises:
            ValueError: The prompt has a token that the model does not have; the chat template refuses it.
        """
        return self.spelled(self.render(prompt))

    def spelled(self, text: str) -> list[int]:
        """Encodes a rendered text. The tokenizer's start tokens are not added a second time if the text has them already.

        Args:
            text: Result of `render`, or its beginning.

        Returns:
            Its token ids.

        Raises:
            ValueError: It has a token that the model does not have.
        """
        begun = self.chat or (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        ids = self.tokenizer.encode(text, add_special_tokens=not begun)
        vocab = self.params.config.vocab
        if odd := [i for i in ids if i >= vocab]:
            raise ValueError(
                f"{self.name}: the prompt has token {self.tokens(odd[:1])[0]!r} ({odd[0]}), the model has {vocab} tokens: leave it out"
            )
        return ids

    def kept(self, ids: Sequence[int]) -> list[int]:
        """Finds which tokens of a prompt are read after truncation to `longest`.

        Args:
            ids: Token ids of the prompt.

        Returns:
            Indices into `ids`: all of them; or, if there are more than `longest`, the tokens that the tokenizer adds to
            the start of every text, and the last tokens.
        """
        if self.longest is None or len(ids) <= self.longest:
            return list(range(len(ids)))
        added = self.tokenizer.encode("")
        begin = len(added) if list(ids[: len(added)]) == added else int(ids[0] == self.tokenizer.bos_token_id)
        begin = min(begin, self.longest)
        return [*range(begin), *range(len(ids) - (self.longest - begin), len(ids))]

    @property
    def first_token(self) -> int:
        """Token to put before a text that has no prompt: the begin-of-sequence token, else an end-of-sequence or stop token.

        Raises:
            ValueError: The tokenizer has neither.
        """
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, *self.stop_tokens)
        first = next((token for token in known if token is not None), None)
        if first is None:
            raise ValueError(f"{self.name}: its tokenizer has no token that a text begins or ends with: give a prompt")
        return first

    def rows(self, prompts: Sequence[Prompt], new: int = 0) -> list[list[int]]:
        """Encodes prompts, and truncates them to `longest`.

        Args:
            prompts: Texts, or conversations.
            new: Number of tokens to leave room for after each.

        Returns:
            Token ids of each prompt.

        Raises:
            ValueError: A prompt is empty; it has a token that the model does not have; it leaves no room for `new`
                tokens.
        """
        for row, prompt in enumerate(prompts):
            if not (prompt if isinstance(prompt, str) else "".join(turn["content"] for turn in prompt)).strip():
                raise ValueError(f"empty prompt at row {row}")
        rows = [[ids[i] for i in self.kept(ids)] for ids in map(self.encode, prompts)]
        self.check_room(rows, new)
        return rows

    def check_room(self, rows: Sequence[Sequence[int]], new: int) -> None:
        """Checks that prompts and new tokens fit the model's positions.

        Args:
            rows: Token ids of each prompt.
            new: Number of tokens that follow each.

        Raises:
            TooLong: A prompt leaves no room for them. TooLong is a ValueError.
            ValueError: `new` is not below the model's number of positions.
        """
        positions = self.params.config.max_positions
        length, limit = max(map(len, rows), default=0), positions - new
        if limit < 1:
            raise ValueError(
                f"a prompt of {length} tokens does not fit: {new} tokens are to follow it, and the model has {positions} "
                "positions; ask for fewer"
            )
        if length > limit:
            raise TooLong(
                f"a prompt of {length} tokens does not fit: the model's positions leave room for {limit}; shorten it"
            )

    def tokenize(self, prompts: Sequence[Prompt], new: int = 0) -> Prompts:
        """Encodes prompts as arrays, and checks them.

        Args:
            prompts: Texts, or conversations.
            new: Number of tokens to leave room for after each.

        Returns:
            Tokens and mask [B, P], left-padded to a bucket (`decoding.bucket`), so that prompts of similar lengths
            share one compiled program.

        Raises:
            ValueError: `prompts` is one text, not a list; a prompt is empty; it has a token that the model does not
                have; it leaves no room for `new` tokens.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts are a list of texts: give [{prompts[:20]!r}...]")
        rows = self.rows(prompts, new)
        return left_pad(rows, bucket(max(map(len, rows), default=0), self.params.config.max_positions - new))

    def find(self, prompts: Sequence[Prompt], text: str | Sequence[str]) -> np.ndarray:
        """Finds the tokens of a text in prompts, for the positions of a `Site`.

        Args:
            prompts: Texts, or conversations, as `tokenize` takes them.
            text: Text to look for: one for all prompts, or one for each.

        Returns:
            A mask [B, P] of the tokens of every occurrence, in the columns of `tokenize(prompts)`.

        Raises:
            ValueError: The numbers of texts and prompts differ; a prompt does not contain its text; the text begins or ends within a token; the tokenizer
                returns no character offsets.

        Example:
            >>> agent.find(["Bob is at Petra."], "Petra").sum()
            np.int64(1)
        """
        wanted = [text] * len(prompts) if isinstance(text, str) else list(text)
        if len(wanted) != len(prompts):
            raise ValueError(
                f"{len(wanted)} texts to find in {len(prompts)} prompts: give one for each, or one for all"
            )
        rows = []
        for whole, part in zip(map(self.render, prompts), wanted, strict=True):
            rows.append(within(self._offsets(whole), whole, part)[self.kept(self.spelled(whole))])
        columns = self.tokenize(prompts).shape[1]
        return np.stack([np.pad(row, (columns - len(row), 0)) for row in rows])

    def before_last_turn(self, prompt: Prompt) -> int:
        """Counts the tokens of a prompt before its last turn: worked examples, a system prompt, template text.

        Args:
            prompt: A text, or a conversation. It must not be longer than `longest`.

        Returns:
            The number of tokens. 0 for a raw text without `system`.

        Raises:
            ValueError: The tokenizer returns no character offsets; the chat template changes the text of the last turn.
        """
        if isinstance(prompt, str) and not self.chat and not self.system:
            return 0
        text, last = self.render(prompt), prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if (begin := text.rfind(last.strip())) < 0:
            raise ValueError(f"{self.name}'s chat template does not write the last turn {last[:40]!r} as it is")
        return int(np.sum(self._offsets(text)[:, 1] <= begin))

    def _offsets(self, text: str) -> np.ndarray:
        """First and last character offset of every token in a rendered text, [T, 2]."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{self.name}: its tokenizer does not say where tokens stand; give positions as numbers")
        begun = self.chat or (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        found = self.tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)["offset_mapping"]
        return np.asarray(found, int).reshape(-1, 2)

    def align(self, receiver: Agent, prompts: Sequence[Prompt]) -> np.ndarray:
        """Finds, for each token that a receiver reads, the corresponding token of this agent (`alignment.align`).

        Args:
            receiver: The receiver B.
            prompts: Texts, or conversations. Both agents read them as the same text.

        Returns:
            An array [B, P_B] with the columns of `receiver.tokenize(prompts)`. Each entry is a column of
            `self.tokenize(prompts)`; -1 on padding; -2 if this agent has no corresponding token. `fit_kv_maps` and
            `map_cache` accept it.

        Raises:
            ValueError: The agents read different texts (through chat templates, or with another `system`); a tokenizer
                returns no character offsets.

        Example:
            >>> agent.align(agent, ["Bob is at Petra."])[0, -4:]
            array([28, 29, 30, 31])
        """
        sides, rows = (self, receiver), []
        for prompt in prompts:
            texts = [side.render(prompt) for side in sides]
            if texts[0] != texts[1]:
                raise ValueError(
                    f"{self.name} reads {texts[0][:40]!r}, {receiver.name} reads {texts[1][:40]!r}: tokens are aligned in "
                    "one text, so let both read prompts raw"
                )
            read = [side._offsets(texts[0])[side.kept(side.spelled(texts[0]))] for side in sides]
            rows.append((len(read[0]), align(*read)))
        columns_a, columns_b = (side.tokenize(prompts).shape[1] for side in sides)
        columns = np.full((len(rows), columns_b), PADDING)
        for row, (length, found) in enumerate(rows):
            columns[row, columns_b - len(found) :] = np.where(found < 0, found, found + columns_a - length)
        return columns

    def stream(
        self,
        prompt: Prompt,
        *,
        past: Sequence[KVCache] = (),
        edits: Sequence[Edit] = (),
        seed: Seed = 0,
        **decoding: Unpack[Decoding],
    ) -> Iterator[str]:
        """Generates after a prompt, and yields the text piece by piece.

        Args:
            prompt: A text, or a conversation.
            past: Key/value caches of the tokens before the prompt (`generate`).
            edits: Edits of the model's states (`generate`). Positions are those of `tokenize([prompt])`.
            seed: Random seed, if `sampling` is given.
            **decoding: Options of `Decoding`. By default the agent's own stop tokens end the reply.

        Yields:
            New text, in whole characters. Nothing while the agent is thinking.

        Raises:
            ValueError: As for `tokenize` and `generate`.
            FloatingPointError: The logits are NaN.

        Example:
            >>> "".join(agent.stream("Bob is at Petra. Which country is Bob located in?", max_new_tokens=8))
            ' Jordan'
        """
        decoding = {"stop_tokens": self.stop_tokens, "keys": row_keys(seed, 1), **decoding}
        most = decoding.get("max_new_tokens", NEW_TOKENS)
        prompts, past = self.tokenize([prompt], most), tuple(past)
        check_past(self.params, past, prompts, most)
        (row,), told = self.rows([prompt]), ""
        state = start_decoding(*prefill(self.params, prompts, past=past, edits=edits), **decoding)
        edits = checked(self.params, edits, None)
        for n in range(1, most + 1):
            out = jax.device_get(state.out)
            check_finite(out)
            text = self.said([i for i in out.tokens[0, : out.lengths[0]] if i not in self.stop_tokens], row)
            whole = text.rstrip("\ufffd")
            if whole.startswith(told) and len(whole) > len(told):
                yield whole[len(told) :]
                told = whole
            if state.done[0]:
                break
            state = write_until(self.params, state, n + 1, past=past, edits=edits)

    def describe(self, message: Message, count: int = 5) -> str:
        """Describes a message of this agent's model.

        Args:
            message: A message with states, such as `send` returns.
            count: Number of tokens to name for each state.

        Returns:
            One line for the whole message and one for each prompt. A prompt's line gives the norm of its last state and
            the tokens that the model's own head predicts from it (the likeliest).

        Raises:
            ValueError: The message holds no states; the agent is a network.
        """
        nearest, norms = np.asarray(nearest_tokens(self.single, message, count=count)[0]), np.asarray(message.norms)
        lines = [repr(message)]
        for row, (ids, norm) in enumerate(zip(nearest, norms, strict=True)):
            last = ids.reshape(-1, count)[-1]
            lines.append(
                f"{row}: norm {np.reshape(norm, -1)[-1]:.1f}, nearest {' '.join(map(repr, self.tokens(last)))}"
            )
        return "\n".join(lines)

    def patchscope(
        self,
        message: Message,
        target: Prompt = TARGET,
        placeholder: str = "x",
        *,
        layer: int | None = None,
        norm: float | None = None,
        max_new_tokens: int = NEW_TOKENS,
    ) -> list[str]:
        """Generates after a target prompt, with the message in the place of one word (`lenses.patchscope`).

        Args:
            message: A message of this agent's model, one state for each row.
            target: The target prompt. By default its examples ask the model to repeat a word.
            placeholder: The word that the message replaces. It must occur in the target prompt exactly once.
            layer: Layer after which the message is inserted. Default: the layer where it was read.
            norm: Scale every state to this Euclidean length first. Default: keep its own.
            max_new_tokens: Largest number of tokens.

        Returns:
            The text of each row.

        Raises:
            ValueError: The placeholder does not occur, or occurs more than once; otherwise as for `lenses.patchscope`.

        Example:
            >>> told = agent.tokenize(["Bob is at the Colosseum."])
            >>> message = jc.send(agent.params, told, jc.Site("resid_post", 4, "last"))
            >>> agent.patchscope(message, "Bob is in x", max_new_tokens=4)
            ['Italy, Europe']
        """
        text = self.render(target)
        if (times := text.count(placeholder)) != 1:
            raise ValueError(
                f"the placeholder {placeholder!r} occurs {times} times in the target prompt {text[:80]!r}: name a word that occurs once"
            )
        prompt = self.tokenize([target], max_new_tokens)
        at = self.find([target], placeholder)[:, -prompt.shape[1] :]
        how: dict[str, Any] = dict(max_new_tokens=max_new_tokens, stop_tokens=self.stop_tokens)
        return self.text(patchscope(self.single, prompt, message, at=at, layer=layer, norm=norm, **how))

    def follow(self, prompt: Prompt, continuation: str) -> list[int]:
        """Encodes a continuation in the context of its prompt.

        Prompt and continuation are encoded together. If the prompt alone has n tokens, the first n are dropped (the rule
        of lm-evaluation-harness). Space between the two belongs to the continuation.

        Args:
            prompt: A text, or a conversation.
            continuation: The text that follows it.

        Returns:
            Token ids of the continuation.

        Raises:
            ValueError: The prompt ends in space, and the space is tokenized differently once the continuation follows.
        """
        text, read = self.render(prompt), self.encode(prompt)
        whole = self.spelled(text + continuation)
        if whole[: len(read)] != read and text != text.rstrip():
            raise ValueError(
                f"the prompt ends in space ({text[-20:]!r}): begin the text {continuation!r} with it instead"
            )
        return whole[len(read) :]

    def spell(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Encodes each answer in the context of its prompt, as the tokenizer itself would.

        An answer follows the prompt after a space. In a chat it begins the assistant's turn.

        Args:
            prompts: Texts, or conversations.
            answers: One answer for each prompt.

        Returns:
            Token ids [B, T]; -1 after the end of an answer.

        Raises:
            ValueError: An answer has no tokens; its first letters change how the end of the prompt is tokenized.
        """
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            text, begin = self.render(prompt), self.encode(prompt)
            if self.chat:
                row = self.tokenizer.encode(answer, add_special_tokens=False)
            else:
                whole = self.spelled(f"{text} {answer}")
                if whole[: len(begin)] != begin:
                    raise ValueError(
                        f"{answer!r} does not follow {text[-80:]!r} in tokens: end the prompt with punctuation"
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
        """Decodes generated tokens.

        Args:
            out: Tokens that the agent's model wrote.

        Returns:
            The text of each row, without thoughts, special tokens and surrounding space.

        Raises:
            FloatingPointError: The logits of a row were NaN.
        """
        out = jax.device_get(out)
        check_finite(out)
        rows = [row[:n] for row, n in zip(out.tokens, out.lengths, strict=True)]
        return [self.said(row).strip() for row in rows]

    def said(self, ids: Sequence[int] | AnyArray, after: Sequence[int] = (), until: Sequence[str] = ()) -> str:
        """Decodes tokens generated after a prompt, without thoughts and special tokens.

        Args:
            ids: The generated tokens.
            after: Tokens of the prompt. It may end inside a thought that the chat template has begun.
            until: Stop strings. The text ends before the first of them.

        Returns:
            The text. It is empty if a thought has not ended yet.
        """
        ids = self.beyond_thoughts(ids, after)
        before = self.before_stop(ids, until)
        return self.tokenizer.decode(ids, skip_special_tokens=True) if before is None else before

    def beyond_thoughts(self, ids: Sequence[int] | AnyArray, after: Sequence[int] = ()) -> list[int]:
        """Removes thoughts from generated tokens.

        Args:
            ids: The generated tokens.
            after: Tokens of the prompt. It may end inside a thought that the chat template has begun.

        Returns:
            The tokens after the last thought. An empty list if a thought has not ended yet.
        """
        ids = [int(i) for i in ids]
        for begin, end in self._thoughts:
            if end in ids:
                return ids[len(ids) - ids[::-1].index(end) :]
            if begin in ids or begin in list(after)[-2:]:  # a template may add a line break after the begin token
                return []
        return ids

    def begins_thought(self, ids: Sequence[int]) -> bool:
        """Says whether a prompt ends inside a thought that its chat template has begun.

        Args:
            ids: Tokens of the prompt.

        Returns:
            Whether it does.
        """
        return any(begin in list(ids)[-2:] for begin, _ in self._thoughts)

    def before_stop(self, ids: Sequence[int], until: Sequence[str]) -> str | None:
        """Decodes tokens up to the first stop string. A stop string may contain a special token, which `text` leaves out.

        Args:
            ids: Tokens.
            until: Stop strings.

        Returns:
            The text before the first stop string, or None if there is no stop string.
        """
        special, found = self.tokenizer.all_special_tokens, []
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if (before := cut(text, until)) != text:
            found.append(before)
        if marked := [stop for stop in until if any(token in stop for token in special)]:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            if (before := cut(text, marked)) != text:
                found.append(functools.reduce(lambda text, token: text.replace(token, ""), special, before))
        return min(found, key=len, default=None)

    @functools.cached_property
    def realignment(self) -> AnyArray:
        """The matrix that maps the model's final states to the space of its embeddings (`latents.realignment`)."""
        return realignment(self.single)

    @functools.cached_property
    def line_ends(self) -> tuple[int, ...]:
        """Every token that contains a line break."""
        spelled = ("\n", "\u010a", "<0x0A>")  # literal; byte-level BPE; byte fallback
        known = [i for token, i in self.tokenizer.get_vocab().items() if any(x in token for x in spelled)]
        vocab = self.params.config.vocab
        return tuple(sorted(i for i in known if i < vocab and "\n" in self.tokenizer.decode([i])))

    @functools.cached_property
    def _thoughts(self) -> list[tuple[int, int]]:
        """The pairs of begin and end tokens of thoughts that exist in this tokenizer, as ids."""
        added = self.tokenizer.get_added_vocab()
        return [(added[begin], added[end]) for begin, end in THOUGHTS.items() if begin in added and end in added]

    def tokens(self, ids: Sequence[int] | AnyArray) -> list[str]:
        """Spells tokens as the tokenizer's vocabulary does.

        Args:
            ids: Token ids. A model may have more tokens than its tokenizer (its embedding matrix is padded).

        Returns:
            One string for each token; "<ID>" for a token that the tokenizer does not know.
        """
        ids = [int(i) for i in ids]
        spelled = self.tokenizer.convert_ids_to_tokens(ids)
        return [f"<{i}>" if token is None else token for i, token in zip(ids, spelled, strict=True)]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]
