"""Temporaries and time of long prompts: all scores of a block of queries at once (plain) beside a tile at a time (blocked).

    make bench-attention, or, in an environment with libtpu: python benchmarks/attention.py [--quick] [--parts times]

Temporaries are the compiler's, of one device, with two stacked layers (a loop: more layers need no
more, but for the streams that a gradient keeps): for this CPU
in float32, in bfloat16 for one v5e and for eight that the weights are cut over, compiled ahead of time; no TPU is needed. Read are 8,192
tokens, 64 tokens behind a cache of 8,192 columns, and 8,192 behind 8,192; beside them the gradient of a loss on 8,192 tokens, of
which everything is made again between blocks. `plain` is what there was before: the threshold is moved out of reach.
Time is of one layer's attention on this CPU, float32, without projections: the forms take turns, the fastest of each counts.
"""

from __future__ import annotations

import lmnet_tpu  # noqa: F401  first: it tells libtpu not to look for a TPU

# isort: split
import argparse
import contextlib
import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from core_tpu import LLAMA, placed, rows
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxcomm import attention
from jaxcomm.cache import KVCache
from jaxcomm.config import ModelConfig
from jaxcomm.language_model import Training
from jaxcomm.model import embed, run_blocks
from jaxcomm.prompts import Prompts
from jaxcomm.reading import prefill

MIB, TURNS, LAYERS = 2**20, 3, 2
SMOL = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192)
MODELS = {"SmolLM2-135M": SMOL, "Llama-3.1-8B": LLAMA["8b"]}
READS = {"8192": (8192, 0), "64 behind 8192": (64, 8192), "8192 behind 8192": (8192, 8192)}


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """What attention does meanwhile, whatever the size."""
    kept = attention.LONG
    jax.clear_caches()  # or a program of the other form would be found
    attention.LONG = 10**9 if name == "plain" else kept
    try:
        yield
    finally:
        attention.LONG = kept


def model(config: ModelConfig, mesh: Mesh):
    """A model on the mesh, as shapes: bfloat16, but on CPU, which would copy all weights as float32."""
    params = placed(config, mesh)
    if mesh.devices.flat[0].platform != "cpu":
        return params
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=a.sharding), params)


def program(config: ModelConfig, mesh: Mesh, tokens: int, behind: int):
    """Reads tokens behind a cache, as shapes on a mesh."""
    params = model(config, mesh)
    prompts = Prompts(rows(mesh, (1, tokens), jnp.int32), rows(mesh, (1, tokens), bool))
    cut = "tensor" if config.kv_heads % mesh.shape["tensor"] == 0 else None
    shape = (config.layers, 1, config.kv_heads, behind, config.head_dim)
    cache = lambda: rows(mesh, shape, params.dtype, None, None, cut)
    past = [KVCache(cache(), cache(), rows(mesh, (1, behind), jnp.int32))] if behind else []
    return jax.jit(lambda params, prompts, past: prefill(params, prompts, past=past)).lower(params, prompts, past)


def gradient(config: ModelConfig, mesh: Mesh, tokens: int):
    """The gradient of a sum of the last stream."""

    def loss(params, tokens):
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        h = run_blocks(params, embed(params, tokens, positions), positions, training=Training(remat="all"))[0]
        return jnp.sum(h.astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss)).lower(model(config, mesh), rows(mesh, (1, tokens), jnp.int32))


def temporaries(meshes: dict[str, Mesh], short: int) -> None:
    for name, config in MODELS.items():
        config = dataclasses.replace(config, layers=LAYERS, max_positions=32768)
        for where, mesh in meshes.items():
            works: dict[str, Callable] = {
                title: functools.partial(program, config, mesh, tokens // short, behind // short)
                for title, (tokens, behind) in READS.items()
            } | {"gradient at 8192": functools.partial(gradient, config, mesh, 8192 // short)}
            for title, lower in works.items():
                found = {}
                for side in ("plain", "blocked"):
                    with form(side):
                        found[side] = lower().compile().memory_analysis().temp_size_in_bytes / MIB
                print(
                    f"{name}, {where:9} {title:17} temporaries: plain {found['plain']:9.1f} MiB, blocked {found['blocked']:7.1f} MiB: "
                    f"{found['plain'] / found['blocked']:.1f} times",
                    flush=True,
                )


def times(short: int) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cases = [(n, 0, None) for n in (2048, 4096, 8192)] + [(8192, 0, 512), (64, 8192, None)]
    for name, c in MODELS.items():
        for tokens, behind, window in cases:
            T, P = -(-tokens // short), behind // short
            q, k, v = (draw(1, c.kv_heads, *group, T, c.head_dim) for group in ((c.heads // c.kv_heads,), (), ()))
            places = P + jnp.arange(T, dtype=jnp.int32)[None]
            past = (draw(1, c.kv_heads, P, c.head_dim), draw(1, c.kv_heads, P, c.head_dim), jnp.arange(P)[None])
            how = attention.Scoring(c.head_dim**-0.5, None, window)

            def read(q, k, v, past, how=how, places=places):
                return attention.attend(q, places, [*([past] if past[0].shape[2] else []), (k, v, places)], how, True)

            made = {}
            for side in ("plain", "blocked"):
                with form(side):
                    made[side] = jax.jit(lambda *x, read=read: read(*x)).lower(q, k, v, past).compile()
            took = [[seconds(run, q, k, v, past) for run in made.values()] for _ in range(TURNS)]
            plain, blocked = np.min(took, axis=0)
            print(
                f"{name}, {tokens} tokens behind {behind}, window {window}: plain {plain:.4f} s, blocked {blocked:.4f} s: "
                f"{plain / blocked:.2f} times",
                flush=True,
            )


def seconds(run: Callable, *given) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*given))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of every length, to try the script")
    parser.add_argument("--parts", nargs="+", default=["temporaries", "times"], choices=["temporaries", "times"])
    args = parser.parse_args()
    short = 8 if args.quick else 1
    print(f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores; tiles of {attention.TILE}")
    if "temporaries" in args.parts:
        v5e = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
        meshes = {"this CPU": np.array(jax.devices()), "one v5e": v5e[:1], "eight v5e": v5e}
        axes = ("data", "fsdp", "tensor")
        made = {name: Mesh(on.reshape(1, 1, -1), axes, axis_types=(AxisType.Auto,) * 3) for name, on in meshes.items()}
        temporaries(made, short)
    if "times" in args.parts:
        times(short)


if __name__ == "__main__":
    main()
