"""Play a game under a protocol, and score it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomm.agent import Agent, Prompt
from jaxcomm.decoding import Sampling
from jaxcomm.protocols import PROTOCOLS, Panel, Reply, StandIn, Turn

from . import processes
from .choices import Choice, choose, logprobs
from .games import PRESETS, Game, Wording
from .hearing import Heard, heard
from .scores import Interval, accuracy, exact_match, mean, normalised_match

SENDS = ("message", "debate", "cipher", "activation", "exchange", "kv", "latent", "deltas", "bridge")
"""Protocols in which A reads a prompt and sends a message. `Wording.reads` sets A's prompt."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One game, played by one pair of agents under one protocol: the replies to the items, and their scores.

    Attributes:
        game: The game, with the played items.
        pair: Names of the sender and the receiver, such as "a -> b".
        protocol: A key of `jaxcomm.protocols.PROTOCOLS`.
        settings: Settings of the draw and the wording, and the protocol's own settings: k, j, graft, control, mapped
            (whether states went through a W), sampling and others.
        replies: B's reply to each item.
        rendered: For each item, the sender's prompt and the answering agents' prompts, as texts for their tokenizers.
        choices: For each item, the scores of the right answer among the choices. None: the choices were not scored.
        heard: For each item, the message that arrived at B, and B's next-token prediction.
        seconds: Wall time of the whole game in seconds. It includes compilation if no program was compiled before.
    """

    game: Game
    pair: str
    protocol: str
    settings: dict[str, Any]
    replies: Sequence[Reply]
    rendered: Sequence[Mapping[str, Any]]
    choices: Sequence[Choice] | None
    heard: Sequence[Heard]
    seconds: float

    @property
    def items(self):
        """The played items."""
        return self.game.items

    @property
    def hits(self) -> list[bool]:
        """Whether each reply is exactly the answer, as in Ramesh & Li (2025), section 4.1 (`scores.exact_match`)."""
        return [exact_match(r.text, i.answer) for r, i in zip(self.replies, self.items, strict=True)]

    @property
    def normalised_hits(self) -> list[bool]:
        """Whether each reply has the same words as the answer (`scores.normalised_match`)."""
        return [normalised_match(r.text, i.answer) for r, i in zip(self.replies, self.items, strict=True)]

    @property
    def found_hits(self) -> list[bool]:
        """Whether each reply names the answer, and names no other choice before it (`Game.named`)."""
        return [self.game.named(r.text, i) == i.answer for r, i in zip(self.replies, self.items, strict=True)]

    def scored(self, metric: str) -> list[Any]:
        """Scores every item by one metric.

        Args:
            metric: A key of `METRICS`: "exact", "found", "choice", or "among".

        Returns:
            Whether each item is right; for "among", log-probabilities. The list is empty for "choice" and "among" if the
            choices were not scored.
        """
        if metric == "among":
            return [choice.among for choice in self.choices or ()]
        if metric == "choice":
            return [choice.hit for choice in self.choices or ()]
        return {"exact": self.hits, "found": self.found_hits}[metric]

    @property
    def accuracy(self) -> Interval:
        """Share of exact matches, with its 95 % interval."""
        return accuracy(self.hits)

    @property
    def flops(self) -> float:
        """FLOPs of both models per item, as a mean over the items. Scoring the choices is not counted."""
        return float(np.mean([r.flops for r in self.replies]))

    @property
    def sent(self) -> float:
        """Bytes that agents send to each other per item, as a mean over the items."""
        return float(np.mean([r.spent.sent for r in self.replies]))

    def summary(self) -> dict[str, Any]:
        """Summarises the outcome as one JSON object.

        Returns:
            Game, pair, protocol, settings, and each accuracy with its 95 % interval (shares between 0 and 1), the
            number of items n, the FLOPs of one item, and the seconds of the whole game.
        """
        intervals = {
            "": self.accuracy,
            "normalised_": accuracy(self.normalised_hits),
            "found_": accuracy(self.found_hits),
        }
        scores: dict[str, Any] = {"information": self.game.information}
        for name, x in intervals.items():
            scores |= {f"{name}accuracy": x.value, f"{name}low": x.low, f"{name}high": x.high}
        if self.choices is not None:
            scores |= _choice_scores(self.choices)
        return {
            "game": self.game.name,
            "pair": self.pair,
            "protocol": self.protocol,
            **{"graft": None, "k": None, "j": None, "control": None, "mapped": None, **self.settings},
            **scores,
            "n": len(self.items),
            "flops": self.flops,
            "bytes_sent": self.sent,
            "seconds": self.seconds,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Lists the items as JSON objects.

        Returns:
            One object for each item: the agents' prompts and texts, and whether the reply is right.
        """
        told = [None] * len(self.items) if self.choices is None else list(map(dataclasses.asdict, self.choices))
        fields = zip(
            self.items, self.replies, self.hits, self.normalised_hits, self.found_hits, told, self.rendered, strict=True
        )
        return [
            {"game": self.game.name, "pair": self.pair, "protocol": self.protocol, **self.settings}
            | {"index": n, **dataclasses.asdict(item)}
            | {"hit": hit, "normalised_hit": loose, "found_hit": found, "choice": choice, **rendered, **reply.row()}
            for n, (item, reply, hit, loose, found, choice, rendered) in enumerate(fields)
        ]


def _choice_scores(choices: Sequence[Choice]) -> dict[str, Any]:
    """Means over items, with intervals, of the values in `Choice`."""
    found = {}
    told = {
        "choice_accuracy": [c.hit for c in choices],
        "choice_rank": [c.rank for c in choices],
        "choice_logprob": [c.logprob for c in choices],
        "choice_among": [c.among for c in choices],
        "calibrated_accuracy": [c.calibrated_hit for c in choices],
        "calibrated_rank": [c.calibrated_rank for c in choices],
        "calibrated_among": [c.calibrated_among for c in choices],
    }
    for name, values in told.items():
        if None in values:
            found[name] = None
            continue
        x = accuracy(values) if name.endswith("accuracy") else mean(values)
        found |= {name: x.value, f"{name}_low": x.low, f"{name}_high": x.high}
    return found | {"choices": float(np.mean([c.choices for c in choices]))}


METRICS = {
    "exact": "exact match, the paper's: the reply is the answer and nothing else",
    "found": "found match: the reply names the answer, and none of the other choices before it",
    "choice": "choice: the answer is the likeliest of the choices, nothing is decoded",
    "among": "log p(right | choices): log-probability of the answer, given that it is one of the choices, in nats",
}


def shown(b: Agent, wording: Wording, examples: int) -> tuple[str, str]:
    """Chooses the main metric of a report.

    Args:
        b: The receiver.
        wording: How the game is put to the agents.
        examples: Number of worked examples before each question.

    Returns:
        A key of `METRICS`, and the reason in words.
    """
    if b.chat:
        return "found", "B answers in a chat, where models write sentences"
    if examples:
        return "exact", "B continues raw text, and worked examples show the form of an answer"
    if "{instruction}" in PRESETS[wording.preset].receiver:
        return "found", "B is told how to answer, and may say more"
    return "exact", "B continues raw text, as in the paper"


@dataclasses.dataclass(frozen=True)
class PlaySettings:
    """Settings for playing a game, the same for all protocols.

    Attributes:
        wording: How the game is put to the agents.
        choices: Whether to score the right answer among the game's choices too.
        max_new_tokens: Largest number of tokens of a reply.
        sampling: How tokens are sampled. None: decoding is greedy.
        seed: Seed of sampling, and of the protocol's own random draws.
        drawn: Further facts to store with the result.
    """

    wording: Wording = dataclasses.field(default_factory=Wording)
    choices: bool = False
    max_new_tokens: int = 16
    sampling: Sampling | None = None
    seed: int = 0
    drawn: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def play(
    game: Game,
    protocol: str,
    a: Agent,
    b: Agent,
    settings: PlaySettings = PlaySettings(),
    prior: Sequence[np.ndarray] | None = None,
    **own: Any,
) -> Outcome:
    """Plays every item of a game once.

    Args:
        game: The game.
        protocol: A key of `jaxcomm.protocols.PROTOCOLS`.
        a: The sender.
        b: The receiver.
        settings: The settings that every protocol has.
        prior: Log-probabilities of each item's choices for B alone, from `alone_with`. Default: computed when needed.
        **own: The protocol's own settings, such as k and j. They are stored with the result.

    Returns:
        The replies and their scores.

    Raises:
        ValueError: A setting does not fit the protocol or the agents; a prompt is too long; the choices are scored but
            B's chat template begins a thought.

    Example:
        >>> from jaxcomm.evals import games
        >>> outcome = play(games.draw("countries", n=2), "skyline", agent, agent)
        >>> [reply.text for reply in outcome.replies]
        ['Russia', 'Mexico']
        >>> outcome.hits
        [True, True]
    """
    start = time.perf_counter()
    turn, prompts_a = begin(game, protocol, a, b, settings, **own)
    notes = heard(turn)
    found = logprobs(turn, game, b.chat) if settings.choices else None
    replies = turn.write(settings.max_new_tokens, sampling=settings.sampling, seed=settings.seed)
    seconds = time.perf_counter() - start
    scored = None
    if found is not None:
        alone = protocol == "silent"
        scored = choose(
            game, found, None if alone else alone_with(game, a, b, settings.wording) if prior is None else prior
        )
    rendered = [
        {
            "rendered_a": reply.details.get("asked") or (a.render(prompts_a[i]) if protocol in SENDS else ""),
            "rendered": turn.rendered(i),
        }
        for i, reply in enumerate(replies)
    ]
    kept = _kept(game, protocol, a, b, settings, own)
    return Outcome(game, f"{a.name} -> {b.name}", protocol, kept, replies, rendered, scored, notes, seconds)


def begin(
    game: Game, protocol: str, a: Agent, b: Agent, settings: PlaySettings, **own: Any
) -> tuple[Turn | Panel, Sequence[Prompt]]:
    """Plays every item of a game up to B's answer.

    Args:
        game: The game.
        protocol: A key of `jaxcomm.protocols.PROTOCOLS`.
        a: The sender.
        b: The receiver.
        settings: The settings that every protocol has.
        **own: The protocol's own settings. For "activation" also `asked`, B's reading of its prompts (`read_receiver`).

    Returns:
        B's turn, and A's prompts.

    Raises:
        ValueError: As for `play`.
    """
    wording, sends = settings.wording, protocol in SENDS
    b = wording.writer(game, b)
    a = a if wording.reads == "statement" else wording.writer(game, a)  # with only the statement, A reads no examples
    prompts_a, prompts_b = wording.prompts_a(game, a, sends=sends), wording.prompts_b(game, b)
    if (control := own.get("control")) is not None:
        own["control"] = StandIn(control, answers=[item.answer for item in game.items])
    how = dict(sampling=settings.sampling, seed=settings.seed)
    return PROTOCOLS[protocol](a, b, prompts_a, own.pop("asked", prompts_b), **how, **own), prompts_a


def _kept(
    game: Game, protocol: str, a: Agent, b: Agent, settings: PlaySettings, own: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings to store in an outcome."""
    metric, why = shown(b, settings.wording, len(game.examples))
    kept = dict(game.source) | dict(settings.drawn)
    kept |= {"dtype": b.params.dtype.name, "chat_a": a.chat, "chat": b.chat}
    kept |= {
        "wording": settings.wording.preset,
        "examples": len(game.examples),
        "sender_reads": settings.wording.reads if protocol in SENDS else None,
    }
    kept |= {"system_a": a.system, "system_b": b.system, "shown": metric, "shown_because": why}
    if protocol in ("activation", "exchange"):
        kept |= {"graft": "replace", "where": "last", "mapped": own.get("W") is not None}
    if sampling := settings.sampling:
        kept |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    kept |= {
        name: value
        for name, value in own.items()
        if name not in ("W", "maps", "sent", "asked", "limits", "bytes", "bridge")
    }
    kept |= {"mapped": own["maps"] is not None} if "maps" in own else {}
    return kept | {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}


def alone_with(game: Game, a: Agent, b: Agent, wording: Wording) -> list[np.ndarray]:
    """Scores every item's choices for B alone, under the protocol "silent".

    Args:
        game: The game.
        a: The sender, which sends nothing.
        b: The receiver.
        wording: How the game is put to B.

    Returns:
        For each item, the log-probabilities of its choices, in nats.
    """
    return logprobs(PROTOCOLS["silent"](a, b, [], wording.prompts_b(game, b)), game, b.chat)


def play_together(
    game: Game,
    protocol: str,
    a: Agent,
    b: Agent,
    settings: PlaySettings,
    prior: Sequence[np.ndarray] | None,
    **own: Any,
) -> Outcome:
    """Plays a game like `play`, in several processes (`evals.processes`).

    Each process plays its share of the items, and every process returns the whole outcome. Each process samples with its
    own seed. Controls that use other items' messages take them from the same share.

    Args:
        game: The game.
        protocol: A key of `jaxcomm.protocols.PROTOCOLS`.
        a: The sender.
        b: The receiver.
        settings: The settings that every protocol has.
        prior: As for `play`, for all items.
        **own: The protocol's own settings.

    Returns:
        The outcome of all items. Its `seconds` are measured in this process.

    Raises:
        ValueError: There are fewer items than processes; otherwise as for `play`.
    """
    count = jax.process_count()
    if len(game.items) < count:
        raise ValueError(f"{len(game.items)} games for {count} processes: each needs at least one")
    part = game.part(processes.mine(range(len(game.items))))
    drawing = dataclasses.replace(settings, seed=settings.seed + jax.process_index())
    own |= {name: processes.mine(own[name]) for name in ("limits", "bytes") if name in own}
    share = play(part, protocol, a, b, drawing, None if prior is None else processes.mine(prior), **own)
    told = {"seed": settings.seed} | ({"processes": count} if count > 1 else {})
    replies, rendered = processes.together(share.replies), processes.together(share.rendered)
    choices = None if share.choices is None else processes.together(share.choices)
    notes = processes.together(share.heard)
    return dataclasses.replace(
        share,
        game=game,
        replies=replies,
        rendered=rendered,
        choices=choices,
        heard=notes,
        settings=share.settings | told,
    )
