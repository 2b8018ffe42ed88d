"""States sent from any site and taken at any other: what is sent, where it goes, its files, which models take it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import jaxcomm as jc

from conftest import assert_close, make_checkpoint, refused
from hooks import PADDED, POSITIONS, ROWS, at, exact_of, numbers, on, sites_at


def test_send_takes_what_run_with_cache_reads(llama):
    for site in sites_at(exact_of(llama), 1, list(jc.SITES), layer=lambda n: 1 + n % 4)[::2]:
        message = jc.send(llama.params, PADDED, site)
        np.testing.assert_array_equal(message.states, jc.run_with_cache(llama.params, PADDED, sites=site)[1][site.name])
        if message.valid is not None:
            want = [len(numbers(site.positions, row, len(tokens))) for row, tokens in enumerate(ROWS)]
            assert np.asarray(message.valid).sum(axis=1).tolist() == want


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (slice(1, 4), slice(-4, None)), (POSITIONS[10], "all"), ("all", POSITIONS[10]), ([0, 2, 1], "last"), (2, "last"),
        (2, "all"),
    ],
)  # fmt: skip
def test_a_message_goes_to_the_ends_of_what_the_receiver_chose(llama, source, target):
    """The last tokens of the message meet the last ones that are chosen, the rest stays; one token's goes to each of them."""
    exact, sent, got = exact_of(llama), jc.Site("mlp_out", 1, source), jc.Site("resid_mid", 3, target)
    logits = jc.forward(llama.params, PADDED, edits=[jc.receive(jc.send(llama.params, PADDED, sent), got)])
    for row, tokens in enumerate(ROWS):
        n = len(tokens)
        taken = on(exact.read(tokens, ["mlp_out"])["mlp_out", 1][numbers(source, row, n)])

        def put(s, taken=taken):
            taken = taken.expand(s.shape) if isinstance(source, int) else taken
            m = min(len(s), len(taken))
            return torch.cat([s[: len(s) - m], taken[len(taken) - m :]])

        assert_close(logits[row, -n:], exact.logits(tokens, [at(got, row, n, put)]), f"row {row}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "site",
    [
        jc.Site("resid_post", 0, 3), jc.Site("k", 3, POSITIONS[10], 1), jc.Site("q", 1, POSITIONS[9]),
        jc.Site("embed", positions=[0, -1]), jc.Site("logits", positions="last"), jc.Site("v", 2, slice(1, None)),
        jc.Site("z", 2, "all", (1, 0)),
        jc.Site("z", 2, [np.int64(1), -1]),
    ],
)  # fmt: skip
def test_messages_survive_a_file_bit_for_bit(llama, tmp_path, site, dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), llama.params)
    message = jc.send(params, PADDED, site).replace(note="was gesagt wurde: ä")
    message.save(tmp_path / "message")
    again = jc.Message.load(tmp_path / "message")
    assert [path.name for path in tmp_path.iterdir()] == ["message"], "nothing is left behind"
    assert (again.sender, again.note, repr(again)) == (message.sender, message.note, repr(message)) and again.sender
    for got, want in ((again.states, message.states), (again.valid, message.valid)):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes() or got is want is None
    np.testing.assert_equal(again.site.positions, site.positions)
    assert (again.site.name, again.site.layer, again.site.heads) == (site.name, site.layer, site.heads)
    logits = [jc.forward(params, PADDED, edits=[jc.receive(m, site)]) for m in (again, message)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("about", ["{", "[1]", "{}", None])
def test_a_foreign_file_is_one_clear_line(tmp_path, about):
    metadata = {"format": "pt"} if about is None else {"format": "jaxcomm.message.1", "about": about}
    safetensors.numpy.save_file({"states": np.ones((2, 3))}, tmp_path / "message", metadata=metadata)
    refused(lambda: jc.Message.load(tmp_path / "message"), "is not a message (jaxcomm.message.1)")


def test_a_damaged_file_is_one_clear_line(llama, tmp_path):
    path = tmp_path / "message"
    jc.send(llama.params, PADDED, 2).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no message", whole[:9], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        refused(lambda: jc.Message.load(path), f"{path} is not a whole safetensors file")


def test_another_model_takes_a_message_through_a_map_or_from_nobody(llama, wide, tmp_path_factory):
    other = make_checkpoint(tmp_path_factory.mktemp("other"), "llama", seed=9).params
    message = jc.send(llama.params, PADDED, 2)
    forward = lambda params, *how: jc.forward(params, PADDED, edits=[jc.receive(*how)])
    same = jax.tree.map(lambda a: a + 0, llama.params).unroll()
    assert_close(forward(same, message, 3), forward(llama.params, message, 3), "the same weights", 1e-6)
    for params in (other, wide.params):
        for call in (jc.forward, jc.generate, jc.prefill):
            says = f"this message of width 48 is from model {message.sender}, the receiver is"
            refused(lambda call=call, params=params: call(params, PADDED, edits=[jc.receive(message, 3)]), says)
        W = jax.random.normal(jax.random.key(0), (params.config.width, 48))
        got = forward(params, message, jc.Site("resid_post", 3, "last"), jc.Graft(W=W))
        assert_close(got, forward(params, message.states @ W.T, 3), "W a", 1e-4)
        assert np.isfinite(forward(params, message.anonymous(), 3)).all()
