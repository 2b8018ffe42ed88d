"""Plays a game under a protocol and keeps score."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.decoding import Sampling
from jaxcomm.protocols import PROTOCOLS, Reply

from . import processes
from .games import Item
from .scores import Interval, accuracy, exact_match, normalised_match


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One game played by one pair under one protocol: the replies, item by item, and the score."""

    game: str
    pair: str
    protocol: str
    settings: dict[str, Any]
    """How the items were drawn, and the protocol's own: k, j, graft, control, mapped (through a W), sampling ..."""
    items: Sequence[Item]
    replies: Sequence[Reply]
    seconds: float
    """Wall time of the whole game, compilation included where it was the first of its shape."""

    @property
    def hits(self) -> list[bool]:
        return [exact_match(r.text, i.answer) for r, i in zip(self.replies, self.items, strict=True)]

    @property
    def normalised_hits(self) -> list[bool]:
        return [normalised_match(r.text, i.answer) for r, i in zip(self.replies, self.items, strict=True)]

    @property
    def accuracy(self) -> Interval:
        return accuracy(self.hits)

    @property
    def flops(self) -> float:
        """Of both models, mean over games."""
        return float(np.mean([r.flops for r in self.replies]))

    def summary(self) -> dict[str, Any]:
        """One JSON line per result."""
        exact, loose = self.accuracy, accuracy(self.normalised_hits)
        return {
            "game": self.game,
            "pair": self.pair,
            "protocol": self.protocol,
            **{"graft": None, "k": None, "j": None, "control": None, "mapped": None, **self.settings},
            "accuracy": exact.value,
            "low": exact.low,
            "high": exact.high,
            "normalised_accuracy": loose.value,
            "normalised_low": loose.low,
            "normalised_high": loose.high,
            "n": len(self.items),
            "flops": self.flops,
            "seconds": self.seconds,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One JSON line per item: what was read and written."""
        fields = zip(self.items, self.replies, self.hits, self.normalised_hits, strict=True)
        return [
            {"game": self.game, "pair": self.pair, "protocol": self.protocol, **self.settings}
            | {"index": n, **dataclasses.asdict(item)}
            | {"hit": hit, "normalised_hit": loose, **reply.row()}
            for n, (item, reply, hit, loose) in enumerate(fields)
        ]


def play(
    game: str,
    items: Sequence[Item],
    protocol: str,
    a: Agent,
    b: Agent,
    *,
    drawn: Mapping[str, Any] = MappingProxyType({}),
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    seed: int = 0,
    **settings,
) -> Outcome:
    """Every item once. `settings` go to the protocol (`jaxcomm.protocols`); `drawn` says how items and W came about and
    is kept with the result, as are the settings."""
    start, how = time.perf_counter(), dict(sampling=sampling, seed=seed)
    turn = PROTOCOLS[protocol](a, b, [i.prompt_a for i in items], [i.prompt_b for i in items], **how, **settings)
    replies = turn.write(max_new_tokens, **how)
    seconds = time.perf_counter() - start
    kept = dict(drawn) | {"chat": b.chat, "dtype": b.params.dtype.name}
    if protocol == "activation":
        kept |= {"graft": "replace", "where": "last", "mapped": settings.pop("W", None) is not None}
    if sampling:
        kept |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    settings |= {"max_new_tokens": max_new_tokens, "seed": seed}
    return Outcome(game, f"{a.name} -> {b.name}", protocol, kept | settings, items, replies, seconds)


def play_together(game: str, items: Sequence[Item], *who: Any, seed: int = 0, **how: Any) -> Outcome:
    """`play`, of which each process (`evals.processes`) does its share; every process returns the whole. Each has draws of its
    own, and the control shuffled stays within its share. ValueError: fewer items than processes."""
    count = jax.process_count()
    if len(items) < count:
        raise ValueError(f"{len(items)} games for {count} processes: each needs at least one")
    own = play(game, processes.mine(items), *who, seed=seed + jax.process_index(), **how)
    told = {"seed": seed} | ({"processes": count} if count > 1 else {})
    replies = processes.together(own.replies)
    return dataclasses.replace(own, items=items, replies=replies, settings=own.settings | told)
