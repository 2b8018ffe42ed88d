"""Settings of a bridge as plain data, so that the command line can show its help without loading a model."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Span:
    """Kind and size of a new bridge."""

    kind: Literal["c2c", "gated"] = "gated"
    """c2c: the fuser of Cache-to-Cache, where A reads what B reads; gated: a memory of what only A reads."""
    hidden: int = 1024
    """c2c: width of the fuser."""
    align: bool = False
    """c2c: A and B have different tokens; they are aligned by characters."""
    rank: int = 8
    """gated: rank of its maps."""
    bridge_seed: int = 0
    """Seed of the new bridge, and of random draws in training."""
