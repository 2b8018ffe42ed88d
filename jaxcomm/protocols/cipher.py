"""Debate in expected embeddings (CIPHER, Pham et al. 2024): like `debate`, but agents send vectors instead of text
(`jaxcomm.cipher`).

The receiver's next prompt contains the response as vectors, computed with the receiver's embedding matrix. To tokenize
the rest of the prompt, the response's readable text (its nearest tokens) is put in that place.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomm.agent import Agent, Prompt
from jaxcomm.cipher import Mixing, Partial, Stop, Vectors, cipher, nearest
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.flops import generation_flops
from jaxcomm.messages import Message
from jaxcomm.model import Params
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.protocols.base import Reply, Spent, Turn, start_turn
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in, worst_of_others
from jaxcomm.protocols.debates import FORMS, Form, check_debate, lookup
from jaxcomm.protocols.text import likelihoods, text
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed
from jaxcomm.sites import Site


@jax.jit
def _prefill_spliced(params: Params, prompts: Prompts, said: Bool[Array, "B P"], vectors: Float[Array, "B P D"]):
    """Reads prompts in which the columns `said` are vectors instead of tokens."""
    return prefill(params, prompts.replace(tokens=jnp.where(said[..., None], vectors, params.embed[prompts.tokens])))


@dataclasses.dataclass(frozen=True)
class CipherTurn(Turn):
    """A turn that generates expected embeddings. Its text is the tokens nearest to them.

    Attributes:
        agent: As in `Turn`.
        prompts: As in `Turn`.
        rows: As in `Turn`.
        logits: As in `Turn`.
        cache: As in `Turn`.
        past: As in `Turn`.
        details: As in `Turn`.
        before: As in `Turn`.
        received: As in `Turn`.
        mixing: How a distribution becomes a vector, and when a response ends.
        lost: Number of tokens truncated from each prompt, or empty.
    """

    mixing: Mixing = dataclasses.field(default_factory=lambda: Mixing(Sampling()))
    lost: Sequence[int] = ()

    @property
    def dropped(self) -> list[int]:
        """Number of tokens truncated from each prompt."""
        return list(self.lost) or super().dropped

    def speak(self, max_new_tokens: int, tables: Sequence[Any] = ()) -> Vectors:
        """Generates a response in vectors, for this agent and for the receivers.

        Args:
            max_new_tokens: Largest number of vectors.
            tables: Embedding matrices of the receivers.

        Returns:
            The response, on the host.

        Raises:
            ValueError: A prompt leaves no room for so many vectors.
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
        """Writes one reply to each prompt, in vectors. Nothing is sampled.

        Args:
            max_new_tokens: Largest number of vectors of a reply.
            until: Stop strings. They are not in the text.
            sampling: Must be None.
            seed: Not used.

        Returns:
            One reply for each prompt. Its logprob is NaN.

        Raises:
            ValueError: `sampling` is not None; a prompt leaves no room for so many vectors.
        """
        check_no_draws(sampling)
        out = self.speak(max_new_tokens)
        spent, replies = self.spend(out, max_new_tokens), []
        for i, row in enumerate(self.rows):
            said = out.tokens[i, : out.lengths[i]]
            raw = self.agent.said(said, row, until)
            ids, read, written = self._ids(said, row, raw), self.agent.tokens(row), self.agent.tokens(said)
            before, details = self.before[i] + spent[i], dict(self.details[i])
            replies.append(Reply(raw, ids, tuple(read), tuple(written), (), before, details))
        return replies

    def spend(self, out: Vectors, max_new_tokens: int, others: Sequence[Agent] = ()) -> list[Spent]:
        """Counts the cost of a response. The vector that stopped it counts too, although it is not part of the response.

        Args:
            out: The response.
            max_new_tokens: Largest number of vectors that the response could have.
            others: Receivers for which vectors were computed too.

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
    """Checks that no sampling is requested.

    Args:
        sampling: Must be None.

    Raises:
        ValueError: `sampling` is not None.
    """
    if sampling is not None:
        raise ValueError("CIPHER draws nothing: leave out sampling, the temperatures say how soft its vectors are")


def mixing_flops(agent: Agent, vectors: int) -> int:
    """Counts the floating-point operations of averaging an embedding matrix, once for every vector.

    Args:
        agent: The owner of the embedding matrix.
        vectors: Number of vectors.

    Returns:
        The number of operations.
    """
    return 2 * vectors * agent.params.config.width * agent.params.config.vocab


@dataclasses.dataclass(frozen=True)
class CipherDebate:
    """Options of `cipher_debate`.

    Attributes:
        temperatures: Temperature of each agent. 0 sends the embedding of the likeliest token: greedy text.
        rounds: Number of rounds. In the first, agents have not read each other yet.
        form: The wording, or a name in `FORMS`.
        max_message_tokens: Largest number of vectors of a response.
        top_k: Number of likeliest tokens to average. 0 averages all.
        top_p: Average the smallest set of likeliest tokens whose probabilities sum to at least top_p.
        stop: As in `cipher.Mixing`.
        partial: As in `cipher.Mixing`.
        threshold: As in `cipher.Mixing`.
        reverse: As in `cipher.Mixing`.
        sampling: Must be None: nothing is sampled.
        seed: Random seed of the control. Nothing else is random.
        control: Stand-in that every agent gets instead of each of the others' responses: a name in `CONTROLS`, or a
            `StandIn`. None: the responses. An agent always reads its own responses unchanged.

    Raises:
        ValueError: `sampling` is not None; `rounds` is below 1; there is no such form or control.
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
    control: Control | StandIn | None = None

    def __post_init__(self):
        object.__setattr__(self, "control", as_stand_in(self.control))
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
            The settings of each agent.

        Raises:
            ValueError: There is not one temperature for each agent; a temperature is below 0.
        """
        if len(self.temperatures) != agents or min(self.temperatures) < 0:
            raise ValueError(f"temperatures {list(self.temperatures)} for {agents} agents: give each one, 0 or above")
        cuts = [Sampling(float(t), self.top_k, self.top_p) for t in self.temperatures]
        return [Mixing(s, self.threshold, self.stop, self.partial, self.reverse, vocab) for s in cuts]


class _Response(NamedTuple):
    """One agent's responses to all questions, as one receiver reads them: vectors [B, T, D], the nearest tokens [B, T],
    numbers of vectors [B], and readable texts."""

    vectors: AnyArray
    tokens: AnyArray
    lengths: AnyArray
    texts: Sequence[str]

    @property
    def message(self) -> Message:
        valid = np.arange(np.shape(self.vectors)[1]) < np.asarray(self.lengths)[:, None]
        return Message(jnp.asarray(self.vectors), jnp.asarray(valid), Site("embed"), text=tuple(self.texts))

    @classmethod
    def of(cls, message: Message, reader: Agent, vocab: int | None) -> _Response:
        """Turn a message into a response for `reader`. vocab: size of the vocabulary, if the embedding matrix is padded."""
        vectors, valid = jnp.asarray(message.state_array()), np.asarray(message.valid)
        tokens = np.where(valid, nearest(vectors, jnp.asarray(reader.params.embed)[:vocab]), -1)
        rows = [[int(t) for t in row if t >= 0] for row in tokens]
        texts = message.text or [reader.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return cls(np.asarray(vectors), tokens, valid.sum(axis=1), texts)


class _Conversation:
    """The state of a debate in vectors: all responses, as each agent received them, and their costs."""

    def __init__(self, agents: Sequence[Agent], prompts: Sequence[Sequence[Prompt]], settings: CipherDebate):
        self.agents, self.prompts, self.settings = agents, prompts, settings
        self.words: Any = settings.form
        self.mixings = settings.mixings(len(agents), check_vocabularies(agents))
        items = len(prompts[0])
        self.spent, self.said = [Spent() for _ in range(items)], [[] for _ in range(items)]
        self.heard = [[self.words.begin(p) for p in own] for own in prompts]
        self.received: list[dict[int, _Response]] = [{} for _ in agents]
        """For each agent, all responses by number, as they arrived."""

    def begin(self, a: int, prompts: Sequence[Prompt]) -> CipherTurn:
        """Agent a's turn after its first prompts."""
        return CipherTurn(**vars(start_turn(self.agents[a], prompts)), mixing=self.mixings[a])

    def speak(self, turns: Mapping[int, CipherTurn], receivers: Sequence[int]) -> dict[int, list[_Response]]:
        """Let every agent respond. Returns, for each receiver, all agents' responses as it reads them."""
        spoken: dict[int, list[_Response]] = {b: [] for b in receivers}
        for a, turn in sorted(turns.items()):
            said, out = self.say(a, turn, receivers)
            for b in receivers:
                spoken[b].append(said[b])
            others = [self.agents[b] for b in receivers if self.agents[b].params is not self.agents[a].params]
            for i, cost in enumerate(turn.spend(out, self.settings.max_message_tokens, others)):
                sent = sum(int(out.lengths[i]) * said[b].vectors[i, 0].nbytes for b in receivers if b != a)
                self.spent[i] += turn.before[i] + cost + Spent(sent=sent)
        for i, own in enumerate(self.said):
            own.append([response.texts[i] for response in spoken[receivers[0]]])
        return spoken

    def say(self, a: int, turn: CipherTurn, receivers: Sequence[int]) -> tuple[dict[int, _Response], Vectors]:
        """Let agent a respond. Returns its response as each receiver reads it."""
        other = [b for b in receivers if self.agents[b].params is not self.agents[a].params]
        out = turn.speak(self.settings.max_message_tokens, [self.agents[b].params.embed for b in other])
        sent, texts = dict(zip(other, out.sent, strict=True)), [text.strip() for text in turn.readable(out)]
        return {b: _Response(sent.get(b, out.own), out.tokens, out.lengths, texts) for b in receivers}, out

    def next_prompts(self, b: int, first: int, spoken: Sequence[_Response], last: bool) -> list[Prompt]:
        """Agent b's next prompts. The responses `spoken` in them have the numbers `first`, `first` + 1, ..."""
        marked = [[_mark(first + a, text) for text in response.texts] for a, response in enumerate(spoken)]
        peers = lambda i: [own[i] for a, own in enumerate(marked) if a != b]
        both = zip(self.prompts[b], self.heard[b], strict=True)
        return [self.words.next_prompt(x, heard, marked[b][i], peers(i), last) for i, (x, heard) in enumerate(both)]

    def next_turn(self, b: int, first: int, spoken: Sequence[_Response], last: bool) -> CipherTurn:
        """Agent b's next turn, after it has read these prompts."""
        known = self.received[b] | {first + a: response for a, response in enumerate(spoken)}
        each = [{n: (x.vectors[i], x.tokens[i], x.lengths[i]) for n, x in known.items()} for i in range(len(self.said))]
        asked = self.next_prompts(b, first, spoken, last)
        return _start_vector_turn(self.agents[b], asked, mixing=self.mixings[b], responses=each)

    def note(self, b: int, first: int, spoken: Sequence[_Response], last: bool) -> None:
        """Store the responses that agent b received, and its next prompts."""
        self.heard[b] = self.next_prompts(b, first, spoken, last)
        self.received[b] |= {first + a: response for a, response in enumerate(spoken)}

    def arrived(self, b: int, first: int, spoken: Sequence[_Response], last: bool) -> list[_Response]:
        """The responses that agent b receives: its own unchanged, the others' after the control."""
        control, seed, made = self.settings.control, self.settings.seed, list(spoken)
        if not isinstance(control, StandIn):
            return made
        reader, vocab = self.agents[b], self.mixings[b].vocab

        def unrelated(a: int, sentence: str) -> Message:
            turn = self.begin(a, [self.words.begin(sentence)] * len(self.said))
            return self.say(a, turn, [b])[0][b].message

        def likely(a: int, message: Message, answers: Sequence[str]) -> np.ndarray:
            changed = [*made[:a], _Response.of(message, reader, vocab), *made[a + 1 :]]
            return likelihoods(self.next_turn(b, first, changed, last), answers)

        for a, response in enumerate(spoken):
            if a != b:
                link = Link(
                    self.agents[a],
                    generated=lambda: spoken[b].message,
                    unrelated=functools.partial(unrelated, a),
                    own=lambda: _read_aloud(reader, self.prompts[b]),
                    worst=lambda m, answers, a=a: worst_of_others(m, answers, lambda x: likely(a, x, answers), seed),
                )
                made[a] = _Response.of(control(response.message, link, seed), reader, vocab)
        return made


def _read_aloud(agent: Agent, prompts: Sequence[Prompt]) -> Message:
    """An agent's own prompts as vectors: the embeddings of their tokens."""
    rows = [agent.tokenizer.encode(text(prompt), add_special_tokens=False) for prompt in prompts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    valid = np.arange(tokens.shape[1]) < np.array(list(map(len, rows)))[:, None]
    vectors = agent.params.embed[tokens] * valid[..., None].astype(agent.params.dtype)
    return Message(vectors, jnp.asarray(valid), Site("embed"), text=tuple(map(text, prompts)))


def cipher_debate(agents: Sequence[Agent], prompts: Sequence[Sequence[Prompt]], **how: Any) -> CipherTurn:
    """Agents debate in expected embeddings (CIPHER, Pham et al. 2024). The agent with the lowest temperature answers.

    Args:
        agents: The agents that take part. They share one vocabulary.
        prompts: For each agent, one prompt for every question.
        **how: Options of `CipherDebate`: temperatures, one for each agent, and others.

    Returns:
        The turn of the agent with the lowest temperature in the last round. The other agents do not answer in that round.

    Raises:
        ValueError: The agents' vocabularies differ; there is not one temperature for each agent; a temperature is below
            0; `sampling` is not None; an agent does not have one prompt for every question.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> how = dict(temperatures=(0.5, 0.0), rounds=2, form="plain", max_message_tokens=8)
        >>> turn = protocols.cipher_debate((agent, agent), (asked, asked), **how)
        >>> turn.write(4)[0].details["agent"]
        1
    """
    settings = CipherDebate(**how)
    check_debate(agents, prompts)
    lead, everybody = int(np.argmin(settings.temperatures)), range(len(agents))
    talk = _Conversation(agents, prompts, settings)
    peers: list[Message] = []
    turns = {a: talk.begin(a, talk.heard[a]) for a in (everybody if settings.rounds > 1 else [lead])}
    for r in range(1, settings.rounds):
        last, first = r == settings.rounds - 1, r * len(agents)
        receivers = [lead] if last else list(everybody)
        spoken = talk.speak(turns, receivers)
        arrived = {b: talk.arrived(b, first, spoken[b], last) for b in receivers}
        turns = {b: talk.next_turn(b, first, arrived[b], last) for b in receivers}
        for b in receivers:
            talk.note(b, first, arrived[b], last)
        peers = [response.message for a, response in enumerate(arrived[lead]) if a != lead]
    details = [{"rounds": said, "agent": lead} for said in talk.said]
    return dataclasses.replace(turns[lead], before=talk.spent, details=details, received=_together(peers))


def _together(messages: Sequence[Message]) -> Message | None:
    """Join the vectors of several agents, one after another, in one message."""
    if not messages:
        return None
    join = lambda parts: jnp.concatenate([jnp.asarray(x) for x in parts], axis=1)
    texts = tuple("\n".join(own) for own in zip(*(m.text or () for m in messages), strict=True))
    return Message(
        join([m.state_array() for m in messages]), join([m.valid for m in messages]), Site("embed"), text=texts
    )


def check_vocabularies(agents: Sequence[Agent]) -> int:
    """Checks that agents share a vocabulary.

    Args:
        agents: The agents that take part.

    Returns:
        The size of the vocabulary.

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
    """Mark a response in a prompt: private-use characters give its number and mark where it begins and ends."""
    return f"\ue000{response}\ue001{text}\ue002"


def _splice(agent: Agent, marked: Prompt) -> tuple[list[list[int]], list[int], Prompt]:
    """Split a marked prompt at its n responses: n + 1 lists of tokens, the responses' numbers, and the plain prompt."""
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
        # If a token covers both response and prompt text, the prompt's part of it is tokenized again.
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
    """Let the agent read its prompts. responses: per prompt, number -> (vectors [T, D], nearest tokens [T], length)."""
    rows, vectors, plain, lost = [], [], [], []
    width = agent.params.config.width
    for prompt, given in zip(marked, responses, strict=True):
        pieces, numbers, text = _splice(agent, prompt)
        row, vector, plain = list(pieces[0]), [np.zeros((len(pieces[0]), width))], [*plain, text]
        for number, piece in zip(numbers, pieces[1:], strict=True):
            own, tokens, n = given[number]
            row += [-1 - int(t) for t in tokens[:n]] + piece  # negative: a vector, not a token
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
    return CipherTurn(agent, plain, written, logits, cache, (), *nothing, mixing=mixing, lost=lost)
