"""Channels beside activations, as protocols: keys and values, latent thoughts, state deltas. What B answers is what
transformers answers under the same rules, what they send is what is counted."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm import protocols
from jaxcomm.evals.games import draw
from jaxcomm.flops import blocks_flops, generation_flops, head_flops
from jaxcomm.protocols import (
    Prefixing,
    StandIn,
    deltas,
    kv,
    latent,
    receive_prefix,
    send_prefix,
    silent,
    sweep_deltas,
    thinking,
)
from jaxcomm.sharding import local_mesh

from conftest import refused
from speakers import EOS, OTHERS, QUESTIONS, N, greedy, ids, spell

GAME = draw("countries", 3, 5)
TOLD, ASKED, ANSWERS = zip(*((i.prompt_a, i.prompt_b, i.answer) for i in GAME.items), strict=True)


def said(turn, n=5) -> list[str]:
    return [reply.text for reply in turn.write(n)]


# Keys and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_receiver_behind_all_keys_and_values_answers_as_if_it_had_read_both(trio, family):
    speaker = trio[family]
    turn = kv(speaker.agent, speaker.agent, QUESTIONS, OTHERS)
    for reply, x, y in zip(turn.write(N), QUESTIONS, OTHERS, strict=True):
        wrote = greedy(speaker.torch, ids(x) + ids(y), N)
        assert reply.text == spell(wrote)


def test_several_roles_in_a_row_have_read_each_other(trio):
    speaker = trio["llama"]
    a, roles = speaker.agent, [QUESTIONS, OTHERS]
    turn = kv([a, a], a, roles, QUESTIONS, order="row")
    for reply, x, y in zip(turn.write(N), QUESTIONS, OTHERS, strict=True):
        assert reply.text == spell(greedy(speaker.torch, ids(x) + ids(y) + ids(x), N))
    apart = send_prefix([a, a], a, roles, Prefixing())
    assert apart.message.states.after().tolist() == [len(ids(x)) + len(ids(y)) for x, y in zip(*roles, strict=True)]
    alone = send_prefix(a, a, QUESTIONS, Prefixing()).message.states
    columns = alone.k.shape[-2] if hasattr(alone.k, "shape") else alone.k[0].shape[-2]
    np.testing.assert_allclose(apart.message.states.k[1][..., :columns, :], alone.k[1], atol=1e-6)


def test_what_a_prefix_costs_is_what_reading_both_texts_costs(b):
    """But for what reading goes through for the last token of the first text, which nobody asks for."""
    config = b.params.config
    for replies, n in ((kv(b, b, TOLD, ASKED).write(3), 3), (kv(b, b, TOLD, ASKED).score([[" a b c"]] * 5), None)):
        for reply, x, y in zip(replies, b.rows(TOLD), b.rows(ASKED), strict=True):
            new = len(reply.written) if n else reply.tokens[0]
            assert reply.spent.flops == generation_flops(config, len(x) + len(y), new)
            assert reply.spent.sent == 2 * config.layers * config.kv_heads * config.head_dim * 4 * len(x)
    half = kv(b, b, TOLD, ASKED, layers=[1, 2, 3]).write(1)
    whole = kv(b, b, TOLD, ASKED).write(1)
    for some, every, x, y in zip(half, whole, b.rows(TOLD), b.rows(ASKED), strict=True):
        assert 2 * some.spent.sent == every.spent.sent
        unseen = len(x) * (2 * len(y) + 1)  # two layers and, in the last one, one token
        assert every.spent.flops - some.spent.flops == 4 * config.heads * config.head_dim * unseen


def test_no_thought_is_the_prefix_alone_and_no_steps_alone_are_silence(b):
    assert said(latent(b, b, TOLD, ASKED, steps=0)) == said(kv(b, b, TOLD, ASKED))
    alone, quiet = thinking(b, b, TOLD, ASKED, steps=0), silent(b, b, TOLD, ASKED)
    assert said(alone) == said(quiet)
    assert [r.spent.flops for r in alone.write(3)] == [r.spent.flops for r in quiet.write(3)]
    long = thinking(b, b, TOLD, ASKED, steps=6).write(3)
    c = b.params.config
    for reply, row in zip(long, b.rows(ASKED), strict=True):
        P, n = len(row), len(reply.written)
        want = generation_flops(c, P, 1) + blocks_flops(c, 6 + n - 1, context=P) + 6 * 2 * c.width**2
        assert reply.spent.flops == want + (n - 1) * head_flops(c)


def test_thoughts_as_vectors_are_read_before_the_prompt(b):
    how = Prefixing(steps=3, sends="thoughts")
    sent = send_prefix(b, b, TOLD, how)
    width = b.params.config.width
    assert sent.message.states.shape == (5, 3, width) and sent.spent[0].sent == 3 * width * 4
    turn = receive_prefix(b, ASKED, sent, how)
    vectors = np.asarray(sent.message.states)
    table = np.asarray(b.params.embed)
    for i, row in enumerate(b.rows(ASKED)):
        x = np.concatenate([vectors[i], table[np.array(row)]])[None]
        want, _ = jc.prefill(b.params, x)
        np.testing.assert_allclose(turn.logits[i], want[0], atol=2e-3)


def test_a_prefix_before_the_last_turn_stands_behind_worked_examples(b):
    """They are read once for all games, and cost what they cost in any case."""
    shown = [
        ("Anna is at Petra. Which country is Anna located in?", "Jordan"),
        ("Ben is at the Louvre. Which country is Ben located in?", "France"),
    ]
    prompts = [
        [{"role": "user", "content": f"{x} {y}"} for x, y in shown] + [{"role": "user", "content": q}] for q in ASKED
    ]
    turn = kv(b, b, TOLD, prompts, place="turn")
    ahead = b.before_last_turn(prompts[0])
    assert turn.ahead == ahead and b.tokenizer.decode(turn.rows[0][ahead:]).strip() == ASKED[0]
    before = jc.prefill(b.params, jc.left_pad([turn.rows[0][:ahead]]))[1]
    for i, row in enumerate(turn.rows):
        told = jc.receive_cache(jc.send_cache(b.params, jc.left_pad(b.rows([TOLD[i]]))), b.params)
        past = [before, jc.prefixes.move(told, b.params.config, ahead)]
        want, _ = jc.prefill(b.params, jc.left_pad([row[ahead:]]), past=past)
        np.testing.assert_allclose(turn.logits[i], want[0], atol=2e-4)
    start, c = kv(b, b, TOLD, prompts), b.params.config
    for near, far, x in zip(turn.write(1), start.write(1), b.rows(TOLD), strict=True):
        pairs = ahead * len(x) * (c.layers - 1)  # examples that do not look at the prefix
        assert far.spent.flops - near.spent.flops == 4 * c.heads * c.head_dim * pairs
    refused(
        lambda: kv(b, b, TOLD, [*prompts[:4], ASKED[4]], place="turn"), "do not begin alike before their last turns"
    )
    refused(lambda: kv(b, b, TOLD, prompts, place="turn", positions="own"), "leave out positions")


def test_the_last_turn_is_found_in_any_rendering(trio):
    agent = trio["llama"].agent
    turns = [
        dict(role="user", content="who ?"),
        dict(role="assistant", content="bob"),
        dict(role="user", content="who ?"),
    ]
    for chat, system, prompt, before in (
        (False, "", "where is bob ?", 0),
        (False, "", turns, 4),  # <s>, the first question and its answer
        (True, "", "where is bob ?", 3),  # <s> user :
        (True, "", turns, 10),  # <s> user : who ? assistant : bob user :
        (True, "alice says :", turns, 15),  # five more: system : alice says :
    ):
        own = dataclasses.replace(agent, chat=chat, system=system)
        row = own.rows([prompt])[0]
        assert own.before_last_turn(prompt) == before
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        assert spell(row[before:]).startswith(last)
    tokenizer = copy.deepcopy(agent.tokenizer)
    tokenizer.chat_template = "<s> {{ messages[-1].content | upper }}"
    loud = dataclasses.replace(agent, tokenizer=tokenizer, chat=True)
    refused(lambda: loud.before_last_turn("where is bob ?"), "does not write the last turn 'where is bob ?' as it is")


def test_a_control_reads_what_was_sent_once(b):
    sent = send_prefix(b, b, TOLD, Prefixing())
    again = kv(b, b, TOLD, ASKED, sent=sent, control="other")
    fresh = kv(b, b, TOLD, ASKED, control="other")
    assert said(again) == said(fresh)


@pytest.mark.parametrize("mesh", [dict(tensor=2), dict(fsdp=2)])
def test_models_on_several_devices_say_what_they_say_on_one(b, mesh):
    cut = dataclasses.replace(b, params=jc.shard(b.params, local_mesh(**mesh)))
    ways = ((kv, {}), (kv, dict(layers=[3, 4, 5])), (latent, dict(steps=2)), (deltas, dict(j=3, max_message_tokens=8)))
    for protocol, how in ways:
        want = said(protocol(b, b, TOLD, ASKED, **how))
        assert said(protocol(cut, cut, TOLD, ASKED, **how)) == want, "both are cut"
        assert said(protocol(b, cut, TOLD, ASKED, **how)) == want, "the message arrives where the receiver is"


def test_bad_input_is_one_clear_line(b, trio):
    refused(lambda: kv(b, b, TOLD, ASKED, layers=[9]), "layer 9 cannot see a prefix: this model's layers are 1 to 6")
    refused(lambda: kv(b, b, TOLD, ASKED, layers=[]), "no layer sees the prefix")
    refused(lambda: kv(b, b, TOLD, ASKED, order="ring"), "unknown order 'ring': choose parallel or row")
    refused(lambda: kv(b, b, TOLD, ASKED[:2]), "5 prefixes for 2 prompts")
    refused(lambda: kv([b, b], b, [TOLD], ASKED), "2 senders, 1 lists of prompts")
    refused(lambda: kv([b, b], b, [TOLD, TOLD[:2]], ASKED), "the senders have 5 and 2 prompts")
    refused(lambda: kv(b, b, TOLD, ASKED, sends="thoughts"), "thoughts are sent, and there are none: give steps")
    refused(lambda: kv(trio["llama"].agent, trio["gemma2"].agent, QUESTIONS, OTHERS), "rotary embeddings differ")
    limit = b.params.config.max_positions
    long = ["Bob is at Petra. " * (limit // 8)] * 5
    rows = len(b.rows(long)[0])
    assert rows < limit < 2 * rows, "the test's text"
    refused(lambda: kv(b, b, long, long), f"a prefix of {rows} tokens and a prompt of {rows} do not fit")
    refused(lambda: said(kv(b, b, long, ASKED), limit - rows), "do not fit")
    refused(
        lambda: thinking(b, b, TOLD, ASKED, steps=limit),
        f"{limit + 1} tokens are to follow it, and the model has {limit}",
    )
    refused(
        lambda: latent(b, b, TOLD, ASKED, steps=1000), "1000 tokens are to follow it, and the model has 256 positions"
    )


# State deltas --------------------------------------------------------------------------------------------------------


def states(model, tokens, layer):
    """Outputs of a block (layers count from 1)."""
    box = {}
    handle = model.base_model.layers[layer - 1].register_forward_hook(
        lambda module, args, out: box.update(h=(out[0] if isinstance(out, tuple) else out)[0].clone())
    )
    with torch.no_grad():
        model(torch.tensor([tokens]))
    handle.remove()
    return box["h"]


def answer(model, before, message, after, moved, steps):
    """Greedy text after [before, message, after], with `moved` {layer: [n, D]} added at the message's tokens."""

    def adding(delta):
        def hook(module, args, out):
            h = (out[0] if isinstance(out, tuple) else out).clone()
            h[0, len(before) : len(before) + len(message)] += delta
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    blocks = model.base_model.layers
    handles = [blocks[layer - 1].register_forward_hook(adding(delta)) for layer, delta in moved.items()]
    tokens, wrote = [*before, *message, *after], []
    for _ in range(steps):
        with torch.no_grad():
            wrote.append(int(model(torch.tensor([[*tokens, *wrote]])).logits[0, -1].argmax()))
        if wrote[-1] == EOS:
            break
    for handle in handles:
        handle.remove()
    return wrote


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_state_deltas_are_added_at_the_pasted_tokens_as_in_pytorch(trio, family, layers):
    speaker = trio[family]
    model = copy.deepcopy(speaker.torch).double()
    turn = deltas(speaker.agent, speaker.agent, QUESTIONS, OTHERS, j=layers, max_message_tokens=N)
    differs, wrote = False, False
    for reply, x, y in zip(turn.write(N), QUESTIONS, OTHERS, strict=True):
        message = [t for t in greedy(speaker.torch, ids(x), N) if t != EOS]
        moved = {}
        for layer in layers:
            h = states(model, [*ids(x), *message], layer)[len(ids(x)) - 1 :]
            moved[layer] = h[1:] - h[:-1]
        # "{message} {prompt}": the text begins with <s>, the message is pasted, the prompt follows.
        want = answer(model, ids(""), message, ids(y)[1:], moved, N)
        assert reply.text == spell(want) and reply.details["message"] == spell(message)
        wrote |= bool(message)
        differs |= want != answer(model, ids(""), message, ids(y)[1:], {}, N)
        assert (
            reply.spent.sent == len(spell(message).encode()) + len(message) * len(layers) * model.config.hidden_size * 4
        )
    assert differs == wrote, "deltas change what is said, where a message was written"


def test_deltas_of_zero_are_a_message_and_controls_leave_its_tokens(b):
    how = dict(j=3, max_message_tokens=10)
    plain = deltas(b, b, TOLD, ASKED, **how)
    zero = deltas(b, b, TOLD, ASKED, control="zero", **how)
    assert zero.rows == plain.rows
    pasted = jc.prefill(b.params, jc.left_pad(zero.rows))[0]
    np.testing.assert_allclose(zero.logits, pasted, atol=1e-4)
    other = deltas(b, b, TOLD, ASKED, control="other", **how)
    assert other.rows == plain.rows and not np.allclose(other.logits, plain.logits)


def test_a_sweep_over_deltas_says_of_an_empty_message_what_its_text_says(b):
    told = [TOLD[0], "Giulia is at Saint Basil's Cathedral. Russia, Europe, Moscow.", TOLD[2]]
    order, how = [1, 2, 0], dict(max_message_tokens=8)
    found = sweep_deltas(b, b, told, ASKED[:3], ANSWERS[:3], layers=[1, 3], orders=[None, order], **how)
    for n, control in enumerate((None, StandIn("other", order=order))):
        for m, j in enumerate((1, 3)):
            turn = deltas(b, b, told, ASKED[:3], j=j, control=control, **how)
            assert [detail["message"] == "" for detail in turn.details] == [False, True, False]
            scored = turn.score([[f" {answer}"] for answer in ANSWERS[:3]])
            np.testing.assert_allclose(found.logprobs[n, :, m], [x.logprobs[0] for x in scored], atol=1e-3)
            assert found.exact[n, :, m].tolist() == [x.greedy[0] for x in scored]
    assert (found.logprobs[:, 1] == found.text_logprobs[1]).all() and (
        found.logprobs[1, 0] == found.text_logprobs[0]
    ).all()


def test_bad_input_of_deltas_is_one_clear_line(b, trio):
    refused(lambda: deltas(b, b, TOLD, ASKED, j=9), "j = 9 is out of range")
    refused(lambda: deltas(b, b, TOLD, ASKED, j=[]), "j names no layer")
    refused(lambda: deltas(b, b, TOLD, ASKED, j=[2, 4, 2]), "j names layer 2 twice")
    refused(lambda: deltas(b, b, TOLD, ASKED, j=2, tell="{message} {prompt} {message}"), "write {message} once")
    refused(lambda: deltas(b, b, TOLD, ASKED, j=2, turns=2), "deltas are sent with a single message")
    sweep = lambda **how: protocols.sweep_deltas(b, b, TOLD, ASKED, ANSWERS, layers=[2], **how)
    refused(lambda: sweep(turns=2), "deltas are sent with a single message")
    refused(lambda: sweep(control="zero"), "orders say whose deltas each game gets: leave out control")
    refused(lambda: deltas(trio["llama"].agent, trio["gemma2"].agent, QUESTIONS, OTHERS, j=1), "cannot be added")
    refused(lambda: deltas(trio["llama"].agent, trio["reversed"].agent, QUESTIONS, OTHERS, j=1), "differ")
