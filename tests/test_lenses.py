"""What a message says: logit lens and patchscope equal hooks on transformers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm.lmnet import init_network

from conftest import ROUNDED, assert_close, refused
from hooks import PADDED, ROWS, at, exact_of, on

VOCAB = 97


def vectors(pair, size=3.0, seed=0) -> np.ndarray:
    width = pair.params.config.width
    return (size * np.random.default_rng(seed).normal(size=(len(ROWS), width))).astype(np.float32)


def every(tokens, logprobs) -> np.ndarray:
    """All log-probabilities [.., V], in the order of the vocabulary, of tokens named in the order of their ranks."""
    assert np.all(np.diff(logprobs, axis=-1) <= 0)
    found = np.empty(logprobs.shape)
    np.put_along_axis(found, np.asarray(tokens), np.asarray(logprobs), axis=-1)
    return found


# Against hooks ------------------------------------------------------------------------------------------------------


def head(exact, h) -> np.ndarray:
    """transformers' own final norm and head, in float64."""
    base, config = exact.model.base_model, exact.model.config
    norm = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    with torch.no_grad():
        logits = exact.model.get_output_embeddings()(norm(h))
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return torch.log_softmax(logits, -1).numpy()


def test_the_logit_lens_of_every_layer_is_what_hooks_see(kind):
    exact, message = exact_of(kind), vectors(kind)
    edit = jc.receive(message, 2)
    answers = np.array([5, 96, 0])
    lens = jc.logit_lens(kind.params, PADDED, edits=[edit], count=VOCAB, answers=answers)
    ours = every(lens.tokens, lens.logprobs)
    for row, tokens in enumerate(ROWS):
        seen = {}
        reads = [
            ("resid_post", i, lambda x, i=i, seen=seen: seen.update({i: x[0, -1].clone()}))
            for i in range(exact.layers + 1)
        ]
        put = at(edit.site, row, len(tokens), lambda x, row=row: on(message[row])[None])
        exact.run(tokens, [put, *reads])
        for layer, h in seen.items():
            want = head(exact, h)
            assert_close(ours[row, layer], want, f"layer {layer}, row {row}", ROUNDED)
            assert_close(lens.answer_logprobs[row, layer], want[answers[row]], f"answer, layer {layer}", ROUNDED)
            assert lens.answer_ranks[row, layer] == 1 + (want > want[answers[row]]).sum()


def test_patchscopes_write_what_hooks_write(kind):
    exact, message = exact_of(kind), vectors(kind, 4.0)
    target, site = ROWS[2], jc.Site("resid_post", 2, 3)
    padded = jc.left_pad([target], 16)
    out = jc.patchscope(kind.params, padded, message, at=3, layer=2, max_new_tokens=5)
    for row in range(len(message)):
        written = list(target)
        for step in range(5):
            put = at(site, row, len(written), lambda x, row=row: on(message[row])[None])
            want = torch.log_softmax(torch.tensor(exact.logits(written, [put])[-1]), -1).numpy()
            written.append(int(want.argmax()))
            assert_close(out.logprobs[row, step], want.max(), f"row {row}, token {step}", ROUNDED)
        assert out.tokens[row].tolist() == written[len(target) :]
    assert np.ptp(out.logprobs, axis=0).min() > 1e-4, "the message says nothing"


# What must hold -----------------------------------------------------------------------------------------------------


def test_a_message_that_replaces_is_seen_as_its_sender_sees_it(llama):
    message = jc.send(llama.params, PADDED, 3)
    tokens, logprobs = jc.nearest_tokens(llama.params, message, count=VOCAB)
    np.testing.assert_array_equal(tokens[:, :5], message.nearest(llama.params))
    lens = jc.logit_lens(llama.params, PADDED, edits=[jc.receive(message, 1)], layers=[1], count=VOCAB)
    assert_close(every(lens.tokens[:, 0], lens.logprobs[:, 0]), every(tokens, logprobs), "after layer j")


def test_after_the_last_layer_the_lens_is_the_next_token_and_padding_changes_nothing(llama):
    lens = jc.logit_lens(llama.params, PADDED, count=VOCAB)
    want = jax.nn.log_softmax(jc.forward(llama.params, PADDED)[:, -1])
    ours = every(lens.tokens, lens.logprobs)
    assert_close(ours[:, -1], want, "after the last layer")
    for row, tokens in enumerate(ROWS):
        alone = jc.logit_lens(llama.params, np.array([tokens]), count=VOCAB)
        assert_close(every(alone.tokens, alone.logprobs)[0], ours[row], f"row {row} alone")


def test_a_placeholder_is_a_position_or_a_mask_and_padding_changes_nothing(llama):
    message, target = vectors(llama), np.array([ROWS[2]])
    padded, mask = jc.left_pad([ROWS[2]], 16), (np.arange(16) == 16 - 9 + 3)[None]
    want = jc.patchscope(llama.params, target, message, at=3, layer=2, max_new_tokens=5)
    for place in (3, mask):
        out = jc.patchscope(llama.params, padded, message, at=place, layer=2, max_new_tokens=5)
        assert out.tokens.tolist() == want.tokens.tolist()
        assert_close(out.logprobs, want.logprobs, f"padded, at {place}", ROUNDED)


def test_a_target_prompt_that_gets_its_own_state_goes_on_as_ever(llama):
    prompt = np.array([ROWS[0]])
    want = jc.generate(llama.params, prompt, max_new_tokens=5).tokens
    message = jc.send(llama.params, prompt, jc.Site("resid_post", 2, 4))
    for how in ({}, dict(layer=2), dict(norm=float(message.norms[0]))):
        np.testing.assert_array_equal(
            jc.patchscope(llama.params, prompt, message, at=4, max_new_tokens=5, **how).tokens, want
        )
    scaled = message.replace(states=7 * jnp.asarray(message.states))
    same = jc.patchscope(llama.params, prompt, scaled, at=4, norm=float(message.norms[0]), max_new_tokens=5)
    np.testing.assert_array_equal(same.tokens, want)


def test_the_embedding_names_tokens_by_cosine(llama):
    states, table = vectors(llama), np.asarray(llama.params.embed, np.float64)
    tokens, cosines = jc.nearest_tokens(llama.params, states[:, None], by="embedding", count=VOCAB)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert_close(every(tokens, cosines)[:, 0], unit(states) @ unit(table).T, "cosines")


def test_lenses_go_under_transformations(llama):
    message = jnp.asarray(vectors(llama))

    def surprise(message):
        answers = jnp.array([5, 6, 7])
        lens = jc.logit_lens(llama.params, PADDED, edits=[jc.receive(message, 2)], layers=[4], answers=answers)
        return -lens.answer_logprobs.sum()

    slope = jax.jit(jax.grad(surprise))(message)
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    assert surprise(message - step) < surprise(message) < surprise(message + step)
    each = jax.vmap(lambda m: jc.logit_lens(llama.params, PADDED, edits=[jc.receive(m, 2)], layers=[3]).tokens)
    assert each(jnp.stack([message, -message])).shape == (2, 3, 1, 5)


def test_an_invalid_layer_under_jit_names_no_token(llama):
    lens = jax.jit(lambda j: jc.logit_lens(llama.params, PADDED, edits=[jc.receive(vectors(llama), j)], layers=[4]))(9)
    assert np.all(lens.tokens == -1) and np.all(np.isnan(lens.logprobs))


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: jc.logit_lens(p, PADDED, layers=[5]), "layer 5 is out of range: resid_post of this model has layers 0 to 4"),
        (lambda p: jc.logit_lens(p, PADDED, layers=[2, 2]), "layers name 2 twice"),
        (lambda p: jc.logit_lens(p, PADDED, layers=[]), "layers are empty"),
        (lambda p: jc.logit_lens(p, PADDED, count=0), "count = 0: name at least 1 token, and at most the model's 97"),
        (lambda p: jc.logit_lens(p, PADDED, count=98), "count = 98"),
        (lambda p: jc.logit_lens(p, PADDED, answers=np.array([1])), "answers are (1,) for 3 prompts"),
        (lambda p: jc.logit_lens(p, PADDED, answers=np.array([1, 2, 97])), "answers have token 97"),
        (lambda p: jc.logit_lens(init_network(jax.random.key(0), p), PADDED), "a network has no layers"),
        (lambda p: jc.nearest_tokens(p, np.ones((2, 47), np.float32)), "states of width 47 in a model of width 48"),
        (lambda p: jc.nearest_tokens(p, np.ones((2, 48), np.float32), by="tail"), "unknown by 'tail': choose head or embedding"),
        (lambda p: jc.nearest_tokens(p, jc.Message(text=("hello",))), "this message holds text"),
        (lambda p: jc.nearest_tokens(p, jc.send(p, PADDED, 2).replace(sender="another")), "is from model another"),
        (lambda p: jc.patchscope(p, PADDED, jc.send(p, PADDED, 2), at=1), "the target prompt has 3 rows: give one"),
        (lambda p: jc.patchscope(p, PADDED.tokens[:1], np.ones((2, 48), np.float32), at=1), "give layer="),
        (lambda p: jc.patchscope(p, PADDED.tokens[:1], jc.send(p, PADDED, 2), at=1, layer=5), "layer 5 is out of range"),
        (lambda p: jc.patchscope(p, PADDED.tokens[:1], jc.send(p, PADDED, 2), at=14), "position 14 is out of range"),
        (lambda p: jc.patchscope(p, PADDED.tokens[:1], jc.send(p, PADDED, 2), at=1, norm=0), "norm = 0: a state is scaled"),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_refused_in_one_line(llama, call, says):
    refused(lambda: call(llama.params), says)


@pytest.mark.parametrize(
    ("target", "placeholder", "says"),
    [
        (
            "Bob is at y.",
            "x",
            "the placeholder 'x' occurs 0 times in the target prompt 'Bob is at y.': name a word that",
        ),
        ("x is as x is", "x", "the placeholder 'x' occurs 2 times"),
        ("Bob is at the Louvre.", "Louv", "'Louv' begins or ends within the token ' Louvre'"),
        ("Bob is here.", "", "the placeholder '' occurs 13 times"),
    ],
)
def test_a_placeholder_is_a_word_that_occurs_once(b, target, placeholder, says):
    message = jc.send(b.params, b.tokenize(["Bob is at the Louvre."]), 3)
    refused(lambda: b.patchscope(message, target, placeholder), says)
