"""Loading a checkpoint beside transformers and beside reading its files, in one run.

    make bench-load, or: python benchmarks/load.py [--preset 1.5b --rounds 3]

Random checkpoints are written (bfloat16, five shards), and read by a process of its own each time, sides in turns: the bytes
of the files into a buffer; `from_hf`; transformers' `from_pretrained`. Every process loads a tiny checkpoint of the family
first, so that imports and code are neither timed nor counted, then the checkpoint twice: "first" into memory the process
never had, "again" into memory it has had. Right before the first, another process touches as much memory and ends: virtual
machines give free huge pages back to their host within seconds, and getting one back takes ten times as long as filling
it (`--from-host` leaves that out). The best of the rounds is shown. The files are in the page cache for all sides. Seconds
are until every weight has been looked at, since transformers may leave weights in the mapped file; "beyond" is the peak of
resident memory over what was resident before and what the weights take; pages of mapped files count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PRESETS = {
    # Qwen2.5-1.5B's shape.
    "1.5b": ("qwen2", dict(vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
                           num_key_value_heads=2, intermediate_size=8960, tie_word_embeddings=True)),
    "llama": ("llama", dict(vocab_size=32000, hidden_size=1024, num_hidden_layers=16, num_attention_heads=16,
                            num_key_value_heads=4, intermediate_size=4096)),
    "gemma3": ("gemma3_text", dict(vocab_size=64000, hidden_size=1024, num_hidden_layers=16, num_attention_heads=4,
                                   num_key_value_heads=1, head_dim=256, intermediate_size=4096)),
    "gpt_neox": ("gpt_neox", dict(vocab_size=50304, hidden_size=1024, num_hidden_layers=16, num_attention_heads=8,
                                  intermediate_size=4096)),
}  # fmt: skip


def write_checkpoint(folder: Path, preset: str, shards: int, **changes: int) -> None:
    """Random bfloat16 weights, file by file; nothing but one shard is held."""
    import jax
    import jax.numpy as jnp
    import transformers
    from safetensors.numpy import save_file

    from jaxcomm.converters import FAMILIES
    from jaxcomm.converters.hf import _leaf, abstract_params
    from jaxcomm.converters.values import Values

    kind, values = PRESETS[preset]
    config = transformers.AutoConfig.for_model(kind, **values | changes)
    config.save_pretrained(folder)
    family = FAMILIES[kind]
    ours = family.read(Values(config))
    shapes: dict[str, tuple[int, ...]] = {}
    for path, abstract in jax.tree_util.tree_leaves_with_path(abstract_params(ours)):
        leaf = _leaf(family.layout, family.layout.roots[0], path, abstract.shape)
        shape = leaf.stored.shape(leaf.shape[leaf.numbered :], ours)
        shapes |= {leaf.name(number): shape for number in np.ndindex(leaf.shape[: leaf.numbered])}
    total, rng = sum(map(np.prod, shapes.values())), np.random.default_rng(0)
    where, shard, held, n = {}, {}, 0, 0
    names = list(shapes)
    for name in names:
        shard[name] = (rng.standard_normal(shapes[name], np.float32) * 0.02).astype(jnp.bfloat16)
        held += shard[name].size
        if held >= total / shards * 0.999 or name == names[-1]:
            file = f"model-{n + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, held, n = {}, 0, n + 1
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": int(total) * 2}, "weight_map": where})
    )


def status(field: str) -> int:
    """Bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def worker(side: str, folder: Path, dtype: str, warm: int) -> None:
    if side == "read":
        buffer, start = memoryview(bytearray(2**24)), time.perf_counter()
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        print(json.dumps({"seconds": time.perf_counter() - start}))
        return
    import transformers

    if side == "transformers":
        import torch

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(2)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        touch = lambda model: [p.sum() for p in model.parameters()]
        size = lambda model: sum(p.numel() * p.element_size() for p in model.parameters())
    else:
        import jax
        import jax.numpy as jnp

        from jaxcomm.converters import from_hf

        jnp.ones((1000, 1000)) @ jnp.ones((1000, 1000))
        load = lambda folder: from_hf(folder, getattr(jnp, dtype), unroll=side == "unrolled")
        touch = jax.block_until_ready
        size = lambda model: sum(a.nbytes for a in jax.tree.leaves(model))
    touch(load(folder / "tiny"))
    before, out = status("VmRSS"), {}
    if warm:
        subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({warm}, numpy.uint8)"], check=True)
    for turn in ("first", "again"):
        start = time.perf_counter()
        model = load(folder)
        touch(model)
        out[turn] = time.perf_counter() - start
        out.setdefault("peak", status("VmHWM"))
        out["weights"] = size(model)
        del model
    print(json.dumps(out | {"before": before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--from-host", action="store_true", help="into memory that the machine may have to find first")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, folder, dtype, warm = args.worker
        return worker(side, Path(folder), dtype, int(warm))
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent)
            write_checkpoint(folder, preset, args.shards)
            (folder / "tiny").mkdir()
            write_checkpoint(folder / "tiny", preset, 2, num_hidden_layers=2, hidden_size=128, intermediate_size=256)
            files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            leaf = (
                max(v for k, v in PRESETS[preset][1].items() if k == "intermediate_size")
                * PRESETS[preset][1]["hidden_size"]
            )
            print(
                f"\n{preset} ({PRESETS[preset][0]}): {files / 2**30:.2f} GiB in {len(list(folder.glob('*.safetensors')))} files, the largest matrix of a layer {leaf / 2**20:.1f} M numbers"
            )
            sides = [("read", "")] + [(s, d) for d in args.dtypes for s in ("stacked", "unrolled", "transformers")]
            results: dict[tuple[str, str], list[dict]] = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side in sides:
                    warm = 0 if args.from_host else 4 * files
                    command = [sys.executable, __file__, "--worker", side[0], str(folder), side[1], str(warm)]
                    done = subprocess.run(
                        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
                    )
                    if done.returncode:
                        sys.exit(done.stderr)
                    results[side].append(json.loads(done.stdout.splitlines()[-1]))
            plain = min(r["seconds"] for r in results["read", ""])
            print(f"  reading the files: {plain:.2f} s, {files / plain / 1e9:.1f} GB/s")
            for dtype in args.dtypes:
                best = {
                    s: {t: min(r[t] for r in results[s, dtype]) for t in ("first", "again")}
                    for s, d in sides
                    if d == dtype
                }
                for side, seconds in best.items():
                    run = results[side, dtype][0]
                    beyond = max(r["peak"] - r["before"] - r["weights"] for r in results[side, dtype])
                    said = (
                        f"{turn} {took:5.2f} s ({took / plain:4.1f} x the files', {best['transformers'][turn] / took:4.2f} x transformers' speed)"
                        for turn, took in seconds.items()
                    )
                    print(
                        f"  {dtype:8} {side:12} {', '.join(said)}; weights {run['weights'] / 2**30:.2f} GiB, peak beyond them "
                        f"{beyond / 2**20:5.0f} MiB, peak / files {(run['weights'] + beyond) / files:.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
