"""A patching map is its edits, one by one; words are found in prompts; agents stream what they write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm.edits import scale
from jaxcomm.evals.pair import folder

from conftest import assert_close, prompts

CLEAN = jc.left_pad([prompts(1, n, seed=n)[0].tolist() for n in (5, 8)], 9)
CORRUPTED = jc.left_pad([prompts(1, n, seed=10 + n)[0].tolist() for n in (6, 7)], 8)
ANSWERS = np.array([[5, 6], [7, -1]], np.int32)


def one_by_one(params, site, layer, position, change):
    """The same cell with an edit of its own, and the whole prompt read again."""
    at = jc.Site(site, layer, position)
    edit = jc.Edit(at, change, jc.send(params, CLEAN, at).anonymous())
    logits, cache = jc.prefill(params, CORRUPTED, edits=[edit])
    found = jc.score(params, logits, cache, ANSWERS[:, None])
    return [x[:, 0] for x in found]


@pytest.mark.parametrize(("kind", "layout"), [("gemma2", "stacked"), ("gpt_neox", "unrolled")], indirect=["kind"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"])
def test_every_cell_of_a_map_is_an_edit(kind, site, layout):
    if site == "resid_mid" and kind.params.config.parallel:
        with pytest.raises(ValueError, match="no resid_mid"):
            jc.patch(kind.params, kind.params, CLEAN, CORRUPTED, ANSWERS, sites=[site])
        return
    params = kind.params if layout == "stacked" else kind.params.unroll()
    rows = np.array([[0, 2], [1, -1]])
    positions = (-1, slice(1, 3), rows)
    layers = (1, 4)
    found = jc.patch(params, params, CLEAN, CORRUPTED, ANSWERS, sites=[site], layers=layers, positions=positions)
    for i, layer in enumerate(layers):
        for n, position in enumerate(positions):
            logprobs, exact = one_by_one(params, site, layer, position, jc.replace)
            what = f"{kind.name}, {site} {layer} at {position}"
            assert_close(found.logprobs[0, i, n], logprobs, what, 1e-4)
            np.testing.assert_array_equal(found.exact[0, i, n], np.asarray(exact).all(axis=-1), what)


def test_a_change_is_given_the_tokens_positions_in_their_rows(llama):
    late = lambda state, message, context: jnp.where(context.positions[..., None] > 3, message, state)
    positions = (slice(0, 6), 4, -1, [-2, -1], np.array([[0, 4], [5, -1]]))
    options = dict(layers=(2,), positions=positions, change=late)
    found = jc.patch(llama.params, llama.params, CLEAN, CORRUPTED, ANSWERS, **options)
    for n, position in enumerate(positions):
        logprobs, _ = one_by_one(llama.params, "resid_post", 2, position, late)
        assert_close(found.logprobs[0, 0, n], logprobs, f"positions {position}", 1e-4)
    whole = jc.patch(llama.params, llama.params, CLEAN, CORRUPTED, ANSWERS, **options | {"change": jc.replace})
    assert (np.abs(found.logprobs - whole.logprobs)[0, 0, 0, :, 0] > 1e-3).all()


def test_a_map_has_every_layer_and_common_position_and_any_change(llama):
    p, seen = llama.params, []
    half = lambda state, message, context: (state + message) / 2
    found = jc.patch(
        p, p, CLEAN, CORRUPTED, ANSWERS, sites=["resid_post", "z"], change=half, progress=lambda *n: seen.append(n)
    )
    assert found.layers == (0, 1, 2, 3, 4) and found.positions == (-5, -4, -3, -2, -1)
    assert np.isnan(found.logprobs[1, 0]).all() and np.isfinite(found.logprobs[:, 1:]).all()
    assert seen == sorted(seen) and seen[-1] == (90, 90), "5 + 4 layers, 5 positions, 2 games"
    for site, layer, position in ((0, 0, -5), (1, 2, -1)):
        name = ("resid_post", "z")[site]
        logprobs, _ = one_by_one(p, name, layer, position, half)
        assert_close(found.logprobs[site, layer, position], logprobs, f"{name} {layer} at {position}", 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sites=["pattern"]), "'pattern' is no site of a layer that can be edited"),
        (dict(sites=["logits"]), "'logits' is no site of a layer that can be edited"),
        (dict(sites=["resid"]), "'resid' is no site"),
        (dict(sites=[]), "sites is empty"),
        (dict(layers=[9]), "layer 9 is out of range"),
        (dict(positions=[6]), "position 6 is out of range: row 0 has 5 tokens"),
        (dict(answers=ANSWERS[:1]), "for 2 items: give one row of tokens per item"),
        (dict(prompts_a=prompts(3, 4)), "A has 3 prompts, B has 2"),
    ],
)
def test_bad_input_is_one_clear_line(llama, change, message):
    call = dict(prompts_a=CLEAN, prompts_b=CORRUPTED, answers=ANSWERS) | change
    with pytest.raises(ValueError, match=".*") as error:
        jc.patch(llama.params, llama.params, **call)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_models_of_two_shapes_are_refused(llama, wide):
    with pytest.raises(ValueError, match="two models of one shape"):
        jc.patch(llama.params, wide.params, CLEAN, CORRUPTED, ANSWERS)


@pytest.fixture(scope="module")
def agent():
    return jc.load_agent(folder("b"), name="b")


TEXTS = ["Alice is at the Louvre.", "At the Colosseum, Alice saw the Colosseum."]


def test_words_are_found_where_they_stand(agent):
    tokens = agent.tokenize(TEXTS).tokens
    found = agent.find(TEXTS, ["the Louvre", "Colosseum"])
    assert found.shape == tokens.shape
    said = [agent.tokenizer.decode(row[mask]).split() for row, mask in zip(tokens, found, strict=True)]
    assert said == [["the", "Louvre"], ["Colosseum", "Colosseum"]]
    edits = [jc.Edit(jc.Site("resid_post", 2, found), scale(0.0))]
    changed = np.asarray(
        jc.run_with_cache(agent.params, agent.tokenize(TEXTS), sites="resid_post", layers=[2], edits=edits)[1][
            "resid_post"
        ]
    )[0]
    assert not changed[found].any() and changed[~found & agent.tokenize(TEXTS).mask].any(axis=-1).all()
    for text, message in (
        ("Paris", "'Paris' is not in the prompt"),
        ("ouvre", "'ouvre' begins or ends within the token"),
    ):
        with pytest.raises(ValueError, match=message):
            agent.find(TEXTS[:1], text)
    with pytest.raises(ValueError, match="1 texts to find in 2 prompts: give one for each, or one for all"):
        agent.find(TEXTS, ["Louvre"])


@pytest.mark.parametrize("sampling", [None, jc.Sampling(0.7)])
def test_what_is_streamed_is_what_is_generated(agent, sampling):
    prompt = "Bob is at Petra. Which country is Bob located in?"
    pieces = list(agent.stream(prompt, max_new_tokens=12, sampling=sampling, seed=3))
    keys = None if sampling is None else jax.random.split(jax.random.key(3), 1)
    out = jc.generate(
        agent.params,
        agent.tokenize([prompt], 12),
        max_new_tokens=12,
        sampling=sampling,
        keys=keys,
        stop_tokens=agent.stop_tokens,
    )
    assert "".join(pieces).strip() == agent.text(out)[0]


def test_edits_and_what_was_read_before_reach_the_stream(agent):
    """At every step too; a conversation passes them on."""
    told, asked = "Bob is at the Colosseum.", "Which country is Bob located in?"
    past = [jc.receive_cache(jc.send_cache(agent.params, agent.tokenize([told])), agent.params)]
    v = 40 * np.random.default_rng(0).normal(size=128).astype(np.float32)
    edits = [jc.Edit(jc.Site("resid_post", 3), jc.add(v), every_step=True)]
    how = dict(max_new_tokens=6, stop_tokens=agent.stop_tokens)
    write = lambda **changes: agent.text(jc.generate(agent.params, agent.tokenize([asked], 6), **how, **changes))[0]
    stream = lambda **changes: "".join(agent.stream(asked, max_new_tokens=6, **changes)).strip()
    assert stream(past=past) == write(past=past) == "Italy" and stream(edits=edits) == write(edits=edits)
    assert len({stream(), stream(edits=edits), stream(past=past)}) == 3, "each changes something"
    assert jc.Chat(agent).say(asked, past=past, max_new_tokens=6) == "Italy"
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        next(agent.stream(asked, edits=[jc.Edit(jc.Site("resid_post", 9), jc.add(v))]))


def test_a_conversation_keeps_what_was_said(agent):
    chat = jc.Chat(agent)
    said = chat.say("Bob is at Petra. Which country is Bob located in?", max_new_tokens=8)
    assert said == "Jordan" and [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    chat.say("Alice is at the Louvre. Which country is Alice located in?", max_new_tokens=8)
    assert len(chat.turns) == 4


def test_a_message_says_whence_it_is(agent):
    message = jc.send(agent.params, agent.tokenize(TEXTS), jc.Site("resid_post", 5, "last"))
    assert "resid_post 5 at last" in repr(message) and "norm" in repr(message)
    lines = agent.describe(message).split("\n")
    assert len(lines) == 3 and "France" in lines[1]
    assert_close(message.norms, jnp.linalg.norm(message.states, axis=-1), "norms")
