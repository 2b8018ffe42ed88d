"""Latent thoughts, step by step as transformers reads them in float64, one prompt at a time, without padding."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm.latents import realignment

from conftest import assert_close, prompts, refused

TOLD = [prompts(1, n, seed=n)[0].tolist() for n in (13, 6, 9)]
WRITES = jc.left_pad(TOLD, 16)


def final_state(model, read):
    """The state after the final norm at the last position, and its logits, of what is read [T, D]."""
    box, base = {}, model.base_model
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    handle = norm.register_forward_hook(lambda module, args, out: box.update(h=out[0, -1]))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.stack(read)[None], use_cache=False).logits[0, -1]
    handle.remove()
    return box["h"], logits


def matrices(model):
    """The embedding matrix as rows are read, before a family scales them, and the head's."""
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def rollout(model, tokens, steps, thought):
    """LatentMAS, section 3.1, in plain PyTorch."""
    E, U = matrices(model)
    W = torch.linalg.solve(U.T @ U + 1e-5 * torch.eye(U.shape[1], dtype=U.dtype), U.T @ E)
    # transformers scales embeddings inside the table (gemma 3), so what is read in their place is scaled by hand.
    scale = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
    norm, vectors = E.norm(dim=-1).mean(), []
    read = list(model.get_input_embeddings()(torch.tensor(tokens)).detach())
    h, logits = final_state(model, read)
    for _ in range(steps):
        if thought == "soft":
            e = torch.softmax(logits, dim=-1) @ E
        else:
            e = h @ W if thought == "aligned" else h
            e = e * norm / e.norm()
        vectors.append(e.numpy())
        read.append(e * scale)
        h, logits = final_state(model, read)
    return np.array(vectors), logits.numpy()


@pytest.mark.parametrize("thought", ["aligned", "identity", "soft"])
def test_thoughts_are_those_of_transformers(kind, thought):
    model = copy.deepcopy(kind.torch).double()
    thoughts = jc.think(kind.params, WRITES, steps=5, thought=thought)
    for row, tokens in enumerate(TOLD):
        vectors, logits = rollout(model, tokens, 5, thought)
        assert_close(thoughts.vectors[row], vectors, f"row {row}", 2e-3)
        assert_close(thoughts.logits[row], logits, f"row {row}", 2e-3)


def test_without_a_step_a_model_has_only_read(kind):
    thoughts = jc.think(kind.params, WRITES, steps=0)
    logits, cache = jc.prefill(kind.params, WRITES)
    assert_close(thoughts.logits, logits, "logits", 1e-5)
    assert thoughts.vectors.shape == (3, 0, kind.params.config.width)
    assert np.array_equal(thoughts.cache.positions, cache.positions)
    for ours, theirs in zip(jax.tree.leaves(thoughts.cache.k), jax.tree.leaves(cache.k), strict=True):
        assert_close(ours, theirs, "keys", 1e-5)


def test_what_follows_thoughts_has_read_them(llama):
    """As if the vectors had stood in the prompt."""
    thoughts = jc.think(llama.params, WRITES, steps=4)
    asked = jc.left_pad([[5, 6, 7], [8, 9], [1, 2, 3]])
    got, _ = jc.prefill(llama.params, asked, past=[thoughts.cache])
    told = jc.receive_cache(jc.send_cache(llama.params, WRITES), llama.params)
    _, read = jc.prefill(llama.params, thoughts.vectors, past=[told])
    want, _ = jc.prefill(llama.params, asked, past=[told, read])
    assert_close(got, want, "logits", 1e-4)
    assert thoughts.message().bytes == 3 * 4 * llama.params.config.width * 4


def test_tied_embeddings_are_nearly_aligned_already(kind):
    W = np.asarray(realignment(kind.params))
    if kind.params.head is None:
        assert np.abs(W - np.eye(len(W))).max() < 1e-3
    else:
        assert np.abs(W - np.eye(len(W))).max() > 1e-1


def test_a_row_thinks_the_same_beside_longer_ones(llama):
    alone = jc.think(llama.params, jnp.array([TOLD[1]]), steps=6)
    beside = jc.think(llama.params, WRITES, steps=6)
    assert_close(beside.vectors[1:2], alone.vectors, "vectors", 1e-4)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: jc.think(m, WRITES, steps=-1), "steps = -1: a model thinks for 0 steps or more"),
        (
            lambda m: jc.think(m, WRITES, steps=1, thought="loud"),
            "unknown thought 'loud': choose aligned, identity or soft",
        ),
        (lambda m: jc.think(m, WRITES, steps=1020), "exceed the model's 1024 positions"),
    ],
)
def test_bad_input_is_one_clear_line(llama, call, says, unchecked):
    refused(lambda: call(llama.params), says)
