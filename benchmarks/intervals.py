"""How often 95 % intervals hold the truth, and how often an effect is found that is not there: simulated tables of channels whose
presence and content are known.

python benchmarks/intervals.py [--tables 1000] [--items 100]          one CPU thread, about five minutes
"""

from __future__ import annotations

import argparse

import numpy as np
import scipy

from jaxcomm.evals.effects import PARTS, split
from jaxcomm.evals.scores import mean

CHANNELS = {
    "presence only": (0.3, 0.25, 0.0),
    "content only": (0.3, 0.0, 0.4),
    "both": (0.3, 0.2, 0.3),
    "neither": (0.3, 0.0, 0.0),
    "a wrong message hurts": (0.3, -0.15, 0.5),
    "neither, rarely right": (0.03, 0.0, 0.0),
    "content only, rarely right alone": (0.03, 0.0, 0.85),
}
"""name -> probability of being right alone, presence, content."""


def table(rng: np.random.Generator, alone: float, presence: float, content: float, n: int) -> list[np.ndarray]:
    """Hits with its own message, with another's, and without one, of games that are more or less hard under all three."""
    hard, own = rng.random(n), rng.random((3, n))
    drawn = np.where(rng.random((3, n)) < 0.5, hard, own)
    return [row < p for row, p in zip(drawn, (alone + presence + content, alone + presence, alone), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--items", type=int, default=100)
    asked = parser.parse_args()
    print(f"numpy {np.__version__}, scipy {scipy.__version__}; {asked.tables} tables of {asked.items} items")
    print(
        "held: tables in which the interval holds the truth, Tango's (ours) and the bootstrap's; p: those with p <= .05"
    )
    for name, (alone, presence, content) in CHANNELS.items():
        rng, truth = np.random.default_rng(0), (presence + content, presence, content)
        held, found = np.zeros((2, 3)), np.zeros(3)
        for _ in range(asked.tables):
            hits = [x.astype(float) for x in table(rng, alone, presence, content, asked.items)]
            for n, (part, (x, y)) in enumerate(zip(split(*hits), ((0, 2), (1, 2), (0, 1)), strict=True)):
                resampled = mean(hits[x] - hits[y])
                for way, interval in enumerate((part.value, resampled)):
                    held[way, n] += interval.low - 1e-9 <= truth[n] <= interval.high + 1e-9
                found[n] += part.p <= 0.05
        cells = [
            f"{part} {truth[n]:+.2f}: held {held[0, n] / asked.tables:.3f}, {held[1, n] / asked.tables:.3f}, p {found[n] / asked.tables:.3f}"
            for n, part in enumerate(PARTS)
        ]
        print(f"{name:34}{'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
