"""Greedy decoding beside transformers' `generate`, on the same random Llama, in one run.

    make bench, or: python benchmarks/generate.py [--layers 12 --width 768 --prompt 64 --new 64 --rounds 5]

Both sides load the same checkpoint, live in a process of their own (peak memory is each one's own high-water mark,
imports included) and take turns, so that a noisy machine disturbs both alike. `make bench` gives our side an
environment of jaxcomm's own dependencies: where torch is installed too, transformers imports it to read a config.
Prefill and every token are timed together; compilation is not (the first, untimed turn). The floor is the time to read
every weight once per token at the bandwidth that a large matrix-vector product reaches in this process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def worker(side: str, folder: str, prompt: int, new: int, threads: int) -> None:
    """Answers lines of stdin, each a batch size, with the seconds a generation took; at the end with the peak memory."""
    ids = lambda batch: np.random.default_rng(batch).integers(1, 32_000, (batch, prompt))
    if side == "transformers":
        import torch
        import transformers

        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def run(batch):
            out = model.generate(
                torch.from_numpy(ids(batch)), attention_mask=torch.ones(batch, prompt, dtype=torch.long), do_sample=False,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            return out[:, prompt:].numpy()
    else:
        import jax

        from jaxcomm.converters import from_hf
        from jaxcomm.generate import generate

        params = from_hf(folder, unroll=True)
        write = jax.jit(generate, static_argnames="max_new_tokens")

        def run(batch):
            return np.asarray(write(params, ids(batch).astype(np.int32), max_new_tokens=new).tokens)

    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens.tolist()}), flush=True)
    # Not ru_maxrss: a child starts with its parent's high-water mark there.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"peak_mb": peak / 1024}), flush=True)


def bandwidth(gigabytes: float = 0.4) -> float:
    """GB/s of a float32 matrix-vector product as large as the model's weights."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((int(gigabytes * 1e9 / 4 / 4096), 4096), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    vector = jnp.ones(4096, jnp.float32)
    product(matrix, vector).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", default=sys.executable, help="interpreter of jaxcomm's side")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.prompt, args.new, args.threads)

    import jax

    from jaxcomm.config import ModelConfig
    from jaxcomm.converters import to_hf
    from jaxcomm.model import init

    config = ModelConfig(
        vocab=32_000, width=args.width, layers=args.layers, heads=args.width // 64, kv_heads=args.width // 64,
        head_dim=64, ff=args.width * 8 // 3, max_positions=2048, tied_head=True,
    )  # fmt: skip
    params = init(jax.random.key(0), config)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory() as parent:
        folder = to_hf(params, Path(parent) / "llama")
        del params
        sides = {}
        for side in ("transformers", "jaxcomm"):
            python = args.python if side == "jaxcomm" else sys.executable
            command = [python, __file__, "--prompt", str(args.prompt), "--new", str(args.new)]
            command += ["--threads", str(args.threads), "--worker", side, str(folder)]
            # One malloc arena on both sides: with one per thread glibc keeps what every compiling thread has freed, and
            # the peak says how that fell out (MALLOC_ARENA_MAX=16 in the environment measures it so).
            environment = {"MALLOC_ARENA_MAX": "1", **os.environ, "OMP_NUM_THREADS": str(args.threads)}
            sides[side] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            assert sides[side].stdout.readline() == "ready\n"

        def turn(side: str, batch: int) -> dict:
            process = sides[side]
            process.stdin.write(f"{batch}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        print(
            f"Llama, {args.layers} layers, width {args.width}, {weights / 1e6:.0f}M weights, float32, {args.threads} threads"
        )
        print(f"prompt {args.prompt}, {args.new} new tokens, median of {args.rounds} alternating rounds")
        gbps = bandwidth()
        for batch in (1, 16):
            first = {side: turn(side, batch)["tokens"] for side in sides}
            seconds = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side in sides:
                    seconds[side].append(turn(side, batch)["seconds"])
            median = {side: float(np.median(s)) for side, s in seconds.items()}
            agree = np.mean(np.asarray(first["jaxcomm"]) == np.asarray(first["transformers"]))
            rate = {side: batch * args.new / s for side, s in median.items()}
            floor = args.new * weights * 4 / gbps / 1e9
            print(
                f"batch {batch:2}: jaxcomm {rate['jaxcomm']:7.1f} tokens/s, transformers {rate['transformers']:7.1f} tokens/s, "
                f"ratio {rate['jaxcomm'] / rate['transformers']:.2f}; {floor / median['jaxcomm']:.0%} of the weight-reading floor "
                f"({gbps:.0f} GB/s); same tokens {agree:.1%}",
                flush=True,
            )
        peak = {}
        for side, process in sides.items():
            process.stdin.close()
            peak[side] = json.loads(process.stdout.readline())["peak_mb"]
            process.wait()
        arenas = os.environ.get("MALLOC_ARENA_MAX", "1")
        print(
            f"peak memory ({arenas} malloc arena(s)): jaxcomm {peak['jaxcomm']:.0f} MB, transformers {peak['transformers']:.0f} MB, ratio {peak['jaxcomm'] / peak['transformers']:.2f}"
        )


if __name__ == "__main__":
    main()
