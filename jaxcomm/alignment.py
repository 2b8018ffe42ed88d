"""Align tokens of two tokenizers by the characters of their common text. Find the tokens of words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

PADDING = -1
"""Entry in a row of columns: padding, no token of B."""
UNREAD = -2
"""Entry for a token of B to which no token of A corresponds."""

Offsets = Sequence[tuple[int, int]] | Int[np.ndarray, "_ 2"]
"""For each token of a text, the offset of its first character and the offset after its last. For a token without
characters (such as a begin-of-text token) both are the same."""


def align(offsets_a: Offsets, offsets_b: Offsets) -> Int[np.ndarray, "T"]:
    """Finds, for each token of B, the corresponding token of A.

    It is the last token of A that begins before B's token ends. So it contains the last character of B's token, and A has
    read that character. If A has no token for the character (such as a space that its tokenizer drops), it is the last
    token before the character. If several tokens contain it (bytes of one letter), it is the last of them.

    A token without characters has a place between the tokens around it. For such a token of B, it may be one of A at the
    same place: B's begin-of-text token gets A's.

    Args:
        offsets_a: Offsets of A's tokens in the text, as returned by a fast tokenizer, in the text's order.
        offsets_b: Offsets of B's tokens in the same text.

    Returns:
        For each token of B, the index of A's token, or `UNREAD` (-2) if there is none.

    Example:
        >>> from jaxcomm.alignment import align
        >>> align([(0, 0), (0, 3), (3, 9)], [(0, 0), (0, 2), (2, 5), (5, 9)])  # A: "", "the", " Louvre"
        array([0, 1, 2, 2])
    """
    a, b = (np.asarray(offsets, int).reshape(-1, 2) for offsets in (offsets_a, offsets_b))
    # Tokenizers return (0, 0) for tokens without characters, wherever they are.
    read_a, read_b = (np.maximum.accumulate(x[:, 1]) for x in (a, b))
    begins = np.where(a[:, 0] < a[:, 1], a[:, 0], read_a)
    found = np.searchsorted(begins, read_b, side="left") - 1
    same = np.searchsorted(read_a, read_b, side="right") - 1
    found = np.where(b[:, 0] < b[:, 1], found, np.maximum(found, same))
    return np.where(found < 0, UNREAD, found)


def within(offsets: Offsets, text: str, part: str) -> Bool[np.ndarray, "T"]:
    """A mask of the tokens of a text that belong to a part of it, in every occurrence.

    Raises:
        ValueError: The text does not contain the part; the part begins or ends within a token.
    """
    begins = [at.start() for at in re.finditer(re.escape(part), text)] if part else []
    if not begins:
        raise ValueError(f"{part!r} is not in the prompt {text[:80]!r}")
    inside = np.zeros(len(offsets), bool)
    for begin in begins:
        end = begin + len(part)
        for token, (start, stop) in enumerate(offsets):
            if start < end and stop > begin:
                inside[token] = True
                # A token may include the space before it, but no other character.
                if (text[start:begin] + text[end:stop]).strip():
                    raise ValueError(
                        f"{part!r} begins or ends within the token {text[start:stop]!r} of the prompt: name whole words"
                    )
    return inside
