"""The coordination games of Ramesh & Li (2025), and one's own: what A knows, what B is asked, what the answer is."""

from .companies import tip_sheets
from .game import GAMES, INFORMATION, Game, draw, information
from .places import countries
from .wording import PRESETS, Wording
from .world import Item

__all__ = [
    "GAMES",
    "INFORMATION",
    "PRESETS",
    "Game",
    "Item",
    "Wording",
    "countries",
    "draw",
    "information",
    "tip_sheets",
]
