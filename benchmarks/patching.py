"""Activation patching on SmolLM2-135M beside a loop of PyTorch forward hooks on transformers, in one run.

Clean and corrupted prompts of one length, the residual stream after every layer at every position (indirect object
identification, Wang et al. 2023): the log-probability of the right name, clean activation in the corrupted run. The loop reads
the corrupted prompts again for every cell, in one batch, as a careful user writes it; after one layer to warm up it runs once,
whole. Ours is one call, its first (compiling) and its second. Needs `make .venv/.real`.
"""

from __future__ import annotations

import os
import platform
import time

import jax
import numpy as np
import torch
import transformers

import jaxcomm as jc
from jaxcomm.converters.hub import locate

NAMES = (("Mary", "John"), ("Anna", "Paul"), ("Lucy", "Mark"), ("Jane", "Tom"))
TEXT = "When {0} and {1} went to the store, {2} gave a drink to"


def hook_loop(model, clean: np.ndarray, corrupted: np.ndarray, answers: np.ndarray, layers: list[int]) -> np.ndarray:
    """Log-probabilities [layers, positions, games] of the answers."""
    clean, corrupted, answers = (torch.from_numpy(x).long() for x in (clean, corrupted, answers))
    with torch.no_grad():
        states = model(clean, output_hidden_states=True).hidden_states
        found = np.zeros((len(layers), clean.shape[1], len(clean)), np.float32)
        for i, layer in enumerate(layers):
            for position in range(clean.shape[1]):

                def put(module, inputs, output, layer=layer, position=position):
                    h = (output[0] if isinstance(output, tuple) else output).clone()
                    h[:, position] = states[layer][:, position]
                    return (h, *output[1:]) if isinstance(output, tuple) else h

                hook = model.model.layers[layer - 1].register_forward_hook(put)
                logits = model(corrupted, logits_to_keep=1).logits[:, -1]
                hook.remove()
                found[i, position] = torch.log_softmax(logits, -1).gather(1, answers)[:, 0]
    return found


def main() -> None:
    agent = jc.load_agent("real:smollm2")
    texts = [TEXT.format(a, b, b) for a, b in NAMES]
    others = [TEXT.format(a, b, a) for a, b in NAMES]
    clean, corrupted = (np.array([agent.encode(text) for text in x], np.int32) for x in (texts, others))
    answers = agent.spell(texts, [a for a, _ in NAMES])
    assert clean.shape == corrupted.shape and answers.shape[1] == 1
    layers = list(range(1, agent.params.config.layers + 1))

    def ours() -> tuple[float, jc.Patching]:
        start = time.perf_counter()
        found = jc.patch(agent.params, agent.params, clean, corrupted, answers, layers=layers)
        return time.perf_counter() - start, found

    (first, found), (again, _) = ours(), ours()
    file = locate("real:smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    hook_loop(model, clean, corrupted, answers, layers[:1])
    start = time.perf_counter()
    # After the last layer the loop's stream is behind the final norm, so that layer's cells are compared up to it only.
    theirs = hook_loop(model, clean, corrupted, answers, layers)
    loop = time.perf_counter() - start
    apart = np.abs(theirs - found.logprobs[0, ..., 0])[:-1].max()
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, float32"
    )
    print(
        f"patching, {len(texts)} games of {clean.shape[1]} tokens, {len(layers)} layers x {clean.shape[1]} positions: {again:.1f} s, "
        f"its first call, compiling included, {first:.1f} s; hook loop {loop:.0f} s: "
        f"{loop / again:.1f} times, {loop / first:.1f} with compiling; log-probabilities within {apart:.1e} up to the last layer but one"
    )
    best = np.unravel_index(found.logprobs[0, ..., 0].mean(axis=-1).argmax(), found.logprobs.shape[1:3])
    print(f"most of the right name comes back at layer {found.layers[best[0]]}, position {found.positions[best[1]]}")


if __name__ == "__main__":
    main()
