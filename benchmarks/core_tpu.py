"""`communicate` and a sweep between real shapes on TPUs, compiled ahead of time; no TPU is needed.

    make tpu-check, or, in an environment with libtpu: python benchmarks/core_tpu.py [--quick]

Llama-3.2-3B -> Llama-3.1-8B on eight v5e, Llama-3.1-8B -> 70B on 32 v5p (a v5p-64: its name counts cores), bfloat16, weights
cut along "tensor" (8), games over the rest. Nothing is run; bytes are the compiler's, of one device. It is asserted that every
program fits beside both models, and that no stack of weights is copied: temporary memory, less the keys and
values that cells need, is less than a tenth of the weights, and no instruction makes an array of a stack's shape. (A control,
which cuts a stack before it walks it, has to be caught.)
"""

from __future__ import annotations

from lmnet_tpu import GIB, arrays  # first: it tells libtpu not to look for a TPU

# isort: split
import argparse
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm.communication import communicate, read_prompt
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.converters.hf import abstract_params
from jaxcomm.layer_sweep.programs import Cells, Drawing, decode_cells
from jaxcomm.prompts import Prompts
from jaxcomm.reading import hidden_states, prefix
from jaxcomm.sharding import shardings, sweep_mesh

ROPE = Rope(5e5, "llama3", factor=32.0)
LLAMA = {
    "3b": ModelConfig(128256, 3072, 28, 24, 8, 128, 8192, 131072, rope=ROPE),
    "8b": ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 131072, tied_head=False, rope=ROPE),
    "70b": ModelConfig(128256, 8192, 80, 64, 8, 128, 28672, 131072, tied_head=False, rope=ROPE),
    "tiny": ModelConfig(1024, 256, 4, 8, 8, 32, 1024, 4096, rope=ROPE),
}
CASES = {
    "v5e-8": ("v5e:2x4", 16, "3b", "8b"),
    "v5p-64": ("v5p:2x4x4", 95, "8b", "70b"),
}
"""Topology, GiB a device, A, B."""
CONTROL = "control: B's blocks[:-1], then a walk"
GAMES, COLUMNS, NEW, LAYERS = 8, 256, 32, 10
"""Games, tokens of a prompt, tokens written, and layers of A and of B that are swept (100 cells)."""


def placed(config: ModelConfig, mesh: Mesh):
    """A bfloat16 model on the mesh, as shapes."""
    like = abstract_params(config)
    at = lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=NamedSharding(mesh, s.spec))
    return jax.tree.map(at, like, shardings(like, mesh))


def rows(mesh: Mesh, shape: tuple[int, ...], dtype, *spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def programs(a: ModelConfig, b: ModelConfig, mesh: Mesh):
    """Of each: name, a function that lowers it, arrays that lie beside the models, bytes a device of keys and values it makes."""
    columns = lambda mesh, *spec: (
        rows(mesh, (GAMES, COLUMNS), jnp.int32, *spec),
        rows(mesh, (GAMES, COLUMNS), bool, *spec),
    )
    model_a, model_b = placed(a, mesh), placed(b, mesh)
    data = "data" if GAMES % mesh.shape["data"] == 0 else None
    (tokens, mask), scalar = columns(mesh, data), jax.ShapeDtypeStruct((), jnp.int32)
    talk = jax.jit(
        lambda p, q, ta, tb, ma, mb, k, j: communicate(
            p, q, Prompts(ta, ma), Prompts(tb, mb), k=k, j=j, max_new_tokens=NEW
        )
    )
    yield "communicate", lambda: talk.lower(model_a, model_b, tokens, tokens, mask, mask, scalar, scalar), (), 0

    # What the check is for: a stack that is cut before it is walked is copied.
    def cut(p, tokens, mask):
        blocks = jax.tree.map(lambda w: w[:-1], p.blocks)
        shorter = p.replace(blocks=blocks, config=dataclasses.replace(p.config, layers=p.config.layers - 1))
        return prefix(shorter, Prompts(tokens, mask), p.config.layers - 1)[:, -1]

    yield CONTROL, lambda: jax.jit(cut).lower(model_b, tokens, mask), (), 0

    spread = sweep_mesh(mesh, GAMES)
    model_a, model_b = placed(a, spread), placed(b, spread)
    tokens, mask = columns(spread, "games")
    last_states = functools.partial(hidden_states, last=True)
    yield "sweep, A's prompts", lambda: jax.jit(last_states).lower(model_a, Prompts(tokens, mask)), (), 0
    yield "sweep, B's prompts", lambda: jax.jit(read_prompt).lower(model_b, Prompts(tokens, mask)), (), 0

    # What B read: laid out as reading leaves it, and the cells of one chunk.
    read = jax.jit(read_prompt).lower(model_b, Prompts(tokens, mask)).compile()
    place = lambda tree, at: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at)
    prompt = place(jax.eval_shape(read_prompt, model_b, Prompts(tokens, mask)), read.output_shardings)
    cells = LAYERS**2
    edits = rows(spread, (GAMES, cells, 1, b.width), jnp.bfloat16, "games")
    layers, count = rows(spread, (cells,), jnp.int32), rows(spread, (GAMES,), jnp.int32, "games")
    drawing = Drawing(rows(spread, (1,), jnp.int32))
    decode = functools.partial(
        decode_cells.lower, model_b, prompt, Cells(edits, None, layers), count, drawing,
        slots=cells, max_new_tokens=NEW, mesh=spread,
    )  # fmt: skip
    own = 2 * b.layers * b.kv_heads * b.head_dim * GAMES * cells * NEW * 2 // mesh.size
    yield f"sweep, {cells} cells decoded", decode, jax.tree.leaves(prompt), own


def check(name: str, quick: bool) -> None:
    topology, memory, a, b = CASES[name]
    a, b = (LLAMA["tiny"], LLAMA["tiny"]) if quick else (LLAMA[a], LLAMA[b])
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(-1, 1, 8), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    part = lambda tree: sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    models = placed(a, mesh), placed(b, mesh)
    both = part(models)
    stacks = [x.sharding.shard_shape(x.shape) for model in models for x in jax.tree.leaves(model.blocks)]
    stacks = {shape for shape in stacks if len(shape) == 3}
    print(
        f"\n{name}: {len(devices)} x {devices[0].device_kind}, (data, tensor) = ({mesh.shape['data']}, 8); "
        f"A {part(models[0]) / GIB:.2f} and B {part(models[1]) / GIB:.2f} GiB a device of {memory}; "
        f"{GAMES} games, prompts of {COLUMNS}, {NEW} new tokens"
    )
    for title, lower, beside, own in programs(a, b, mesh):
        start = time.perf_counter()
        program = lower().compile()
        seconds, found = time.perf_counter() - start, program.memory_analysis()
        spare, out = found.temp_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
        total = both + part(beside) + out + spare + found.generated_code_size_in_bytes
        copies = sum(
            dims in stacks
            for line in program.as_text().splitlines()
            if " = " in line
            and " parameter(" not in line
            and " get-tuple-element(" not in line
            and " while(" not in line
            for _, dims, _ in arrays(line.split(" = ", 1)[1].split("(", 1)[0])
        )
        print(
            f"  {title}: compiled in {seconds:.0f} s; temporaries {spare / GIB:.3f} GiB (the cells' keys and values {own / GIB:.3f}), the rest "
            f"{(spare - own) / both:.1%} of the weights"
            f"; beside both models {total / GIB:.2f} of {memory} GiB; "
            f"instructions that make a whole stack: {copies}",
            flush=True,
        )
        assert total <= memory * GIB, "does not fit"
        copied = copies > 0 or spare - own > both / 10
        assert quick or copied == (title == CONTROL), f"copies of a stack of weights: {copied}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(f"jax {jax.__version__}")
    for name in args.cases:
        check(name, args.quick)


if __name__ == "__main__":
    main()
