"""The coordination games of Ramesh & Li (2025): what A knows, what B is asked, what the answer is."""

from collections.abc import Callable

from .companies import tip_sheets
from .places import countries
from .world import Item

GAMES: dict[str, Callable[..., list[Item]]] = {"countries": countries, "tip_sheets": tip_sheets}
"""name -> generator(seed, n, names); n defaults to the paper's 100 and 70 prompts."""

__all__ = ["GAMES", "Item", "countries", "tip_sheets"]
