"""Prompts as arrays: rows of tokens, padded on the left, so that the last column holds every row's last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from jaxcomm.config import AnyArray


def known(x: Any) -> np.ndarray | None:
    """Returns the values of an array, if they are available.

    Args:
        x: An array, or None.

    Returns:
        The values. None if x is None, a traced array, or an array that is partly on other processes.
    """
    if x is None or isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


class Prompts(struct.PyTreeNode):
    """The input of a model. `Agent.tokenize` makes prompts from texts, `left_pad` from lists of token ids.

    Attributes:
        tokens: Token ids [B, P], with any id on padding; or vectors [B, P, D] in the place of tokens.
        mask: False on padding, [B, P]. Padding is on the left of every row. None: there is no padding.

    Raises:
        ValueError: The arrays have other shapes; a row has no token; a row ends in padding.

    Example:
        >>> jc.left_pad([[3, 1, 4], [1, 5]]).tokens
        array([[3, 1, 4],
               [0, 1, 5]], dtype=int32)
    """

    tokens: Int[AnyArray, "B P"] | Float[AnyArray, "B P D"]
    mask: Bool[AnyArray, "B P"] | None = None

    def __post_init__(self):
        if not isinstance(self.tokens, jax.Array | np.ndarray):
            return  # a placeholder from JAX; `as_prompts` refuses a user's invalid values
        if np.ndim(self.tokens) not in (2, 3):
            raise ValueError(
                f"prompts are tokens [rows, columns], or vectors [rows, columns, width]: got {np.shape(self.tokens)}"
            )
        if not isinstance(self.mask, jax.Array | np.ndarray):
            return
        if np.shape(self.mask) != np.shape(self.tokens)[:2]:
            raise ValueError(
                f"the mask is {np.shape(self.mask)}, the prompts are {np.shape(self.tokens)[:2]}: give both one shape"
            )
        real = known(self.mask)
        if real is None or not real.size or real[:, -1].all():
            return
        row = int(np.argmin(real[:, -1]))
        if not real[row].any():
            raise ValueError(f"row {row} has no token: its mask is False everywhere")
        raise ValueError(
            f"row {row} ends in padding: pad on the left, so that the last column is every row's last token "
            "(jaxcomm.left_pad; of a transformers tokenizer, padding_side='left')"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns, (B, P)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def real(self) -> np.ndarray | None:
        """The mask's values, [B, P], True everywhere without a mask. None: the mask is traced."""
        return np.ones(self.shape, bool) if self.mask is None else known(self.mask)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Any) -> Prompts:
        """Takes some of the rows.

        Args:
            rows: An index (the axis is kept), a slice, or an array.

        Returns:
            Prompts with these rows.
        """
        rows = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        return Prompts(self.tokens[rows], None if self.mask is None else self.mask[rows])

    def __iter__(self) -> Iterator[Prompts]:
        return (self[row] for row in range(len(self)))


def as_prompts(prompts: Prompts | AnyArray) -> Prompts:
    """Makes prompts from tokens or vectors without padding.

    Args:
        prompts: `Prompts`, or an array of token ids [B, P] or vectors [B, P, D].

    Returns:
        The prompts.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(prompts, Prompts):
        return prompts
    if not hasattr(prompts, "shape"):
        raise ValueError(f"prompts are an array, got a {type(prompts).__name__}: jaxcomm.left_pad makes one of lists")
    return Prompts(prompts)


def left_pad(rows: Sequence[Sequence[int]], columns: int | None = None) -> Prompts:
    """Makes prompts from lists of token ids, padded on the left.

    Args:
        rows: Token ids of each prompt.
        columns: Number of columns, P. Default: the length of the longest prompt.

    Returns:
        Tokens and mask [B, P].

    Raises:
        ValueError: There is no prompt; a prompt is empty, or longer than `columns`.

    Example:
        >>> jc.left_pad([[3, 1, 4], [1, 5]]).mask
        array([[ True,  True,  True],
               [False,  True,  True]])
    """
    lengths = [len(row) for row in rows]
    if not lengths or not min(lengths):
        raise ValueError(f"empty prompt at row {lengths.index(0)}" if lengths else "no prompts")
    columns = max(lengths) if columns is None else columns
    if max(lengths) > columns:
        raise ValueError(
            f"the prompt at row {lengths.index(max(lengths))} has {max(lengths)} tokens, the limit is {columns}: shorten it"
        )
    tokens, mask = np.zeros((len(rows), columns), np.int32), np.zeros((len(rows), columns), bool)
    for row, prompt in enumerate(rows):
        tokens[row, columns - len(prompt) :] = prompt
        mask[row, columns - len(prompt) :] = True
    return Prompts(tokens, mask)
