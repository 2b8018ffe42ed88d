"""Choose layers, and run the registered tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..effects import Effect, effect, holm
from .design import PRIMARY, Block, Cell

RULES = {
    "content": "the pair with the largest mean gain of the right answer's log-probability over another item's message",
    "likelihood": "the pair with the highest mean log-probability of the right answer",
    "early": "as for content, among the pairs whose j is in the lower half of B's layers",
}
"""Rules for choosing layers on the first half of the items. "early" is not registered. It uses only B's lower half, where B
still computes with the message. After B's last layer, its head would decode A's state directly, so B would say A's next
token."""
OUTCOMES = {"among": "nats", "choice": "points"}
"""The registered outcomes with their units: log p(right | choices), and whether the right answer is the likeliest choice."""


def choose_cells(
    layers: Mapping[str, tuple[Sequence[int], Sequence[int]]], maps: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[Cell]:
    """Chooses the layers of every operator by every rule.

    Args:
        layers: For each operator, the layers of A and of B.
        maps: For each operator, "own" and "other" [K, J, items] in nats. Cells of NaN are ignored.

    Yields:
        The cells. Among equal cells the first is chosen: the lowest k, then the lowest j.
    """
    for operator, (ks, js) in layers.items():
        own, other = (maps[operator][name].mean(axis=-1) for name in ("own", "other"))
        early = sum(2 * j <= js[-1] for j in js) if operator == PRIMARY else 0
        rules = {"content": own - other, "likelihood": own} | ({"early": (own - other)[:, :early]} if early else {})
        for rule, values in rules.items():
            k, j = np.unravel_index(np.nanargmax(values), values.shape)
            yield Cell(operator, rule, ks[int(k)], js[int(j)])


def cell_of(cells: Sequence[Cell], operator: str, rule: str) -> Cell:
    """Finds the cell of an operator that was chosen by a rule."""
    return next(cell for cell in cells if (cell.operator, cell.rule) == (operator, rule))


def contrast(block: Block, of: str, against: str, outcome: str) -> Effect:
    """Compares two conditions of a block.

    Args:
        block: The block.
        of: Label of the first condition.
        against: Label of the second condition.
        outcome: The score to compare.

    Returns:
        The paired difference on the second half of the items.
    """
    return effect(block.scores[of][outcome], block.scores[against][outcome])


def family(blocks: Sequence[Block], rule: str) -> list[tuple[Block, str, Effect, float]]:
    """Runs a family of tests.

    Args:
        blocks: All blocks. Blocks without a cell chosen by the rule are left out.
        rule: "content" (registered): does the message's content reach B's answer? Compares own with another item's
            message, at the layers chosen by content. "likelihood" (registered): is the message useful? Compares own
            message with none, at the layers chosen by likelihood. "early": like "content", at layers of B's lower half.

    Returns:
        For every block and outcome, the effect and its p-value after Holm's correction over the family.
    """
    found: list[Any] = []
    for block in blocks:
        for label in (cell.label for cell in block.cells if (cell.operator, cell.rule) == (PRIMARY, rule)):
            against = "silent" if rule == "likelihood" else f"{label}, other"
            found += [(block, outcome, contrast(block, label, against, outcome)) for outcome in OUTCOMES]
    corrected = holm([made.p for _, _, made in found])
    return [(*row, p) for row, p in zip(found, corrected, strict=True)]
