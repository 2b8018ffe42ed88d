"""A network of language models (1/4/4/4/1, block edges) beside its own vertices, and beside plain PyTorch, in one run.

    python benchmarks/lmnet.py               # two CPU threads, float32, about eight minutes
    python benchmarks/lmnet.py --quick       # a tiny shape, to try the script

One random vertex in the shape of Qwen2.5-0.5B at two sevenths of its width, shared by all 14 places; every weight is moved
off its initialisation, so edges are not zero. Every row of the batch is one text. Three things are timed:

    forward       logits of all positions
    edges step    `make_step` on the edges (AdamW); the vertices stay as they are
    stage 2 step  `make_step` on everything

Layers are one by one, as `jaxcomm lmnet train` takes them on CPU in long runs (`--layout stacked`: in short ones), and the network's
steps make again what lies between matrix products, as that command does; the single vertex' and PyTorch's do not, which is
faster for them. All sides keep freed memory, as that command does.

The network is compared with 14 times the single vertex: its forward with the vertex' forward, head included; the stage 2
step with the vertex' own training step; the edges step with the gradient of the vertex' loss with respect to its input
vectors, through weights that stay. (That is what a vertex costs there: gradients pass through its activations, but for
the first of the 14, which nothing trained precedes, and no gradient of its weights is made.) 14 single models have 14
heads and optimizers, the network has one of each; in exchange it has 40 edges. "by FLOPs" is what the ratio would be
if both sides ran at the same speed; "14 bodies, 1 head" compares with 14 x the vertex less 13 x its head's share of the
FLOPs.

Plain PyTorch is transformers' Qwen2 as the vertex and Qwen2DecoderLayer (as many key heads as heads) as the edge, Python
loops over vertices and edges, SDPA, `requires_grad` off where nothing is trained, torch.optim.AdamW. Logits, losses and
gradient norms are compared before anything is timed. Every part lives in a process of its own (so its peak memory is its
own, imports, compilation and the loaded weights included); the parts of a comparison take turns. The floor is the FLOPs
(a step's: twice the forward's of whatever has gradients of activations alone, thrice where weights have them, too) over the
speed of a large matrix product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

WIDTHS = (1, 4, 4, 4, 1)
CALLS = sum(WIDTHS)
WHAT = {"forward": "forward", "edges": "edges step", "all": "stage 2 step"}
RATE = 1e-4


def shape(quick: bool) -> dict:
    """Qwen2.5-0.5B: 24 layers, width 896 = 14 x 64, 2 key heads, feed-forward 4864, vocabulary 151936."""
    common = dict(head_dim=64, max_positions=1024, qkv_bias=True)
    if quick:
        return dict(vocab=512, width=128, layers=2, heads=2, kv_heads=1, ff=320, **common)
    return dict(vocab=16384, width=256, layers=24, heads=4, kv_heads=2, ff=1390, **common)


def tokens_of(args) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape(args.quick)["vocab"], (args.rows, args.columns), np.int32)


# Ours ---------------------------------------------------------------------------------------------------------------


def make(args, folder: Path):
    """The network, its vertex as a checkpoint and its edges as arrays for the other side."""
    import jax

    from jaxcomm import lmnet
    from jaxcomm.config import ModelConfig, Rope
    from jaxcomm.converters import to_hf
    from jaxcomm.model import init_params

    vertex = init_params(jax.random.key(0), ModelConfig(**shape(args.quick), rope=Rope(theta=1e6)))
    network = lmnet.init_network(jax.random.key(1), vertex, WIDTHS)
    leaves, tree = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [a + 0.02 * jax.random.normal(key, a.shape) for a, key in zip(leaves, keys, strict=True)]
    network = jax.tree.unflatten(tree, moved)
    to_hf(network.models[0], folder / "vertex")
    flat = jax.tree_util.tree_leaves_with_path(network.edges)
    np.savez(folder / "edges.npz", **{"/".join(k.key for k in path): a for path, a in flat})
    return network


def ours(what: str, single: bool, folder: Path, args):
    """run() -> numbers to compare, and what is known after compiling."""
    import jax
    import jax.numpy as jnp

    from jaxcomm import lmnet
    from jaxcomm.converters import from_hf
    from jaxcomm.language_model import positions_of
    from jaxcomm.model import embed
    from jaxcomm.prompts import Prompts
    from jaxcomm.reading import forward
    from jaxcomm.training import Batch, Everything, begin, losses, make_optimizer, make_step

    vertex = from_hf(folder / "vertex", unroll=args.layout == "unrolled")
    if single:
        model = vertex
    else:
        with np.load(folder / "edges.npz") as saved:
            read = lambda path, a: jnp.asarray(saved["/".join(k.key for k in path)])
            model = jax.eval_shape(lambda: lmnet.init_network(jax.random.key(1), vertex, WIDTHS))
            model = model.replace(models=(vertex,), edges=jax.tree_util.tree_map_with_path(read, model.edges))
    tokens = jnp.asarray(tokens_of(args))
    weights = jnp.ones(tokens.shape).at[:, 0].set(0.0)
    batch = Batch(tokens, jnp.zeros_like(tokens), weights)
    if what == "forward":
        fn, state, rest = jax.jit(forward), None, (model, tokens)
    elif what == "edges" and single:

        def loss(vectors, frozen):
            reader = SimpleNamespace(read=lambda _, *a, **how: frozen.read(vectors, *a, **how), logits=frozen.logits)
            return jnp.sum(losses(reader, batch))

        fn, state, rest = (
            jax.jit(jax.value_and_grad(loss)),
            None,
            (embed(model, tokens, positions_of(Prompts(tokens))), model),
        )
    else:
        optimizer = make_optimizer(RATE, 1000, warmup=0.0)
        trained, frozen = (Everything(model), None) if what == "all" else model.split()
        state = begin(jax.tree.map(jnp.copy, trained), optimizer)
        del model, vertex, trained  # the step owns its state
        fn = jax.jit(make_step(optimizer, remat="off" if single else "products"), donate_argnums=0)
        rest = (frozen, jax.tree.map(lambda a: a[None], batch))
    begun = time.perf_counter()
    given = rest if state is None else (state, *rest)
    compiled = fn.lower(*given).compile()
    told = {"compile": time.perf_counter() - begun, "temporary": compiled.memory_analysis().temp_size_in_bytes}
    held = [state]

    def run():
        if held[0] is None:
            out = jax.block_until_ready(compiled(*rest))
            return np.asarray(out[0, :, :8]).tolist() if what == "forward" else None
        held[0], metrics = compiled(held[0], *rest)
        return [float(metrics["loss"]), float(metrics["norm"])]

    return run, told


# Theirs -------------------------------------------------------------------------------------------------------------


def theirs(what: str, folder: Path, args):
    import torch
    import transformers
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    from jaxcomm.converters.families import FAMILIES

    torch.set_num_threads(args.threads)

    class Edge(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.block = Qwen2DecoderLayer(config, layer_idx=0)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, angles):
            return self.scale * self.block(x, position_embeddings=angles)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vertex = transformers.AutoModelForCausalLM.from_pretrained(
                folder / "vertex", dtype=torch.float32, attn_implementation="sdpa"
            )
            config = self.vertex.config
            config = type(config)(**{**config.to_dict(), "num_key_value_heads": config.num_attention_heads})
            config._attn_implementation = "sdpa"
            stack = lambda n, m: torch.nn.ModuleList(
                torch.nn.ModuleList(Edge(config) for _ in range(m)) for _ in range(n)
            )
            self.edges = torch.nn.ModuleList(stack(n, m) for n, m in itertools.pairwise(WIDTHS))

        def forward(self, tokens):
            body = self.vertex.model
            xs = [body(input_ids=tokens, use_cache=False).last_hidden_state]
            positions = torch.arange(tokens.shape[1])[None]
            angles = body.rotary_emb(xs[0], positions)
            for stack in self.edges:
                ys = [sum(row[j](x, angles) for x, row in zip(xs, stack, strict=True)) for j in range(len(stack[0]))]
                xs = [body(inputs_embeds=y, use_cache=False).last_hidden_state for y in ys]
            return self.vertex.lm_head(xs[0])

    net = Net()
    names = {"/".join(path): f"block.{name}" for path, name in FAMILIES["qwen2"].block.items()} | {"scale": "scale"}
    with np.load(folder / "edges.npz") as saved, torch.no_grad():
        for key in saved.files:
            stack, name = key.split("/", 1)
            own, value = net.edges[int(stack.split()[1].split(".")[0])], torch.from_numpy(saved[key])
            for i, row in enumerate(own):
                for j, edge in enumerate(row):
                    edge.get_parameter(names[name]).copy_(value[i, j])
    tokens = torch.from_numpy(tokens_of(args)).long()
    if what != "all":
        net.vertex.requires_grad_(False)
    if what == "forward":

        def run():
            with torch.no_grad():
                return net(tokens)[0, :, :8].tolist()

        return run, {}
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def run():
        optimizer.zero_grad()
        logits = net(tokens)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return [loss.item(), norm.item()]

    return run, {}


# Turns --------------------------------------------------------------------------------------------------------------


def worker(side: str, what: str, folder: Path, args) -> None:
    """Answers every line of stdin with the seconds a run took; first with what is known before, at the end its peak."""
    from jaxcomm.evals.networks.training import keep_freed_memory

    keep_freed_memory()
    run, told = theirs(what, folder, args) if side == "torch" else ours(what, side == "single", folder, args)
    first = run()
    print(json.dumps({**told, "first": first}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    # Not ru_maxrss: a child starts with its parent's high-water mark there.
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20, flush=True)


class Part:
    """A worker, its times, its peak memory in GiB."""

    def __init__(self, side: str, what: str, folder: Path, args):
        given = [f"--{name}={getattr(args, name)}" for name in ("rows", "columns", "threads", "layout")]
        command = [sys.executable, __file__, *given, *["--quick"] * args.quick, "--worker", side, what, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told = json.loads(self.process.stdout.readline())
        self.seconds, self.peak = [], 0.0

    def turn(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.seconds.append(float(self.process.stdout.readline()))

    def end(self) -> None:
        self.process.stdin.close()
        self.peak = float(self.process.stdout.readline())
        self.process.wait()


def products(size: int) -> float:
    """FLOP/s of a large matrix product."""
    import jax
    import jax.numpy as jnp

    square = jnp.ones((size, size))
    multiply, seconds = jax.jit(jnp.matmul), []
    for _ in range(6):
        start = time.perf_counter()
        multiply(square, square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def others(since: tuple[float, float, float] | None = None):
    """How many cores were busy with other things than this run since then; without `since`, what to give as it."""
    own = sum(os.times()[:4])
    busy = np.array(Path("/proc/stat").read_text().split("\n")[0].split()[1:], float)[[0, 1, 2, 5, 6, 7]].sum()
    now = own, busy / os.sysconf("SC_CLK_TCK"), time.perf_counter()
    return now if since is None else max(0.0, (now[1] - since[1] - now[0] + since[0]) / (now[2] - since[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layout", choices=["unrolled", "stacked"], default="unrolled", help="of the vertex' layers")
    parser.add_argument("--what", nargs="+", choices=[*WHAT], default=[*WHAT])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    # XLA takes its number of threads from the cores it is given.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.worker:
        side, what, folder = args.worker
        return worker(side, what, Path(folder), args)

    import jax
    import torch
    import transformers

    from jaxcomm import flops
    from jaxcomm.lmnet import size

    told = [f"{m.__name__} {m.__version__}" for m in (jax, torch, transformers)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = make(args, folder)
        config, vertex = network.config, network.models[0].config
        print(
            f"{'/'.join(map(str, WIDTHS))}, vertex of {vertex.layers} layers, width {vertex.width}, vocabulary {vertex.vocab}: "
            f"{size(network.models) / 1e6:.1f}M weights, {size(network.edges) / 1e6:.1f}M in edges; {args.rows} x {args.columns} tokens, "
            f"float32, {args.threads} threads, layers {args.layout}; {', '.join(told)}"
        )
        print(f"the best of {args.rounds} rounds in turns; peak memory of each process", flush=True)
        del network

        # Of a batch. Weights' gradients cost the forward once more, activations' too.
        body = args.rows * flops.blocks_flops(vertex, args.columns)
        head = args.rows * args.columns * flops.head_flops(vertex)
        wires = args.rows * flops.wires_flops(config, args.columns)
        net = {
            "forward": CALLS * body + wires + head,
            "edges": (2 * CALLS - 1) * body + 3 * wires + 2 * head,
            "all": 3 * (CALLS * body + wires + head),
        }
        alone = {"forward": body + head, "edges": 2 * (body + head), "all": 3 * (body + head)}
        heads = {"forward": head, "edges": 2 * head, "all": 3 * head}

        verdicts = []
        for what in args.what:
            begun = others()
            parts = {side: Part(side, what, folder, args) for side in ("network", "single", "torch")}
            first = {side: np.asarray(parts[side].told["first"]) for side in ("network", "torch")}
            apart = np.max(np.abs(first["network"] - first["torch"]) / np.max(np.abs(first["torch"])))
            assert apart < 1e-3, f"{what}: the two sides differ by {apart:.1e}"
            speeds = []
            for _ in range(args.rounds):
                speeds.append(products(512 if args.quick else 2048))
                for side, part in parts.items():
                    for _ in range(5 if side == "single" else 1):
                        part.turn()
            for part in parts.values():
                part.end()
            seconds = {side: min(part.seconds) for side, part in parts.items()}
            speed = max(speeds)
            ratio = seconds["network"] / (CALLS * seconds["single"])
            # 13 of the 14 heads taken off, at the speed of the whole vertex.
            one_head = seconds["single"] * (CALLS - (CALLS - 1) * heads[what] / alone[what])
            beside = seconds["torch"] / seconds["network"]
            logits = "logits" if what == "forward" else "loss and gradient norm"
            print(
                f"\n{WHAT[what]}    ({logits} of the two sides differ by {apart:.0e} of the largest; others kept {others(begun):.2f} cores busy)"
            )
            for side, part in parts.items():
                rate = args.rows * args.columns / seconds[side]
                work = alone[what] if side == "single" else net[what]
                line = f"  {side:8} {seconds[side]:8.3f} s  {rate:9.1f} tokens/s  {work / seconds[side] / speed:4.0%} of {speed / 1e9:.0f} GFLOP/s"
                line += f"  peak {part.peak:5.2f} GiB"
                if side != "torch":
                    line += f"  temporary {part.told['temporary'] / 2**30:5.2f} GiB  compiled in {part.told['compile']:.1f} s"
                print(line)
            by_flops = net[what] / (CALLS * alone[what])
            print(
                f"  network / (14 x single) {ratio:.2f} (by FLOPs {by_flops:.2f}; 14 bodies, 1 head: {seconds['network'] / one_head:.2f}); "
                f"faster than PyTorch {beside:.2f} x",
                flush=True,
            )
            verdicts.append(("at most 1.3 x (14 x single)", what, ratio, ratio <= 1.3))
            verdicts.append(("at least 1.2 x PyTorch", what, beside, beside >= 1.2))
    print()
    for target, what, found, met in verdicts:
        print(f"target {target}, {WHAT[what]}: {found:.2f}, {'met' if met else 'NOT met'}")


if __name__ == "__main__":
    main()
