"""What a sweep is cut into: parts that are scored in one way, and the chunks of each that are computed at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.layer_sweep import Chunk, Plan, Sizes

from ..games import Game, Wording
from .grid import PLAIN, answer_groups, plan_game


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """A sweep as it is asked for (`jaxcomm sweep --help` says what the fields mean). With the models' fingerprints and the
    versions it makes a run what it is."""

    games: tuple[str, ...]
    ks: tuple[int, ...]
    js: tuple[int, ...]
    grafts: tuple[str, ...]
    decode: int | None
    """Also write so many tokens in every cell."""
    text: str | None
    """W per cell: `fitting.STATEMENTS`, or a file with a sentence per line. None: no W."""
    into: int | None
    """The layer of B that W maps into, if it is not the one it is grafted at."""
    n: int | None
    seed: int
    names: str
    memory: int | None
    """Bytes."""
    wording: Wording = PLAIN
    examples: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """Questions of one game that are scored in one way."""

    game: str
    kind: Literal["answers", "decoded"]
    group: int
    questions: np.ndarray
    """Answers are scored in groups of about one length (`layer_sweep.by_length`)."""

    @property
    def name(self) -> str:
        return f"{self.game} {self.kind} {self.group}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A part as it is computed."""

    part: Part
    plan: Plan
    chunks: tuple[Chunk, ...]
    """As they were cut when the run began: a file each. The plan's own are smaller if it goes on with less memory."""

    def name(self, index: int) -> str:
        """Of a chunk's file."""
        return f"{self.part.game}-{self.part.kind}-{self.part.group}-{index:05d}"

    def run(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """`Plan.run`'s arrays [cells, games, ..] of one of the chunks."""
        found: dict[str, np.ndarray] = {}
        for piece in chunk.cut(self.plan.sizes):
            for name, value in self.plan.run(piece).items():
                if not value.ndim:  # what it took, which nothing here asks for
                    continue
                whole = found.setdefault(
                    name, np.zeros((len(chunk.cells), len(chunk.games), *value.shape[2:]), value.dtype)
                )
                at = lambda inner, outer: slice(inner.start - outer.start, inner.stop - outer.start)
                whole[at(piece.cells, chunk.cells), at(piece.games, chunk.games)] = value
        return found


@dataclasses.dataclass(frozen=True)
class GameSweep:
    """Two agents and the games they play at every layer pair."""

    settings: SweepSettings
    a: Agent
    b: Agent
    games: Mapping[str, Game]

    def parts(self) -> list[Part]:
        """Every game in every way it is scored."""
        found = []
        for name, game in self.games.items():
            groups = answer_groups(game, self.b, self.settings.wording)
            found += [Part(name, "answers", n, questions) for n, questions in enumerate(groups)]
            if self.settings.decode:
                found.append(Part(name, "decoded", 0, np.arange(len(game.items))))
        return found

    def plan(self, part: Part, **more: Any) -> Plan:
        """How a part is computed. more: `Plan`'s W, sizes and memory."""
        own = self.settings
        return plan_game(
            self.games[part.game].part(part.questions), self.a, self.b, wording=own.wording, ks=own.ks, js=own.js,
            grafts=own.grafts, max_new_tokens=own.decode if part.kind == "decoded" else None, **more,
        )  # fmt: skip

    def sizes(self, parts: Sequence[Part]) -> dict[str, list[int]]:
        """How much of each part, by name, the memory holds at once."""
        return {p.name: list(dataclasses.astuple(self.plan(p, memory=self.settings.memory).sizes)) for p in parts}

    def job(self, part: Part, maps: np.ndarray | None, begun: Sequence[int], now: Sequence[int]) -> Job:
        """A part to be computed, in chunks of the sizes that the run began with, in pieces that the memory holds now."""
        plan = self.plan(part, maps=maps, sizes=Sizes(*map(min, begun, now)))
        every = Chunk(range(plan.games), range(len(plan.grid.cells)))
        return Job(part, plan, tuple(every.cut(Sizes(*begun))))
