"""Debate in expected embeddings (CIPHER, Pham et al. 2024): `debate`, but what agents say are vectors (`jaxcomm.cipher`).

A response stands in its place in the next prompt as vectors, through the receiver's embedding matrix. The prompt's own
tokens are those it has with the response's readable text (nearest tokens) in that place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcomm.agent import Agent, Prompt, Seed
from jaxcomm.cipher import Partial, Stop, Vectors, cipher
from jaxcomm.decoding import Sampling, bucket, left_pad
from jaxcomm.flops import generation_flops
from jaxcomm.model import Params, prefill
from jaxcomm.protocols.base import Reply, Spent, Turn, hear
from jaxcomm.protocols.debates import FORMS, Form, check_debate, lookup, next_prompts


@jax.jit
def _prefill_spliced(
    params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], said: Bool[Array, "B P"],
    vectors: Float[Array, "B P D"],
):  # fmt: skip
    """Reads prompts whose columns `said` are vectors instead of tokens."""
    return prefill(params, jnp.where(said[..., None], vectors, params.embed[tokens]), mask=mask)


@dataclasses.dataclass(frozen=True)
class CipherTurn(Turn):
    """A turn that is written in expected embeddings, and read as the tokens nearest to them."""

    how: dict[str, Any] = dataclasses.field(default_factory=dict)
    vocab: int = 0
    lost: Sequence[int] = ()

    @property
    def dropped(self) -> list[int]:
        return list(self.lost) or super().dropped

    def speak(self, max_new_tokens: int, tables: Sequence[Any] = ()) -> Vectors:
        """What it says, on the host, and through other tables. ValueError: no room for so many."""
        self.agent.check_room(self.rows, max_new_tokens)
        stops = jnp.asarray(self.agent.stop_tokens, jnp.int32)
        return jax.device_get(
            cipher(
                self.agent.params, self.logits, self.cache, tables=tuple(tables), vocab=self.vocab, past=self.past,
                max_new_tokens=max_new_tokens, stop_tokens=stops, **self.how,
            )
        )  # fmt: skip

    def readable(self, out: Vectors) -> list[str]:
        rows = zip(out.tokens, out.lengths, strict=True)
        return [self.agent.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in rows]

    def write(self, max_new_tokens: int = 16, *, until: Sequence[str] = (), sampling=None, seed=0) -> list[Reply]:
        """Nothing is drawn: `seed` changes nothing, and a Reply's logprob is not a number. ValueError: there is a `sampling`."""
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
        """What a response cost, its vectors also formed for others; the vector that stopped it, which is not said, too."""
        spent, config = [], self.agent.params.config
        for row, said, lost in zip(self.rows, out.lengths, self.dropped, strict=True):
            steps = min(int(said) + 1, max_new_tokens)
            flops = generation_flops(config, len(row), steps)
            flops += sum(mixing_flops(agent, steps) for agent in (self.agent, *others))
            spent.append(Spent(flops, len(row), int(said), lost))
        return spent


def check_no_draws(sampling: Sampling | None) -> None:
    """ValueError: there is a `sampling`."""
    if sampling is not None:
        raise ValueError("CIPHER draws nothing: leave out sampling, the temperatures say how soft its vectors are")


def mixing_flops(agent: Agent, vectors: int) -> int:
    """Averaging an embedding matrix, once for every vector."""
    return 2 * vectors * agent.params.config.width * agent.params.config.vocab


def cipher_debate(
    agents: Sequence[Agent],
    prompts: Sequence[Sequence[Prompt]],
    *,
    temperatures: Sequence[float],
    rounds: int = 3,
    form: Form | str = "harness",
    max_message_tokens: int = 256,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Stop = "argmax",
    partial: Partial = "off",
    threshold: float | None = None,
    reverse: bool = False,
    sampling: Sampling | None = None,
    seed: Seed = 0,
) -> CipherTurn:
    """The turn of the agent with the lowest temperature, in the last of `rounds`, of which the first is before any
    debate; the others need not answer in it.

    temperatures: one for each agent; 0 says the embedding of the argmax, greedy text. The rest is `jaxcomm.cipher.cipher`'s;
    sampling must be None and seed changes nothing, since nothing is drawn.
    ValueError: the agents' vocabularies differ, and `debate`'s.
    """
    check_no_draws(sampling)
    words: Form = lookup(form, FORMS, "form")
    check_debate(agents, prompts, rounds)
    if len(temperatures) != len(agents) or min(temperatures) < 0:
        raise ValueError(f"temperatures {list(temperatures)} for {len(agents)} agents: give each one, 0 or above")
    vocab = check_vocabularies(agents)
    every = [
        dict(sampling=Sampling(t, top_k, top_p), stop=stop, partial=partial, threshold=threshold, reverse=reverse)
        for t in map(float, temperatures)
    ]
    lead, items = int(np.argmin(temperatures)), range(len(prompts[0]))
    heard = [[words.begin(p) for p in own] for own in prompts]
    listening = range(len(agents)) if rounds > 1 else [lead]
    turns = {a: CipherTurn(**vars(hear(agents[a], heard[a])), how=every[a], vocab=vocab) for a in listening}
    spent, said = [Spent() for _ in items], [[] for _ in items]
    vectors = {}  # of a response, by its number: as each receiver reads it, and as it was said
    for r in range(1, rounds):
        last = r == rounds - 1
        receivers, texts, n = [lead] if last else list(range(len(agents))), [], len(agents)
        for a, turn in sorted(turns.items()):
            other = [b for b in receivers if agents[b].params is not agents[a].params]
            out = turn.speak(max_message_tokens, [agents[b].params.embed for b in other])
            spoken = dict(zip(other, out.sent, strict=True))
            vectors[r * n + a] = {b: spoken.get(b, out.own) for b in receivers}, out
            texts.append(turn.readable(out))
            costs = turn.spend(out, max_message_tokens, [agents[b] for b in other])
            for i in items:
                spent[i] += turn.before[i] + costs[i]
        for i in items:
            said[i].append([own[i].strip() for own in texts])
        marked = [[_mark(r * n + a, text.strip()) for text in own] for a, own in enumerate(texts)]
        heard = next_prompts(words, prompts, heard, marked, last=last)
        turns = {
            b: _hear_vectors(
                agents[b], heard[b], how=every[b], vocab=vocab,
                responses=[
                    {m: (v[b][i], out.tokens[i], out.lengths[i]) for m, (v, out) in vectors.items()} for i in items
                ],
            )
            for b in receivers
        }  # fmt: skip
    final = turns[lead]
    details = [{"rounds": said[i], "agent": lead} for i in items]
    return dataclasses.replace(final, before=spent, details=details)


def check_vocabularies(agents: Sequence[Agent]) -> int:
    """Tokens of the vocabulary that all agents share. ValueError: they do not share one."""
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


def _hear_vectors(
    agent: Agent, marked: Sequence[Prompt], *, responses: Sequence[dict[int, tuple[Any, Any, Any]]], how, vocab: int
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
    tokens, mask = left_pad(rows, bucket(max(map(len, rows)), agent.params.config.max_positions))
    said = mask & (tokens < 0)
    spliced = np.zeros((*tokens.shape, width), agent.params.dtype)
    for i, vector in enumerate(vectors):
        spliced[i, tokens.shape[1] - len(vector) :] = vector
    tokens = np.where(said, -1 - tokens, tokens)
    logits, cache = _prefill_spliced(agent.params, tokens, mask, said, spliced)
    written = [[-1 - t if t < 0 else t for t in row] for row in rows]
    nothing = [{} for _ in rows], [Spent() for _ in rows]
    return CipherTurn(agent, plain, written, logits, cache, (), *nothing, how, vocab, lost)
