"""The maps W of a sweep: the text they are fitted on, and the fit."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomm.agent import Agent
from jaxcomm.mapping import HELD_OUT, Maps, fit_maps

from ..sentences import read_both, sentences

SENTENCES = 1000
FIT = 2
"""Seed of the game's own statements that W is fitted on. They hold no combination of any game (`held_out`)."""
STATEMENTS = "statements"


def fit(a: Agent, b: Agent, sentences: Sequence[str], ks: Sequence[int], js: Sequence[int]) -> Maps:
    """W from layers ks of A to layers js of B, from the states at the last token of the sentences."""
    return fit_maps(a.params, b.params, read_both(a, b, sentences), ks=ks, js=js)


def own_statements(game: str) -> list[str]:
    """What A reads in a game, but none of its games: the paper's in-distribution text (appendix B.3)."""
    return sentences(f"{STATEMENTS}:{game}", SENTENCES, seed=FIT)


def read_text(text: str | None, game: str) -> list[str] | None:
    """The sentences to fit W on: none, the game's own, or another source's (`evals.sentences`).

    Raises:
        ValueError: The game has no statements of its own, or there are too few sentences.
    """
    if text is None:
        return None
    if text == STATEMENTS and game.endswith(".jsonl"):
        raise ValueError(
            f"--text {STATEMENTS} are of the paper's games, {game} has none of its own: name a file of sentences"
        )
    found = own_statements(game) if text == STATEMENTS else sentences(text)
    if len(found) < HELD_OUT:
        raise ValueError(f"{text} has {len(found)} sentences: fitting W needs at least {HELD_OUT}")
    return found
