"""Turns and activations against renderings in plain PyTorch and transformers, which keep no cache, pad nothing and take one
question at a time."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxcomm.communication import communicate, communicate_logits
from jaxcomm.decoding import Sampling
from jaxcomm.evals.pair import folder
from jaxcomm.prompts import left_pad
from jaxcomm.protocols import Back, Form, activation, cipher_debate, debate, exchange, message
from jaxcomm.protocols.base import start_turn
from jaxcomm.sites import Site

from speakers import (
    EOS,
    GAMES,
    OTHERS,
    QUESTIONS,
    TEXTS,
    WORDS,
    N,
    Speaker,
    assert_scored,
    greedy,
    ids,
    log_likelihood,
    spell,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]


# --- A turn ---

LONG = 40


@pytest.fixture(scope="module")
def spoken(trio):
    """A turn, what it writes if nothing stops it, and torch's log-probability of each of these tokens."""
    s = trio["gemma2"]
    turn = start_turn(s.agent, QUESTIONS)
    how = dict(sampling=Sampling(2.5), seed=1)
    replies = turn.write(LONG, **how)
    vocabulary = ["<s>", "</s>", *WORDS]
    tokens = [[vocabulary.index(w) for w in r.written] for r in replies]
    logprobs = [
        [log_likelihood(s, [*ids(q), *row[:n]], row[n : n + 1])[0] for n in range(len(row))]
        for q, row in zip(QUESTIONS, tokens, strict=True)
    ]
    assert max(map(len, tokens)) > 20, "it goes on for more than a step"
    return turn, how, tokens, logprobs


@given(st.data())
def test_writing_until_a_stop_string_is_writing_everything_and_cutting_there(spoken, data):
    turn, how, tokens, logprobs = spoken
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):
        text = spell(data.draw(st.sampled_from(tokens)))
        assume(text)
        begin = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[begin : begin + data.draw(st.integers(1, 12))])
    for row, probs, reply in zip(tokens, logprobs, turn.write(LONG, until=stops, **how), strict=True):
        hit = lambda n, row=row: min((at for s in stops if (at := spell(row[:n]).find(s)) >= 0), default=None)
        n = next((n for n in range(len(row) + 1) if hit(n) is not None), len(row))
        assert reply.raw == spell(row[:n])[: hit(n)]
        assert reply.written == tuple(turn.agent.tokens(row[:n]))
        assert reply.logprob == pytest.approx(sum(probs[:n]), abs=1e-4)


def test_an_empty_stop_string_stops_nothing_and_no_texts_have_no_scores(trio):
    turn = start_turn(trio["gemma2"].agent, QUESTIONS)
    assert turn.write(N, until=["", "alice ?"]) == turn.write(N, until=["alice ?"])
    assert turn.write(N, until=[""]) == turn.write(N)
    none, some = turn.score([[], [], []]), turn.score([TEXTS[0], [], []])
    assert [x.logprobs for x in none] == [()] * 3 and none[0].spent.read == len(turn.rows[0])
    assert some[0] == turn.score([TEXTS[0]] * 3)[0] and some[1].logprobs == ()


def test_a_reply_keeps_the_ids_of_its_text(spoken):
    """Also of tokens that the tokenizer does not know, and without the one that stopped it."""
    turn, how, tokens, _ = spoken
    for row, reply in zip(tokens, turn.write(LONG, **how), strict=True):
        assert list(reply.ids) == [t for t in row if t != EOS]
    stop = spell(tokens[0][:6]).split()[-1]
    for row, reply in zip(tokens, turn.write(LONG, until=[f" {stop}"], **how), strict=True):
        assert spell(reply.ids) == reply.text and list(reply.ids) == row[: len(reply.ids)]


def test_a_turn_may_write_and_score_again_and_again(trio):
    turn = start_turn(trio["gemma2"].agent, QUESTIONS)
    once, scores = turn.write(1), turn.score(TEXTS)
    longer = turn.write(N)
    assert turn.write(1) == once and turn.write(N) == longer and turn.score(TEXTS) == scores


def test_a_rows_sampled_text_follows_its_seed_whoever_its_neighbours_are(trio):
    agent, how = trio["gemma2"].agent, dict(sampling=Sampling(2.0))
    said = lambda prompts, seeds: [r.text for r in start_turn(agent, prompts).write(LONG, seed=seeds, **how)]
    together = said(QUESTIONS, [5, 9, 2])
    order = [2, 0, 1]
    assert said([QUESTIONS[i] for i in order], [[5, 9, 2][i] for i in order]) == [together[i] for i in order]
    assert said([QUESTIONS[0], *OTHERS[:2]], [5, 1, 1])[0] == together[0]
    again = said([QUESTIONS[0]] * 3, [5, 6, 5])
    assert again[0] == again[2] == together[0] != again[1]


def test_space_at_a_prompts_end_is_read_once(trained):
    """What is scored after a prompt that ends in a line feed, raw or by its chat template, are the tokens that follow it."""
    s = trained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder("b"))
    tokenizer.chat_template = "{{ messages[0].content + ' Answer:\\n' }}"
    chatty = dataclasses.replace(s.agent, chat=True, tokenizer=tokenizer)
    text = f"{GAMES[0].prompt_a} {GAMES[0].prompt_b} Answer:\n"
    for agent, prompt, special in ((s.agent, text, True), (chatty, text[: -len(" Answer:\n")], False)):
        row = tokenizer.encode(text, add_special_tokens=special)
        after = tokenizer.encode(text + "Greece.", add_special_tokens=special)
        assert after[: len(row)] == row
        (got,) = start_turn(agent, [prompt]).score([["Greece."]])
        assert_scored(got, [log_likelihood(s, row, after[len(row) :])], [len(after) - len(row)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, b: debate((a, b), (["who ?"], [" "])), "empty prompt at row 0"),
        (lambda a, b: debate((a,), (["who ? " * 600],)), "a prompt of 1201 tokens does not fit"),
        (lambda a, b: start_turn(a, ["who ? " * 500]).write(30), "leave room for 994; shorten it"),
        (lambda a, b: start_turn(a, ["who ? " * 511]).score([["who " * 5]]), "leave room for 1020; shorten it"),
        (lambda a, b: start_turn(a, ["who ?"]).score([[""]]), "a text to score has no tokens"),
        (
            lambda a, b: start_turn(a, ["who ali"]).score([["ce"]]),
            "the text 'ce' shares its token with the prompt's end ('who ali')",
        ),
        (
            lambda a, b: message(a, b, ["who ?"], ["who ?"], ask="{foo}"),
            "ask '{foo}': it must have {prompt} and no other",
        ),
        (
            lambda a, b: message(a, b, ["who ?"], ["who ?"], tell="{message}"),
            "tell '{message}': it must have {message} and {prompt}",
        ),
        (
            lambda a, b: message(a, b, ["who ?"], ["who ?"], ask="{prompt"),
            "ask '{prompt': it must have {prompt} and no other",
        ),
        (lambda a, b: Form(peer="{answers}", update="{others}"), "peer '{answers}': it must have {answer}"),
        (
            lambda a, b: cipher_debate((a,), (["who ?"],), temperatures=[0.0], sampling=Sampling(1.0)),
            "CIPHER draws nothing",
        ),
        (
            lambda a, b: cipher_debate((a,), (["who ?"],), temperatures=[0.0]).write(1, sampling=Sampling(1.0)),
            "CIPHER draws nothing",
        ),
        (lambda a, b: debate((a, b), (["who ?"],) * 2, form="odd"), "unknown form 'odd': choose one of harness, plain"),
        (lambda a, b: debate((a, b), (["who ?"],) * 2, answer="odd"), "unknown answer 'odd': choose one of numeric"),
        (lambda a, b: cipher_debate((a,), (["who ?"],), temperatures=[0.0], form="odd"), "unknown form 'odd'"),
        (lambda a, b: exchange(a, b, ["who ?"], ["who ?"], k=1, j=1, answer="odd"), "unknown answer 'odd'"),
        (lambda a, b: debate((a, b), (["who ?"],)), "2 agents and prompts for [1]"),
        (lambda a, b: debate((a, b), (["who ?"], ["who ?", "is"])), "2 agents and prompts for [1, 2]"),
        (lambda a, b: debate((), ()), "0 agents"),
        (lambda a, b: debate((a,), (["who ?"],), rounds=0), "rounds = 0: a debate has at least 1"),
        (lambda a, b: cipher_debate((a, b), (["who ?"],) * 2, temperatures=[0.5]), "temperatures [0.5] for 2 agents"),
        (
            lambda a, b: cipher_debate((a, b), (["who ?"],) * 2, temperatures=[0.5, -1.0]),
            "temperatures [0.5, -1.0] for 2",
        ),
        (lambda a, b: activation((a, b), b, (["who ?"],) * 2, ["who ?"], k=1, j=1), "give one of each"),
        (lambda a, b: activation((a, b), b, (["who ?"],) * 2, ["who ?"], k=(1,), j=1), "give one of each"),
        (lambda a, b: activation((a, b), b, (["who ?"],) * 2, ["who ?"], k=(1, 1), j=1), "give every sender a W"),
    ],
)
def test_bad_input_is_one_clear_line(trio, call, message):
    with pytest.raises(ValueError) as error:
        call(trio["llama"].agent, trio["gemma2"].agent)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- Activations, beyond one sender and one edit ---


def torch_state(speaker: Speaker, tokens, k):
    """h[k] at the last token; transformers' hidden state of the last layer is normed, so a hook reads it."""
    box = []
    hook = speaker.torch.model.layers[k - 1].register_forward_hook(
        lambda module, inputs, out: box.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        speaker.torch(torch.tensor([tokens]))
    hook.remove()
    return box[0][0, -1]


def torch_receive(speaker: Speaker, tokens, message, j, steps=N):
    """Greedy text after a prompt whose last token's h[j] is replaced in every pass."""

    def edit(module, inputs, out):
        h = (out[0] if isinstance(out, tuple) else out).clone()
        d = min(len(message), h.shape[-1])
        h[0, len(tokens) - 1, -d:] = message[-d:]
        return (h, *out[1:]) if isinstance(out, tuple) else h

    hook, text = speaker.torch.model.layers[j - 1].register_forward_hook(edit), []
    with torch.no_grad():
        while len(text) < steps and EOS not in text:
            text.append(int(speaker.torch(torch.tensor([[*tokens, *text]])).logits[0, -1].argmax()))
    hook.remove()
    return text


def test_prompts_that_begin_alike_are_read_once_and_give_what_each_gives_alone(trio):
    """Text, scores and activation replies; one of them is all that the others begin with, and windows (9) are shorter."""
    s = trio["gemma2"]
    examples = " ".join(np.random.default_rng(0).choice(WORDS, 50))
    prompts = [examples, f"{examples} {QUESTIONS[0]}", f"{examples} {QUESTIONS[1]}"]
    turn = start_turn(s.agent, prompts)
    (past,) = turn.past
    assert past.positions.shape[0] == 1 and past.positions.max() == 49, "all but the shortest one's last token"
    sent = activation(s.agent, s.agent, prompts, prompts[::-1], k=1, j=2).write(N)
    replies, scores = turn.write(N), turn.score([TEXTS[0]] * 3)
    assert turn.write(N, until=["nobody says this"]) == replies
    for i, row in enumerate(map(ids, prompts)):
        alone = greedy(s.torch, row, N)
        assert replies[i].written == tuple(s.agent.tokens(alone)) and replies[i].read == tuple(s.agent.tokens(row))
        assert replies[i].logprob == pytest.approx(log_likelihood(s, row, alone)[0], abs=1e-4)
        want = [log_likelihood(s, row, ids(text)[1:]) for text in TEXTS[0]]
        assert_scored(scores[i], want, [len(text.split()) for text in TEXTS[0]])
        to = ids(prompts[::-1][i])
        assert sent[i].written == tuple(s.agent.tokens(torch_receive(s, to, torch_state(s, row, 1), 2)))
        assert (sent[i].details["sent_position"], sent[i].details["edited_position"]) == (len(row) - 1, len(to) - 1)


def test_of_several_senders_the_mean_of_what_they_send_arrives(trio):
    senders, b = [trio["llama"], trio["gemma2"]], trio["gemma2"]
    reads, ks = (OTHERS, QUESTIONS[::-1]), (2, 1)
    rng = np.random.default_rng(0)
    Ws = [rng.normal(size=(40, len(s.table[0]))).astype(np.float32) / 4 for s in senders]
    replies = activation([s.agent for s in senders], b.agent, reads, QUESTIONS, k=ks, j=1, W=Ws).write(N)
    for i, reply in enumerate(replies):
        states = [torch_state(s, ids(own[i]), k) for s, own, k in zip(senders, reads, ks, strict=True)]
        mean = sum(torch.from_numpy(W) @ h for W, h in zip(Ws, states, strict=True)) / 2
        assert reply.written == tuple(b.agent.tokens(torch_receive(b, ids(QUESTIONS[i]), mean, 1)))
        assert reply.details["norm_sent"] == pytest.approx(float(mean.norm()), rel=1e-4)
    same = activation([b.agent, b.agent], b.agent, (OTHERS, OTHERS), QUESTIONS, k=(2, 2), j=1).write(N)
    one = activation(b.agent, b.agent, OTHERS, QUESTIONS, k=2, j=1).write(N)
    assert [r.written for r in same] == [r.written for r in one]


def test_thinking_sends_the_state_at_the_last_token_written(trio):
    """That is: what `communicate` sends for these tokens, and what a hook on transformers sees there."""
    a, b = trio["gemma2"], trio["llama"]
    lengths = []
    for i, reply in enumerate(activation(a.agent, b.agent, QUESTIONS, OTHERS, k=1, j=2, think=N).write(N)):
        thought = greedy(a.torch, ids(QUESTIONS[i]), N)
        read = [*ids(QUESTIONS[i]), *(t for t in thought if t != EOS)]
        want = torch_receive(b, ids(OTHERS[i]), torch_state(a, read, 1), 2)
        assert reply.details["thought"] == [spell(thought)]
        assert reply.written == tuple(b.agent.tokens(want))
        assert reply.details["sent_position"] == len(read) - 1
        if i == 0:
            rows = np.asarray([read], np.int32), np.asarray([ids(OTHERS[i])], np.int32)
            said = communicate(a.agent.params, b.agent.params, *rows, k=1, j=2, max_new_tokens=N, stop_tokens=(EOS,))
            assert [t for t in said.tokens[0].tolist() if t >= 0] == want
        lengths.append(len(thought))
    assert min(lengths) < N, "one of them stops by itself"


def test_an_exchange_sends_both_states_unedited(trio):
    a, b = trio["gemma2"], trio["llama"]
    replies = exchange(a.agent, b.agent, QUESTIONS, OTHERS, k=1, j=2, back=Back(2, 1)).write(N)
    for x, y, reply in zip(QUESTIONS, OTHERS, replies, strict=True):
        there = torch_receive(b, ids(y), torch_state(a, ids(x), 1), 2)
        back = torch_receive(a, ids(x), torch_state(b, ids(y), 2), 1)
        assert reply.details["texts"] == [spell(there), spell(back)]


@pytest.mark.parametrize("graft, where, k, j", [("mean", "last", 1, 2), ("sum", "all", 2, 1)])
def test_scores_after_an_activation_are_what_communicate_foresees(trio, graft, where, k, j):
    a = b = trio["gemma2"].agent
    how = dict(k=Site("resid_post", k, where), j=Site("resid_post", j, where), graft=graft)
    foresee = jax.jit(communicate_logits, static_argnames="graft")
    scores = activation(a, b, OTHERS, QUESTIONS, k=k, j=j, graft=graft, where=where).score([TEXTS[2]] * 3)
    pa, pb = (left_pad([ids(q) for q in own], 32) for own in (OTHERS, QUESTIONS))
    for c, text in enumerate(TEXTS[2]):
        answer = ids(text)[1:] + [0] * (8 - len(text.split()))
        answers = np.asarray([answer] * 3, np.int32)
        logits = np.asarray(foresee(a.params, b.params, pa, pb, answers, **how))
        n = len(text.split())
        for i in range(3):
            logprobs = torch.log_softmax(torch.tensor(logits[i, :n]), -1)[torch.arange(n), answer[:n]]
            assert scores[i].logprobs[c] == pytest.approx(float(logprobs.sum()), abs=1e-4)
            assert scores[i].greedy[c] == (logits[i, :n].argmax(-1).tolist() == answer[:n])
