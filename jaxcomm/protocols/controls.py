"""Controls in protocols: every protocol passes each message through one `StandIn` before it reaches another agent.

`jaxcomm.controls` makes stand-ins from states alone. This module adds the controls that need the agents (another agent
speaks for the sender; the receiver keeps its own state), and the same controls for text.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.cache import KVCache
from jaxcomm.controls import derange, stand_in
from jaxcomm.messages import Message
from jaxcomm.seeds import Seed, one_seed, row_keys

Control = Literal["other", "generated", "mean", "moments", "noise", "zero", "adversarial", "unrelated", "self"]
"""Name of a control (`CONTROLS`)."""

CONTROLS: dict[str, str] = {
    "other": "the message of another item, whose answer differs",
    "generated": "a message that the receiver makes itself, in the sender's place, from its own prompt alone",
    "mean": "the mean of the other items' messages; of texts, the one most like the others",
    "moments": "noise with their mean and covariance; of texts, words drawn from them",
    "noise": "noise of the message's norm; of texts, as many random tokens",
    "zero": "zeros; of texts, nothing",
    "adversarial": "the message of the same norm under which the right answer is least likely, found by gradient "
    "steps; of texts and CIPHER's vectors, the worst of eight other items' messages",
    "unrelated": "what the sender sends after a sentence that has nothing to do with the game",
    "self": "the receiver's own state at that place (with the graft replace it changes nothing); of texts, the receiver's own prompt",
}
"""name -> description, for tables and docs."""

UNRELATED = "Water boils at one hundred degrees."
TRIES = 8
"""Number of other items' messages that "adversarial" tries if no gradient is available."""


@dataclasses.dataclass(frozen=True)
class Link:
    """The sender of one message in every item, and functions that make the stand-ins which need the agents.

    Attributes:
        sender: The agent that sent the message.
        generated: Makes the message that the receiver itself would send.
        unrelated: Makes the sender's message for a given sentence.
        own: Returns the receiver's own state at the place of the message.
        worst: Finds the worst message for given right answers, for each item.
    """

    sender: Agent
    generated: Callable[[], Message]
    unrelated: Callable[[str], Message]
    own: Callable[[], Message]
    worst: Callable[[Message, Sequence[str]], Message]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A control: the stand-in that every receiver gets instead of its message. A plain name means one without options.

    Attributes:
        name: The control (`CONTROLS`).
        answers: The right answer of every item. "other" uses it so that no item gets a message with its own answer;
            "adversarial" needs it. None: all answers differ.
        unrelated: The sentence of the control "unrelated".
        seed: Random seed: one for all items, or one for each. None: the protocol's seed.
        order: For "other": for each item, the index of the item whose message it gets. None: random (`jaxcomm.derange`).

    Raises:
        ValueError: There is no such control; "adversarial" without answers.

    Example:
        >>> told = ["Alice is at the Acropolis of Athens.", "Alice is at the Louvre."]
        >>> asked = ["Which country is Alice located in?"] * 2
        >>> other = protocols.StandIn("other", answers=["Greece", "France"])
        >>> [reply.text for reply in protocols.activation(agent, agent, told, asked, k=5, j=2, control=other).write(4)]
        ['France', 'Greece']
    """

    name: Control
    answers: Sequence[str] | None = None
    unrelated: str = UNRELATED
    seed: Seed | None = None
    order: Sequence[int] | None = None

    def __post_init__(self):
        if self.name not in get_args(Control):
            raise ValueError(f"unknown control {self.name!r}: choose one of {', '.join(get_args(Control))}")
        if self.name == "adversarial" and self.answers is None:
            raise ValueError(
                "the control adversarial needs the right answers: StandIn('adversarial', answers=[..]), one for each item"
            )

    def __call__(self, message: Message, link: Link, seed: Seed = 0) -> Message:
        """Replaces the messages by their stand-ins.

        Args:
            message: The message that was sent in every item.
            link: Its sender, and functions that make stand-ins.
            seed: The protocol's seed.

        Returns:
            The message that arrives in every item.

        Raises:
            ValueError: The control needs other games' messages, and there are none; there is not one answer for each
                game.
        """
        seed = seed if self.seed is None else self.seed
        if self.answers is not None and len(self.answers) != len(message):
            raise ValueError(f"{len(self.answers)} right answers for {len(message)} messages: give one for each")
        match self.name:
            case "generated":
                return link.generated()
            case "unrelated":
                return link.unrelated(self.unrelated)
            case "self":
                return link.own()
            case "adversarial":
                assert self.answers is not None
                return link.worst(message, self.answers)
            case "other" if self.order is not None:
                return message.take(self.order)
            case "other":
                return stand_in(message, "other", answers=self.answers, seed=one_seed(seed))
            case name if message.states is None:
                return Message(text=texts_in_place(name, message.text or (), link.sender, row_keys(seed, len(message))))
            case name:
                return stand_in(message, name, keys=row_keys(seed, len(message)))


def as_stand_in(control: Control | StandIn | None) -> StandIn | None:
    """Makes a control from its name.

    Args:
        control: A control, its name, or None for no control.

    Returns:
        The control.

    Raises:
        ValueError: There is no such control.
    """
    return control if control is None or isinstance(control, StandIn) else StandIn(control)


def texts_in_place(control: str, texts: Sequence[str], sender: Agent, keys: jax.Array) -> tuple[str, ...]:
    """Makes stand-ins for texts.

    Args:
        control: "mean", "moments", "noise" or "zero".
        texts: The text of each item.
        sender: The agent that wrote them. Its tokenizer is used.
        keys: A random key for each item.

    Returns:
        One text for each item.

    Raises:
        ValueError: There is a single game, and the control needs the other games' texts.
    """
    if control == "zero":
        return ("",) * len(texts)
    if control != "noise" and len(texts) < 2:
        raise ValueError(f"the control {control} needs at least two items: it is made of the others' messages")
    tokenizer = sender.tokenizer
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if control == "mean":
        return tuple(texts[i] for i in _typical(rows))
    special = {*tokenizer.all_special_ids}
    every = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special and i < sender.params.config.vocab]
    made = []
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        pool = every if control == "noise" else [t for j, other in enumerate(rows) if j != i for t in other] or every
        drawn = np.asarray(pool)[np.asarray(jax.random.randint(key, (len(row),), 0, len(pool)))]
        made.append(tokenizer.decode(drawn.tolist(), skip_special_tokens=True).strip())
    return tuple(made)


def _typical(rows: Sequence[Sequence[int]]) -> list[int]:
    """For each text, the index of the most typical other text: most similar to the others by cosine of token counts."""
    counts = [collections.Counter(row) for row in rows]
    column = {token: n for n, token in enumerate(sorted({t for row in rows for t in row}))}
    x = np.zeros((len(rows), max(1, len(column))))
    for i, count in enumerate(counts):
        x[i, [column[t] for t in count]] = list(count.values())
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    alike = x @ x.T
    found = []
    for i in range(len(rows)):
        others = np.delete(np.arange(len(rows)), i)
        found.append(int(others[np.argmax(alike[np.ix_(others, others)].sum(axis=1))]))
    return found


def worst_of_others(
    message: Message, answers: Sequence[str], likely: Callable[[Message], np.ndarray], seed: Seed = 0
) -> Message:
    """Chooses for each item, from `TRIES` other items' messages, the one that hurts most.

    Args:
        message: The messages.
        answers: The right answer of every item.
        likely: Function that returns the log-probability of each item's right answer, if these messages arrive.
        seed: Random seed.

    Returns:
        The messages. States at a site are scaled to the norm of the game's own message, state by state.
    """
    orders = np.stack([derange(answers, one_seed(seed) + t) for t in range(TRIES)])
    tried = [scaled_like(message.take(order), message) for order in orders]
    worst = np.argmin([likely(candidate) for candidate in tried], axis=0)
    return scaled_like(message.take(orders[worst, np.arange(len(worst))]), message)


def scaled_like(message: Message, like: Message) -> Message:
    """Scale each state to the norm of the matching state of `like`, where both exist. Texts, keys and values stay."""
    if message.states is None or isinstance(message.states, KVCache):
        return message
    x, norms, wanted = jnp.asarray(message.state_array()), message.norms, like.norms
    ratio = jnp.where(wanted > 0, wanted / jnp.maximum(norms, 1e-30), 1.0)
    ratio = ratio.reshape(*ratio.shape, *(1,) * (x.ndim - ratio.ndim))
    return message.replace(states=(x * ratio).astype(x.dtype))
