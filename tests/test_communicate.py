"""Activation communication against an oracle with forward hooks, and its promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.communication import communicate, communicate_logits, read_prompt, resume
from jaxcomm.decoding import decode
from jaxcomm.edits import GRAFTS, Graft, apply_graft
from jaxcomm.messages import receive, send
from jaxcomm.prompts import left_pad
from jaxcomm.reading import prefill
from jaxcomm.sites import Site

from conftest import assert_close, prompts, talk, write

TORCH_GRAFTS = {"sum": lambda a, b: a + b, "mean": lambda a, b: (a + b) / 2, "replace": lambda a, b: a}


def block_hook(model, layer, hook):
    """Calls hook(stream) on h[layer]; what it returns, if anything, becomes the stream. Layer 0 is the embedding."""
    if layer == 0:
        return model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: hook(output))

    def outer(module, inputs, output):
        changed = hook(output[0] if isinstance(output, tuple) else output)
        return None if changed is None else ((changed, *output[1:]) if isinstance(output, tuple) else changed)

    return model.model.layers[layer - 1].register_forward_hook(outer)


def oracle(a, b, prompt_a, prompt_b, k, j, graft, steps, where="last"):
    """The method as a PyTorch user writes it: hooks on transformers models, no cache, the edit made again in every pass."""
    box = {}
    hook = block_hook(a.torch, k, lambda h: box.update(h=h.detach()))
    with torch.no_grad():
        a.torch(torch.tensor([prompt_a]))
    hook.remove()
    message, last = box["h"][0], len(prompt_b) - 1

    def edit(h):
        h = h.clone()
        d = min(message.shape[-1], h.shape[-1])
        if where == "last":
            h[0, last, -d:] = TORCH_GRAFTS[graft](message[-1, -d:], h[0, last, -d:])
        else:
            n = min(len(message), len(prompt_b))
            h[0, last + 1 - n : last + 1] += message[-n:]
        return h

    hook, text = block_hook(b.torch, j, edit), list(prompt_b)
    with torch.no_grad():
        for _ in range(steps):
            text.append(int(b.torch(torch.tensor([text])).logits[0, -1].argmax()))
    hook.remove()
    return text[len(prompt_b) :]


@pytest.mark.parametrize("widths", ["same", "narrow to wide", "wide to narrow"])
def test_every_layer_pair_and_graft_equals_forward_hooks_on_transformers(llama, wide, widths):
    a, b = {"same": (llama, llama), "narrow to wide": (llama, wide), "wide to narrow": (wide, llama)}[widths]
    rows_a = [prompts(1, n, seed=n)[0].tolist() for n in (6, 11)]
    rows_b = [prompts(1, n, seed=n)[0].tolist() for n in (9, 4)]
    pa, pb = left_pad(rows_a, 16), left_pad(rows_b, 16)
    for graft in GRAFTS:
        for k in range(a.params.config.layers + 1):
            for j in range(b.params.config.layers + 1):
                ours = talk(a.params, b.params, pa, pb, k=k, j=j, graft=graft, max_new_tokens=4)
                want = [oracle(a, b, x, y, k, j, graft, 4) for x, y in zip(rows_a, rows_b, strict=True)]
                assert ours.tokens.tolist() == want, f"{widths}, {graft}, k = {k}, j = {j}"


def test_all_tokens_equals_forward_hooks_on_transformers(llama):
    rows_a = [prompts(1, n, seed=n)[0].tolist() for n in (6, 11)]
    rows_b = [prompts(1, n, seed=n)[0].tolist() for n in (9, 4)]
    pa, pb = left_pad(rows_a, 16), left_pad(rows_b, 12)
    for k, j in ((0, 0), (2, 1), (1, 3), (4, 4)):
        ours = talk(
            llama.params,
            llama.params,
            pa,
            pb,
            k=Site("resid_post", k),
            j=Site("resid_post", j),
            graft="sum",
            max_new_tokens=4,
        )
        want = [oracle(llama, llama, x, y, k, j, "sum", 4, "all") for x, y in zip(rows_a, rows_b, strict=True)]
        assert ours.tokens.tolist() == want, f"k = {k}, j = {j}"


def test_one_program_serves_every_layer_pair_and_equals_the_one_made_for_it(llama):
    tokens, traces = prompts(2, 8), []

    def counted(params, k, j):
        traces.append((k, j))
        return communicate(params, params, tokens, tokens[::-1].copy(), k=k, j=j, max_new_tokens=3).tokens

    for params in (llama.params, llama.params.unroll()):
        traced, made_for_it = jax.jit(counted), jax.jit(counted, static_argnums=(1, 2))
        traces.clear()
        every = {(k, j): traced(params, k, j) for k in range(5) for j in range(5)}
        assert len(traces) == 1
        for cell in ((0, 0), (2, 3), (4, 1), (1, 4)):
            np.testing.assert_array_equal(every[cell], made_for_it(params, *cell))


def test_replacing_b_by_itself_is_plain_generation_bit_for_bit(kind):
    padded = left_pad([prompts(1, n, seed=n)[0].tolist() for n in (5, 12)], 16)
    want = write(kind.params, padded, max_new_tokens=8)
    for k in range(kind.params.config.layers + 1):
        got = talk(kind.params, kind.params, padded, padded, k=k, j=k, max_new_tokens=8)
        if kind.params.config.alike:
            jax.tree.map(np.testing.assert_array_equal, got, want)
        else:  # unrolled, as in every family: the last block is compiled for one token here, and there for all of them
            np.testing.assert_array_equal(got.tokens, want.tokens)
            assert_close(got.logprobs, want.logprobs, f"k = {k}", 1e-6)


def test_vmap_over_games_equals_a_loop(llama, wide):
    ta, tb = prompts(6, 7).reshape(3, 2, 7), prompts(6, 9, seed=1).reshape(3, 2, 9)
    settings = dict(k=2, j=3, max_new_tokens=4)
    together = jax.jit(jax.vmap(functools.partial(communicate, llama.params, wide.params, **settings)))(ta, tb)
    for g in range(3):
        np.testing.assert_array_equal(
            together.tokens[g], talk(llama.params, wide.params, ta[g], tb[g], **settings).tokens
        )


def test_teacher_forced_logits_foresee_what_communicate_says(llama, wide):
    pa, pb = left_pad([[5, 6, 7], [8]], 4), left_pad([[1, 2], [3, 4, 5]], 4)
    for graft, where, b, k, j in (
        ("replace", "last", wide, 2, 3),
        ("mean", "last", llama, 1, 4),
        ("sum", "all", llama, 3, 2),
    ):
        how = dict(k=Site("resid_post", k, where), j=Site("resid_post", j, where), graft=graft)
        said = talk(llama.params, b.params, pa, pb, max_new_tokens=6, **how)
        foresee = jax.jit(functools.partial(communicate_logits, **how))
        logits = jax.nn.log_softmax(foresee(llama.params, b.params, pa, pb, said.tokens))
        np.testing.assert_array_equal(jnp.argmax(logits, -1), said.tokens)
        assert_close(said.logprobs, jnp.take_along_axis(logits, said.tokens[..., None], -1)[..., 0], graft)


def test_gradients_flow_from_bs_loss_to_w_and_to_a_and_are_right(llama, wide):
    ta, tb, answers = prompts(2, 5), prompts(2, 6, seed=1), prompts(2, 3, seed=2)

    def loss(a, W):
        logits = communicate_logits(a, wide.params, ta, tb, answers, k=2, j=2, graft=Graft(W=W))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], -1))

    W = 0.1 * jax.random.normal(jax.random.key(0), (64, 48))
    for a in (llama.params, llama.params.unroll()):
        grad_a, grad_W = jax.jit(jax.grad(loss, argnums=(0, 1)))(a, W)
        value = jax.jit(loss)
        direction = jax.random.normal(jax.random.key(1), W.shape)
        numeric = (value(a, W + 1e-2 * direction) - value(a, W - 1e-2 * direction)) / 2e-2
        assert_close(jnp.vdot(grad_W, direction), numeric, "dloss/dW", tolerance=2e-3)
        size = np.abs(grad_a.stack().blocks["mlp"]["down"]["weight"]).max(axis=(1, 2))
        assert (size[:2] > 0).all(), "blocks 1 .. k of A made the message"
        assert (size[2:] == 0).all(), "blocks above k did not"


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox"], indirect=True)
def test_a_prompt_read_once_goes_on_from_any_edit_as_if_it_were_read_with_it(kind):
    """`read_prompt` then `resume` against `receive`: logits and text, left-padded rows, both layouts, traced j."""
    padded = left_pad([prompts(1, n, seed=n)[0].tolist() for n in (11, 5)])
    for params in (kind.params, kind.params.unroll()):
        message = jax.random.normal(jax.random.key(2), (2, params.config.width))
        prompt = jax.jit(read_prompt)(params, padded)

        @jax.jit
        def shared(params, prompt, message, j):
            logits, cache = resume(params, prompt, apply_graft("mean", message, prompt.states[j]), j)
            return logits, decode(params, logits, cache, past=(prompt.earlier,), max_new_tokens=6)

        @jax.jit
        def whole(params, message, j):
            logits, cache = prefill(params, padded, edits=[receive(message, j, "mean")])
            return logits, decode(params, logits, cache, max_new_tokens=6)

        for j in range(params.config.layers + 1):
            (logits, out), (want, wanted) = shared(params, prompt, message, j), whole(params, message, j)
            assert_close(logits, want, f"j = {j}")
            np.testing.assert_array_equal(out.tokens, wanted.tokens)
            assert_close(out.logprobs, wanted.logprobs, f"log-probabilities, j = {j}")
    with pytest.raises(ValueError, match="j = 9 is out of range"):
        resume(params, prompt, message, 9)


def test_w_maps_the_message_before_the_graft(llama, wide):
    ta, tb = prompts(2, 5), prompts(2, 6, seed=1)
    W = jax.random.normal(jax.random.key(0), (64, 48))
    message = send(llama.params, ta, 3)
    direct, _ = prefill(wide.params, tb, edits=[receive(jnp.einsum("bi,oi->bo", message.states, W), 2, "sum")])
    mapped, _ = prefill(wide.params, tb, edits=[receive(message, 2, Graft("sum", W))])
    assert_close(mapped, direct, "W a")


def test_a_message_is_the_state_transformers_calls_hidden_states_k(llama):
    tokens = prompts(2, 9)
    with torch.no_grad():
        theirs = llama.torch(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    for k in range(llama.params.config.layers):
        assert_close(send(llama.params, tokens, k).states, theirs[k][:, -1], f"k = {k}")


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([*GRAFTS, "callable"]), st.integers(0, 2**31))
def test_unequal_widths_follow_the_papers_rule(da, db, name, seed):
    """Footnote 1, entry by entry: the first D_B - d of b stay, f acts on the last d of both."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, da)).astype(np.float32), rng.normal(size=(2, db)).astype(np.float32)
    graft = (lambda x, y: 3 * x - y) if name == "callable" else name
    f = {**TORCH_GRAFTS, "callable": lambda x, y: 3 * x - y}[name]
    want, d = b.copy(), min(da, db)
    for i in range(1, d + 1):
        want[:, -i] = f(a[:, -i], b[:, -i])
    assert_close(apply_graft(graft, jnp.asarray(a), jnp.asarray(b)), want, name, 1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=9), "k = 9 is out of range"),
        (dict(j=-1), "j = -1 is out of range"),
        (dict(graft="median"), "unknown graft 'median': choose one of sum, mean, replace"),
        (
            dict(k=Site("q", 1, "last"), j=Site("q", 7, "last")),
            "layer 7 is out of range: q of this model has layers 1 to 5",
        ),
        (
            dict(graft=Graft(W=np.zeros((3, 4), np.float32))),
            "W is (3, 4), but maps from width 48 to width 64: it must be (64, 48)",
        ),
        (dict(prompts_b=prompts(3, 5)), "A has 2 prompts, B has 3"),
        (dict(prompts_a=np.zeros((2, 0), np.int32)), "empty prompt"),
        (dict(max_new_tokens=1024), "exceed the model's 1024 positions"),
    ],
)
def test_bad_input_is_one_clear_line(llama, wide, changes, message):
    call = dict(prompts_a=prompts(2, 5), prompts_b=prompts(2, 5), k=1, j=1) | changes
    with pytest.raises(ValueError, match=".*") as error:
        communicate(llama.params, wide.params, **call)
    assert message in str(error.value) and "\n" not in str(error.value)
