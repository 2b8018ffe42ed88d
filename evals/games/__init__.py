"""The coordination games of Ramesh & Li (2025), and games of your own. An item has A's prompt, B's prompt and the answer."""

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
