"""The two layouts of the layers beside each other, in one run: one stack (a loop over it) and a tuple (unrolled).

    make bench-layouts, or: python benchmarks/layouts.py

SmolLM2-135M (`make .venv/.real`) and a random Llama of 12 layers, float32: reading 64 and 256 tokens, writing 16 tokens at
batch 1 and 16, a sweep of answers, a step of SGD on 4 texts of 128 tokens. The layouts take turns; the fastest of each counts.
The first call compiles: no programs are kept between runs.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomm as jc

TURNS = 5
LLAMA = jc.ModelConfig(
    vocab=8192, width=512, layers=12, heads=8, kv_heads=4, head_dim=64, ff=1536, max_positions=512, activation="silu"
)


@functools.partial(jax.jit, donate_argnums=0)
def step(params: jc.Params, tokens: jax.Array) -> jc.Params:
    """One of SGD on the next tokens' cross-entropy."""

    def loss(params: jc.Params) -> jax.Array:
        logprobs = jax.nn.log_softmax(jc.forward(params, tokens)[:, :-1])
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    return jax.tree.map(lambda w, g: w - 1e-3 * g, params, jax.grad(loss)(params))


def works(params: jc.Params) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    rng = np.random.default_rng(0)
    tokens = lambda *shape: rng.integers(3, params.config.vocab, shape).astype(np.int32)
    one, long, many, games, answers, texts = (
        tokens(*shape) for shape in ((1, 64), (1, 256), (16, 64), (8, 48), (8, 3), (4, 128))
    )
    depth = params.config.layers
    layers = [round(depth * part) for part in (0.2, 0.4, 0.6, 0.8)]
    trained = [jax.tree.map(jnp.array, params)]

    def train() -> object:
        trained[0] = step(trained[0], texts)
        return trained[0]

    return {
        "read 1 x 64": lambda: jc.forward(params, one),
        "read 1 x 256": lambda: jc.forward(params, long),
        "write 16 after 1 x 64": lambda: jc.generate(params, one, max_new_tokens=16),
        "write 16 after 16 x 64": lambda: jc.generate(params, many, max_new_tokens=16),
        "sweep 8 games, 4 x 4": lambda: jc.sweep_answers(params, params, games, games, answers, ks=layers, js=layers),
        "train 4 x 128": train,
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(work()))
    return time.perf_counter() - start


def compare(name: str, params: jc.Params) -> None:
    stacked, unrolled = works(params.stack()), works(params.unroll())
    for title in stacked:
        sides = stacked[title], unrolled[title]
        first = [seconds(work) for work in sides]
        times = np.min([[seconds(work) for work in sides] for _ in range(TURNS)], axis=0)
        print(
            f"{name}, {title:22}  stacked {times[0]:7.3f} s (first {first[0]:5.1f}), unrolled {times[1]:7.3f} s (first {first[1]:5.1f}): "
            f"{times[0] / times[1]:.2f} times",
            flush=True,
        )


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores, float32")
    compare("random, 12 layers", jc.init_params(jax.random.key(0), LLAMA))
    compare("SmolLM2, 30 layers", jc.load_agent("real:smollm2").params)


if __name__ == "__main__":
    main()
