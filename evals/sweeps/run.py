"""Run a sweep, from its settings to its report, in a run folder that several processes may share."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.compiled import check_layer
from jaxcomm.fingerprint import fingerprint
from jaxcomm.sharding import spread

from .. import processes
from ..figures import MapStyle
from ..games import draw
from ..runs import RunFolder, surroundings
from .chunks import compute
from .fitting import fit, read_text
from .parts import GameSweep, SweepSettings
from .report import report


def run(
    settings: SweepSettings,
    a: Agent,
    b: Agent,
    out: Path,
    *,
    resume: bool,
    command: str,
    recorded: Mapping[str, Any],
    style: MapStyle = "cells",
) -> None:
    """Runs a sweep: computes every chunk, saves it in the run folder, and reports.

    If there are several processes, each computes its share of the chunks. All of them see the same folder.

    Args:
        settings: The settings of the sweep.
        a: The sender.
        b: The receiver.
        out: The run folder.
        resume: Whether to resume the run in the folder.
        command: The command line that runs it again.
        recorded: Further facts that identify this run.
        style: How maps are drawn in the PNG files.

    Raises:
        ValueError: A game, layer or text is invalid, or the folder holds another run. It is raised before any
            computation.
        OSError: A file does not exist, or the folder cannot be written.
    """
    sweep = _drawn(settings, a, b)
    parts = sweep.parts()
    texts = {game: read_text(settings.text, name) for game, name in zip(sweep.games, settings.games, strict=True)}
    config = _config(sweep, texts, recorded)
    opened = lambda first: RunFolder(
        out, config, lambda: sweep.sizes(parts), command=command, resume=resume or not first, free={"memory"},
        shared=not first,
    )  # fmt: skip
    with _shared(opened) as folder:
        maps = _maps(sweep, folder, texts)
        now = folder.plan if settings.memory is None else sweep.sizes(parts)
        jobs = [sweep.job(part, maps.get(part.game), folder.plan[part.name], now[part.name]) for part in parts]
        took = processes.agreed(lambda: compute(folder, sweep, jobs))
        processes.agreed(lambda: report(folder, sweep, jobs, maps, took, style) if processes.first() else None)


def _drawn(settings: SweepSettings, a: Agent, b: Agent) -> GameSweep:
    """Draw the games of a sweep. ValueError: a game is named twice or too small, or B has no such layer."""
    drawn = [
        draw(g, settings.seed, settings.n, names=settings.names, examples=settings.examples) for g in settings.games
    ]
    games = {game.name: game for game in drawn}
    if not games or len(games) < len(drawn):
        raise ValueError(f"games = {' '.join(settings.games) or 'none'}: name at least one, each once")
    if settings.into is not None:
        check_layer(b.params, settings.into, "into")
    if few := [game for game in drawn if len(game.items) < 4]:
        raise ValueError(f"{len(few[0].items)} questions of {few[0].name}: a report on halves needs at least 4")
    # Place the model once. Otherwise every plan would put its own copy on every device.
    same, b = a.params is b.params, dataclasses.replace(b, params=spread(b.single))
    a = dataclasses.replace(a, params=b.params if same else spread(a.single))
    return GameSweep(settings, a, b, games)


def _config(sweep: GameSweep, texts: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run, for its config."""
    sha = lambda value: hashlib.sha256(repr(value).encode()).hexdigest()
    config = dataclasses.asdict(sweep.settings) | dict(recorded)
    if own := [game for game in sweep.games.values() if "file" in game.source]:
        config |= {"games_sha256": sha(own)}
    config |= {"sentences_sha256": sha(texts)}
    prints = {"fingerprint_a": fingerprint(sweep.a.params), "fingerprint_b": fingerprint(sweep.b.params)}
    return config | prints | surroundings()


@contextlib.contextmanager
def _shared(opened: Callable[[bool], RunFolder]) -> Iterator[RunFolder]:
    """The run's folder. The first process holds opened(True) until the end; the other processes share opened(False)."""
    first, agreed = processes.first(), processes.agreed
    with agreed(lambda: opened(True) if first else contextlib.ExitStack()) as made:
        yield agreed(lambda: made if isinstance(made, RunFolder) else opened(False))


def _maps(sweep: GameSweep, folder: RunFolder, texts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The maps W of each game that has a text to fit them on. The first process fits them, and the others read them."""
    settings = sweep.settings
    into = settings.js if settings.into is None else (settings.into,)
    fitted = lambda text: vars(fit(sweep.a, sweep.b, text, settings.ks, into))
    kept = lambda game, text: folder.arrays(f"maps-{game}", lambda: fitted(text))["W"]
    every = lambda: {game: kept(game, text) for game, text in texts.items() if text is not None}
    return processes.agreed(lambda: every() if processes.first() else {}) or every()
