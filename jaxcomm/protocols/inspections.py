"""The games of `activation` looked into: what A sent, what B heard of it in every later layer, what B said."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomm.agent import TARGET, Agent, Prompt
from jaxcomm.config import NEW_TOKENS, AnyArray
from jaxcomm.edits import Graft, GraftFunction
from jaxcomm.lenses import Lens, logit_lens, nearest_tokens
from jaxcomm.messages import receive, send
from jaxcomm.protocols.activations import activation
from jaxcomm.protocols.base import Reply
from jaxcomm.sharding import deliver


@dataclasses.dataclass(frozen=True)
class Inspecting:
    """Options of `inspect_activation`.

    Attributes:
        graft: "sum", "mean", "replace", or a function f(a, b).
        W: The map [D_B, D_A], or None.
        target: Target prompt of the patchscope (`Agent.patchscope`).
        placeholder: The word in it that the message takes the place of.
        count: Number of tokens that are named of each state.
        max_new_tokens: Largest number of tokens of a reply, and of the patchscope's text.

    Example:
        >>> protocols.Inspecting(graft="sum", target="Bob is in x").placeholder
        'x'
    """

    graft: GraftFunction = "replace"
    W: AnyArray | None = None
    target: Prompt = TARGET
    placeholder: str = "x"
    count: int = 5
    max_new_tokens: int = NEW_TOKENS


@dataclasses.dataclass(frozen=True)
class Named:
    """Tokens that a state is near to, the nearest first.

    Attributes:
        ids: Their ids.
        tokens: Their texts (`spell_out`).
        values: How near they are: probabilities, or cosines.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Heard:
    """What the logit lens shows after one layer of B, at the last token.

    Attributes:
        layer: Number of the layer.
        likeliest: The likeliest tokens, and their probabilities.
        answer_logprob: Log-probability of the right answer's first token, in nats.
        answer_rank: Its rank among all tokens; 1 is the likeliest.
    """

    layer: int
    likeliest: Named
    answer_logprob: float
    answer_rank: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """One game of `activation`, looked into.

    Attributes:
        k: A was read after this layer.
        j: B was edited after this layer.
        sent_token: Token of A at which it was read.
        sent_position: Its position.
        sent_norm: Euclidean length of A's state.
        head: What A's own head names of its state, with probabilities.
        embedding: What A's embedding matrix names of it, with cosines.
        patchscope: What A itself writes of it.
        answer_token: First token of the right answer.
        answer_id: Its id.
        heard: B after each of the layers j .. L, with the message.
        alone: B after the same layers, without the message.
        reply: What B said.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> found, = protocols.inspect_activation(agent, agent, told, asked, ["Greece"], k=5, j=2)
        >>> found.sent_token, found.head.tokens[0], found.heard[-1].answer_rank, found.reply.text
        ('.', ' Greece', 1, 'Greece')
    """

    k: int
    j: int
    sent_token: str
    sent_position: int
    sent_norm: float
    head: Named
    embedding: Named
    patchscope: str
    answer_token: str
    answer_id: int
    heard: tuple[Heard, ...]
    alone: tuple[Heard, ...]
    reply: Reply

    def row(self) -> dict[str, Any]:
        """Makes a record of the game, as results files hold it.

        Returns:
            All fields by name, the reply as its own record.
        """
        return dataclasses.asdict(self) | {"reply": self.reply.row()}


def inspect_activation(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    answers: Sequence[str],
    *,
    k: int,
    j: int,
    **how: Any,
) -> list[Inspection]:
    """Plays games of `activation`, and looks at every message on its way: sent, heard, said.

    Args:
        a: The sender.
        b: The receiver.
        prompts_a: What A reads, one prompt for each game.
        prompts_b: What B reads, one prompt for each game.
        answers: The right answer of each game. Its first token is looked up in every layer of B.
        k: A is read after this layer, 0 .. L_A.
        j: B is edited after this layer, 0 .. L_B.
        **how: Options of `Inspecting`.

    Returns:
        What was sent, heard and said in each game.

    Raises:
        ValueError: As for `activation`, `Agent.spell`, `Agent.patchscope` and `logit_lens`.

    Example:
        >>> told, asked = ["Bob is at the Colosseum."], ["Which country is Bob located in?"]
        >>> found, = protocols.inspect_activation(agent, agent, told, asked, ["Italy"], k=4, j=1)
        >>> [layer.answer_rank for layer in found.heard]
        [2, 2, 2, 2, 2, 1]
    """
    settings = Inspecting(**how)
    turn = activation(a, b, prompts_a, prompts_b, k=k, j=j, graft=settings.graft, W=settings.W)
    message = send(a.single, a.tokenize(prompts_a), k)
    written = settings.max_new_tokens
    scoped = a.patchscope(message, settings.target, settings.placeholder, max_new_tokens=written)
    near = [nearest_tokens(a.single, message, by=by, count=settings.count) for by in ("head", "embedding")]
    edit = receive(deliver(message.anonymous(), b.params), j, Graft(settings.graft, settings.W))
    asked, spelled = b.tokenize(prompts_b), b.spell(prompts_b, answers)[:, 0]
    layers = range(j, b.single.config.layers + 1)
    look = lambda *edits: logit_lens(b.single, asked, edits=edits, layers=layers, count=settings.count, answers=spelled)
    heard, alone = (_by_game(b, look(*edits), layers) for edits in ((edit,), ()))
    norms = np.asarray(message.norms)
    return [
        Inspection(
            int(k), int(j), spell_out(a, turn_rows[-1:])[0], len(turn_rows) - 1, float(norms[i]),
            _named(a, near[0][0][i], np.exp(near[0][1][i])), _named(a, near[1][0][i], near[1][1][i]), scoped[i],
            spell_out(b, spelled[i : i + 1])[0], int(spelled[i]), heard[i], alone[i], reply,
        )
        for i, (turn_rows, reply) in enumerate(zip(a.rows(prompts_a), turn.write(written), strict=True))
    ]  # fmt: skip


def spell_out(agent: Agent, ids: Sequence[int] | AnyArray) -> list[str]:
    """Decodes each token by itself.

    Args:
        agent: Whose tokens they are.
        ids: Token ids.

    Returns:
        The text of each; as the vocabulary spells it, if it has no text or is a part of a character.
    """
    texts = [agent.tokenizer.decode([int(i)]) for i in ids]
    spelled = agent.tokens(ids)
    return [mark if not text or "\ufffd" in text else text for text, mark in zip(texts, spelled, strict=True)]


def _named(agent: Agent, ids: AnyArray, values: AnyArray) -> Named:
    return Named(tuple(map(int, ids)), tuple(spell_out(agent, ids)), tuple(float(x) for x in np.asarray(values)))


def _by_game(agent: Agent, lens: Lens, layers: Sequence[int]) -> list[tuple[Heard, ...]]:
    """What a lens shows, game by game and layer by layer."""
    fields = lens.tokens, np.exp(lens.logprobs), lens.answer_logprobs, lens.answer_ranks
    tokens, values, logprobs, ranks = map(np.asarray, fields)
    return [
        tuple(
            Heard(layer, _named(agent, tokens[i, n], values[i, n]), float(logprobs[i, n]), int(ranks[i, n]))
            for n, layer in enumerate(layers)
        )
        for i in range(len(tokens))
    ]
