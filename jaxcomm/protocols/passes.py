"""Group texts of several tokens by length, so that scoring them computes little padding (ARCHITECTURE.md, decision 90)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxcomm.decoding import bucket

PASS = 16
"""Cost of another pass over the model in `passes`, in tokens of each prompt: it reads the weights again."""


def further(length: int) -> int:
    """Number of columns for the tokens of a text after its first one, rounded up if there are more than four."""
    return length - 1 if length <= 5 else bucket(length - 1, length + 32, 4)


def texts_of(counts: Iterable[int]) -> int:
    """Rows of each prompt for so many texts: beyond 4 a multiple of 4, so that batches share programs."""
    most = max(counts)
    return most if most <= 4 else -(-most // 4) * 4


def passes(lengths: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Splits texts of several tokens into passes of similar length, so that little of a pass is padding.

    In a pass every prompt has as many rows as the prompt with the most texts, and every row is as long as the longest text.

    Args:
        lengths: Number of tokens of each text after each prompt.

    Returns:
        The shortest and the longest text of each pass. Texts of one token are in none.

    Example:
        >>> from jaxcomm.protocols.passes import passes
        >>> passes([[1, 2, 3] * 30]), passes([[1, 2, 2, 3]]), passes([[1, 1]])
        ([(2, 2), (3, 3)], [(2, 3)], [])
    """
    found = sorted({n for texts in lengths for n in texts if n > 1})
    counts = np.array([[texts.count(n) for n in found] for texts in map(list, lengths)])
    best: list[tuple[float, list[tuple[int, int]]]] = [(0, [])]  # for the shortest texts, up to each length
    for end, longest in enumerate(found, 1):
        cost = lambda start, end=end, longest=longest: (
            texts_of(counts[:, start:end].sum(axis=1)) * further(longest) + PASS
        )
        options = [(best[i][0] + cost(i), [*best[i][1], (found[i], longest)]) for i in range(end)]
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]
