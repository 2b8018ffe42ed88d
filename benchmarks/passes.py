"""Scoring the choices of a game in passes of similar length, compared with one pass padded to the longest choice.

    make bench-passes, or: python benchmarks/passes.py

SmolLM2-135M (`make .venv/.real`), Countries: 20 chat prompts, 47 names of countries after each. Both sides take turns; the
fastest of each counts.
"""

from __future__ import annotations

import os
import platform
import time
from unittest import mock

import jax
import numpy as np

import jaxcomm as jc
from jaxcomm.evals.games import countries
from jaxcomm.protocols import base, passes

TURNS = 3


def one_pass(lengths) -> list[tuple[int, int]]:
    longer = [n for texts in lengths for n in texts if n > 1]
    return [(min(longer), max(longer))]


def main() -> None:
    agent = jc.load_agent("real:smollm2")
    items = countries()[:20]
    choices = sorted({item.answer for item in countries()})
    turn = jc.protocols.silent(
        agent, agent, [""] * 20, [[{"role": "user", "content": item.prompt_b}] for item in items]
    )
    follow = [agent.follow(prompt, choice) for prompt in turn.prompts[:1] for choice in choices]
    lengths = [list(map(len, follow))]
    print(
        f"jax {jax.__version__}, {platform.machine()}, {len(os.sched_getaffinity(0))} threads, float32; {len(choices)} choices"
    )
    ways = {"in passes": passes.passes, "in one pass": one_pass}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS + 1):  # the first turn compiles
        for name, way in ways.items():
            with mock.patch.object(base, "passes", way):
                start = time.perf_counter()
                found = turn.score([choices] * 20)
                times[name].append(time.perf_counter() - start)
            if len(times[name]) == 1:
                total = np.sum([scored.logprobs for scored in found])
                print(f"{name:12} {way(lengths)}, sum of all log-probabilities {total:.3f}")
    best = {name: min(took[1:]) for name, took in times.items()}
    print(", ".join(f"{name} {took:.2f} s" for name, took in best.items()), end=": ")
    print(f"{best['in one pass'] / best['in passes']:.2f} times as fast in passes")


if __name__ == "__main__":
    main()
