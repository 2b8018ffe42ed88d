"""Messages of every kind: keys and values, text and embeddings beside states, what they weigh, who takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm.cipher import Mixing, cipher
from jaxcomm.communication import read_prompt
from jaxcomm.protocols import (
    Conversation,
    Grafting,
    activation,
    message,
    read_receiver,
    receive_states,
    receive_text,
    send_states,
    send_text,
)

from conftest import assert_close, make_checkpoint, prompts, refused

TOLD = [prompts(1, n, seed=n)[0].tolist() for n in (13, 6, 9)]
ASKED = [prompts(1, n, seed=10 * n)[0].tolist() for n in (2, 7, 4)]
WRITES = jc.left_pad(TOLD, 16)
READS = jc.left_pad(ASKED, 8)


# Keys and values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_who_takes_keys_and_values_goes_on_as_if_it_had_read_the_prompt(kind, layout, tmp_path):
    """transformers reads both texts, one after the other; here the sender's part comes out of a file."""
    params = kind.params.unroll() if layout == "unrolled" else kind.params
    jc.send_cache(params, WRITES).save(tmp_path / "message")
    told = jc.receive_cache(jc.Message.load(tmp_path / "message"), params)
    logits, _ = jc.prefill(params, READS, past=(told,))
    wrote = jc.generate(params, READS, past=[told], max_new_tokens=5)
    for row, both in enumerate(x + y for x, y in zip(TOLD, ASKED, strict=True)):
        with torch.no_grad():
            want = kind.torch(torch.tensor([both])).logits[0, -1]
            said = kind.torch.generate(torch.tensor([both]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert_close(logits[row], want, f"row {row}", 1e-4)
        assert np.asarray(wrote.tokens[row]).tolist() == said[0, len(both) :].tolist()


def test_several_messages_follow_one_another(llama):
    """The second sender reads after the first; one message of a single row is for every game."""
    first = jc.send_cache(llama.params, jc.left_pad(TOLD[:1]))
    second = jc.send_cache(llama.params, WRITES, past=(jc.receive_cache(first, llama.params),))
    past = tuple(jc.receive_cache(m, llama.params) for m in (first, second))
    whole = jc.left_pad([TOLD[0] + x + y for x, y in zip(TOLD, ASKED, strict=True)])
    got, want = jc.prefill(llama.params, READS, past=past)[0], jc.prefill(llama.params, whole)[0]
    assert_close(got, want, "three texts", 1e-4)


def test_keys_and_values_survive_a_file_and_say_what_they_are(llama, tmp_path):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), llama.params)
    sent = jc.send_cache(params, WRITES).replace(note="told")
    sent.save(tmp_path / "message")
    again = jc.Message.load(tmp_path / "message")
    assert (repr(again), again.sender, again.note, again.bytes) == (repr(sent), sent.sender, "told", sent.bytes)
    for got, want in zip(jax.tree.leaves(again.states), jax.tree.leaves(sent.states), strict=True):
        assert got.dtype == want.dtype and np.asarray(got).tobytes() == np.asarray(want).tobytes()
    c, tokens = params.config, sum(map(len, TOLD))
    assert len(sent) == 3 and sent.bytes == 2 * 2 * c.layers * tokens * c.kv_heads * c.head_dim
    assert "keys and values, bfloat16[4, 3, 2, 16, 16] each" in repr(sent)


def test_sending_keys_and_values_works_under_jit_and_grad(llama):
    """The gradient of what the receiver says reaches the sender's prompt."""

    def loss(params):
        told = jc.receive_cache(jc.send_cache(params, WRITES), llama.params)
        return jnp.sum(jc.prefill(llama.params, READS, past=(told,))[0] ** 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(llama.params)
    assert_close(value, loss(llama.params), "under jit", 1e-4)
    assert float(jnp.abs(slope.embed).sum()) > 0


def test_only_the_same_model_takes_keys_and_values(llama, wide, tmp_path_factory):
    other = make_checkpoint(tmp_path_factory.mktemp("other"), "llama", seed=9).params
    sent = jc.send_cache(llama.params, WRITES)
    for params in (other, wide.params):
        refused(lambda params=params: jc.receive_cache(sent, params), "the receiver is")
    nobody = sent.replace(sender=None)
    assert jc.receive_cache(nobody, other) is nobody.states, "of the same shape, and from nobody: on one's own account"
    refused(lambda: jc.receive_cache(nobody, wide.params), "read with the same model")


def test_caches_are_of_this_model_of_these_rows_and_leave_room(unchecked, llama, wide):
    """In every function that goes on from them; what is only padding takes no room."""
    params, limit = llama.params, llama.params.config.max_positions
    cache = lambda n, rows=3, who=llama: jc.prefill(who.params, np.ones((rows, n), np.int32))[1]
    reads = {
        "generate": lambda past: jc.generate(params, READS, past=past, max_new_tokens=4),
        "prefill": lambda past: jc.prefill(params, READS, past=past),
        "prefix": lambda past: jc.prefix(params, READS, 2, past=past),
        "send": lambda past: jc.send(params, READS, 2, past=past),
        "send_cache": lambda past: jc.send_cache(params, READS, past=past),
        "read_prompt": lambda past: read_prompt(params, READS, past=past),
    }
    logits, own = jc.prefill(params, READS)
    decode = lambda past, n=4: jc.decode(params, logits, own, past=past, max_new_tokens=n)
    for call in (*reads.values(), decode):
        refused(lambda call=call: call([cache(3, who=wide)]), "read with the same model")
        refused(lambda call=call: call([cache(3, rows=2)]), "a cache has 2 rows for 3 prompts")
        refused(lambda call=call: call([jc.send_cache(params, WRITES)]), "past holds a Message")
        refused(lambda call=call: call(cache(3)), "past is a list of caches, got a KVCache")
    longest = max(map(len, ASKED))
    for name, call in reads.items():
        new = 4 if name == "generate" else 0
        call([cache(limit - longest - new)])
        says = f"{limit - longest - new + 1} tokens before row 1, {longest} in it and {new} new ones exceed the model's {limit} positions"
        refused(lambda call=call, n=new: call([cache(limit - longest - n + 1)]), says)
    decode([], limit - longest)
    refused(lambda: decode([], limit - longest + 1), "exceed the model's")


# What each kind of message refuses ----------------------------------------------------------------------------------


def test_each_kind_is_taken_in_its_own_way(llama):
    params = llama.params
    states, cache, text = jc.send(params, WRITES, 2), jc.send_cache(params, WRITES), jc.Message(text=("at rome",) * 3)
    put = lambda m: jc.forward(params, READS, edits=[jc.receive(m, 2)])
    refused(lambda: put(cache), "this message holds keys and values: take it with receive_cache, not at a site")
    refused(lambda: put(text), "this message holds text: put it into the receiver's prompt, not at a site")
    for other in (states, text):
        refused(lambda other=other: jc.receive_cache(other, params), "no keys and values: make it with send_cache")
    for other in (cache, text):
        refused(lambda other=other: jc.nearest_tokens(params, other), "this message holds")
        refused(lambda other=other: other.norms, "this message holds")


# Text and embeddings ------------------------------------------------------------------------------------------------


def test_text_survives_a_file_and_weighs_its_utf8(tmp_path):
    sent = jc.Message(text=("Der Louvre ist in Paris.", "", "où? 🙂\n\"'"), sender="a", note="gesagt")
    sent.save(tmp_path / "message")
    again = jc.Message.load(tmp_path / "message")
    assert (again.text, again.sender, again.note, again.states) == (sent.text, "a", "gesagt", None)
    assert len(again) == 3 and again.bytes == 24 + 0 + len("où? 🙂\n\"'".encode())
    assert repr(again) == repr(sent) and "'Der Louvre ist in Paris.'" in repr(again)


def test_states_weigh_what_is_sent_without_padding(llama):
    assert jc.send(llama.params, WRITES, 2).bytes == 3 * 48 * 4
    assert jc.send(llama.params, WRITES, jc.Site("resid_post", 2, "all")).bytes == sum(map(len, TOLD)) * 48 * 4
    assert jc.send(llama.params, WRITES, jc.Site("q", 2, [0, -1])).bytes == 3 * 2 * 4 * 16 * 4


def test_a_response_in_embeddings_is_a_message_at_embed(llama, tmp_path):
    """Put in the place of as many tokens, it is read as CIPHER's receiver reads it: as rows of the embedding."""
    logits, cache = jc.prefill(llama.params, WRITES)
    how = Mixing(jc.Sampling(temperature=0.7), stop="none")
    response = cipher(llama.params, logits, cache, how, max_new_tokens=2)
    response.message().save(tmp_path / "message")
    sent = jc.Message.load(tmp_path / "message")
    np.testing.assert_array_equal(sent.states, response.own)
    assert sent.site == jc.Site("embed") and sent.bytes == 3 * 2 * 48 * 4
    ids = np.asarray(response.tokens)
    exact = response.replace(own=llama.params.embed[ids]).message()
    spoken = jc.left_pad([[*row, 5] for row in ids.tolist()])
    blank = jc.left_pad([[0, 0, 5]] * 3)
    at = jc.Site("embed", positions=[0, 1])
    got = jc.forward(llama.params, blank, edits=[jc.receive(exact, at)])
    assert_close(got, jc.forward(llama.params, spoken), "the embeddings of tokens are the tokens")
    assert not np.allclose(jc.forward(llama.params, blank, edits=[jc.receive(sent, at)]), got, atol=1e-3)


# Protocols ----------------------------------------------------------------------------------------------------------

A_READS, B_READS = ["Alice is at the Louvre.", "Bob is at Petra."], ["Where is Alice?", "Which country is Bob in?"]


def test_activation_is_sending_and_receiving(trained):
    agent, how = trained.agent, Grafting(graft="sum")
    sent = send_states(agent, agent, A_READS, how, k=4, games=2)
    apart = receive_states(agent, B_READS, sent, how, j=2).write(4)
    assert apart == activation(agent, agent, A_READS, B_READS, k=4, j=2, graft="sum").write(4)
    assert sent.message.site == jc.Site("resid_post", 4, "last") and len(sent.message) == 2
    changed = dataclasses.replace(sent, message=jc.stand_in(sent.message, "zero"))
    assert receive_states(agent, B_READS, changed, how, j=2).write(4)[0].details["norm_sent"] == 0


def test_many_edits_need_one_reading_of_the_receivers_prompts(trained):
    agent = trained.agent
    asked = read_receiver(agent, B_READS)
    at = jc.Site("mlp_out", 2, "last")  # not served by the reading: its prompts are read again
    for how in (
        {"k": 4, "j": 2},
        {"k": 6, "j": 5, "graft": "mean"},
        {"k": 4, "j": 0, "control": "other"},
        {"k": at, "j": at},
    ):
        shared = activation(agent, agent, A_READS, asked, **how)
        assert shared.write(4) == activation(agent, agent, A_READS, B_READS, **how).write(4)
    other = dataclasses.replace(agent, params=agent.params.unroll(), name="other")
    refused(
        lambda: activation(agent, other, A_READS, asked, k=4, j=2),
        "b has read the prompts, the receiver is other: let it",
    )


def test_a_message_may_be_changed_on_its_way(trained, tmp_path):
    """Text goes through a file and is rewritten; the receiver reads what arrives."""
    agent, talk = trained.agent, Conversation(max_message_tokens=8)
    sent = send_text(agent, A_READS, talk)
    whole = message(agent, agent, A_READS, B_READS, max_message_tokens=8).write(4)
    assert [r.text for r in receive_text(agent, B_READS, sent, talk).write(4)] == [r.text for r in whole]
    sent.message.replace(text=("He is at Petra.",) * 2).save(tmp_path / "message")
    arrived = dataclasses.replace(sent, message=jc.Message.load(tmp_path / "message"))
    turn = receive_text(agent, B_READS, arrived, talk)
    assert [agent.tokenizer.decode(row, skip_special_tokens=True).strip() for row in turn.rows] == [
        f"He is at Petra. {asked}" for asked in B_READS
    ]
    refused(lambda: receive_text(agent, B_READS[:1], sent, talk), "2 texts for 1 prompts: give one for each")
    states = dataclasses.replace(sent, message=jc.Message(jnp.ones((2, 3))))
    refused(lambda: receive_text(agent, B_READS, states, talk), "0 texts for 2 prompts: give one for each")
