"""Reading and greedy decoding beside transformers, on the same random checkpoints of three families, in one run.

    make bench, or: python benchmarks/generate.py [--families llama gemma3_text gpt_neox --layers 12 --width 768 --rounds 5]

Both sides load the same checkpoint, live in a process of their own (peak memory is each one's own high-water mark,
imports included) and take turns, so that a noisy machine disturbs both alike. `make bench` gives our side an
environment of jaxcomm's own dependencies: where torch is installed too, transformers imports it to read a config.
A turn reads prompts and takes the next token of each (transformers: one forward pass with a cache, logits of the last
token), then generates; decoding is the second less the first. Compilation is not timed (the first turn). Floors: the
FLOPs of reading at the speed of a large matrix product, and the time to read every weight once per token at the
bandwidth of a large matrix-vector product, both measured in this process.
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

VOCAB = 32_000


def worker(side: str, folder: str, prompt: int, new: int, threads: int) -> None:
    """Answers lines of stdin, each a batch size, with the seconds that reading and generating took; at the end with the
    peak memory."""
    ids = lambda batch: np.random.default_rng(batch).integers(1, VOCAB, (batch, prompt))
    if side == "transformers":
        import torch
        import transformers

        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def read(batch):
            with torch.no_grad():
                return model(torch.from_numpy(ids(batch)), use_cache=True, logits_to_keep=1).logits.numpy()

        def run(batch):
            out = model.generate(
                torch.from_numpy(ids(batch)), attention_mask=torch.ones(batch, prompt, dtype=torch.long), do_sample=False,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            return out[:, prompt:].numpy()
    else:
        import jax

        from jaxcomm.converters import from_hf
        from jaxcomm.decoding import generate

        params = from_hf(folder, unroll=True)
        write = jax.jit(generate, static_argnames="max_new_tokens")
        generated = lambda batch, n: np.asarray(write(params, ids(batch).astype(np.int32), max_new_tokens=n).tokens)
        read, run = lambda batch: generated(batch, 1), lambda batch: generated(batch, new)

    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        read(int(line))
        between = time.perf_counter()
        tokens = run(int(line))
        end = time.perf_counter()
        print(json.dumps({"read": between - start, "all": end - between, "tokens": tokens.tolist()}), flush=True)
    # Not ru_maxrss: a child starts with its parent's high-water mark there.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"peak_mb": peak / 1024}), flush=True)


def fastest(function, *args) -> float:
    """Seconds of the fastest of ten calls."""
    function(*args).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        function(*args).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def machine() -> tuple[float, float]:
    """GFLOP/s of a large matrix product, GB/s of a matrix-vector product as large as a model's weights."""
    import jax
    import jax.numpy as jnp

    square, tall = jnp.ones((4096, 4096)), jnp.ones((24_000, 4096))
    product = jax.jit(lambda m, v: m @ v)
    return 2 * 4096**3 / fastest(product, square, square) / 1e9, tall.nbytes / fastest(product, tall, tall[0]) / 1e9


def make(family: str, folder: Path, layers: int, width: int):
    """A random checkpoint of the family, heads of 64."""
    import jax
    import transformers

    from jaxcomm.converters import FAMILIES, to_hf
    from jaxcomm.converters.values import Values
    from jaxcomm.model import init_params

    heads = width // 64
    sizes = dict(vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    sizes |= dict(intermediate_size=width * 8 // 3, max_position_embeddings=2048)
    if family != "gpt_neox":
        sizes |= dict(num_key_value_heads=heads if family == "llama" else heads // 3, tie_word_embeddings=True)
    if family == "gemma3_text":
        sizes |= dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=128)
    values = transformers.AutoConfig.for_model(family, **sizes)
    params = init_params(jax.random.key(0), FAMILIES[family].read(Values(values)))
    return to_hf(params, folder / family, family=family), params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llama", "gemma3_text", "gpt_neox"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", default=sys.executable, help="interpreter of jaxcomm's side")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.prompt, args.new, args.threads)

    gflops, gbps = machine()
    print(
        f"prompt {args.prompt}, {args.new} new tokens, float32, {args.threads} threads, median of {args.rounds} alternating rounds"
    )
    print(f"a large matrix product {gflops:.0f} GFLOP/s, a matrix-vector product {gbps:.0f} GB/s")
    for family in args.families:
        with tempfile.TemporaryDirectory() as parent:
            compare(family, args, Path(parent), gflops, gbps)


def compare(family: str, args: argparse.Namespace, parent: Path, gflops: float, gbps: float) -> None:
    import jax

    from jaxcomm.flops import generation_flops

    folder, params = make(family, parent, args.layers, args.width)
    config, weights = params.config, sum(leaf.size for leaf in jax.tree.leaves(params))
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

    print(f"\n{family}, {args.layers} layers, width {args.width}, {weights / 1e6:.0f}M weights")
    for batch in (1, 16):
        first = {side: turn(side, batch)["tokens"] for side in sides}
        turns = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                turns[side].append(turn(side, batch))
        reading = {side: float(np.median([t["read"] for t in turns[side]])) for side in sides}
        decoding = {side: float(np.median([t["all"] - t["read"] for t in turns[side]])) for side in sides}
        agree = np.mean(np.asarray(first["jaxcomm"]) == np.asarray(first["transformers"]))
        floors = {
            "prefill": batch * generation_flops(config, args.prompt, 1) / gflops / 1e9,
            "decode": (args.new - 1) * weights * 4 / gbps / 1e9,
        }
        print(f"  batch {batch:2}, same tokens {agree:.1%}")
        for name, seconds, tokens in (("prefill", reading, args.prompt), ("decode", decoding, args.new - 1)):
            ours, theirs = (batch * tokens / seconds[side] for side in ("jaxcomm", "transformers"))
            print(
                f"    {name:7}: jaxcomm {ours:8.1f} tokens/s, transformers {theirs:8.1f} tokens/s, ratio {ours / theirs:.2f}; "
                f"{floors[name] / seconds['jaxcomm']:.0%} of the floor",
                flush=True,
            )
    peak = {}
    for side, process in sides.items():
        process.stdin.close()
        peak[side] = json.loads(process.stdout.readline())["peak_mb"]
        process.wait()
    arenas = os.environ.get("MALLOC_ARENA_MAX", "1")
    print(
        f"  peak memory ({arenas} malloc arena(s)): jaxcomm {peak['jaxcomm']:.0f} MB, transformers {peak['transformers']:.0f} MB, "
        f"ratio {peak['jaxcomm'] / peak['transformers']:.2f}"
    )


if __name__ == "__main__":
    main()
