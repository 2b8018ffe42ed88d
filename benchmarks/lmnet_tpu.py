"""What a training step of Qwen2.5-0.5B in 1/4/4/4/1 takes on eight TPU v5e, compiled ahead of time; no TPU is needed.

    pip install libtpu                       # in an environment of its own
    python benchmarks/lmnet_tpu.py           # about seven minutes a case on one core, almost all of it XLA's
    python benchmarks/lmnet_tpu.py --quick   # a tiny shape, to try the script

Stage 1 trains the edges (float32; the vertices are frozen, bfloat16), stage 2 everything (float32). Both compute in bfloat16
and make activations again (remat). Weights and moments are placed by `sharding.fsdp_shardings`, rows over all devices.
Nothing is run: bytes are the compiler's, of one device. Besides them the compiled program is searched for what should not
be there: results of collectives that hold a whole stack of layers, and arrays that hold every row of the batch (the lookup in an
embedding cut along the vocabulary makes a few, once; layers should make none).
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import time

# Or libtpu asks the metadata server which machine this is.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm import lmnet
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.model import init_params
from jaxcomm.sharding import fsdp_shardings
from jaxcomm.training import Batch, Everything, begin, make_optimizer, make_step

ROWS, GIB, MEMORY = 8, 2**30, 16
QWEN = dict(vocab=151936, width=896, layers=24, heads=14, kv_heads=2, ff=4864)
TINY = dict(vocab=1024, width=128, layers=2, heads=2, kv_heads=1, ff=256)
CASES = ["1:1x8:1024", "1:8x1:1024", "1:1x8:2048", "2:1x8:1024"]
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"\b(f32|s32|u32|bf16|f16|pred|s8|u8)\[([\d,]+)\]")


def compiled(stage: int, mesh: Mesh, columns: int, quick: bool):
    """The step, the vertex, bytes of all weights, and what of the state the step places otherwise."""
    shape = TINY if quick else QWEN
    config = ModelConfig(**shape, head_dim=64, max_positions=32768, qkv_bias=True, rope=Rope(theta=1e6))
    optimizer = make_optimizer(1e-4, 1000)

    def abstract():
        params = init_params(jax.random.key(0), config, jnp.bfloat16 if stage == 1 else jnp.float32)
        network = lmnet.init_network(jax.random.key(1), params, (1, 2, 1) if quick else (1, 4, 4, 4, 1))
        trained, frozen = network.split() if stage == 1 else (Everything(network), None)
        rows = jnp.zeros((1, ROWS, columns), jnp.int32)
        return begin(trained, optimizer), frozen, Batch(rows, rows, rows.astype(jnp.float32))

    state, frozen, batch = jax.eval_shape(abstract)
    place = lambda tree, at: jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, at)
    rows = jax.tree.map(lambda _: NamedSharding(mesh, P(None, mesh.axis_names)), batch)
    state, frozen, batch = (
        place(state, fsdp_shardings(state, mesh)),
        place(frozen, fsdp_shardings(frozen, mesh)),
        place(batch, rows),
    )
    step = make_step(optimizer, remat="all", dtype=jnp.bfloat16, mesh=mesh)
    program = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    moved = [
        jax.tree_util.keystr(path)
        for (path, a), s in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(program.output_shardings[0]), strict=True
        )
        if not s.is_equivalent_to(a.sharding, len(a.shape))
    ]
    return (
        program,
        config,
        sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves((state.trained, frozen))),
        moved,
    )


def arrays(text: str):
    """(dtype, dims, bytes) of every array type in a piece of a program."""
    for dtype, dims in SHAPE.findall(text):
        axes = tuple(map(int, dims.split(",")))
        yield dtype, axes, math.prod(axes) * BYTES[dtype]


def check(case: str, quick: bool, devices: np.ndarray) -> None:
    stage, layout, columns = case.split(":")
    stage, columns = int(stage), 128 if quick else int(columns)
    mesh = Mesh(devices.reshape(*map(int, layout.split("x"))), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    start = time.perf_counter()
    program, config, weights, moved = compiled(stage, mesh, columns, quick)
    seconds, found = time.perf_counter() - start, program.memory_analysis()
    gib = lambda n: f"{n / GIB:.2f}"
    given, out, spare = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    code, shared = found.generated_code_size_in_bytes, found.alias_size_in_bytes
    total = given + out - shared + spare + code
    print(f"\nstage {stage}, (data, fsdp) = {layout}, {ROWS} x {columns} tokens; compiled in {seconds:.0f} s")
    print(
        f"  GiB a device: arguments {gib(given)}, outputs {gib(out)} (in place of arguments {gib(shared)}), temporaries {gib(spare)}, "
        f"program {gib(code)}; in all {gib(total)} of {MEMORY}: {'fits' if total <= MEMORY * GIB else 'DOES NOT FIT'}"
    )
    print(f"  temporaries are {spare / weights:.2f} of all weights ({gib(weights)} GiB on all devices together)")
    print(f"  leaves of the state that leave the step placed otherwise: {len(moved)}")

    collectives, stacks, whole = collections.Counter(), 0, collections.Counter()
    for line in program.as_text().splitlines():
        if hit := COLLECTIVE.search(line):
            dtype, dims, size = max(arrays(hit[1]), key=lambda a: a[2], default=("", (), 0))
            collectives[size, hit[2], f"{dtype}{list(dims)}"] += 1
            stacks += len(dims) >= 3 and dims[0] == config.layers
        for dtype, dims, size in arrays(line.split(" = ", 1)[-1].split("(", 1)[0]):
            # [.., rows, columns, ..], with more than one number a token.
            rows = any(dims[i : i + 2] == (ROWS, columns) for i in range(len(dims) - 2))
            if rows and math.prod(dims) > ROWS * columns:
                whole[size, f"{dtype}{list(dims)}"] += 1
    print(f"  collectives that hold a whole stack of layers: {stacks}; the largest collectives:")
    for (size, kind, shape), n in sorted(collectives.items(), reverse=True)[:4]:
        print(f"    {size / 2**20:8.1f} MiB  {n:4} x {kind} {shape}")
    print(f"  arrays that hold all {ROWS} rows: {sum(whole.values())} ({len(whole)} shapes); the largest:")
    for (size, shape), n in sorted(whole.items(), reverse=True)[:4]:
        print(f"    {size / 2**20:8.1f} MiB  {n:4} x {shape}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="STAGE:DATAxFSDP:COLUMNS")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    for case in args.cases:
        check(case, args.quick, devices)


if __name__ == "__main__":
    main()
