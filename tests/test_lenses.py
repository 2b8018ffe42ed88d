"""What a message says: logit lens and patchscope equal hooks on transformers in float64; games looked into, as files and pictures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm import protocols
from jaxcomm.evals.inspection_figure import drawable, readable, scene
from jaxcomm.lmnet import init_network
from jaxcomm.protocols.inspections import spell_out

import command
from command import jaxcomm
from conftest import ROUNDED, assert_close, refused
from game_files import write_game
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


def test_behind_what_was_read_before_the_lens_is_that_of_the_whole_text(llama):
    whole = [[*row, *ROWS[0]] for row in ROWS]
    want = jc.logit_lens(llama.params, jc.left_pad(whole), count=VOCAB)
    past = jc.prefill(llama.params, PADDED)[1]
    asked = np.array([ROWS[0]] * len(ROWS))
    found = jc.logit_lens(llama.params, asked, past=[past], count=VOCAB)
    assert_close(every(found.tokens, found.logprobs), every(want.tokens, want.logprobs), "behind a cache")


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


# Games --------------------------------------------------------------------------------------------------------------

TOLD = ["Bob is at the Colosseum.", "Alice is at the Acropolis of Athens."]
ASKED = ["Which country is Bob located in?", "Which country is Alice located in?"]


@pytest.fixture(scope="module")
def inspected(b):
    return protocols.inspect_activation(b, b, TOLD, ASKED, ["Italy", "Greece"], k=5, j=2, graft="sum")


def test_a_game_is_looked_into_as_it_is_played(b, inspected):
    turn = protocols.activation(b, b, TOLD, ASKED, k=5, j=2, graft="sum")
    silent = protocols.silent(b, b, [], ASKED).score([[" Italy"], [" Greece"]])
    for i, (x, reply) in enumerate(zip(inspected, turn.write(), strict=True)):
        assert x.reply == reply and x.sent.token == "." and x.sent.position == len(b.encode(TOLD[i])) - 1
        assert [layer.layer for layer in x.heard] == [layer.layer for layer in x.alone] == [2, 3, 4, 5, 6]
        assert x.heard[-1].likeliest.ids[0] == reply.ids[0] and x.answer_token == (" Italy", " Greece")[i]
        assert x.heard[-1].answer_logprob == pytest.approx(
            turn.score([[" Italy"], [" Greece"]])[i].logprobs[0], abs=1e-4
        )
        assert x.alone[-1].answer_logprob == pytest.approx(silent[i].logprobs[0], abs=1e-4)
        assert x.sent.norm == pytest.approx(reply.details["norm_sent"], rel=1e-5)
        assert json.loads(json.dumps(x.row()))["reply"]["text"] == reply.text


@pytest.mark.parametrize(
    ("protocol", "how"),
    [
        ("silent", {}),
        ("skyline", {}),
        ("message", dict(max_message_tokens=8)),
        ("activation", dict(k=5, j=2)),
        ("activation", dict(k=5, j=2, where="all", graft="sum")),
        ("kv", dict(layers=[2, 5])),
        ("latent", dict(steps=2, sends="thoughts")),
        ("deltas", dict(j=[3, 4], max_message_tokens=8)),
    ],
)
def test_every_turn_can_be_looked_into(b, protocol, how):
    turn = protocols.PROTOCOLS[protocol](b, b, TOLD, ASKED, **how)
    lens = turn.lens([6], count=3)
    want, ids = jax.lax.top_k(jax.nn.log_softmax(turn.logits), 3)
    np.testing.assert_array_equal(lens.tokens[:, 0], ids)
    np.testing.assert_allclose(lens.logprobs[:, 0], want, atol=1e-4)


def test_what_stands_in_for_a_message_is_not_looked_into(b):
    games, says = (b, b, TOLD, ASKED, ["Italy", "Greece"]), "an inspection shows A's own message, leave it out"
    made = jc.init_gated(jax.random.key(0), b.params, b.params)
    refused(lambda: protocols.inspect_prefix(*games, protocols.Prefixing(control="other")), says)
    refused(lambda: protocols.inspect_bridge(*games, protocols.Bridging(made, control="zero")), says)
    talk = protocols.Conversation(control="zero", max_message_tokens=8)
    refused(lambda: protocols.inspect_deltas(*games, talk, layers=[4]), says)


def test_what_was_not_read_at_once_is_not_looked_into(b):
    with pytest.raises(ValueError, match="this turn was not read in one pass"):
        protocols.thinking(b, b, [], ASKED, steps=1).lens()


def test_tokens_are_spelled_readably(b):
    parts = b.tokenizer.encode("東", add_special_tokens=False)
    assert "\ufffd" not in "".join(spell_out(b, parts)) and spell_out(b, b.encode(" Italy")[-1:]) == [" Italy"]
    assert [readable(x) for x in (" Italy", " ", "\n", "a b ")] == ["·Italy", "·", "\\n", "a b·"]
    assert drawable("東京 $5_") == "\\u6771\\u4eac $5_" and drawable("Liechtenstein", 8) == "Liechte…"


@pytest.mark.parametrize("layers", [1, 40])
def test_a_picture_is_drawn_of_any_number_of_layers_and_any_text(inspected, layers):
    several = lambda heard: (heard * layers)[:layers]
    x = dataclasses.replace(inspected[0], heard=several(inspected[0].heard), alone=several(inspected[0].alone))
    png = scene(x, ["A reads: $x_1$ and $", "B reads: 東京\n\\frac"], "right")
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


ODD = [
    dict(prompt_a="Ünï $x_1$ is at 東京 🗼 <b>|p|</b> \\alpha.", prompt_b="Where is $x_1$ `now`?", answer="東京"),
    dict(prompt_a="שלום _is_ at $5\tand $6.", prompt_b="Where is _it_, $5?\nSay | so.", answer="$5 _or_ $6"),
]


def test_the_command_writes_a_report_rows_and_pictures_whatever_is_said(tmp_path, capsys):
    game, out = write_game(tmp_path / "odd.jsonl", *ODD), tmp_path / "run"
    words = ("--game", game, "--n", 2, "--k", 4, "--j", 2, "--target", "$ y_1 $ | x is", "--out", out)
    jaxcomm("read", "--a", "pair:b", "--b", "pair:b", *words)
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "report.html", "report.md", "items.jsonl", "item-1.png", "item-2.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt_a"] for row in rows] == [line["prompt_a"] for line in ODD]
    for row in rows:
        assert row["heard"][0]["likeliest"]["ids"] == row["sent"]["head"]["ids"], "replace: as A sees it"
        assert row["hit"] == (row["reply"]["text"] == row["answer"])
    html, text = (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")
    assert html.count("data:image/png;base64,") == 2 and "&lt;b&gt;|p|&lt;/b&gt;" in html and "<b>" not in html
    assert "](item-2.png)" in text and "jaxcomm read --a pair:b --b pair:b" in text
    for part in ("A sends", "Patchscope", "B says", "with the message"):
        assert part in printed and part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--k", 7, "--j", 1), "k = 7 is out of range"),
        (("--k", 1, "--j", 7), "j = 7 is out of range"),
        (("--k", 1, "--j", 1, "--target", "It is"), "the placeholder 'x' occurs 0 times in the target prompt 'It is'"),
        (("--k", 1, "--j", 1, "--placeholder", "hello"), "the placeholder 'hello' occurs 2 times"),
        (("--k", 1, "--j", 1, "--n", 0), "play at least 1 item"),
    ],
)
def test_commands_that_cannot_be_meant_are_refused(capsys, words, message):
    assert message in command.refused(capsys, "read", "--a", "pair:b", "--b", "pair:b", *words)
