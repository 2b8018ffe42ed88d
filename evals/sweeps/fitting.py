"""Fit the maps W of a sweep: the text, and the fit."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomm.agent import Agent
from jaxcomm.mapping import HELD_OUT, Maps, fit_maps

from ..sentences import read_both, sentences

SENTENCES = 1000
FIT = 2
"""Seed of the game's own statements for fitting W. They contain no combination of any game (`held_out`)."""
STATEMENTS = "statements"


def fit(a: Agent, b: Agent, sentences: Sequence[str], ks: Sequence[int], js: Sequence[int]) -> Maps:
    """Fits W from layers of A to layers of B in closed form (`jaxcomm.fit_maps`).

    Args:
        a: The sender.
        b: The receiver.
        sentences: At least ten sentences. W is fitted on the states at their last tokens.
        ks: Layers of A, 0 .. L_A each.
        js: Layers of B, 0 .. L_B each.

    Returns:
        The maps W [K, J, D_B, D_A] and their errors.
    """
    return fit_maps(a.single, b.single, read_both(a, b, sentences), ks=ks, js=js)


def own_statements(game: str) -> list[str]:
    """Draws 1000 statements of the kind that A reads in a game.

    None of them belongs to an item of the game. This is the in-distribution text of Ramesh & Li (2025, appendix B.3).

    Args:
        game: "countries" or "tip_sheets".

    Returns:
        The statements.
    """
    return sentences(f"{STATEMENTS}:{game}", SENTENCES, seed=FIT)


def read_text(text: str | None, game: str) -> list[str] | None:
    """Reads the sentences for fitting W.

    Args:
        text: `STATEMENTS`: the game's own statements; otherwise a source of sentences (`evals.sentences`). None: no W.
        game: Name of the game, as for `games.draw`.

    Returns:
        The sentences. None: there is no W to fit.

    Raises:
        ValueError: The game has no statements of its own, or there are fewer than ten sentences.
        OSError: The source does not exist or cannot be read.
    """
    if text is None:
        return None
    if text == STATEMENTS and game.endswith(".jsonl"):
        raise ValueError(f"--text {STATEMENTS} is only for the paper's games, not for {game}: name a file of sentences")
    found = own_statements(game) if text == STATEMENTS else sentences(text)
    if len(found) < HELD_OUT:
        raise ValueError(f"{text} has {len(found)} sentences: fitting W needs at least {HELD_OUT}")
    return found
