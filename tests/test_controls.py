"""Controls are what they are called, on every kind of message and in every protocol: whose message arrives, what statistics it
has, what it leaves unchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import jaxcomm as jc
from jaxcomm.converters import load_agent
from jaxcomm.evals.games import draw
from jaxcomm.evals.pair import folder
from jaxcomm.protocols import CONTROLS, PROTOCOLS, Conversation, StandIn, activation, debate, message, send_text, silent

from conftest import assert_close, refused

GAME = draw("countries", 3, 7)
TOLD, ASKED, ANSWERS = zip(*((i.prompt_a, i.prompt_b, i.answer) for i in GAME.items), strict=True)
TALK = dict(max_message_tokens=10)
SENDING = {
    "message": TALK,
    "debate": dict(TALK, form="plain", tie="last"),
    "cipher": dict(TALK, form="plain", temperatures=(0.4, 0.1), rounds=2),
    "activation": dict(k=4, j=1),
    "exchange": dict(k=4, j=1),
    "kv": dict(layers=[1, 2, 3, 5, 6]),
    "latent": dict(steps=2),
    "deltas": dict(TALK, j=[2, 4]),
}


@pytest.fixture(scope="module")
def b(trained) -> jc.Agent:
    return trained.agent


def turn_of(protocol: str, b: jc.Agent, control=None, told=TOLD, asked=ASKED, **more):
    control = StandIn(control, answers=ANSWERS) if isinstance(control, str) else control
    return PROTOCOLS[protocol](b, b, told, asked, control=control, **{**SENDING[protocol], **more})


def said(turn) -> list[str]:
    return [reply.text for reply in turn.write(5)]


# Whose message ------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40), st.integers(0, 5))
def test_nobody_gets_its_own_message_and_as_few_as_can_be_one_with_their_own_answer(answers, seed):
    order, most = jc.derange(answers, seed), max(map(answers.count, answers))
    assert sorted(order.tolist()) == list(range(len(answers))) and (order != np.arange(len(answers))).all()
    assert jc.overlap(answers, order) == max(0, 2 * most - len(answers)) / len(answers)


def test_answers_that_differ_in_case_only_are_the_same():
    assert jc.overlap(["Peru", "peru "], jc.derange(["Peru", "peru "])) == 1.0
    refused(lambda: jc.derange(["Peru"]), "needs at least two items")


@pytest.mark.parametrize("protocol", ["message", "activation", "cipher", "kv", "latent"])
def test_another_items_message_is_what_the_sender_says_in_that_item(b, protocol):
    order = jc.derange(ANSWERS, 0)
    alone = [TOLD[n] for n in order]
    assert said(turn_of(protocol, b, "other")) == said(turn_of(protocol, b, told=alone))
    assert said(turn_of(protocol, b, "other")) != said(turn_of(protocol, b))
    assert all(ANSWERS[i] != ANSWERS[n] for i, n in enumerate(order))


def test_in_a_debate_each_keeps_its_own_answer_and_reads_another_questions_of_the_others(b):
    order, first = jc.derange(ANSWERS, 0), said(silent(b, b, TOLD, TOLD))
    panel = turn_of("debate", b, "other", max_message_tokens=5)
    for i, n in enumerate(order):
        own, asked = panel.turns[1].rendered(i)[0], ASKED[i]
        assert own == f"{first[n]} {asked}", "the form leaves B's own answer out"
    harness = turn_of("debate", b, "other", form="harness", max_message_tokens=5)
    assert all(harness.details[i]["rounds"][0][1] in harness.turns[1].rendered(i)[0] for i in range(len(ASKED)))


def test_in_an_exchange_the_sender_still_reads_its_own_prompt(b):
    panel = turn_of("exchange", b, "other")
    assert [panel.turns[1].prompts[i] for i in range(len(TOLD))] == list(TOLD)
    assert said(panel.turns[0]) == said(turn_of("activation", b, "other"))


def test_a_generated_message_is_the_receivers_own_from_its_own_prompt(b):
    for protocol in ("message", "activation", "kv", "latent"):
        assert said(turn_of(protocol, b, "generated")) == said(turn_of(protocol, b, told=ASKED))
    panel = turn_of("debate", b, "generated", max_message_tokens=5)
    own = said(silent(b, b, TOLD, ASKED))
    assert [panel.turns[1].rendered(i)[0] for i in range(len(own))] == [
        f"{x} {y}" for x, y in zip(own, ASKED, strict=True)
    ]


def test_a_receiver_of_another_depth_is_read_as_deep_as_the_sender(b):
    a = load_agent(folder("a"), name="a", unroll=False)
    assert (a.params.config.layers, b.params.config.layers) == (7, 6)
    for k, deep in ((7, 6), (4, 3), (0, 0)):
        turn = activation(a, b, TOLD, ASKED, k=k, j=1, control="generated")
        assert said(turn) == said(activation(b, b, ASKED, ASKED, k=deep, j=1))


@pytest.mark.parametrize("protocol", SENDING)
def test_an_unrelated_message_is_the_same_for_all(b, protocol):
    turn = turn_of(protocol, b, "unrelated")
    received = (turn.turns[turn.receiver] if hasattr(turn, "turns") else turn).received
    if received.states is None:
        assert len({*received.text}) == 1
    else:
        cache = isinstance(received.states, jc.KVCache)
        for x in (received.states.k[0], received.states.v[-1]) if cache else (received.states,):
            assert_close(x, jnp.broadcast_to(x[:1], x.shape), "one for all")


# What it is ---------------------------------------------------------------------------------------------------------


def others(x: np.ndarray, valid: np.ndarray, i: int, n: int) -> np.ndarray:
    return np.array([row[n] for j, row in enumerate(x) if j != i and valid[j, n]])


@pytest.fixture(scope="module")
def ragged() -> jc.Message:
    """Five messages of up to three states, aligned at their ends."""
    valid = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]], bool)
    x = np.random.default_rng(0).normal(2, 3, (5, 3, 4)).astype(np.float32) * valid[..., None]
    return jc.Message(jnp.asarray(x), jnp.asarray(valid), jc.Site("resid_post", 1, "all"))


def test_the_mean_is_that_of_the_others(ragged):
    made = np.asarray(jc.stand_in(ragged, "mean").states)
    x, valid = np.asarray(ragged.states), np.asarray(ragged.valid)
    for i in range(5):
        for n in range(3):
            want = others(x, valid, i, n).mean(axis=0) if valid[i, n] else np.zeros(4)
            np.testing.assert_allclose(made[i, n], want, atol=1e-5)


def test_moments_are_those_of_the_others_and_nothing_is_its_own(ragged):
    x, valid = np.asarray(ragged.states), np.asarray(ragged.valid)
    drawn = np.stack([np.asarray(jc.stand_in(ragged, "moments", seed=s).states) for s in range(4000)])
    for i, n in ((0, 1), (2, 2), (4, 0)):
        own, of = drawn[:, i, n], others(x, valid, i, n)
        spread = np.sqrt(np.trace(np.cov(of.T)))
        np.testing.assert_allclose(own.mean(axis=0), of.mean(axis=0), atol=0.1 * spread)
        np.testing.assert_allclose(np.cov(own.T), np.cov(of.T), atol=0.1 * spread**2)
    changed = ragged.replace(states=ragged.states.at[2].multiply(7))
    for control in ("mean", "moments"):
        np.testing.assert_allclose(
            jc.stand_in(changed, control).states[2], jc.stand_in(ragged, control).states[2], rtol=1e-5, atol=1e-5
        )


def test_noise_has_the_norms_of_the_messages_and_differs_with_the_seed(ragged):
    made = jc.stand_in(ragged, "noise")
    np.testing.assert_allclose(made.norms, ragged.norms, rtol=1e-5)
    assert not np.allclose(made.states, jc.stand_in(ragged, "noise", seed=1).states)
    assert not np.any(jc.stand_in(ragged, "zero").states)


@pytest.mark.parametrize("control", ["other", "mean", "moments", "noise", "zero"])
def test_keys_and_values_are_controlled_as_states_are(b, control):
    """Layer by layer and head by head, aligned at their ends, in the stored order of axes."""
    prompts = b.tokenize(list(TOLD))
    sent = jc.send_cache(b.params, prompts)
    made = jc.stand_in(sent, control, answers=ANSWERS)
    order = jc.derange(ANSWERS, 0)
    for new, old in ((made.states.k, sent.states.k), (made.states.v, sent.states.v)):
        x = np.moveaxis(np.asarray(old), (1, 3), (0, 1))
        flat = jc.Message(jnp.asarray(x), sent.states.positions >= 0)
        got = np.moveaxis(np.asarray(new), (1, 3), (0, 1))
        if control == "other":
            np.testing.assert_array_equal(got, x[order])
        elif control == "noise":
            there = np.asarray(flat.valid)[..., None, None]
            norm = lambda a, there=there: np.linalg.norm(a, axis=-1) * there
            np.testing.assert_allclose(norm(got), norm(x), rtol=1e-5)
        elif control != "moments":
            np.testing.assert_allclose(got, jc.stand_in(flat, control).states, rtol=1e-5, atol=1e-5)
    b.text(jc.generate(b.params, b.tokenize(list(ASKED), 4), past=[jc.receive_cache(made, b.params)], max_new_tokens=4))


def test_messages_are_taken_row_by_row_whatever_they_hold(b, ragged):
    rows = [3, 0, 0]
    taken = ragged.take(rows)
    np.testing.assert_array_equal(taken.states, np.asarray(ragged.states)[rows])
    np.testing.assert_array_equal(taken.valid, np.asarray(ragged.valid)[rows])
    assert jc.Message(text=("x", "y", "z", "w")).take(rows).text == ("w", "x", "x")
    placed = jc.Message(jnp.ones((4, 2)), site=jc.Site("resid_post", 1, np.array([0, 1, 2, 3])))
    assert placed.take(rows).site.positions.tolist() == [3, 0, 0]
    cache = jc.send_cache(b.params, b.tokenize(list(TOLD)))
    np.testing.assert_array_equal(cache.take(rows).states.k, np.asarray(cache.states.k)[:, rows])


# In text ------------------------------------------------------------------------------------------------------------


def received(b: jc.Agent, control: str) -> tuple[str, ...]:
    return turn_of("message", b, control).received.text


def test_texts_are_controlled_by_their_words(b):
    written = received(b, "other")
    pieces = lambda text: b.tokenizer.encode(text, add_special_tokens=False)
    true = turn_of("message", b).received.text
    assert sorted(written) == sorted(true) and written != true
    assert all(x in {*true} - {true[i]} for i, x in enumerate(received(b, "mean"))), "another's, word for word"
    for i, text in enumerate(received(b, "moments")):
        words = {token for j, other in enumerate(true) if j != i for token in pieces(other)}
        assert text and {*pieces(text)} <= words | {*pieces(f" {text}")}
    assert received(b, "self") == ASKED
    assert len({*received(b, "noise")}) == len(true)


def test_an_empty_message_is_silence_token_by_token(b):
    turn = turn_of("message", b, "zero")
    assert turn.rows == silent(b, b, TOLD, ASKED).rows
    words = turn_of("message", b, "zero", tell="Your partner says: {message} {prompt}")
    assert words.rendered(0)[0] == f"Your partner says:  {ASKED[0]}", "a template's words stay"


def test_a_message_is_cut_to_tokens_and_bytes_and_costs_what_it_says(b):
    whole = send_text(b, TOLD, Conversation(**TALK))
    cut = send_text(b, TOLD, Conversation(**TALK, limits=[0, 1, 2, 3, 4, 5, 99]))
    for n, (short, long) in list(enumerate(zip(cut.message.text, whole.message.text, strict=True)))[1:]:
        assert long.startswith(short) and (n == 6 or cut.spent[n].written <= n)
        assert cut.spent[n].sent == len(short.encode())
        apart = send_text(b, [TOLD[n]], Conversation(max_message_tokens=max(n, 1)))
        if 0 < n < 5 and apart.message.text[0] == short:
            assert cut.spent[n].flops == apart.spent[0].flops and cut.spent[n].written == apart.spent[0].written
    assert cut.message.text[0] == "" and cut.spent[0].flops == 0 and cut.spent[6] == whole.spent[6]
    few = send_text(b, TOLD, Conversation(**TALK, bytes=[6] * 7))
    assert all(len(text.encode()) <= 6 for text in few.message.text) and any(few.message.text)
    refused(lambda: Conversation(turns=2, limits=[1]), "turns = 2: only a single message is cut to tokens or bytes")


# What hurts ---------------------------------------------------------------------------------------------------------


def likely(turn) -> np.ndarray:
    return np.array([x.logprobs[0] for x in turn.score([[f" {answer}"] for answer in ANSWERS])])


@pytest.mark.parametrize("where", ["last", "all", "z"])
def test_the_worst_state_of_the_same_norm_is_worse_than_the_message_and_than_noise(b, where):
    if where == "z":
        how = dict(k=jc.Site("z", 4, [-1]), j=jc.Site("z", 3, [-1]))
    else:
        how = dict(where=where, graft="replace" if where == "last" else "sum")
    turns = {c: turn_of("activation", b, c, **how) for c in (None, "adversarial", "noise", "other")}
    found = {c: likely(turn) for c, turn in turns.items()}
    for c in (None, "noise", "other"):
        assert (found["adversarial"] < found[c]).mean() > 0.8, c
    np.testing.assert_allclose(turns["adversarial"].received.norms, turns[None].received.norms, rtol=1e-4)


@pytest.mark.parametrize("protocol", ["message", "debate", "cipher"])
def test_the_worst_text_is_another_items_and_no_other_one_hurts_more(b, protocol):
    turn_b = lambda turn: turn.turns[turn.receiver] if hasattr(turn, "turns") else turn
    worst = turn_b(turn_of(protocol, b, "adversarial"))
    true = turn_b(turn_of(protocol, b)).received.text
    assert all(text in {*true} - {true[i]} or true.count(text) > 1 for i, text in enumerate(worst.received.text))
    assert likely(worst).mean() <= likely(turn_b(turn_of(protocol, b, "other"))).mean() + 1e-3


def test_the_gradient_of_answer_logits_is_that_of_finite_differences(b):
    prompts, answers = b.tokenize(list(ASKED)), b.spell(ASKED, ANSWERS)
    sent = jc.send(b.params, b.tokenize(list(TOLD)), 4)

    def loss(states):
        logits = jc.answer_logits(b.params, prompts, answers, edits=[jc.receive(jc.Message(states), 1)])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(answers, 0)[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(answers < 0, 0, picked))

    way = jax.random.normal(jax.random.key(0), sent.states.shape)
    slope = float(jnp.sum(jax.grad(loss)(sent.states) * way))
    step = (loss(sent.states + 1e-2 * way) - loss(sent.states - 1e-2 * way)) / 2e-2
    assert slope == pytest.approx(float(step), rel=2e-2)
    scored = activation(b, b, TOLD, ASKED, k=4, j=1).score([[f" {answer}"] for answer in ANSWERS])
    assert float(loss(sent.states)) == pytest.approx(sum(x.logprobs[0] for x in scored), abs=1e-2)


# Everywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", SENDING)
def test_every_control_goes_with_every_protocol(b, protocol):
    for control in CONTROLS:
        turn = turn_of(protocol, b, control)
        assert len(turn.write(2)) == len(ASKED), control


@pytest.mark.parametrize("protocol", ["message", "debate", "activation", "exchange"])
def test_games_may_have_seeds_of_their_own(b, protocol):
    how = dict(sampling=jc.Sampling(0.7), seed=[n + 3 for n in range(len(ASKED))])
    for control in CONTROLS:
        assert len(turn_of(protocol, b, control, **how).write(2)) == len(ASKED), control


def test_several_senders_and_debaters_are_controlled(b):
    how = dict(k=[4, 3], j=1)
    for control in CONTROLS:
        turn = activation([b, b], b, [TOLD, TOLD], ASKED, control=StandIn(control, answers=ANSWERS), **how)
        assert len(turn.write(2)) == len(ASKED), control
    panel = debate(
        (b, b, b), (ASKED, TOLD, TOLD), control=StandIn("other", answers=ANSWERS), rounds=3, max_message_tokens=5
    )
    assert len(panel.turns) == 3 and len(panel.write(2)) == len(ASKED)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "z", "resid_mid", "embed", "q", "v"])
def test_activations_are_controlled_at_every_site_and_position(b, site):
    layer = None if site == "embed" else 3
    for positions in ("last", "all", [-3, -1], slice(-2, None)):
        at = jc.Site(site, layer, positions)
        graft = "sum" if positions == "all" else "replace"
        for control in (None, "other", "mean", "moments", "noise", "zero", "self", "generated"):
            turn = turn_of("activation", b, control, k=at, j=at, graft=graft)
            assert np.isfinite(np.asarray(turn.logits)).all(), (positions, control)
            if control == "self" and graft == "replace":
                alone = silent(b, b, TOLD, ASKED)
                assert_close(
                    scipy.special.log_softmax(turn.logits, -1),
                    scipy.special.log_softmax(alone.logits, -1),
                    "self",
                    1e-4,
                )


@pytest.mark.parametrize("site", ["resid_post", "z"])
def test_every_row_may_have_a_position_of_its_own(b, site):
    """The word that names the place; with or without an axis of positions."""
    length = np.array([len(b.encode(text)) for text in TOLD])
    for positions in (length - 2, (length - 2)[:, None]):
        read = jc.Site(site, 3, positions)
        at = jc.Site(site, 2, np.full_like(positions, -1))
        for control in (None, *CONTROLS):
            if control in ("generated", "unrelated"):
                continue  # other prompts, other positions
            turn = turn_of("activation", b, control, k=read, j=at)
            assert np.isfinite(np.asarray(turn.logits)).all(), control


def test_a_padded_vocabulary_names_no_token_that_the_tokenizer_lacks(b):
    """Vectors beyond every embedding are nearest to one that has a name."""
    params = b.params
    rows = jnp.concatenate([params.embed, 5 * jax.random.normal(jax.random.key(0), (64, params.config.width))])
    config = dataclasses.replace(params.config, vocab=len(rows))
    wide = dataclasses.replace(b, params=params.replace(embed=rows, config=config))
    for control in ("noise", "moments", "mean", "zero", "other"):
        turn = turn_of("cipher", wide, control)
        assert max(max(row) for row in turn.rows) < len(params.embed), control


def test_bytes_that_are_sent_are_counted(b):
    width = b.params.config.width
    assert [x.sent for x in turn_of("activation", b).before] == [4 * width] * len(TOLD)
    everything = turn_of("activation", b, where="all", graft="sum")
    assert [x.sent for x in everything.before] == [4 * width * len(b.encode(x)) for x in TOLD]
    told = turn_of("message", b)
    assert [x.sent for x in told.before] == [len(text.encode()) for text in told.received.text]
    assert [r.spent.sent for r in turn_of("exchange", b).write(1)] == [2 * 4 * width] * len(TOLD)
    vectors = turn_of("cipher", b)
    assert [x.sent for x in vectors.before] == [4 * width * int(n) for n in np.asarray(vectors.received.valid).sum(1)]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda b: StandIn("shuffled"), "unknown control 'shuffled': choose one of other, generated"),
        (lambda b: StandIn("adversarial"), "adversarial needs the right answers: StandIn('adversarial', answers=[..])"),
        (lambda b: message(b, b, TOLD, ASKED, control=StandIn("other", ["x"])), "1 right answers for 7 messages"),
        (lambda b: message(b, b, TOLD[:1], ASKED[:1], control="mean"), "mean needs at least two items"),
        (lambda b: activation(b, b, TOLD[:1], ASKED[:1], k=4, j=1, control="moments"), "moments needs at least two"),
        (
            lambda b: jc.stand_in(jc.Message(jnp.ones((2, 3))), "self"),
            "unknown control 'self': choose one of other, mean",
        ),
        (lambda b: jc.stand_in(jc.Message(text=("a", "b")), "mean"), "this message holds text: use jaxcomm.protocols"),
        (lambda b: silent(b, b, TOLD, ASKED, control="other"), "control"),
    ],
)
def test_bad_input_is_one_clear_line(b, call, says, unchecked):
    if says == "control":
        with pytest.raises(TypeError, match="control"):
            call(b)
    else:
        refused(lambda: call(b), says)


def test_a_control_has_the_protocols_seed_or_its_own(b):
    noise = lambda **how: np.asarray(
        turn_of("activation", b, StandIn("noise", **how.pop("own", {})), **how).received.states
    )
    np.testing.assert_array_equal(noise(seed=3), noise(own={"seed": 3}))
    assert not np.array_equal(noise(seed=3), noise(seed=4))
    rows = np.arange(len(TOLD)) + 5
    changed = dataclasses.replace(StandIn("noise"), seed=rows)
    assert noise(own={"seed": rows}).shape == np.shape(turn_of("activation", b, changed).received.states)
