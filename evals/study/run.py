"""Run the study in a run folder. Every piece is computed once, and a stopped run resumes where it was."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.sites import Site

from ..agents import read_as
from ..choices import choose
from ..conditions import Condition, Readings, conditions
from ..games import GAMES, Game, draw
from ..play import PlaySettings, alone_with
from ..runs import RunFolder, agent_fingerprint, surroundings
from ..sweeps.fitting import STATEMENTS, fit, read_text
from . import measure
from .analysis import cell_of, choose_cells
from .design import (
    CONTROLS,
    PREREGISTRATION,
    PRIMARY,
    SHOWN,
    Block,
    Cell,
    Setup,
    Size,
    channels,
    halves,
    setups,
    spread,
)

NEW_TOKENS = 16
"""Largest number of tokens of a reply."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a study.

    Attributes:
        size: Size of the study.
        seed: Random seed for the items and everything else.
        text: Text for fitting W (`sentences.sentences`), or "statements", the game's own. None: W is fitted only on the game's
            own statements, in the full size.
    """

    size: Size
    seed: int
    text: str | None = None


class Study:
    """The study of one pair of models.

    Args:
        settings: The settings.
        a: The sender, raw.
        b: The receiver, raw.
        folder: The run folder.
        say: Called with the name of every piece that is computed.
        prompts: Set-ups to play: "raw", "chat" or both. It is no part of the run's identity, so a run may go on with more.
    """

    def __init__(
        self,
        settings: Settings,
        a: Agent,
        b: Agent,
        folder: RunFolder,
        say: Callable[[str], None] = lambda name: None,
        *,
        prompts: Sequence[str] = ("raw", "chat"),
    ):
        self.settings, self.a, self.b, self.folder, self.say = settings, a, b, folder, say
        self.prompts = prompts

    def blocks(self) -> Iterator[Block]:
        """Runs everything, game by game and set-up by set-up. Finished pieces are read from the folder.

        Yields:
            One block for each game and set-up.

        Raises:
            ValueError: A game has too few items, only chats are to be played and a model has no chat template, or B's chat
                template begins a thought, which would come before the answer.
        """
        mute = [agent.name for agent in (self.a, self.b) if not agent.tokenizer.chat_template]
        if mute and "raw" not in self.prompts:
            raise ValueError(f"--prompts chat: {mute[0]} has no chat template; leave out --prompts, or use raw")
        chat = not mute and "chat" in self.prompts
        if chat and (b := dataclasses.replace(self.b, chat=True)).begins_thought(b.rows(["Hello"])[0]):
            raise ValueError(
                f"{b.name}'s chat template begins a thought, but choices are scored at the start of an answer: switch thinking off (such as --chat-args enable_thinking=false)"
            )
        for name in self.settings.size.games:
            for setup in setups(chat=chat, instructed=name in GAMES, whole=self.settings.size.whole):
                if setup.form in self.prompts:
                    yield self._block(drawn(name, setup, self.settings), setup)

    def _agents(self, setup: Setup) -> tuple[Agent, Agent]:
        a, b = (dataclasses.replace(agent, chat=setup.form == "chat") for agent in (self.a, self.b))
        return a, b

    def _piece(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        def told() -> Mapping[str, Any]:
            self.say(name)
            return make()

        return self.folder.arrays(name, told)

    def _block(self, game: Game, setup: Setup) -> Block:
        name, agents = f"{game.name}-{setup.key}", self._agents(setup)
        choosing, reported = (game.part(rows) for rows in halves(len(game.items)))
        fitted = self._fitted(game, setup)
        layers, maps = self._maps(name, choosing, setup, agents, fitted)
        cells = tuple(choose_cells(layers, maps))
        settings = PlaySettings(setup.wording, True, NEW_TOKENS, seed=self.settings.seed)
        prior = self._prior(name, reported, agents, settings)
        scores: dict[str, dict[str, np.ndarray]] = {"silent": alone(reported, prior)}
        whole = self.settings.size.whole
        for part, every, of in self._played(Readings(reported, *agents, setup.wording), setup, cells, fitted):
            make = lambda every=every, of=of: measure.played(of, every, settings, prior, whole)
            for key, values in self._piece(f"play-{name}-{part}", make).items():
                label, score = key.rsplit("/", 1)
                scores.setdefault(label, {})[score] = values
        return Block(game, setup, layers, maps, cells, scores)

    def _prior(self, name: str, game: Game, agents: tuple[Agent, Agent], settings: PlaySettings) -> list[np.ndarray]:
        """Log-probabilities of each item's choices for B alone."""
        counts = np.cumsum([len(game.choices(item)) for item in game.items])[:-1]
        make = lambda: {"logprobs": np.concatenate(alone_with(game, *agents, settings.wording))}
        return np.split(self._piece(f"alone-{name}", make)["logprobs"], counts)

    def _fitted(self, game: Game, setup: Setup) -> dict[str, np.ndarray]:
        """The maps W [K, J, D_B, D_A] of each operator."""
        sources = {"W, statements": STATEMENTS} if self.settings.size.others and game.name in GAMES else {}
        sources |= {} if self.settings.text is None else {"W, text": self.settings.text}
        ks, js = self._coarse

        def make(source: str) -> dict[str, np.ndarray]:
            maps = fit(*self._agents(setup), read_text(source, game.name) or [], ks, js)
            return {"W": np.asarray(maps.W, np.float32)}

        key = lambda operator: f"W-{game.name}-{setup.form}-{operator.removeprefix('W, ')}"
        return {op: self._piece(key(op), lambda s=source: make(s))["W"] for op, source in sources.items()}

    def _layers(self, n: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ks, js = (spread(agent.single.config.layers, n) for agent in (self.a, self.b))
        return ks, js

    @property
    def _coarse(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers of A and of B for sum, mean and W."""
        return self._layers(self.settings.size.others or self.settings.size.layers)

    def _maps(
        self, name: str, game: Game, setup: Setup, agents: tuple[Agent, Agent], fitted: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """The layers and maps of each operator."""
        size, seed = self.settings.size, self.settings.seed
        every, coarse = self._layers(size.layers), self._coarse
        jobs: dict[str, Any] = {PRIMARY: (game, every, (PRIMARY,), None)}
        if size.others:
            jobs["grafts"] = game, coarse, ("sum", "mean"), None
        jobs |= {operator: (game, coarse, (PRIMARY,), W) for operator, W in fitted.items()}
        if size.whole and has_entity(game, setup):
            jobs["entity"] = measure.entity(game), every, (PRIMARY,), None
        layers, maps = {}, {}
        for job, (items, at, grafts, W) in jobs.items():
            make = lambda items=items, at=at, grafts=grafts, W=W: measure.layer_maps(
                items, agents, setup.wording, at, grafts, W, seed
            )
            found = self._piece(f"map-{name}-{job.replace(', ', '-')}", make)
            for n, graft in enumerate(grafts):
                operator = graft if job == "grafts" else job
                layers[operator] = at
                maps[operator] = {key: x[n] for key, x in found.items()}
        if size.whole and measure.same_shape(*agents):
            found = self._piece(f"sites-{name}", lambda: measure.other_sites(game, agents, setup.wording, seed))
            for n, site in enumerate(measure.SITES[1:], 1):
                layers[site] = (tuple(range(1, found["own"].shape[1] + 1)),) * 2
                maps[site] = {key: diagonal(x[n]) for key, x in found.items()}
        return layers, maps

    def _played(
        self, own: Readings, setup: Setup, cells: tuple[Cell, ...], fitted: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, list[Condition], Readings]]:
        """What to play: a name, the conditions, and the items with what the agents have read of them."""
        entity = Readings(measure.entity(own.game), own.a, own.b, own.wording)
        yield "skyline", [Condition("skyline", "skyline", {})], own
        for cell in cells:
            at, file = self._grafted(cell, fitted), cell.label.replace(", ", "-").replace(" ", "-")
            of = entity if cell.operator == "entity" else own
            yield file, [Condition(cell.label, "activation", at)], of
            if cell.rule == "content" or cell.operator == PRIMARY:
                yield f"{file}-other", [Condition(f"{cell.label}, other", "activation", at | {"control": "other"})], of
        if self.settings.size.whole:
            every = self._whole(setup, cell_of(cells, PRIMARY, "content"))
            yield from ((name, part, own) for name, part in every)

    def _whole(self, setup: Setup, cell: Cell) -> Iterator[tuple[str, list[Condition]]]:
        """Every control of the activation at the cell chosen by content, and every channel."""
        own = channels(setup, measure.same_shape(self.a, self.b))
        at = {"activation": {"k": cell.k, "j": cell.j}, "message": own["message"]}
        made = [c for c in conditions(["activation"], at, CONTROLS) if c.protocol != "silent"]
        name = lambda label: label.replace("activation", cell.label, 1)
        same_cost = lambda equal: None if equal is None else (equal[0], name(equal[1]))
        yield "controls", [dataclasses.replace(c, label=name(c.label), equal=same_cost(c.equal)) for c in made]
        for channel, settings in own.items():
            every = [Condition(channel, channel, settings)]
            every.append(Condition(f"{channel}, other", channel, settings | {"control": "other"}))
            yield channel, every

    def _grafted(self, cell: Cell, fitted: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Options of the protocol "activation"."""
        if cell.operator in measure.SITES:
            return {"k": Site(cell.operator, cell.k, "last"), "j": Site(cell.operator, cell.j, "last")}
        own: dict[str, Any] = {"k": cell.k, "j": cell.j}
        if cell.operator in ("sum", "mean"):
            own["graft"] = cell.operator
        if cell.operator in fitted:
            ks, js = self._coarse
            own["W"] = fitted[cell.operator][ks.index(cell.k), js.index(cell.j)]
        return own


def drawn(name: str, setup: Setup, settings: Settings) -> Game:
    """Draws the items of a game, both halves.

    Args:
        name: A game, or FILE.jsonl.
        setup: The set-up, with or without worked examples.
        settings: Number and seed.

    Returns:
        The game. Set-ups with and without examples have the same items, except for a game from a file.

    Raises:
        ValueError: The game has too few items.
    """
    each = settings.size.items
    if each is None and name in GAMES:
        each = len(GAMES[name](settings.seed))
    game = draw(name, settings.seed, None if each is None else 2 * each, examples=SHOWN if setup.examples else 0)
    if len(game.items) < 8:
        raise ValueError(f"{name} has {len(game.items)} items: half of them choose layers, so at least 8 are needed")
    return game


def has_entity(game: Game, setup: Setup) -> bool:
    """Whether A's last word is the place in the statement: the game Countries, if A reads only the statement."""
    return game.name == "countries" and (setup.form, setup.reads) == ("raw", "statement")


def diagonal(values: np.ndarray) -> np.ndarray:
    """Puts values for k = j on the diagonal of a map. Other cells are NaN.

    Args:
        values: [L, items].

    Returns:
        [L, L, items], NaN beside the diagonal.
    """
    made = np.full((len(values), *values.shape), np.nan, values.dtype)
    made[np.arange(len(values)), np.arange(len(values))] = values
    return made


def alone(game: Game, prior: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Computes the scores of B alone from its choices' log-probabilities.

    Args:
        game: The game.
        prior: Log-probabilities of each item's choices.

    Returns:
        "among" and "choice" [items].
    """
    found = choose(game, prior, None)
    return {"among": np.array([c.among for c in found]), "choice": np.array([float(c.hit) for c in found])}


def opened(settings: Settings, a: Agent, b: Agent, out: Path, *, command: str, resume: bool) -> RunFolder:
    """Opens the run folder of a study.

    Args:
        settings: The settings.
        a: The sender.
        b: The receiver.
        out: The folder.
        command: The command line that runs it again.
        resume: Whether to resume the run in the folder.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds another run, or it holds this run and `resume` is false; the text for W is too short.
        OSError: It cannot be written, or the text cannot be read.
    """
    texts = PREREGISTRATION.read_bytes()
    config = dataclasses.asdict(settings) | {"preregistration_sha256": hashlib.sha256(texts).hexdigest()}
    told = [read_text(settings.text, name) for name in settings.size.games] if settings.text else []
    config |= {"text_sha256": hashlib.sha256(repr(told).encode()).hexdigest()} if told else {}
    own = [drawn(name, Setup("raw", "statement", 0), settings) for name in settings.size.games if name not in GAMES]
    config |= {"games_sha256": hashlib.sha256(repr(own).encode()).hexdigest()} if own else {}
    config |= {"a": a.name, "b": b.name, "agent_a": agent_fingerprint(a), "agent_b": agent_fingerprint(b)}
    config |= read_as((a, b))
    return RunFolder(out, config | surroundings(), dict, command=command, resume=resume)
