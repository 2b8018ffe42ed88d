"""A layer sweep beside a PyTorch forward-hook loop on transformers, on the same random Llama, in one run.

    make bench-sweep, or: python benchmarks/sweep.py            two CPU threads, float32, about half an hour
    python benchmarks/sweep.py --preset 8b                       on an accelerator: Llama-3.1-8B's shape, bfloat16
    python benchmarks/sweep.py --preset real --modes exact       SmolLM2-135M's own weights (make .venv/.real)

The hook loop is the best a careful user would write: hidden states of A cached once, all games in one batch, B's KV cache
used while decoding, one pass for the exact match of a given answer. Per cell it reads B's prompt again. Both sides load
the same checkpoint, live in processes of their own and take turns: after every column of the hook loop (one j, all k)
the whole sweep runs once. Compilation is counted apart. Work is counted in token-layers: cells x (P + T - 1) x L per game
for the loop, 2 P L + cells x T x L for the sweep.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PRESETS = {
    "small": dict(layers=12, width=256, heads=4, kv_heads=2, head_dim=64, ff=1024, vocab=1024, games=50, grid=11,
                  prompts=[32, 64, 256], columns=11, dtype="float32"),
    "real": dict(layers=30, width=576, heads=9, kv_heads=3, head_dim=64, ff=1536, vocab=49152, games=40, grid=10, every=3,
                 prompts=[46], columns=3, dtype="float32", checkpoint="real:smollm2"),
    "8b": dict(layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ff=14336, vocab=128256, games=100, grid=30,
               prompts=[64], columns=1, dtype="bfloat16", memory=30 * 2**30),
}  # fmt: skip
NEW, ANSWER = 8, 3
TARGETS = {"decode": {32: 4, 64: 6.5, 256: 15}, "exact": {32: 7, 64: 12, 256: 25}}


def draw(games: int, prompt: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of A and of B, of the same length."""
    rng = np.random.default_rng(prompt)
    return tuple(rng.integers(1, vocab, (games, prompt)).astype(np.int32) for _ in range(2))


# The hook loop ------------------------------------------------------------------------------------------------------


def torch_worker(folder: str, args) -> None:
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(device).eval()
    )
    cached = {}

    def sent(prompt: int):
        """h_A[0] .. h_A[L] at the last token."""
        if prompt not in cached:
            cached.clear()
            ids = torch.from_numpy(draw(args.games, prompt, args.vocab)[0]).to(device, torch.long)
            last = []  # among the hidden states it is after the final norm
            keep = lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
            hook = model.model.layers[-1].register_forward_hook(keep)
            states = model(ids, output_hidden_states=True).hidden_states[:-1]
            hook.remove()
            cached[prompt] = [h[:, -1].clone() for h in (*states, *last)]
        return cached[prompt]

    def cell(prompt: int, k: int, j: int, answers):
        a, ids = sent(prompt)[k], torch.from_numpy(draw(args.games, prompt, args.vocab)[1]).to(device, torch.long)

        def replace(module, inputs, output):
            h = output[0] if isinstance(output, tuple) else output
            h[:, prompt - 1] = a

        hook = model.model.layers[j - 1].register_forward_hook(replace)
        if answers is not None:  # teacher-forced, one pass
            ids = torch.cat([ids, answers[:, :-1]], dim=1)
            logits = model(ids, logits_to_keep=answers.shape[1], use_cache=False).logits
            hook.remove()
            logprobs = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
            return (logits.argmax(-1) == answers).all(-1), logprobs.sum(-1)
        out = model(ids, logits_to_keep=1, use_cache=True)
        hook.remove()
        tokens, gaps = [], []
        for t in range(NEW):
            if t:
                out = model(tokens[-1], past_key_values=out.past_key_values, logits_to_keep=1, use_cache=True)
            top = out.logits[:, -1].float().topk(2)
            tokens.append(top.indices[:, :1])
            gaps.append(top.values[:, 0] - top.values[:, 1])
        return torch.cat(tokens, 1), torch.stack(gaps, 1)

    def run(request: dict):
        answers = request.get("answers")
        answers = None if answers is None else torch.tensor(answers, device=device)
        with torch.no_grad():
            sent(request["prompt"])
            start = time.perf_counter()
            cells = [cell(request["prompt"], k, request["j"], answers) for k in request["ks"]]
            out = [torch.stack(part).cpu() for part in zip(*cells, strict=True)]
            return time.perf_counter() - start, out[0].tolist(), out[1].tolist()

    serve(run)


# The sweep ----------------------------------------------------------------------------------------------------------


def jax_worker(folder: str, args) -> None:
    import jax
    import jax.numpy as jnp

    from jaxcomm.converters import from_hf
    from jaxcomm.layer_sweep import sweep, sweep_answers

    compiling = [0.0]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiling.__setitem__(
            0, compiling[0] + seconds * name.startswith("/jax/core/compile")
        )
    )
    params = from_hf(folder, getattr(jnp, args.dtype), unroll=False)

    def run(request: dict):
        ta, tb = draw(args.games, request["prompt"], args.vocab)
        grid = dict(ks=request["ks"], js=request["js"], memory=args.memory)
        compiling[0], start = 0.0, time.perf_counter()
        if request.get("answers") is None:
            out = sweep(params, params, ta, tb, max_new_tokens=NEW, **grid)
            out = out.tokens, out.logprobs
        else:
            out = sweep_answers(params, params, ta, tb, np.array(request["answers"], np.int32), **grid)
            out = out.exact, out.logprobs.sum(-1)
        seconds = time.perf_counter() - start
        return (seconds, compiling[0], *(part[0].tolist() for part in out if request.get("results")))

    serve(run)


def serve(run) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


# Both ---------------------------------------------------------------------------------------------------------------


class Side:
    """A process that answers requests."""

    def __init__(self, name: str, folder: Path, args):
        shape = [
            f"--{key.replace('_', '-')}={getattr(args, key)}"
            for key in ("games", "vocab", "dtype", "threads", "memory")
        ]
        threads = {"OMP_NUM_THREADS": str(args.threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *shape, "--worker", name, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n", f"{name} did not start"

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def work(prompt: int, cells: int, new: int, layers: int) -> tuple[int, int]:
    """Token-layers a game costs the hook loop, and the sweep."""
    return cells * (prompt + new - 1) * layers, 2 * prompt * layers + cells * new * layers


def compare(hooks: Side, ours: Side, args, prompt: int, mode: str, answers) -> list:
    """One setting, both sides in turns. Returns what the sweep wrote."""
    layers = [args.every * i for i in range(1, args.grid + 1)]
    request = dict(prompt=prompt, ks=layers, js=layers, answers=answers)
    first, compiled, *results = ours.ask(**request, results=True)
    # The columns the loop runs, spread over the grid; all of them unless it would take too long.
    columns = [layers[i] for i in np.linspace(0, len(layers) - 1, args.columns).round().astype(int)]
    loop, times, theirs = [], [], []
    for j in columns:
        seconds, *out = hooks.ask(prompt=prompt, ks=layers, j=j, answers=answers)
        loop.append(seconds)
        theirs.append(out)
        times.append(ours.ask(**request)[0])
    seconds, all_loop = float(np.median(times)), float(np.median(loop)) * len(layers)
    cells, new = len(layers) ** 2, NEW if answers is None else ANSWER
    loop_work, our_work = work(prompt, cells, new, args.layers)
    ratio, possible = all_loop / seconds, loop_work / our_work
    target = max(0.9 * possible, TARGETS[mode].get(prompt, 0))
    floors = (
        flops(args, prompt, cells, new, answers is not None) * args.games / args.rate,
        least_bytes(args, prompt, cells, new, answers is not None) / args.bandwidth,
    )
    print(
        f"{mode:6} P {prompt:3}: hook loop {all_loop:7.1f} s, sweep {seconds:6.2f} s (first call {first:.1f}, of which compiling {compiled:.1f}); "
        f"{cells / seconds:6.1f} cells/s\n"
        f"              token-layers a game {loop_work} against {our_work}: {possible:.1f} x less; measured {ratio:.1f} x "
        f"= {ratio / possible:.2f} of it, asked {target:.1f}\n"
        f"              floor: {floors[0]:.2f} s of matrix products, {floors[1]:.2f} s of memory; reached {max(floors) / seconds:.0%}"
    )
    at = [layers.index(j) for j in columns]
    ours_first = np.array(results[0])[:, at]
    theirs_first = np.stack([np.array(out[0]) for out in theirs], axis=1)
    same = ours_first == theirs_first
    line = f"              {'tokens' if answers is None else 'verdicts'} equal {same.mean():.4%}"
    if answers is None:
        gaps = np.stack([np.array(out[1]) for out in theirs], axis=1)
        rows = np.argwhere(~same.all(-1))
        first_gap = [gaps[(*row, np.argmin(same[tuple(row)]))] for row in rows]
        if first_gap:
            line += f"; {len(rows)} of {same[..., 0].size} texts part where the loop's two best logits are at most {max(first_gap):.1e} apart"
    else:
        difference = np.abs(np.array(results[1])[:, at] - np.stack([np.array(out[1]) for out in theirs], axis=1)).max()
        line += f"; {ours_first.mean():.1%} exact; log-probabilities differ by at most {difference:.1e}"
    print(line, flush=True)
    return results[0]


def flops(args, prompt: int, cells: int, new: int, exact: bool) -> float:
    """Matrix FLOPs one game must cost: two prompts, then per cell its tokens (of a given answer, and of the prompt's last
    token, only the blocks above j) and the head."""
    from jaxcomm.flops import blocks_flops, head_flops

    config = make_config(args)
    reading = blocks_flops(config, prompt) * 2
    above = sum(args.layers - args.every * j for j in range(1, args.grid + 1)) / args.grid
    per_layer = lambda tokens: blocks_flops(config, tokens, context=prompt - 1, blocks=1)
    cell = per_layer(new) * above if exact else per_layer(1) * above + (per_layer(new) - per_layer(1)) * args.layers
    return reading + cells * (cell + new * head_flops(config))


def least_bytes(args, prompt: int, cells: int, new: int, exact: bool) -> float:
    """Bytes of all games that must be read with every cell in one batch: weights and the prompts' K/V once per token
    (once in all for a given answer), and each cell's own K/V at every token."""
    from jaxcomm.flops import block_weights

    config, size = make_config(args), 4 if args.dtype == "float32" else 2
    weights = config.layers * block_weights(config) + 2 * config.vocab * config.width
    kv = 2 * config.layers * config.kv_heads * config.head_dim
    passes, own = (1, new) if exact else (new, new * (new + 1) // 2)
    return size * ((2 + passes) * weights + args.games * kv * (passes * prompt + cells * own))


def make_config(args):
    from jaxcomm.config import ModelConfig

    return ModelConfig(
        vocab=args.vocab, width=args.width, layers=args.layers, heads=args.heads, kv_heads=args.kv_heads,
        head_dim=args.head_dim, ff=args.ff, max_positions=2048, tied_head=args.checkpoint is not None,
    )  # fmt: skip


def rate(dtype: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product, bytes/s of a matrix-vector product, as XLA reaches them here."""
    import jax
    import jax.numpy as jnp

    n = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((n, n), dtype)
    tall = jnp.ones((50_000_000 // n, n), dtype)

    def seconds(fn, *operands):
        fn = jax.jit(fn)
        fn(*operands).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            fn(*operands).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    product = lambda a, b: a @ b
    return 2 * n**3 / seconds(product, matrix, matrix), tall.nbytes / seconds(product, tall, matrix[0])


def check_flops(args) -> None:
    """The hand count of one token of 64 branches after a prompt, beside the compiler's."""
    import jax
    import jax.numpy as jnp

    from jaxcomm.cache import Attended
    from jaxcomm.flops import blocks_flops, head_flops
    from jaxcomm.model import init_params, run_blocks, unembed

    config = make_config(args)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config).unroll())
    past = jax.eval_shape(lambda: params.empty_cache(1, 63))
    h, positions = jax.ShapeDtypeStruct((1, 64, config.width), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def step(params, past, h, positions):
        attended = Attended((past,), branches=64)
        return unembed(params, run_blocks(params, h, positions, attended=attended)[0])

    counted = jax.jit(step).lower(params, past, h, positions).compile().cost_analysis()
    by_hand = 64 * (blocks_flops(config, 1, context=63) + head_flops(config))
    read = [
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params.blocks, params.norm, params.head, past))
    ]
    print(
        f"a step of 64 cells after 63 tokens, by hand {by_hand / 1e9:.3f} GFLOP and {sum(read) / 1e6:.0f} MB of weights and K/V; "
        f"by the compiler, with all that lies between, {counted['flops'] / 1e9:.3f} GFLOP and {counted['bytes accessed'] / 1e6:.0f} MB"
    )


def growth(args) -> None:
    """Cost against cells x 4, layers x 2, prompt x 4, each alone, and compile time with it."""
    import jax

    from jaxcomm.converters import to_hf
    from jaxcomm.model import init_params

    def measure(layers: int, grid: int, prompt: int) -> tuple[float, float]:
        args.layers = layers
        with tempfile.TemporaryDirectory() as parent:
            side = Side(
                "jaxcomm", to_hf(init_params(jax.random.key(0), make_config(args)), Path(parent) / "llama"), args
            )
            request = dict(prompt=prompt, ks=list(range(1, grid + 1)), js=list(range(1, grid + 1)))
            compiled = side.ask(**request)[1]
            times = [side.ask(**request)[0] for _ in range(3)]
            side.close()
        return min(times), compiled

    base = dict(layers=12, grid=5, prompt=64)
    start, compiled = measure(**base)
    print(
        f"growth from L 12, 5 x 5 cells, prompts of 64 ({NEW} tokens decoded): {start:.2f} s, compiled in {compiled:.1f} s"
    )
    for name, factor, changed in (
        ("cells x 4", 4, base | {"grid": 10}), ("L x 2", 2, base | {"layers": 24}), ("prompt x 4", 4, base | {"prompt": 256})
    ):  # fmt: skip
        seconds, compiled = measure(**changed)
        count = lambda s: work(s["prompt"], s["grid"] ** 2, NEW, s["layers"])[1]
        exponent = math.log(seconds / start) / math.log(factor)
        formula = math.log(count(changed) / count(base)) / math.log(factor)
        print(
            f"  {name:10}: {seconds:6.2f} s, exponent {exponent:.2f}, the formula's {formula:.2f}; compiled in {compiled:.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for name, value in PRESETS["small"].items():
        many = dict(nargs="+", type=int) if isinstance(value, list) else dict(type=type(value))
        parser.add_argument(f"--{name.replace('_', '-')}", **many)
    parser.add_argument("--every", type=int, help="layer of the grid")
    parser.add_argument("--checkpoint", help="what is loaded instead of random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=lambda x: None if x == "None" else int(x), help="bytes, as jaxcomm.sweep's")
    parser.add_argument("--modes", nargs="+", default=["decode", "exact"])
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in (PRESETS[args.preset] | {"every": PRESETS[args.preset].get("every", 1)}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.worker:
        return {"transformers": torch_worker, "jaxcomm": jax_worker}[args.worker[0]](args.worker[1], args)

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator is shared by three processes
    import jax
    import jax.numpy as jnp

    from jaxcomm.converters import from_hf, to_hf
    from jaxcomm.model import init_params

    print(
        f"{args.checkpoint or 'random'} Llama, {args.layers} layers, width {args.width}, {args.heads} heads, {args.kv_heads} key heads, feed-forward {args.ff}, vocabulary {args.vocab}, "
        f"{args.dtype}, {jax.default_backend()}, {args.threads} threads; {args.games} games, {args.grid} x {args.grid} cells; "
        f"medians of {args.columns} alternating turns"
    )
    args.rate, args.bandwidth = rate(args.dtype)
    print(
        f"measured: {args.rate / 1e9:.0f} GFLOP/s in a large matrix product, {args.bandwidth / 1e9:.0f} GB/s in a matrix-vector product"
    )
    check_flops(args)
    with tempfile.TemporaryDirectory() as parent:
        made = lambda: init_params(jax.random.key(0), make_config(args), getattr(jnp, args.dtype))
        folder = to_hf(from_hf(args.checkpoint) if args.checkpoint else made(), Path(parent) / "llama")
        hooks, ours = (Side(name, folder, args) for name in ("transformers", "jaxcomm"))
        for prompt in args.prompts:
            answers = None
            for mode in args.modes:
                if mode == "exact":  # what one cell says: right there, wrong elsewhere
                    middle = [args.every * (args.grid // 2 + 1)]
                    said = ours.ask(prompt=prompt, ks=middle, js=middle, results=True)[2]
                    answers = [row[:ANSWER] for row in said[0][0]]
                compare(hooks, ours, args, prompt, mode, answers)
        hooks.close()
        ours.close()
    if args.preset == "small":
        growth(args)


if __name__ == "__main__":
    main()
