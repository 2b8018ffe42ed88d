"""Protocols side by side on the embedded pair, and a single model beside lm-evaluation-harness' own `hf` backend.

python benchmarks/protocols.py            # about ten minutes on two cores
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from jaxcomm.converters import load_agent
from jaxcomm.evals.evaluation.arms import Arm, Team
from jaxcomm.evals.evaluation.run import run
from jaxcomm.evals.evaluation.settings import EvalSettings
from jaxcomm.evals.harness import Decoding, ProtocolLM
from jaxcomm.evals.pair import folder
from jaxcomm.evals.pair.text import statements
from jaxcomm.evals.runs import RunFolder
from jaxcomm.protocols.base import start_turn

THREADS, BATCH, ROUNDS = 2, 8, 3
SHAPE = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048,
    vocab_size=32000, max_position_embeddings=2048,
)  # fmt: skip


def checkpoint(path: Path) -> Path:
    """Random weights, float32, with the embedded pair's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder("b")).save_pretrained(path)
    return path


def texts(words: int, seed: int):
    """Endless texts of about so many words."""
    source = statements("tip_sheets", seed)
    while True:
        text = ""
        while len(text.split()) < words:
            text += next(source) + " "
        yield " ".join(text.split()[:words])


def requests(kind: str, seed: int) -> list[Instance]:
    """What the harness would ask; no two rounds ask the same."""
    short, question = texts(15, 10 * seed + 1), texts(60, 10 * seed + 2)
    made: list[tuple[str, tuple]] = []
    if kind.startswith("choices"):
        shots = next(texts(250, 10 * seed + 3))
        for n in range(32):
            before = shots if "few-shot" in kind else next(texts(250, 1000 * seed + n))
            asked = f"{before} {next(question)}"
            made += [("loglikelihood", (asked, f" {letter}")) for letter in "ABCD"]
    if kind == "endings":
        made = [
            ("loglikelihood", (asked, f" {next(short)}"))
            for _ in range(32)
            for asked in [next(question)]
            for _ in "ABCD"
        ]
    if kind == "writing":
        how = {"until": ["Question:"], "max_gen_toks": 48, "do_sample": False}
        made = [("generate_until", (f"{next(question)} {next(question)}", how)) for _ in range(16)]
    if kind == "rolling":
        long = texts(250, 10 * seed + 4)
        made = [("loglikelihood_rolling", (next(long),)) for _ in range(16)]
    return [
        Instance(request_type=method, doc={}, arguments=args, idx=n, metadata=(kind, n // 4, 1))  # pyright: ignore[reportArgumentType]
        for n, (method, args) in enumerate(made)
    ]


KINDS = {
    "choices, few-shot": "4 letters after a question of 60 words, the same 250 words of examples before all",
    "choices": "the same, other words before each",
    "endings": "4 endings of 15 words after a question of 60",
    "writing": "48 tokens after 120 words",
    "rolling": "perplexity of 250 words",
}


def products(size: int = 2048) -> float:
    """FLOP/s of a large matrix product in float32: the best of twelve."""
    square = jax.random.normal(jax.random.key(0), (size, size))
    multiply, seconds = jax.jit(jnp.matmul), []
    for _ in range(13):
        start = time.perf_counter()
        multiply(square, square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def timed(lm: Any, asked: list[Instance]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = getattr(lm, asked[0].request_type)(asked)
    return time.perf_counter() - start, found


def beside_hf(path: Path, show: Callable[[str], None]) -> None:
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=BATCH)
    b = load_agent(path, name="b")
    peak = products()
    show(
        f"\nOne model, {SHAPE['num_hidden_layers']} layers, width {SHAPE['hidden_size']}, vocabulary {SHAPE['vocab_size']}, float32, batch {BATCH}, {THREADS} threads: requests per second, median of {ROUNDS} rounds side by side"
    )
    show(
        f"Shares are of the speed of a large matrix product here, {peak / 1e9:.0f} GFLOP/s, counting for each context what it needs when it is read once, alone"
    )
    show(
        f"{'':20} {'hf':>8} {'ours':>8} {'ratio':>7} {'share hf':>9} {'ours':>6}   first round with compiling   largest difference"
    )
    for kind, says in KINDS.items():
        seconds: dict[str, list[float]] = {"hf": [], "ours": []}
        worst = 0.0
        for n in range(ROUNDS + 1):
            asked = requests(kind, n)
            hf, want = timed(theirs, asked)
            arm = Arm("single", (b,), lambda batch: start_turn(batch.agents[-1], batch.prompts_b), alone=True)
            with tempfile.TemporaryDirectory() as out:
                run = RunFolder(Path(out), {}, dict, command="", resume=False)
                lm = ProtocolLM(arm, run, Decoding(batch_size=BATCH))
                ours, got = timed(lm, asked)
            if kind == "writing":
                worst = max(worst, sum(x != y for x, y in zip(got, want, strict=True)))
            else:
                flat = lambda found: np.array([x[0] if isinstance(x, tuple) else x for x in found])
                worst = max(worst, float(np.max(np.abs(flat(got) - flat(want)))))
            seconds["hf"].append(hf)
            seconds["ours"].append(ours)
        rate = {side: len(asked) / statistics.median(own[1:]) for side, own in seconds.items()}
        needed = sum(record["flops"] for records in lm.records.values() for record in records) / len(asked)
        share = {side: needed * own / peak for side, own in rate.items()}
        first = seconds["hf"][0] / seconds["ours"][0]
        told = f"{worst:.0f} texts differ" if kind == "writing" else f"{worst:.1e}"
        show(
            f"{kind:20} {rate['hf']:8.2f} {rate['ours']:8.2f} {rate['ours'] / rate['hf']:6.2f}x {share['hf']:9.0%} {share['ours']:6.0%} {first:20.2f}x   {told:>24}   ({says})"
        )


def protocols(show: Callable[[str], None]) -> None:
    """The embedded pair, b with itself, on Countries; the second of two runs, so nothing is compiled in it."""
    b = load_agent(folder("b"), name="b")
    asked = EvalSettings(
        tasks=("countries", "countries_choice"), k=(4,), j=1, temperatures=(0.1, 0.4), form="plain",
        tell="{message} {prompt}", max_message_tokens=24, controls=("zero",),
        protocols=("single", "skyline", "message", "debate", "cipher", "activation", "exchange"),
    )  # fmt: skip
    for seed in (1, 0):
        with tempfile.TemporaryDirectory() as out:
            how = dict(resume=False, command="", recorded={})
            lines = run(dataclasses.replace(asked, seed=seed), Team(b, b), Path(out) / "run", **how)
    show("\nProtocols, b with itself, 100 questions of Countries (written, and chosen from four by likelihood):")
    show(f"{'':18} {'task':18} {'% right':>8} {'MFLOPs / question':>18} {'ms / question':>14} {'of single':>10}")
    alone = {line["task"]: line["seconds"] for line in lines if line["protocol"] == "single"}
    for line in lines:
        ms = 1000 * line["seconds"] / line["n"]
        ratio = line["seconds"] / alone[line["task"]]
        show(
            f"{line['protocol']:18} {line['task']:18} {100 * line['value']:8.0f} {line['flops'] / 1e6:18.0f} {ms:14.2f} {ratio:9.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".txt"))
    out = parser.parse_args().out
    torch.set_num_threads(THREADS)
    transformers.utils.logging.set_verbosity_error()
    lines = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    show(f"{os.cpu_count()} cores, {platform.machine()}, {', '.join(f'{k} {v}' for k, v in versions.items())}")
    with tempfile.TemporaryDirectory() as path:
        beside_hf(checkpoint(Path(path)), show)
    protocols(show)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
