"""A model with linear attention (the shape of Qwen 3.5 0.8B, 8 of its 24 layers, a small vocabulary), compared with transformers.

    make bench-linear-attention, or: python benchmarks/linear_attention.py

Random weights, float32, the same threads. Reading 64, 512 and 2048 tokens, writing 32 tokens after 512. transformers runs its
PyTorch code, since the kernels it prefers need a GPU. The sides take turns; the fastest of each counts. Then the rule alone, with
several sizes of a chunk.
"""

from __future__ import annotations

import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

import jaxcomm as jc
from jaxcomm import linear_attention

TURNS = 3
CONFIG = dict(
    vocab_size=4096, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, max_position_embeddings=4096,
    tie_word_embeddings=True,
)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    first = seconds(ours), seconds(theirs)
    times = np.min([[seconds(ours), seconds(theirs)] for _ in range(TURNS)], axis=0)
    print(
        f"{title:24} jaxcomm {times[0]:7.3f} s (first {first[0]:5.1f}), transformers {times[1]:7.3f} s: "
        f"{times[1] / times[0]:.2f} times as fast",
        flush=True,
    )


def models() -> tuple[jc.Params, transformers.PreTrainedModel]:
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return jc.from_hf(folder), model


def rule() -> None:
    """The rule alone: 512 tokens, 16 heads of 128 x 128."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, k, v = (draw(1, 512, 16, 128) for _ in "qkv")
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    given = draw(1, 16, 128, 128), q, k, v, -abs(draw(1, 512, 16)), rng.random((1, 512, 16)).astype(np.float32)
    default = linear_attention.CHUNK
    for size in (1, 16, 32, 64, 128, 256):
        linear_attention.CHUNK = size
        run = jax.jit(lambda *x: linear_attention.delta_rule(*x))
        seconds(lambda run=run: run(*given))
        best = min(seconds(lambda run=run: run(*given)) for _ in range(TURNS))
        print(f"rule, chunks of {size:3}        {1000 * best:7.1f} ms{' (used)' * (size == default)}", flush=True)
    linear_attention.CHUNK = default


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    print(f"jax {jax.__version__}, torch {torch.__version__}, {platform.machine()}, {threads} threads, float32")
    params, model = models()
    tokens = lambda n: np.random.default_rng(n).integers(3, 4096, (1, n)).astype(np.int32)
    with torch.no_grad():
        for n in (64, 512, 2048):
            ids = tokens(n)
            theirs = functools.partial(model, torch.from_numpy(ids).long(), logits_to_keep=1, use_cache=False)
            compare(
                f"read 1 x {n}", lambda ids=ids: jc.prefill(params, ids)[0], lambda run=theirs: np.asarray(run().logits)
            )
        ids = tokens(512)
        write = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None)
        compare(
            "write 32 after 1 x 512",
            lambda: jc.generate(params, ids, max_new_tokens=32).tokens,
            lambda: model.generate(torch.from_numpy(ids).long(), **write).numpy(),
        )
    rule()


if __name__ == "__main__":
    main()
