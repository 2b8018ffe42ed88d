"""What key/value prefixes cost: many selections of layers at once, beside a loop that reads again for each; and one answer.

taskset -c 0 python benchmarks/channels.py        one CPU thread, about five minutes; needs SmolLM2-135M (make .venv/.real)

The loop is this library's own, compiled once: for every setting A reads its prompts, B reads its own behind the layers of
that setting, and writes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxcomm as jc
from jaxcomm.flops import generation_flops, keys_flops, prefix_flops
from jaxcomm.prefixes import attention_mass, layer_scores, spread

ROWS, TOLD, ASKED, NEW = 2, 512, 16, 4
"""Games, tokens that A reads, tokens that B reads, tokens that B writes."""
RATIOS = [n / 10 for n in range(11)]
SCHEMES = ("score", "first", "last", "random")


def main() -> None:
    model = jc.load_agent("real:smollm2").single
    told, asked = (jax.random.randint(jax.random.key(n), (ROWS, n), 0, 40000) for n in (TOLD, ASKED))
    print(
        f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads; "
        f"SmolLM2-135M with itself, {ROWS} games: A reads {TOLD} tokens, B {ASKED}, B writes {NEW}; seconds without compiling"
    )
    read = lambda: jc.send_cache(model, told).states
    scores = layer_scores(np.asarray(attention_mass(model, asked, past=[read()])))
    cells = [(scheme, ratio) for scheme in SCHEMES for ratio in RATIOS]
    chosen = np.stack([jc.choose_layers(s, r, model.config.layers, scores=scores) for s, r in cells])  # pyright: ignore

    def alone(layers: np.ndarray) -> np.ndarray:
        out = jc.generate(model, asked, past=[jc.select(read(), layers)], max_new_tokens=NEW)
        return np.asarray(out.tokens)

    def loop() -> np.ndarray:
        return np.stack([alone(layers) for layers in chosen], axis=1)

    def together() -> np.ndarray:
        distinct, back = np.unique(chosen, axis=0, return_inverse=True)
        many, cache = spread(asked, read(), distinct)
        out = np.asarray(jc.generate(model, many, past=[cache], max_new_tokens=NEW).tokens)
        return out.reshape(ROWS, len(distinct), NEW)[:, back.ravel()]

    alone(chosen[0])  # compiles
    together()
    (each, apart), (every, took) = timed(loop), timed(together)
    same = float((each == every).mean())
    distinct = np.unique(chosen, axis=0)
    of = lambda settings: sum(behind(model.config, int(layers.sum())) for layers in settings)
    reading = ROWS * keys_flops(model.config, TOLD)
    work = len(cells) * reading + of(chosen), reading + of(distinct)
    print(f"{len(cells)} settings ({len(RATIOS)} ratios x {len(SCHEMES)} schemes, {len(distinct)} distinct):")
    print(
        f"  a loop that reads for each {apart:.1f} ({work[0] / apart / 1e9:.0f} GFLOP/s), all at once {took:.1f} "
        f"({work[1] / took / 1e9:.0f} GFLOP/s): {apart / took:.1f} times as fast, {work[0] / work[1]:.1f} times fewer FLOPs; "
        f"{same:.1%} of tokens equal"
    )
    answer(model, told, asked, chosen[cells.index(("score", 0.5))])


def behind(config: jc.ModelConfig, layers: int) -> int:
    """FLOPs of all of B's answers behind so many layers of the prefix."""
    seen = [TOLD] * layers + [0] * (config.layers - layers)
    return ROWS * (generation_flops(config, ASKED, NEW) + prefix_flops(config, seen, ASKED, NEW))


def answer(model: jc.Params, told: Any, asked: Any, layers: np.ndarray) -> None:
    """One answer behind a prefix, beside its parts: A's reading, B's reading, and writing."""
    logits, own = jc.prefill(model, asked)
    parts: dict[str, Callable[[], Any]] = {
        "A reads": lambda: jc.prefill(model, told),
        "B reads": lambda: jc.prefill(model, asked),
        "B writes": lambda: jc.decode(model, logits, own, max_new_tokens=NEW),
    }
    whole = lambda: jc.generate(
        model, asked, past=[jc.select(jc.send_cache(model, told).states, layers)], max_new_tokens=NEW
    )
    best = {name: np.inf for name in (*parts, "all")}
    for _ in range(5):  # side by side, so that a busy machine slows all
        for name, work in {**parts, "all": whole}.items():
            jax.block_until_ready(work())
            best[name] = min(best[name], timed(work)[1])
    apart = sum(best[name] for name in parts)
    told_of = ", ".join(f"{name} {best[name]:.3f}" for name in parts)
    print(f"one answer behind half of the layers {best['all']:.3f}; {told_of}: {best['all'] / apart:.2f} of their sum")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = jax.block_until_ready(work())
    return found, time.perf_counter() - start


if __name__ == "__main__":
    main()
