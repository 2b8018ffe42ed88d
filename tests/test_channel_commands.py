"""Channels by the command line: games, evaluations, maps of keys and values, and sweeps over selections of layers."""

import dataclasses
import json

import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm.evals import selections
from jaxcomm.evals.effects import effect
from jaxcomm.evals.evaluation.arms import Team, arms
from jaxcomm.evals.evaluation.run import run as evaluate
from jaxcomm.evals.evaluation.settings import EvalSettings
from jaxcomm.evals.games import Wording, draw
from jaxcomm.evals.options import PrefixOptions
from jaxcomm.evals.prefixes import LayerChoice, answers_of, calibrate
from jaxcomm.protocols import Prefixing, StandIn, deltas, kv, send_prefix

from command import jaxcomm, refused
from evaluations import items
from game_files import lines_of, write_game

PAIR = ("--a", "pair:b", "--b", "pair:b")


def records(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# Games ---------------------------------------------------------------------------------------------------------------


def test_every_channel_is_played_with_controls_its_layers_and_its_bytes(tmp_path, b):
    channels = ("kv", "latent", "thinking", "deltas")
    options = ("--steps", 2, "--delta-layers", 4, "--scheme", "score", "--ratio", 0.5, "--control", "other", "noise")
    jaxcomm(
        "play", *PAIR, "--n", 6, "--protocol", "silent", *channels, *options, "--probe", 12, "--out", tmp_path / "run"
    )
    rows = {(r["protocol"], r["control"]): r for r in records(tmp_path / "run" / "results.jsonl")}
    wanted = [("silent", None), ("thinking", None)]
    wanted += [(name, control) for name in ("kv", "latent", "deltas") for control in (None, "other", "noise")]
    assert {*rows} == {*wanted}
    own = rows["kv", None]
    assert own["scheme"] == "score" and own["calibration_items"] == 8 and len(own["layers"]) == 3
    tokens = np.mean([len(row) for row in b.rows([item.prompt_a for item in draw("countries", 0, 6).items])])
    c = b.params.config
    assert own["bytes_sent"] == pytest.approx(tokens * 3 * 2 * c.kv_heads * c.head_dim * 4)
    assert rows["latent", None]["bytes_sent"] == pytest.approx((tokens + 2) * 3 * 2 * c.kv_heads * c.head_dim * 4)
    assert rows["thinking", None]["bytes_sent"] == rows["silent", None]["bytes_sent"] == 0
    assert own["accuracy"] > 0.8 and rows["kv", "other"]["accuracy"] == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| kv |" in report and "costs.png" in report


def test_layers_are_chosen_on_items_that_are_not_played(tmp_path, b):
    game, wording = draw("countries", 0, 6), Wording()
    choice = LayerChoice(scheme="greedy", ratio=0.5, items=4)
    found = choice.calibration_items(game)
    assert len(found.items) == 4 and not {i.prompt_a for i in found.items} & {i.prompt_a for i in game.items}
    layers, told = choice(game, b, b, wording)
    scores = calibrate("greedy", found, (b, b), wording, Prefixing())
    assert layers == tuple(sorted((np.argsort(-scores)[:3] + 1).tolist())) and told["calibration_items"] == 4
    shown = draw("countries", 0, 6, examples=2)
    for calibration in (None, "tip_sheets"):
        items = LayerChoice(scheme="score", ratio=0.5, calibration=calibration).calibration_items(shown)
        assert items.examples == shown.examples, "read as the game is played"
    file = write_game(tmp_path / "mine.jsonl", *lines_of(game.items[:3]))
    mine = draw(file)
    with pytest.raises(ValueError, match="has no others: name a game or a file with --calibration"):
        choice(mine, b, b, wording)
    with pytest.raises(ValueError, match="is also played; layers would be chosen on what is reported"):
        LayerChoice(scheme="score", ratio=0.5, calibration=file, items=2)(game, b, b, wording)


@pytest.mark.parametrize(
    "words, says",
    [
        (("--protocol", "kv", "--ratio", 0.5), "--scheme and --ratio go together"),
        (("--protocol", "kv", "--scheme", "last", "--ratio", 0), "--ratio 0.0: a share of the layers, above 0"),
        (
            ("--protocol", "kv", "--scheme", "last", "--ratio", 0.5, "--layers", 3),
            "--layers and --scheme last both choose layers",
        ),
        (("--protocol", "kv", "--layers", 9), "layer 9 cannot see a prefix: this model's layers are 1 to 6"),
        (("--protocol", "kv", "--steps", 3), "--steps does not apply to the protocol kv"),
        (("--protocol", "silent", "--layers", 3), "--layers does not apply to the protocol silent"),
        (("--protocol", "deltas"), "deltas needs --delta-layers"),
        (("--protocol", "deltas", "--delta-layers", 9), "j = 9 is out of range"),
        (("--protocol", "latent", "--steps", 0, "--sends", "thoughts"), "--steps 0: it must be at least 1"),
        (("--protocol", "kv", "--a", "pair:a"), "give a map of keys and values"),
        (
            ("--protocol", "kv", "--scheme", "last", "--ratio", 0.5, "--calibration", "countries"),
            "--calibration is for",
        ),
    ],
)
def test_options_that_cannot_be_are_one_line(capsys, words, says):
    assert says in refused(capsys, "play", *PAIR, "--n", 2, *words)


def test_prefixes_and_thoughts_are_read(tmp_path, capsys, b):
    jaxcomm("read", *PAIR, "--channel", "latent", "--steps", 2, "--n", 2, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "After thought 2 A would say:" in printed and "most looked at by the last token" in printed
    rows, game = records(tmp_path / "run" / "items.jsonl"), draw("countries", 0, 2)
    for row, item in zip(rows, game.items, strict=True):
        shares = np.array(row["sent"]["looks"]["last"])
        tokens = len(b.rows([item.prompt_a])[0]) + 2
        assert shares.shape == (6, tokens) == (6, len(row["sent"]["looks"]["tokens"]))
        assert row["sent"]["looks"]["tokens"][-1] == "<thought 2>"
        assert (shares.sum(axis=1) < 1).all() and shares.sum(axis=1).max() > 0.5
        told = jc.think(b.params, b.tokenize([item.prompt_a], 2), steps=2)
        likely = float(np.max(np.exp(told.logits[0] - np.logaddexp.reduce(np.asarray(told.logits[0])))))
        assert row["sent"]["thoughts"][1]["values"][0] == pytest.approx(likely, abs=1e-4)
    assert {p.name for p in (tmp_path / "run").glob("*.png")} == {"item-1.png", "item-2.png"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "to read activations, or name another --channel"),
        (("--channel", "deltas"), "deltas needs --delta-layers"),
        (("--channel", "bridge"), "bridge needs --bridge"),
        (("--channel", "kv", "--k", 4, "--j", 1), "to read activations, or name another --channel"),
        (("--channel", "deltas", "--delta-layers", 9), "j = 9 is out of range"),
        (("--channel", "latent", "--steps", 2, "--sends", "thoughts"), "an inspection shows A's tokens"),
        (
            ("--channel", "kv", "--tell", "{message}{prompt}"),
            "--tell does not apply to --channel kv: it is an option of deltas",
        ),
        (
            ("--channel", "latent", "--graft", "sum"),
            "--graft does not apply to --channel latent: it is an option of activation",
        ),
        (("--channel", "kv", "--place", "turn", "--positions", "own"), "leave out positions='own'"),
    ],
)
def test_what_cannot_be_read_is_one_line(capsys, words, says):
    assert says in refused(capsys, "read", *PAIR, "--n", 2, *words)


def test_with_a_sink_the_first_layer_hears_too(tmp_path):
    words = ("--channel", "kv", "--layers", 5, "--n", 1, "--out", tmp_path)
    for more, first in (((), 5), (("--published-mask",), 1)):
        jaxcomm("read", *PAIR, *words, *more)
        (row,) = records(tmp_path / "items.jsonl")
        assert [x["layer"] for x in row["heard"]] == list(range(first, 7)) and row["heard"][0] != row["alone"][0]


def test_deltas_are_read(tmp_path, capsys, b):
    jaxcomm("read", *PAIR, "--channel", "deltas", "--delta-layers", 3, 4, "--n", 2, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "A writes: 'Russia, Europe, Moscow.'" in printed and "length, layer 4" in printed
    for row in records(tmp_path / "run" / "items.jsonl"):
        sent, written = row["sent"], row["reply"]["details"]["ids"]
        assert [len(own) for own in sent["norms"]] == [len(written)] * 2 == [len(sent["tokens"])] * 2
        told = np.array([b.rows([row["prompt_a"]])[0] + written])
        states = np.asarray(jc.hidden_states(b.params, told))[4, 0, -len(written) - 1 :]
        moved = np.linalg.norm(np.diff(states.astype(np.float64), axis=0), axis=-1)
        np.testing.assert_allclose(sent["norms"][1], moved, rtol=1e-3)
        assert [x["layer"] for x in row["heard"]] == [3, 4, 5, 6] and row["heard"] != row["alone"]
        assert row["heard"][-1]["likeliest"]["ids"][0] == row["reply"]["ids"][0]


def test_a_message_that_is_empty_is_played_swept_and_read(tmp_path, capsys):
    silenced = (*PAIR, "--n", 2, "--delta-layers", 4, "--ask", "{prompt} Russia, Europe, Moscow.")
    controls = ("--control", "other", "zero", "mean", "noise", "self")
    jaxcomm("play", *silenced, "--protocol", "deltas", *controls, "--probe", 0)
    assert "A says:  ''" in capsys.readouterr().out
    jaxcomm("read", *silenced, "--channel", "deltas", "--out", tmp_path / "read")
    assert "at each of 0 tokens" in capsys.readouterr().out and (tmp_path / "read" / "item-2.png").is_file()
    jaxcomm("select", *silenced, "--channel", "deltas", "--out", tmp_path / "select")
    (cell,) = records(tmp_path / "select" / "results.jsonl")
    assert cell["logprob"] == cell["other_logprob"] == cell["text_logprob"]


def test_every_option_of_channels_reaches_its_protocol():
    """But for those by which layers are chosen, or files loaded, before there are settings."""
    changed = dict(
        place="turn", positions="own", published_mask=True, steps=3, thought="soft", sends="thoughts", order="row",
        delta_layers=(2,),
    )  # fmt: skip
    fixed = {"layers", "scheme", "ratio", "alpha", "calibration", "calibration_items", "kv_map", "bridge"}
    assert {f.name for f in dataclasses.fields(PrefixOptions)} == {*changed, *fixed}
    default = PrefixOptions().channel_settings()
    for name, value in changed.items():
        assert PrefixOptions(**{name: value}).channel_settings() != default, name
    assert default["kv"]["layers"] == "all" and PrefixOptions().channel_settings((3,))["kv"]["layers"] == (3,)


# Maps of keys and values -----------------------------------------------------------------------------------------------


def test_keys_and_values_are_mapped_between_models_of_unequal_size(tmp_path, capsys):
    ab = ("--a", "pair:a", "--b", "pair:b")
    fit = ("--kv", "--text", "statements:countries", "--n", 400, "--stride", 1)
    jaxcomm("fit-map", *ab, *fit, "--out", tmp_path / "map")
    table = capsys.readouterr().out
    assert "cosine" in table and "R2: on held-out texts" in table
    controls = ("--control", "other", "self", "generated", "unrelated", "zero")
    mapped = ("--protocol", "kv", "--kv-map", tmp_path / "map", *controls)
    jaxcomm("play", *ab, "--n", 8, *mapped, "--out", tmp_path / "run")
    rows = {(r["protocol"], r["control"]): r for r in records(tmp_path / "run" / "results.jsonl")}
    assert rows["kv", None]["accuracy"] >= 0.5 and rows["kv", "other"]["accuracy"] == 0 and rows["kv", None]["mapped"]
    assert rows["kv", "self"]["accuracy"] < 0.5, "B's own keys and values, which need no map"
    says = refused(capsys, "play", *PAIR, "--n", 2, "--protocol", "kv", "--kv-map", tmp_path / "map")
    assert "was fitted for another pair" in says
    assert "or --kv, which maps all of them" in refused(
        capsys, "fit-map", *ab, "--text", "x", "--out", tmp_path / "new"
    )


# Evaluations -----------------------------------------------------------------------------------------------------------


def test_channels_are_arms_of_an_evaluation(b, tmp_path):
    protocols = ("single", "kv", "latent", "thinking", "deltas")
    how = dict(layers=(3, 4, 5, 6), steps=2, delta_layers=(4,), max_message_tokens=16, max_new_tokens=6, form="plain")
    asked = EvalSettings(tasks=("countries",), n=4, protocols=protocols, tell="{message} {prompt}", **how)
    lines = evaluate(asked, Team(b, b), tmp_path / "run", resume=False, command="jaxcomm eval", recorded={})
    found = {line["protocol"]: line for line in lines if line["metric"] == "exact_match"}
    assert {*found} == {*protocols, "kv, other", "latent, other", "deltas, other"}
    game = [row for row in items(tmp_path / "run") if row["protocol"] == "kv"]
    c = b.params.config
    for row in game:
        assert (
            row["bytes_sent"] == len(b.encode(json.loads(row["rendered_a"])[0])) * 4 * 2 * c.kv_heads * c.head_dim * 4
        )
    turn = kv(b, b, [json.loads(r["rendered_a"])[0] for r in game], [r["prompt"] for r in game], layers=[3, 4, 5, 6])
    assert [r.text for r in turn.write(6)] == [json.loads(row["answer"])[0].strip() for row in game]


def test_an_evaluation_asks_for_nothing_that_layers_were_chosen_on(b, tmp_path):
    asked = EvalSettings(tasks=("countries",), n=4, protocols=("single", "kv"))
    docs = evaluate_docs(asked)
    team = Team(b, b, layers=(3, 4), calibrated=[docs[0]["prompt_a"]])
    with pytest.raises(ValueError, match="is also a calibration item; layers would be chosen on what is reported"):
        evaluate(asked, team, tmp_path / "run", resume=False, command="", recorded={})
    chosen = dict(scheme="score", ratio=0.5)
    with pytest.raises(ValueError, match="needs items that are not reported on: name a game or a file"):
        list(arms(EvalSettings(tasks=("countries",), protocols=("kv",), **chosen), Team(b, b)))


def evaluate_docs(asked):
    from jaxcomm.evals.evaluation.questions import read_questions

    (task,) = read_questions(asked).tasks.values()
    return list(task.test_docs())


# Selections ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    out = tmp_path_factory.mktemp("selected") / "run"
    words = ("--schemes", "score", "last", "--ratios", 0, 0.5, 1, "--ways", "plain", "sink", "published", "--n", 5)
    jaxcomm("select", *PAIR, *words, "--calibration-items", 3, "--out", out)
    return out, words


def test_a_sweep_over_selections_says_what_each_selection_says(selected, b):
    out, _ = selected
    cells, game = records(out / "results.jsonl"), draw("countries", 0, 5)
    told, asked = [i.prompt_a for i in game.items], [i.prompt_b for i in game.items]
    answers = answers_of(game, b, asked)
    order = jc.derange([i.answer for i in game.items], 0)
    for cell in cells:
        how = dict(sink=cell["way"] != "plain", future=cell["way"] == "published")
        for whose, of in (("", range(5)), ("other_", order)):
            past = jc.select(
                send_prefix(b, b, [told[n] for n in of], Prefixing()).message.states, cell["layers"], **how
            )
            logits, own = jc.prefill(b.params, b.tokenize(asked), past=[past])
            found, best = jc.score(b.params, logits, own, answers[:, None], past=[past])
            assert cell[f"{whose}logprob"] == pytest.approx(float(found.sum(axis=(1, 2)).mean()), abs=1e-3)
            assert cell[f"{whose}accuracy"] == pytest.approx(float(np.mean(np.asarray(best.all(axis=(1, 2))))))
    assert len(cells) == 3 * 2 * 3


def test_a_sweep_over_selections_goes_on_where_it_was(selected, tmp_path, capsys):
    out, words = selected
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    (out / "chunks" / "sink-own.parquet").unlink()
    jaxcomm("select", *PAIR, *words, "--calibration-items", 3, "--out", out, "--resume")
    assert capsys.readouterr().out.count("computing") == 1
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before
    assert "holds a different run" in refused(
        capsys, "select", *PAIR, *words, "--calibration-items", 2, "--out", out, "--resume"
    )


def test_tables_of_selections_are_paired_and_corrected_over_distinct_selections():
    rng = np.random.default_rng(0)
    grid = selections.Grid(("first", "last"), (0.0, 0.5, 1.0), ("plain",), {}, 4)
    assert len(grid.selections) == 4, "none, all, and two halves"
    hits, others = rng.random((40, 4)) < 0.7, rng.random((40, 4)) < 0.3
    swept = selections.Swept(rng.normal(size=(40, 4)), hits, rng.normal(size=(40, 4)) - 1, others)
    heavy = selections.Weight(10.0, 100)
    rows = list(selections.rows(grid, swept, "plain", heavy))
    for row, (_, _, _, c) in zip(rows, grid.cells, strict=True):
        value = effect(hits[:, c], others[:, c]).value.value
        assert row[6].startswith(f"{100 * value:+.0f}") and row[4] == f"{1000 * grid.selections[c].sum():,}"
        assert (row[7] == "") == (not grid.selections[c].any())
    # The first layer whole, and one token of each of the others.
    assert heavy.of(np.array([False, False, True, False]), "sink") == 100 * (2 * 10 + 2)
    (drawn,) = selections.pictures(grid, {"plain": swept})
    assert drawn.file == "ratios.png" and drawn.png.startswith(b"\x89PNG")


def test_a_sweep_over_thoughts_says_what_so_many_thoughts_say(tmp_path, b):
    words = ("--channel", "latent", "--steps", 0, 1, 3, "--schemes", "last", "--ratios", 0.5, 1, "--n", 4)
    jaxcomm("select", *PAIR, *words, "--out", tmp_path / "run")
    cells, game = records(tmp_path / "run" / "results.jsonl"), draw("countries", 0, 4)
    told, asked, answers = zip(*((i.prompt_a, i.prompt_b, i.answer) for i in game.items), strict=True)
    assert [(cell["steps"], cell["ratio"]) for cell in cells] == [(m, r) for m in (0, 1, 3) for r in (0.5, 1.0)]
    for cell in cells:
        for control in (None, "other"):
            stand_in = control and StandIn(control, answers=answers)
            turn = kv(b, b, told, asked, layers=cell["layers"], steps=cell["steps"], control=stand_in)
            scored = turn.score([[f" {answer}"] for answer in answers])
            name = "other_logprob" if control else "logprob"
            assert cell[name] == pytest.approx(np.mean([x.logprobs[0] for x in scored]), abs=1e-3)
    assert {p.name for p in (tmp_path / "run").glob("*.png")} == {"ratios.png", "steps.png"}


def test_a_sweep_over_layers_of_deltas_says_what_each_layer_says(tmp_path, capsys, b):
    words = ("select", *PAIR, "--channel", "deltas", "--delta-layers", 5, 1, "--max-message-tokens", 8, "--n", 5)
    jaxcomm(*words, "--out", tmp_path / "run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The text alone: 100 [57, 100] exact match" in report and "| presence |" in report
    assert "The other item always has another answer." in report
    cells, game = records(tmp_path / "run" / "results.jsonl"), draw("countries", 0, 5)
    told, asked, answers = zip(*((i.prompt_a, i.prompt_b, i.answer) for i in game.items), strict=True)
    assert [cell["layer"] for cell in cells] == [5, 1]
    for cell in cells:
        for name, control in (("", None), ("other_", "other"), ("text_", "zero")):
            stand_in = control and StandIn(control, answers=answers)
            turn = deltas(b, b, told, asked, j=cell["layer"], max_message_tokens=8, control=stand_in)
            scored = turn.score([[f" {answer}"] for answer in answers])
            assert cell[f"{name}logprob"] == pytest.approx(np.mean([x.logprobs[0] for x in scored]), abs=1e-3), name
            assert cell[f"{name}accuracy"] == np.mean([x.greedy[0] for x in scored]), name
    assert cells[1]["other_logprob"] < cells[1]["logprob"] - 0.1
    capsys.readouterr()
    jaxcomm(*words, "--out", tmp_path / "run", "--resume")
    assert "computing" not in capsys.readouterr().out and (tmp_path / "run" / "report.md").read_text() == report
    (tmp_path / "run" / "deltas.npz").write_bytes(b"PK\x03\x04")
    assert "deltas.npz is damaged" in refused(capsys, *words, "--out", tmp_path / "run", "--resume")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", 0, 1), "--steps does not apply to --channel kv: it is an option of latent"),
        (
            ("--channel", "deltas", "--ratios", 0.5),
            "--ratios does not apply to --channel deltas: it is an option of kv",
        ),
        (("--channel", "latent", "--steps", -1), "--steps -1: A thinks 0 steps or more"),
        (("--channel", "latent", "--steps", 1, 1), "name at least one, each once"),
        (("--channel", "deltas", "--delta-layers", 7), "j = 7 is out of range"),
        (("--channel", "deltas", "--max-message-tokens", 0), "--max-message-tokens 0"),
        (("--channel", "deltas", "--max-message-tokens", 1000), "1000 tokens are to follow it"),
        (("--channel", "deltas", "--ask", "hello"), "it must have {prompt}"),
        (("--schemes", "last", "greedy", "--alpha", 0.5), "--alpha 0.5: it is for --scheme score"),
        (("--schemes", "last", "--calibration-items", 3), "--calibration-items 3 is for --scheme score and greedy"),
        (("--channel", "deltas", "--delta-layers", 4, 4), "j names layer 4 twice"),
        (("--channel", "latent", "--steps", 1000, "--schemes", "last"), "1000 tokens are to follow it"),
        (("--channel", "latent", "--steps", 1000), "1000 tokens are to follow it"),
    ],
)
def test_settings_of_a_sweep_that_cannot_be_are_one_line(tmp_path, capsys, words, says):
    assert says in refused(capsys, "select", *PAIR, "--n", 2, *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
