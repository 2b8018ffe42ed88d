"""What every protocol returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.flops import generation_flops
from jaxcomm.generate import Generation


@dataclasses.dataclass(frozen=True)
class Reply:
    """What B said in one game, and how it came to it.

    read, written: token strings; logprob: of all tokens written; flops: of both models, without padding; details: what
    is the protocol's own (A's message, or layers, positions and norms of the edit).
    """

    text: str
    read: tuple[str, ...]
    written: tuple[str, ...]
    logprob: float
    flops: int
    details: dict[str, Any]


def replies(
    b: Agent, tokens: np.ndarray, mask: np.ndarray, out: Generation, details: list[dict[str, Any]], flops: list[int]
) -> list[Reply]:
    """B's generation, on the host, as one Reply per row; `flops` is what came on top of B's reading and writing."""
    rows = zip(b.text(out), tokens, mask, out.tokens, out.lengths, details, flops, strict=True)
    logprobs = out.logprobs.sum(axis=1)
    return [
        Reply(
            text,
            tuple(b.tokens(row[real])),
            tuple(b.tokens(new[:length])),
            float(logprob),
            generation_flops(b.params.config, int(real.sum()), int(length)) + extra,
            detail,
        )
        for (text, row, real, new, length, detail, extra), logprob in zip(rows, logprobs, strict=True)
    ]
