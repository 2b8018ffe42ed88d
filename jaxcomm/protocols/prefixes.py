"""Keys and values as messages: `kv` (KVComm), `latent` (LatentMAS), and `thinking`, in which B thinks by itself.

A sender reads its prompt and may think in latents after it. The receiver gets the result before its own prompt: as keys
and values that some of its layers see (`jaxcomm.prefixes`), or as vectors that it reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.cache import KVCache
from jaxcomm.config import AnyArray, ModelConfig
from jaxcomm.decoding import Sampling, bucket
from jaxcomm.flops import blocks_flops, head_flops, keys_flops, thinking_flops
from jaxcomm.kv_mapping import KVMaps, map_cache
from jaxcomm.latents import Thought, think
from jaxcomm.messages import Message
from jaxcomm.prefixes import as_layers, check_parts, check_prefix, check_reach, join, move, select, stretch
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.protocols.base import Input, Sent, Spent, Turn, dropped, total
from jaxcomm.protocols.controls import Control, Link, StandIn, as_stand_in, worst_of_others
from jaxcomm.protocols.text import likelihoods
from jaxcomm.reading import prefill
from jaxcomm.seeds import Seed
from jaxcomm.sharding import by_rows, deliver
from jaxcomm.sites import Site


@dataclasses.dataclass(frozen=True)
class Prefixing:
    """Options of `kv` and `latent`: the prefix before B's prompt, and the layers that see it.

    Attributes:
        layers: Layers of B that see the prefix: "all", numbers from 1, or bool [L_B] (`choose_layers`).
        place: Where to put the prefix. "start": before B's prompt, as published. "turn": before the last turn of B's
            prompt, after worked examples and system prompt, which must be the same in all games. They are read once, and
            A's keys are rotated to the positions after them.
        positions: "after": B's positions continue from the prefix. "own": they begin at 0 (`prefixes.select`).
        sink: As in KVComm's code, all layers see the first token, and the first layer sees the whole prefix.
        future: KVComm's published mask (`prefixes.select`).
        steps: Number of latent thinking steps of every sender after its prompt. With 0 it only reads.
        thought: How a sender turns its states into the inputs of its thinking steps (`latents.Thought`).
        sends: "kv": the keys and values of prompt and thoughts. "thoughts": the thought vectors, which B reads before its
            prompt. This needs `steps`.
        maps: Maps of A's keys and values to B's (`fit_kv_maps`), for a single sender whose keys do not match B's. Tokens
            of another tokenizer are aligned by characters (`Agent.align`). None: B uses them unchanged.
        order: For several senders. "parallel": each reads only its own prompt. "row": each continues from the keys and
            values of the senders before it.
        control: Stand-in that B gets instead of the message: a name in `CONTROLS`, or a `StandIn`. None: the message.
        seed: Random seed for noise: one for all items, or one for each.
        sampling: As in other protocols. No effect: nothing is sampled before B's turn.
        until: As in other protocols. No effect, as for `sampling`.

    Raises:
        ValueError: An option has an unknown value; no layer is chosen; `sends` is "thoughts" and `steps` is 0.

    Example:
        >>> how = protocols.Prefixing(layers=[3, 4, 5])
        >>> sent = protocols.send_prefix(agent, agent, ["Bob is at Petra."], how)
        >>> len(sent.message), sent.message.bytes == sent.spent[0].sent
        (1, True)
    """

    layers: Literal["all"] | Sequence[int] | AnyArray = "all"
    place: Literal["start", "turn"] = "start"
    positions: Literal["after", "own"] = "after"
    sink: bool = False
    future: bool = False
    steps: int = 0
    thought: Thought = "aligned"
    sends: Literal["kv", "thoughts"] = "kv"
    maps: KVMaps | None = None
    order: Literal["parallel", "row"] = "parallel"
    control: Control | StandIn | None = None
    seed: Seed = 0
    sampling: Sampling | None = None
    until: Sequence[str] = ()

    def __post_init__(self):
        object.__setattr__(self, "control", as_stand_in(self.control))
        for name, value, known in (
            ("place", self.place, ("start", "turn")),
            ("positions", self.positions, ("after", "own")),
            ("sends", self.sends, ("kv", "thoughts")),
            ("order", self.order, ("parallel", "row")),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose {' or '.join(known)}")
        if self.place == "turn" and (self.positions == "own" or self.sends == "thoughts"):
            wrong = "positions='own'" if self.positions == "own" else "sends='thoughts'"
            raise ValueError(f"place='turn' puts keys and values after what B has read: leave out {wrong}")
        if self.sends == "thoughts" and not self.steps:
            raise ValueError("thoughts are sent, and there are none: give steps")
        if not isinstance(self.layers, str) and not np.any(np.asarray(self.layers)):
            raise ValueError("no layer sees the prefix: name at least one, or play the protocol silent")

    def chosen(self, config: Any) -> np.ndarray:
        """Finds the layers of a receiver that see the prefix.

        Args:
            config: The receiver's architecture.

        Returns:
            Bool [L_B].

        Raises:
            ValueError: A layer is out of range.
        """
        if isinstance(self.layers, str):
            return np.ones(config.layers, bool)
        return np.asarray(as_layers(self.layers, config.layers))


def kv(
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Prompt],
    *,
    sent: Sent | None = None,
    **how: Any,
) -> Turn:
    """A reads its prompts. Its keys and values become a prefix of B's prompts, in some layers (KVComm, arXiv 2510.03346).

    With all layers, and with the same model as sender and receiver, B answers as if it had read both texts.

    Args:
        a: The sender, or a list of several. Then `a` and `prompts_a` are lists with one entry for each sender.
        b: The receiver.
        prompts_a: A's prompts, one for each item.
        prompts_b: B's prompts, one for each item.
        sent: Result of `send_prefix` for the same prompts. With it, many controls need only one reading of A's prompts.
            Default: A reads them now.
        **how: Options of `Prefixing`.

    Returns:
        B's turn. `Reply.details` holds the layers that see the prefix, its number of tokens by sender, and the thinking steps.

    Raises:
        ValueError: The models' keys do not match; prefix and prompt exceed B's positions; a chosen layer's window hides
            the prefix; an option is invalid.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> protocols.kv(agent, agent, told, asked).write(4)[0].text
        'Greece'
    """
    settings = Prefixing(**how)
    if sent is None:
        sent = send_prefix(a, b, prompts_a, settings)
    if settings.control is not None:
        sent = _replaced(sent, a, b, prompts_a, prompts_b, settings)
    return receive_prefix(b, prompts_b, sent, settings)


def latent(
    a: Agent | Sequence[Agent], b: Agent, prompts_a: Sequence[Any], prompts_b: Sequence[Prompt], **how: Any
) -> Turn:
    """A reads its prompts and thinks in latents. B reads its prompt after them (LatentMAS, arXiv 2511.20639).

    This is `kv` with `steps=10` by default. With 0 steps it is `kv`.

    Args:
        a: The sender, or a list of several, in a row or in parallel (`Prefixing.order`).
        b: The receiver.
        prompts_a: A's prompts, one for each item; with several senders, one list for each.
        prompts_b: B's prompts, one for each item.
        **how: Options of `Prefixing`.

    Returns:
        B's turn, as for `kv`.

    Raises:
        ValueError: As for `kv`.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> turn = protocols.latent(agent, agent, told, asked, steps=2)
        >>> turn.details[0]["steps"]
        2
    """
    return kv(a, b, prompts_a, prompts_b, **{"steps": 10, **how})


def thinking(
    a: Agent,
    b: Agent,
    prompts_a: Sequence[Prompt],
    prompts_b: Sequence[Prompt],
    *,
    steps: int = 10,
    thought: Thought = "aligned",
    **unused: Any,
) -> Turn:
    """B thinks in latents after its own prompt, and answers. It receives no message.

    Use it as the baseline for `latent`: a gain of `latent` over `silent` may be due to thinking alone.

    Args:
        a: The other agent. It does nothing.
        b: The agent that answers.
        prompts_a: A's prompts. Not used.
        prompts_b: B's prompts, one for each item.
        steps: Number of thinking steps, m. With 0 it is `silent`.
        thought: How B turns its states into the inputs of its thinking steps (`latents.Thought`).
        **unused: Options of `Prefixing`. They change nothing.

    Returns:
        B's turn.

    Raises:
        ValueError: A prompt is empty, or leaves no room for the thoughts.

    Example:
        >>> asked = ["Bob is at Petra. Which country is Bob located in?"]
        >>> protocols.thinking(agent, agent, [""], asked, steps=2).details[0]
        {'steps': 2}
    """
    settings = Prefixing(**{"steps": steps, "thought": thought, **unused})
    rows = b.rows(prompts_b, steps + 1)
    prompts = by_rows(b.params, left_pad(rows, bucket(max(map(len, rows)), b.params.config.max_positions - steps)))
    thoughts = _think(b, prompts, settings, ())
    spent = [Spent(_thinking(b, len(row), settings)) for row in rows]
    details = [{"steps": steps} for _ in rows]
    turn = Turn(b, prompts_b, rows, thoughts.logits, thoughts.cache, (), details, spent)
    return dataclasses.replace(turn, thought=steps)


def send_prefix(a: Agent | Sequence[Agent], b: Agent, prompts_a: Sequence[Any], settings: Prefixing) -> Sent:
    """Lets one or several senders read and think, and makes a prefix for the receiver from their keys and values.

    Args:
        a: The sender, or a list of several.
        b: The receiver.
        prompts_a: The sender's prompts, one for each item; with several senders, one list for each.
        settings: Layers, steps, order.

    Returns:
        Messages of keys and values, as the receiver's layers will see them, or of vectors.

    Raises:
        ValueError: The models' keys do not match; the numbers of senders and prompts differ; a prompt is empty or too
            long.

    Example:
        >>> sent = protocols.send_prefix(agent, agent, ["Bob is at Petra."], protocols.Prefixing())
        >>> sent.message.states.positions.shape[0]
        1
    """
    agents, reads = ([a], [prompts_a]) if isinstance(a, Agent) else (list(a), list(prompts_a))
    if len(agents) != len(reads):
        raise ValueError(f"{len(agents)} senders, {len(reads)} lists of prompts: give one of each")
    if len({len(x) for x in reads}) > 1:
        raise ValueError(f"the senders have {' and '.join(str(len(x)) for x in reads)} prompts: give one for each item")
    _check_models(agents, b, settings)
    heard: list[_Read] = []
    for agent, prompts in zip(agents, reads, strict=True):
        before = [x.cache for x in heard] if settings.order == "row" else []
        heard.append(_read(agent, prompts, settings, before))
    if settings.sends == "thoughts":
        vectors = jnp.concatenate([deliver(x.vectors, b.params) for x in heard], axis=1)
        message = Message(vectors, jnp.ones(vectors.shape[:2], bool), Site("embed"))
        sent = np.full(len(vectors), vectors[0].nbytes)
    else:
        caches = [deliver(x.cache, b.params) for x in heard]
        if settings.maps is not None:
            caches = [_mapped(caches[0], agents[0], b, reads[0], settings)]
        message = _as_seen(join(caches), b, settings)
        sent = message.states.bytes  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    details = [
        {
            "layers": (np.flatnonzero(settings.chosen(b.single.config)) + 1).tolist(),
            "prefix_tokens": [len(x.rows[i]) for x in heard],
            "steps": settings.steps,
        }
        for i in range(len(reads[0]))
    ]
    mapping = _mapping(settings, b)
    spent = [
        total(x.spent[i] + Spent(mapping * (len(x.rows[i]) + settings.steps)) for x in heard) + Spent(sent=int(sent[i]))
        for i in range(len(reads[0]))
    ]
    return Sent(message, details, spent)


def receive_prefix(b: Agent, prompts_b: Sequence[Prompt], sent: Sent, settings: Prefixing) -> Turn:
    """Lets the receiver read its prompts after a prefix.

    Args:
        b: The receiver.
        prompts_b: Its prompts, one for each item.
        sent: Messages of keys and values, or of vectors, one for each prompt.
        settings: Options, including the name of the control for the details.

    Returns:
        The receiver's turn.

    Raises:
        ValueError: There is not one message for each prompt; prefix and prompt exceed the receiver's positions; a chosen
            layer's window hides the prefix.

    Example:
        >>> told, asked = ["Alice is at the Acropolis of Athens."], ["Which country is Alice located in?"]
        >>> how = protocols.Prefixing(layers=[1, 2, 3, 4, 5, 6])
        >>> protocols.receive_prefix(agent, asked, protocols.send_prefix(agent, agent, told, how), how).write(4)[0].text
        'Greece'
    """
    message, rows, params = sent.message, b.rows(prompts_b, 1), b.single
    if len(message) != len(rows):
        raise ValueError(f"{len(message)} prefixes for {len(rows)} prompts: give one for each")
    read, ahead = [Spent() for _ in rows], 0
    if isinstance(message.states, KVCache):
        cache, ahead = message.states, places(b, prompts_b, rows) if settings.place == "turn" else 0
        check_reach(params.config, settings.chosen(params.config), max(map(len, rows)) - ahead)
    else:
        vectors = jnp.asarray(message.state_array())
        cache = prefill(params, Prompts(vectors.astype(params.dtype)))[1]
        read = [Spent(blocks_flops(params.config, vectors.shape[1]), vectors.shape[1]) for _ in rows]
    begin = np.broadcast_to(np.asarray(cache.after()), len(rows))
    control = None if settings.control is None else settings.control.name  # pyright: ignore
    details = [{**told, "control": control} for told in sent.details]
    before = [x + y for x, y in zip(sent.spent, read, strict=True)]
    # Check before anything is compiled. The other fields of the turn are filled in below.
    blank: Any = None
    turn = Turn(b, prompts_b, rows, blank, blank, (), details, before, message, cache.columns_seen.T, begin, ahead)
    turn.check_room([1] * len(rows))
    past, prompts = behind(b, rows, cache, ahead)
    logits, own = prefill(params, prompts, past=past)
    return dataclasses.replace(turn, logits=logits, cache=own, past=past, given=Input(prompts, past))


def places(b: Agent, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]]) -> int:
    """Counts the tokens before the last turn of the prompts, for `Prefixing.place` "turn".

    Args:
        b: The agent that reads them.
        prompts: The prompts.
        rows: Their tokens.

    Returns:
        The number of tokens.

    Raises:
        ValueError: These tokens differ between prompts; prompts were truncated.
    """
    if any(dropped(b, prompts, rows)):
        raise ValueError(
            "a prompt was cut, so its last turn cannot be found: let the prefix stand at the start (place='start')"
        )
    counts = {b.before_last_turn(prompt) for prompt in prompts}
    if len(counts) > 1 or len({tuple(row[: min(counts)]) for row in rows}) > 1:
        raise ValueError(
            "the prompts do not begin alike before their last turns: let the prefix stand at the start (place='start')"
        )
    return counts.pop()


def behind(b: Agent, rows: Sequence[Sequence[int]], cache: KVCache, ahead: int) -> tuple[tuple[KVCache, ...], Prompts]:
    """Lays out prompts after a prefix, and reads the tokens before the prefix.

    Args:
        b: The agent that reads.
        rows: Tokens of the prompts.
        cache: Keys and values of the prefix.
        ahead: Number of tokens of each prompt before the prefix, the same in all.

    Returns:
        Caches for `past` (the prefix is the last one), and the rest of the prompts.
    """
    params, limit, past = b.single, b.params.config.max_positions, ()
    if ahead:
        past = (prefill(params, left_pad([rows[0][:ahead]], bucket(ahead, limit)))[1],)
        cache, rows = move(cache, params.config, ahead), [row[ahead:] for row in rows]
    prompts = by_rows(params, left_pad(rows, bucket(max(map(len, rows)), limit)))
    return (*past, cache), prompts


@dataclasses.dataclass(frozen=True)
class _Read:
    """Result of reading and thinking: the sender's cache, its thought vectors [B, m, D], and the cost."""

    cache: KVCache
    vectors: AnyArray
    rows: Sequence[Sequence[int]]
    spent: Sequence[Spent]


def _read(agent: Agent, prompts: Sequence[Prompt], settings: Prefixing, before: Sequence[KVCache]) -> _Read:
    """Let a sender read and think, behind the caches of the senders before it."""
    rows, params, steps = agent.rows(prompts, settings.steps), agent.single, settings.steps
    behind = sum((np.asarray((cache.positions >= 0).sum(axis=-1)) for cache in before), np.zeros(len(rows), int))
    limit = params.config.max_positions - steps
    agent.check_room([[0] * int(n) + list(row) for n, row in zip(behind, rows, strict=True)], steps)
    padded = by_rows(params, left_pad(rows, bucket(max(map(len, rows)), limit)))
    before = [deliver(cache, params) for cache in before]
    thoughts = _think(agent, padded, settings, before)
    spent = []
    for row, lost, n in zip(rows, dropped(agent, prompts, rows), behind.tolist(), strict=True):
        reading = blocks_flops(params.config, len(row), n) if steps else _keys_behind(params.config, len(row), n)
        spent.append(Spent(reading + _thinking(agent, len(row) + n, settings), len(row) + steps, 0, lost))
    return _Read(thoughts.cache, thoughts.vectors, rows, spent)


def _keys_behind(config: ModelConfig, tokens: int, before: int) -> int:
    """FLOPs of a prompt's keys and values, behind other senders' tokens. The last block computes only these."""
    return keys_flops(config, before + tokens) - (keys_flops(config, before) if before else 0)


def _think(agent: Agent, prompts: Prompts, settings: Prefixing, past: Sequence[KVCache]) -> Any:
    W = agent.realignment if settings.steps and settings.thought == "aligned" else None
    return think(agent.single, prompts, steps=settings.steps, thought=settings.thought, W=W, past=tuple(past))


def _thinking(agent: Agent, prompt: int, settings: Prefixing) -> int:
    """FLOPs of all thinking steps after a prompt of so many tokens."""
    config = agent.single.config
    said = 2 * head_flops(config) * settings.steps if settings.thought == "soft" else 0
    return said + thinking_flops(config, prompt, settings.steps, settings.thought == "aligned")


def _mapped(cache: KVCache, a: Agent, b: Agent, prompts: Sequence[Prompt], settings: Prefixing) -> KVCache:
    """Map a sender's keys and values to the receiver's."""
    assert settings.maps is not None
    columns = None
    if a.tokenizer.get_vocab() != b.tokenizer.get_vocab():
        if settings.steps:
            raise ValueError(
                f"thoughts have no characters, so they cannot be aligned with {b.name}'s tokens: send what was read (steps=0)"
            )
        columns = a.align(b, prompts)
    return map_cache(settings.maps, cache, a.single, b.single, columns)


def _mapping(settings: Prefixing, b: Agent) -> int:
    """FLOPs of the map for one token, in the layers that see it."""
    if settings.maps is None:
        return 0
    chosen, maps = settings.chosen(b.single.config), settings.maps
    return int(sum(2 * np.size(W[0]) * chosen.sum() for W in (maps.k.W, maps.v.W)))


def _check_models(agents: Sequence[Agent], b: Agent, settings: Prefixing) -> None:
    """Raises ValueError if the receiver cannot use the senders' keys and values or vectors."""
    parts = not settings.chosen(b.single.config).all() or settings.positions == "own" or settings.place == "turn"
    if settings.sends == "kv" and (parts or len(agents) > 1):
        check_parts(b.single.config, b.name)
    if settings.maps is not None and (len(agents) > 1 or settings.sends == "thoughts"):
        raise ValueError("maps are of one sender's keys and values: name a single sender, and send no thoughts")
    for agent in agents if settings.maps is None else ():
        if settings.sends == "kv":
            check_prefix(agent.single.config, b.single.config)
        elif (own := agent.params.config.width) != (width := b.params.config.width):
            raise ValueError(
                f"thoughts are vectors of width {own}, B reads width {width}: send keys and values, or text"
            )
    if settings.order == "row":
        for agent in agents[1:]:
            check_prefix(agents[0].single.config, agent.single.config)
            if agent.single.config.layers != agents[0].single.config.layers:
                raise ValueError("senders in a row go on from each other's keys and values: give models of one depth")


def _as_seen(cache: KVCache, b: Agent, settings: Prefixing) -> Message:
    """A message of a sender's keys and values, as the receiver's layers see them."""
    config = b.single.config
    cache = stretch(cache, config.layers)
    how = dict(positions=settings.positions, sink=settings.sink, future=settings.future)
    there = True if cache.seen is None else np.asarray(cache.seen)[:, 0, 0]
    return Message(select(cache, settings.chosen(config) & there, **how))  # pyright: ignore[reportArgumentType]


def _replaced(
    sent: Sent,
    a: Agent | Sequence[Agent],
    b: Agent,
    prompts_a: Sequence[Any],
    prompts_b: Sequence[Prompt],
    settings: Prefixing,
) -> Sent:
    """Replace the messages by the control's stand-in."""
    plain, games = dataclasses.replace(settings, control=None), len(prompts_b)
    home = dataclasses.replace(plain, maps=None)  # B's own keys and values need no map
    one = functools.partial(send_prefix, b, b)

    def unrelated(sentence: str) -> Message:
        told: Any = [sentence] * games if isinstance(a, Agent) else [[sentence] * games] * len(a)
        return send_prefix(a, b, told, plain).message

    def likely(message: Message, answers: Sequence[str]) -> np.ndarray:
        return likelihoods(receive_prefix(b, prompts_b, dataclasses.replace(sent, message=message), plain), answers)

    assert isinstance(settings.control, StandIn)
    link = Link(
        a if isinstance(a, Agent) else a[0],
        generated=lambda: one(prompts_b, home).message,
        unrelated=unrelated,
        own=lambda: (
            one(prompts_b, home if settings.sends == "thoughts" else dataclasses.replace(home, steps=0)).message
        ),
        worst=lambda message, answers: worst_of_others(message, answers, lambda m: likely(m, answers), settings.seed),
    )
    return dataclasses.replace(sent, message=settings.control(sent.message, link, settings.seed))
