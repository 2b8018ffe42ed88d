"""Cut a sweep into parts with one kind of scoring, and parts into chunks to compute at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.controls import derange
from jaxcomm.layer_sweep import Chunk, Plan, Sizes

from ..games import Game, Wording
from .grid import PLAIN, answer_groups, plan_game


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep. `jaxcomm sweep --help` explains them.

    Attributes:
        games: Names of the games, as for `games.draw`.
        ks: Layers of A, ascending.
        js: Layers of B, ascending.
        grafts: The grafts.
        decode: Number of tokens to decode in every cell. None: only the answers' tokens are scored.
        text: Text for fitting the maps W: `fitting.STATEMENTS`, or a source of sentences (`evals.sentences`). None: there
            is no W.
        into: The layer of B that W maps to. None: the layer of the graft.
        n: Number of items of each game. None: the game's own number.
        seed: Seed of the items and of the halves.
        names: "seen" or "new" people and companies.
        memory: Bytes that a device may use besides the weights. None: the free memory, if the device reports it;
            otherwise 1 GiB.
        wording: How the games are put to the agents.
        examples: Number of worked examples.
        content: Whether to play every cell with another item's message too, for the maps of content.
    """

    games: tuple[str, ...]
    ks: tuple[int, ...]
    js: tuple[int, ...]
    grafts: tuple[str, ...]
    decode: int | None
    text: str | None
    into: int | None
    n: int | None
    seed: int
    names: str
    memory: int | None
    wording: Wording = PLAIN
    examples: int = 0
    content: bool = True


def unchanged(a: Any, b: Any) -> Any:
    """The graft that leaves B as it is."""
    return b


@dataclasses.dataclass(frozen=True)
class Part:
    """Questions of one game with one kind of scoring.

    Attributes:
        game: Name of the game.
        kind: "answers": the tokens of the answers are scored; "decoded": replies are decoded.
        group: Number of the group. Answers are scored in groups of similar length (`layer_sweep.by_length`).
        questions: Indices of the questions.
        message: The message that B gets: the question's "own", an "other" question's (`jaxcomm.derange`), or "none" (a
            single cell that changes nothing).
    """

    game: str
    kind: Literal["answers", "decoded"]
    group: int
    questions: np.ndarray
    message: Literal["own", "other", "none"] = "own"

    @property
    def name(self) -> str:
        """Name of the part, unique in its sweep."""
        return f"{self.game} {self.kind} {self.group}{'' if self.message == 'own' else f' {self.message}'}"


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of a sweep, ready to compute.

    Attributes:
        part: The part.
        plan: Its plan.
        chunks: The chunks, as cut when the run began; each is one file. If the run is resumed with less memory, the plan
            computes a chunk in smaller pieces.
    """

    part: Part
    plan: Plan
    chunks: tuple[Chunk, ...]

    def name(self, index: int) -> str:
        """Names the file of a chunk.

        Args:
            index: Index of the chunk.

        Returns:
            The name, without its ending.
        """
        return f"{self.part.name.replace(' ', '-')}-{index:05d}"

    def run(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """Computes one of the chunks.

        Args:
            chunk: The chunk.

        Returns:
            The arrays of `Plan.run`, [cells, games, ..], by name.
        """
        found: dict[str, np.ndarray] = {}
        for piece in chunk.cut(self.plan.sizes):
            for name, value in self.plan.run(piece).items():
                if not value.ndim:  # skip the cost counter, which is not used here
                    continue
                whole = found.setdefault(
                    name, np.zeros((len(chunk.cells), len(chunk.games), *value.shape[2:]), value.dtype)
                )
                at = lambda inner, outer: slice(inner.start - outer.start, inner.stop - outer.start)
                whole[at(piece.cells, chunk.cells), at(piece.games, chunk.games)] = value
        return found


@dataclasses.dataclass(frozen=True)
class GameSweep:
    """Two agents, and the games that they play at every layer pair.

    Attributes:
        settings: The settings of the sweep.
        a: The sender.
        b: The receiver.
        games: The games, by name.
    """

    settings: SweepSettings
    a: Agent
    b: Agent
    games: Mapping[str, Game]

    def parts(self) -> list[Part]:
        """Lists all parts: every game, with every kind of scoring and every kind of message."""
        found = []
        for name, game in self.games.items():
            groups = answer_groups(game, self.b, self.settings.wording)
            own = [Part(name, "answers", n, questions) for n, questions in enumerate(groups)]
            if self.settings.decode:
                own.append(Part(name, "decoded", 0, np.arange(len(game.items))))
            found += own
            for message in ("none", "other") if self.settings.content else ():
                found += [dataclasses.replace(part, message=message) for part in own]
        return found

    def others(self, game: str) -> np.ndarray:
        """Draws, for each question of a game, the question whose message it gets under the control "other"."""
        return derange([item.answer for item in self.games[game].items], self.settings.seed)

    def plan(self, part: Part, **more: Any) -> Plan:
        """Plans a part.

        Args:
            part: The part.
            **more: Further arguments of `plan_game`: the maps W as `maps`, sizes, memory.

        Returns:
            The plan.
        """
        own, game = self.settings, self.games[part.game]
        cells: dict[str, Any] = dict(ks=own.ks, js=own.js, grafts=own.grafts)
        if part.message == "none":
            cells, more = dict(ks=own.ks[:1], js=own.js[-1:], grafts=(unchanged,)), {**more, "maps": None}
        sent = self.others(part.game)[part.questions] if part.message == "other" else part.questions
        new = own.decode if part.kind == "decoded" else None
        how = dict(wording=own.wording, max_new_tokens=new, told=game.part(sent))
        return plan_game(game.part(part.questions), self.a, self.b, **how, **cells, **more)

    def sizes(self, parts: Sequence[Part]) -> dict[str, list[int]]:
        """Finds the sizes of each part's chunks that fit in memory.

        Args:
            parts: The parts.

        Returns:
            The numbers of `layer_sweep.Sizes`, by name of the part.
        """
        return {p.name: list(dataclasses.astuple(self.plan(p, memory=self.settings.memory).sizes)) for p in parts}

    def job(self, part: Part, maps: np.ndarray | None, begun: Sequence[int], now: Sequence[int]) -> Job:
        """Prepares the job of a part.

        Args:
            part: The part.
            maps: The maps W [K, J, D_B, D_A]. None: there is no W.
            begun: Sizes at the beginning of the run. The chunks have these sizes.
            now: Sizes that fit in memory now. The pieces of a chunk are not larger.

        Returns:
            The job.
        """
        plan = self.plan(part, maps=maps, sizes=Sizes(*map(min, begun, now)))
        every = Chunk(range(plan.games), range(len(plan.grid.cells)))
        return Job(part, plan, tuple(every.cut(Sizes(*begun))))
