"""Debate in expected embeddings (CIPHER, Pham et al. 2024): `debate`, but what agents say are vectors
(`jaxcomm.cipher`).

A response stands in its place in the next prompt as vectors, through the receiver's embedding matrix. The prompt's own
tokens are those it has with the response's readable text (nearest tokens) in that place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomm.agent import Agent, Prompt, Seed
from jaxcomm.cipher import Mixing, Partial, Stop, Vectors, cipher
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.flops import generation_flops
from jaxcomm.model import Params
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.protocols.base import Reply, Spent, Turn, start_turn
from jaxcomm.protocols.debates import FORMS, Form, check_debate, lookup, next_prompts
from jaxcomm.reading import prefill


@jax.jit
def _prefill_spliced(params: Params, prompts: Prompts, said: Bool[Array, "B P"], vectors: Float[Array, "B P D"]):
    """Reads prompts whose columns `said` are vectors instead of tokens."""
    return prefill(params, prompts.replace(tokens=jnp.where(said[..., None], vectors, params.embed[prompts.tokens])))


@dataclasses.dataclass(frozen=True)
class CipherTurn(Turn):
    """A turn that is written in expected embeddings, and read as the tokens nearest to them.

    Attributes:
        agent: As in `Turn`.
        prompts: As in `Turn`.
        rows: As in `Turn`.
        logits: As in `Turn`.
        cache: As in `Turn`.
        past: As in `Turn`.
        details: As in `Turn`.
        before: As in `Turn`.
        mixing: How a distribution becomes a vector, and when a response ends.
        lost: Number of tokens that were cut off each prompt, or nothing.
    """

    mixing: Mixing = dataclasses.field(default_factory=lambda: Mixing(Sampling()))
    lost: Sequence[int] = ()

    @property
    def dropped(self) -> list[int]:
        """Number of tokens that were cut off each prompt."""
        return list(self.lost) or super().dropped

    def speak(self, max_new_tokens: int, tables: Sequence[Any] = ()) -> Vectors:
        """Writes a response in vectors, for itself and for receivers.

        Args:
            max_new_tokens: Largest number of vectors.
            tables: Embedding matrices of the receivers.

        Returns:
            The response, on the host.

        Raises:
            ValueError: A prompt leaves no room for so many.
        """
        self.agent.check_room(self.rows, max_new_tokens)
        stops = jnp.asarray(self.agent.stop_tokens, jnp.int32)
        return jax.device_get(
            cipher(
                self.agent.params, self.logits, self.cache, self.mixing, tables=tuple(tables), past=self.past,
                max_new_tokens=max_new_tokens, stop_tokens=stops,
            )
        )  # fmt: skip

    def readable(self, out: Vectors) -> list[str]:
        """Decodes a response as the tokens nearest to its vectors.

        Args:
            out: The response.

        Returns:
            One text for each prompt.
        """
        rows = zip(out.tokens, out.lengths, strict=True)
        return [self.agent.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in rows]

    def write(self, max_new_tokens: int = 16, *, until: Sequence[str] = (), sampling=None, seed=0) -> list[Reply]:
        """Writes one reply to each prompt, in vectors. Nothing is drawn.

        Args:
            max_new_tokens: Largest number of vectors of a reply.
            until: Stop strings. They are not in the text.
            sampling: Must be None.
            seed: Not used.

        Returns:
            One reply for each prompt. Its logprob is NaN.

        Raises:
            ValueError: There is a `sampling`; a prompt leaves no room for so many.
        """
        check_no_draws(sampling)
        out = self.speak(max_new_tokens)
        spent, replies = self.spend(out, max_new_tokens), []
        for i, row in enumerate(self.rows):
            said = out.tokens[i, : out.lengths[i]]
            raw = self.agent.said(said, row, until)
            ids, read, written = self._ids(said, row, raw), self.agent.tokens(row), self.agent.tokens(said)
            before, details = self.before[i] + spent[i], dict(self.details[i])
            replies.append(Reply(raw, ids, tuple(read), tuple(written), float("nan"), before, details))
        return replies

    def spend(self, out: Vectors, max_new_tokens: int, others: Sequence[Agent] = ()) -> list[Spent]:
        """Counts what a response cost. The vector that stopped it, which is not said, counts too.

        Args:
            out: The response.
            max_new_tokens: Largest number of vectors that it could have.
            others: Receivers that it was also formed for.

        Returns:
            The cost for each prompt.
        """
        spent, config = [], self.agent.params.config
        for row, said, lost in zip(self.rows, out.lengths, self.dropped, strict=True):
            steps = min(int(said) + 1, max_new_tokens)
            flops = generation_flops(config, len(row), steps)
            flops += sum(mixing_flops(agent, steps) for agent in (self.agent, *others))
            spent.append(Spent(flops, len(row), int(said), lost))
        return spent


def check_no_draws(sampling: Sampling | None) -> None:
    """Checks that nothing is to be drawn.

    Args:
        sampling: Must be None.

    Raises:
        ValueError: There is a `sampling`.
    """
    if sampling is not None:
        raise ValueError("CIPHER draws nothing: leave out sampling, the temperatures say how soft its vectors are")


def mixing_flops(agent: Agent, vectors: int) -> int:
    """Counts the floating-point operations of averaging an embedding matrix, once for every vector.

    Args:
        agent: Whose embedding matrix it is.
        vectors: Number of vectors.

    Returns:
        The number of operations.
    """
    return 2 * vectors * agent.params.config.width * agent.params.config.vocab


@dataclasses.dataclass(frozen=True)
class CipherDebate:
    """Options of `cipher_debate`: how a debate in vectors goes.

    Attributes:
        temperatures: Temperature of each agent. 0 says the embedding of the likeliest token: greedy text.
        rounds: Number of rounds. The first is before any debate.
        form: The words, or a name in `FORMS`.
        max_message_tokens: Largest number of vectors of a response.
        top_k: Number of likeliest tokens that are averaged. 0 averages all.
        top_p: The smallest set of likeliest tokens whose probabilities sum to at least top_p is averaged.
        stop: As in `cipher.Mixing`.
        partial: As in `cipher.Mixing`.
        threshold: As in `cipher.Mixing`.
        reverse: As in `cipher.Mixing`.
        sampling: Must be None: nothing is drawn.
        seed: Not used: nothing is drawn.

    Raises:
        ValueError: There is a `sampling`; `rounds` is below 1; there is no such form.
    """

    temperatures: Sequence[float]
    rounds: int = 3
    form: Form | str = "harness"
    max_message_tokens: int = 256
    top_k: int = 0
    top_p: float = 1.0
    stop: Stop = "argmax"
    partial: Partial = "off"
    threshold: float | None = None
    reverse: bool = False
    sampling: Sampling | None = None
    seed: Seed = 0

    def __post_init__(self):
        check_no_draws(self.sampling)
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}: a debate has at least 1, the first answers")
        object.__setattr__(self, "form", lookup(self.form, FORMS, "form"))

    def mixings(self, agents: int, vocab: int) -> list[Mixing]:
        """Makes the settings of each agent.

        Args:
            agents: Number of agents.
            vocab: Number of tokens of their vocabulary.

        Returns:
            One for each agent.

        Raises:
            ValueError: There is not one temperature for each agent; a temperature is below 0.
        """
        if len(self.temperatures) != agents or min(self.temperatures) < 0:
            raise ValueError(f"temperatures {list(self.temperatures)} for {agents} agents: give each one, 0 or above")
        cuts = [Sampling(float(t), self.top_k, self.top_p) for t in self.temperatures]
        return [Mixing(s, self.threshold, self.stop, self.partial, self.reverse, vocab) for s in cuts]


class _Round:
    """What was said in a debate so far, and what it cost."""

    def __init__(self, agents: Sequence[Agent], items: int):
        self.agents = agents
        self.spent, self.said = [Spent() for _ in range(items)], [[] for _ in range(items)]
        self.vectors: dict[int, tuple[dict[int, Any], Vectors]] = {}
        """Of a response, by its number: as each receiver reads it, and as it was said."""

    def speak(
        self, number: int, turns: Mapping[int, CipherTurn], receivers: Sequence[int], most: int
    ) -> list[list[str]]:
        """Everybody says something, the first of them as response `number`; what each said, as readable text."""
        agents, texts = self.agents, []
        for a, turn in sorted(turns.items()):
            other = [b for b in receivers if agents[b].params is not agents[a].params]
            out = turn.speak(most, [agents[b].params.embed for b in other])
            spoken = dict(zip(other, out.sent, strict=True))
            self.vectors[number + a] = {b: spoken.get(b, out.own) for b in receivers}, out
            texts.append(turn.readable(out))
            for i, cost in enumerate(turn.spend(out, most, [agents[b] for b in other])):
                self.spent[i] += turn.before[i] + cost
        for i, own in enumerate(self.said):
            own.append([text[i].strip() for text in texts])
        return texts

    def heard_by(self, receiver: int, i: int) -> dict[int, tuple[Any, Any, Any]]:
        """All responses to the i-th question, by number, as a receiver reads them."""
        return {m: (v[receiver][i], out.tokens[i], out.lengths[i]) for m, (v, out) in self.vectors.items()}


def cipher_debate(agents: Sequence[Agent], prompts: Sequence[Sequence[Prompt]], **how: Any) -> CipherTurn:
    """Agents debate in expected embeddings (CIPHER, Pham et al. 2024). The one with the lowest temperature answers.

    Args:
        agents: Who takes part. All have one vocabulary.
        prompts: For each agent, one prompt for every question.
        **how: Options of `CipherDebate`: temperatures, one for each agent, and others.

    Returns:
        The turn of the agent with the lowest temperature, in the last round. The others need not answer in it.

    Raises:
        ValueError: The agents' vocabularies differ; there is not one temperature for each agent; a temperature is below
            0; there is a `sampling`; an agent has not one prompt for every question.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> how = dict(temperatures=(0.5, 0.0), rounds=2, form="plain", max_message_tokens=8)
        >>> turn = protocols.cipher_debate((agent, agent), (asked, asked), **how)
        >>> turn.write(4)[0].details["agent"]
        1
    """
    settings = CipherDebate(**how)
    words: Any = settings.form
    check_debate(agents, prompts)
    every = settings.mixings(len(agents), check_vocabularies(agents))
    lead, items = int(np.argmin(settings.temperatures)), range(len(prompts[0]))
    heard = [[words.begin(p) for p in own] for own in prompts]
    listening = range(len(agents)) if settings.rounds > 1 else [lead]
    turns = {a: CipherTurn(**vars(start_turn(agents[a], heard[a])), mixing=every[a]) for a in listening}
    so_far = _Round(agents, len(items))
    for r in range(1, settings.rounds):
        last, first = r == settings.rounds - 1, r * len(agents)
        receivers = [lead] if last else list(range(len(agents)))
        texts = so_far.speak(first, turns, receivers, settings.max_message_tokens)
        marked = [[_mark(first + a, text.strip()) for text in own] for a, own in enumerate(texts)]
        heard = next_prompts(words, prompts, heard, marked, last=last)
        turns = {
            b: _start_vector_turn(
                agents[b], heard[b], mixing=every[b], responses=[so_far.heard_by(b, i) for i in items]
            )
            for b in receivers
        }
    details = [{"rounds": said, "agent": lead} for said in so_far.said]
    return dataclasses.replace(turns[lead], before=so_far.spent, details=details)


def check_vocabularies(agents: Sequence[Agent]) -> int:
    """Checks that agents share a vocabulary.

    Args:
        agents: Who takes part.

    Returns:
        The number of its tokens.

    Raises:
        ValueError: They do not share one.
    """
    first, *others = agents
    vocabulary = first.tokenizer.get_vocab()
    for other in others:
        theirs = other.tokenizer.get_vocab()
        if theirs != vocabulary:
            odd = min(set(vocabulary.items()) ^ set(theirs.items()), key=lambda item: item[1])
            raise ValueError(
                f"CIPHER averages embeddings over one vocabulary, those of {first.name} ({len(vocabulary)} tokens) and {other.name} ({len(theirs)}) differ, as in {odd[0]!r}: use debate or message"
            )
    return max(vocabulary.values()) + 1


_MARK = re.compile("\ue000(\\d+)\ue001(.*?)\ue002", re.DOTALL)


def _mark(response: int, text: str) -> str:
    """A response in a prompt: characters of the private use area say which it is, and where it begins and ends."""
    return f"\ue000{response}\ue001{text}\ue002"


def _splice(agent: Agent, marked: Prompt) -> tuple[list[list[int]], list[int], Prompt]:
    """A marked prompt as tokens around n responses: n + 1 lists, the responses' numbers, and the plain prompt."""
    rendered, plain, spans = agent.render(marked), "", []
    for n, part in enumerate(_MARK.split(rendered)):  # text, number, response, text, number, ...
        if n % 3 == 1:
            spans.append((len(plain), int(part)))
        else:
            plain += part
            if n % 3 == 2:
                spans[-1] = (*spans[-1], len(plain))
    encoded = agent.tokenizer(plain, add_special_tokens=not agent.chat, return_offsets_mapping=True)
    spell = lambda text: agent.tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
    pieces, numbers, waiting = [[]], [], list(spans)
    for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = [(start, stop) for start, _, stop in spans if start < stop and begin < stop and start < end]
        # Of a token that reaches beyond the response, what is the prompt's is spelled again.
        pieces[-1] += spell(plain[begin : inside[0][0]]) if inside else []
        while waiting and end > waiting[0][0]:
            numbers.append(waiting.pop(0)[1])
            pieces.append([])
        pieces[-1] += spell(plain[inside[-1][1] : end]) if inside else [token]
    for _, number, _ in waiting:
        numbers.append(number)
        pieces.append([])
    unmark = lambda text: _MARK.sub(r"\2", text)
    if isinstance(marked, str):
        return pieces, numbers, unmark(marked)
    return pieces, numbers, [{**turn, "content": unmark(turn["content"])} for turn in marked]


def _start_vector_turn(
    agent: Agent, marked: Sequence[Prompt], *, responses: Sequence[dict[int, tuple[Any, Any, Any]]], mixing: Mixing
) -> CipherTurn:
    """The agent reads its prompts. responses: for every prompt, by number, (vectors [T, D], nearest tokens [T], length)."""
    rows, vectors, plain, lost = [], [], [], []
    width = agent.params.config.width
    for prompt, given in zip(marked, responses, strict=True):
        pieces, numbers, text = _splice(agent, prompt)
        row, vector, plain = list(pieces[0]), [np.zeros((len(pieces[0]), width))], [*plain, text]
        for number, piece in zip(numbers, pieces[1:], strict=True):
            own, tokens, n = given[number]
            row += [-1 - int(t) for t in tokens[:n]] + piece  # negative: said, not written
            vector += [own[:n], np.zeros((len(piece), width))]
        kept = agent.kept(row)
        lost.append(len(row) - len(kept))
        rows.append([row[i] for i in kept])
        vectors.append(np.concatenate(vector)[kept])
    agent.check_room(rows, 1)
    prompts = left_pad(rows, bucket(max(map(len, rows)), agent.params.config.max_positions))
    said = np.asarray(prompts.mask) & (np.asarray(prompts.tokens) < 0)
    spliced = np.zeros((*prompts.shape, width), agent.params.dtype)
    for i, vector in enumerate(vectors):
        spliced[i, prompts.shape[1] - len(vector) :] = vector
    prompts = prompts.replace(tokens=np.where(said, -1 - prompts.tokens, prompts.tokens))
    logits, cache = _prefill_spliced(agent.params, prompts, said, spliced)
    written = [[-1 - t if t < 0 else t for t in row] for row in rows]
    nothing = [{} for _ in rows], [Spent() for _ in rows]
    return CipherTurn(agent, plain, written, logits, cache, (), *nothing, mixing, lost)
