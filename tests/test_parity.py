"""The same weights give the same numbers as transformers, at every layer, in every family."""

import copy
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
import transformers

from jaxcomm.converters import from_hf, to_hf
from jaxcomm.language_model import positions_of
from jaxcomm.layers import Block, Surroundings, angles_of, rotary
from jaxcomm.model import unembed
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.reading import hidden_states, prefix

from conftest import ROUNDED, assert_close, prompts, read, write


def load(folder, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if getattr(model.config, "num_experts_per_tok", None) or getattr(model.config, "top_k_experts", None):
        model.set_experts_implementation("eager")
    return model


def wide_delta_rule(monkeypatch, model_type):
    """transformers computes the gated delta rule in float32 in every model: let its own code do it in float64."""
    if model_type != "qwen3_5_text":
        return
    module = transformers.models.qwen3_5.modeling_qwen3_5
    name = "torch_chunk_gated_delta_rule"
    source = inspect.getsource(getattr(module, name)).replace("torch.float32", "torch.float64")
    scope = {**vars(module)}
    exec(source[source.index("def ") :], scope)
    monkeypatch.setattr(module, name, scope[name])


def reference(pair, tokens):
    """Every hidden state (the last one before the final norm, as a hook sees it) and the logits, by transformers.

    In float64: at 700 columns transformers' own float32 is up to 7e-6 away from it, so that two such roundings would need
    twice the bound.
    """
    last, exact = {}, copy.deepcopy(pair.torch).double()
    base = exact.base_model
    blocks = base.h if hasattr(base, "h") else base.layers
    hook = blocks[-1].register_forward_hook(lambda module, inputs, output: last.update(h=output))
    with torch.no_grad():
        out = exact(torch.from_numpy(tokens).long(), output_hidden_states=True)
    hook.remove()
    final = last["h"][0] if isinstance(last["h"], tuple) else last["h"]
    return [*out.hidden_states[:-1], final], out.logits


head = jax.jit(unembed)

STEPS = {
    "attention_norm": ("input_layernorm", "ln_1"),
    "attention": ("self_attn", "attn", "attention"),
    "delta": ("linear_attn",),
    "attention_post_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    "mlp": ("mlp", "block_sparse_moe"),
    "mlp_post_norm": ("post_feedforward_layernorm",),
    "dense_post_norm": ("post_feedforward_layernorm_1",),
    "experts_norm": ("pre_feedforward_layernorm_2",),
    "experts": ("experts",),
    "experts_post_norm": ("post_feedforward_layernorm_2",),
}
"""Names of a block's steps, ours and those transformers has for them; the first that a layer of the family has is meant."""


def test_every_norm_attention_and_mlp_equals_transformers_given_the_same_stream(pair):
    """Each step of each layer from the stream that transformers has there, so that no error hides another."""
    tokens, config = prompts(2, 40), pair.params.config
    exact = copy.deepcopy(pair.torch).double()
    layers = exact.base_model.h if hasattr(exact.base_model, "h") else exact.base_model.layers
    said = [{} for _ in layers]
    first = lambda out: out[0] if isinstance(out, tuple) else out
    for layer, keep in zip(layers, said, strict=True):
        for name, module in layer.named_children():
            module.register_forward_hook(
                lambda module, inputs, out, keep=keep, name=name: keep.update({name: first(out)})
            )
    with torch.no_grad():
        streams = exact(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states

    positions = positions_of(Prompts(tokens))
    tables = rotary(config, positions)
    around = lambda angles, window: Surroundings(1, angles, positions, window)

    @functools.partial(jax.jit, static_argnums=0)
    def block(config, weights, h, angles, positions, window):
        apply = Block(config).apply
        return apply({"params": weights}, h, around(angles, window), capture_intermediates=True)[1]

    for i, (weights, want) in enumerate(zip(pair.params.unroll().blocks, said, strict=True)):
        given = jnp.asarray(streams[i].numpy(), jnp.float32), angles_of(config, tables, i), positions
        window = config.windows[i] or None if config.windows else None
        got = block(config if config.alike else config.layer(i), weights, *given, window)
        steps = [name for name in STEPS if name in got["intermediates"]]
        assert len(steps) == {"before": 4, "after": 4, "both": 6}[config.norms] + 4 * bool(config.dense_ff)
        for step in steps:
            theirs = next(want[name] for name in STEPS[step] if name in want)
            ours = first(got["intermediates"][step]["__call__"][0])
            assert_close(ours, theirs.reshape(ours.shape), f"{pair.name}, layer {i + 1}, {step}")


@pytest.mark.parametrize("columns", [11, 700])
def test_every_hidden_state_and_the_logits_equal_transformers(pair, columns, monkeypatch):
    wide_delta_rule(monkeypatch, pair.torch.config.model_type)
    tokens = prompts(2, columns)
    states, logits = reference(pair, tokens)
    ours = hidden_states(pair.params, tokens)
    for k, state in enumerate(states):
        assert_close(ours[k], state, f"{pair.name}, {columns} columns, h[{k}]", ROUNDED)
    assert_close(head(pair.params, ours[-1]), logits, f"{pair.name}, {columns} columns, logits", ROUNDED)


def test_32_greedy_tokens_equal_transformers_also_for_unequal_left_padded_prompts(pair):
    rows = [prompts(1, n, seed=n)[0].tolist() for n in (5, 19, 12)]
    ours = np.asarray(write(pair.params, left_pad(rows, 24), max_new_tokens=32).tokens)
    for row, prompt in zip(ours, rows, strict=True):
        want = pair.torch.generate(
            torch.tensor([prompt]),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert row.tolist() == want.tolist()


def test_to_hf_then_transformers_gives_the_same_logits(pair, tmp_path):
    out = to_hf(pair.params, tmp_path / "out", family=pair.torch.config.model_type)
    again = load(out, torch.float32)
    tokens = prompts(2, 33)
    with torch.no_grad():
        theirs = again(torch.from_numpy(tokens).long()).logits
        first = pair.torch(torch.from_numpy(tokens).long()).logits
    assert_close(theirs, first, f"{pair.name} after a round trip", tolerance=0.0)
    assert from_hf(out).config == pair.params.config


def log_softmax(logits):
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)


def test_bfloat16_is_as_close_to_float32_as_transformers_own(pair):
    """Casts in the wrong places would make it worse: argmax agreement with the float32 model and mean KL to it, ours against theirs."""
    tokens = prompts(2, 64)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), pair.params)
    assert read(half, tokens).dtype == jnp.float32 and prefix(half, tokens, 2).dtype == jnp.bfloat16
    exact = np.asarray(log_softmax(read(pair.params, tokens)))
    theirs = load(pair.folder, torch.bfloat16)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.float().numpy()

    def divergence(logits):
        return float(np.mean(np.sum(np.exp(exact) * (exact - log_softmax(logits)), axis=-1)))

    agreement = lambda logits: float(np.mean(np.argmax(logits, -1) == np.argmax(exact, -1)))
    mine = np.asarray(read(half, tokens))
    assert agreement(mine) >= agreement(logits) - 0.04, (
        f"{agreement(mine)} same argmax, transformers {agreement(logits)}"
    )
    ours, other = divergence(mine), divergence(logits)
    assert ours <= 1.2 * other + 1e-5, f"{pair.name}: {ours:.2e} nats per token, transformers {other:.2e}"
