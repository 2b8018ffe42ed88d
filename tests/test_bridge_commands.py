"""`jaxcomm bridge`, and bridges wherever a protocol is asked for."""

import json

import jax
import numpy as np
import pytest

from jaxcomm.evals.agents import load_agents
from jaxcomm.evals.bridges import compare
from jaxcomm.evals.bridges.folders import load_bridge
from jaxcomm.evals.games.world import held_out, world
from jaxcomm.evals.networks import texts
from jaxcomm.protocols import bridge

from command import jaxcomm, refused

PAIR = ("--a", "pair:a", "--b", "pair:b")
SMALL = ("--rows", 8, "--columns", 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A gated bridge, a few steps old."""
    out = tmp_path_factory.mktemp("bridges") / "run"
    jaxcomm(
        "bridge", "train", *PAIR, *SMALL, "--rank", 2, "--steps", 4, "--every", 2, "--learning-rate", 1e-2, "--out", out
    )
    return out


def test_a_finished_run_is_a_bridge_to_play_and_eval(trained, tmp_path, capsys):
    a, b = load_agents("pair:a", "pair:b")
    made = load_bridge(trained, a, b)
    assert made.rank == 2 and np.asarray(made.open).all()
    words = (
        "play",
        *PAIR,
        "--protocol",
        "bridge",
        "--bridge",
        trained,
        "--n",
        3,
        "--probe",
        8,
        "--out",
        tmp_path / "play",
    )
    jaxcomm(*words, "--control", "other", "self", "equal-bytes")
    items = [json.loads(line) for line in (tmp_path / "play" / "items.jsonl").read_text().splitlines()]
    own = [x for x in items if x["protocol"] == "bridge" and x.get("control") is None]
    told, asked = ([x[key] for x in own] for key in ("prompt_a", "prompt_b"))
    assert [x["text"] for x in own] == [r.text for r in bridge(a, b, told, asked, bridge=made).write(16)]
    assert {x["bridge"] for x in own} == {str(trained)} and own[0]["details"]["kind"] == "gated"
    if pytest.importorskip("lm_eval"):
        words = ("eval", *PAIR, "--tasks", "countries", "--protocols", "bridge", "--bridge", trained, "--n", 2)
        jaxcomm(*words, "--out", tmp_path / "eval")
        lines = [json.loads(line) for line in (tmp_path / "eval" / "results.jsonl").read_text().splitlines()]
        assert {line["protocol"] for line in lines} == {"single", "bridge", "bridge, other"}


def test_training_goes_on_where_it_was(trained, tmp_path, capsys):
    record = json.loads((trained / "run.json").read_text())
    assert record["command"].startswith("jaxcomm bridge train")
    again = ("bridge", "train", *PAIR, *SMALL, "--rank", 2, "--steps", 4, "--every", 2, "--learning-rate", 1e-2)
    jaxcomm(*again, "--resume", "--out", trained)
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 4
    error = refused(capsys, *again[:-1], 2e-2, "--resume", "--out", trained)
    assert "learning_rate" in error and str(trained) in error


def test_every_arm_is_trained_alike_and_finished_ones_stay(tmp_path, capsys):
    words = ("bridge", "compare", *PAIR, *SMALL, "--rank", 2, "--steps", 2, "--seeds", 2, "--questions", 3)
    words += ("--learning-rate", 1e-2, "--out", tmp_path / "run")
    jaxcomm(*words)
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    arms = {line["arm"]: line for line in lines}
    assert list(arms) == [*compare.ARMS, "bridge - LoRA on the receiver", "bridge - bridge, sharer = receiver"]
    assert arms["receiver, told"]["accuracy"]["value"] == arms["sharer alone"]["accuracy"]["value"] == 1
    for arm in (compare.BRIDGE, compare.SAME):
        line = arms[arm]
        assert line["rates"] == [1e-2] and line["seeds"] == 2 and line["numbers"]
        assert line["content"]["value"] == pytest.approx(line["accuracy"]["value"] - line["other"]["value"])
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run" / "chunks").iterdir()}
    assert len(whole) == 3 + 3 * 2
    gone = next(name for name in whole if name.startswith("bridge-0.01-1"))
    (tmp_path / "run" / "chunks" / gone).unlink()
    before = (tmp_path / "run" / "results.jsonl").read_text()
    jaxcomm(*words, "--resume")
    strip = lambda text: [{**json.loads(line), "seconds": None} for line in text.splitlines()]
    assert strip((tmp_path / "run" / "results.jsonl").read_text()) == strip(before)
    assert "bridge, sharer = receiver" in (tmp_path / "run" / "report.txt").read_text()


def test_a_comparison_reports_on_questions_that_its_rate_was_not_chosen_on():
    row = lambda *hits, loss=1.0: {
        "hits": [list(map(bool, h)) for h in hits],
        "losses": [loss],
        "numbers": 5,
        "seconds": 1.0,
    }
    done, none = {}, [0, 0, 0, 0, 0]
    for arm in (compare.LORA, compare.SAME, compare.BRIDGE):
        others = (none, none) if arm != compare.LORA else ()
        for seed in (0, 1):
            done[arm, 0.1, seed] = row([1, 1, 1, 0, 0], *others)
            done[arm, 0.2, seed] = row([1, 0, 1, 1, 1], *others)  # better in all, but not on the first two
    done[compare.BRIDGE, 0.1, 1] = row([1, 1, 1, 1, 0], [0, 0, 1, 0, 0], none)
    done[compare.ALONE, 0.1, 0] = row([1, 1, 0, 1, 0])
    arms = {line["arm"]: line for line in compare.summary(done, 2)}
    made = arms[compare.BRIDGE]
    assert made["learning_rate"] == 0.1
    found = {name: made[name]["value"] for name in ("accuracy", "other", "zero", "content")}
    assert found == pytest.approx({"accuracy": 1 / 2, "other": 1 / 6, "zero": 0, "content": 1 / 3})
    assert arms[compare.ALONE]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert arms[compare.ALONE]["learning_rate"] is None
    assert arms["bridge - LoRA on the receiver"]["accuracy"]["value"] == pytest.approx(1 / 6)


def test_what_a_sharer_is_told_is_beside_the_question_and_tests_are_kept_out_of_training(tmp_path):
    a, b = load_agents("pair:a", "pair:b")
    ids, weights, told = next(texts.source("countries", b, 32, sharer=a)(5))
    text = texts.told_country(0, 5)
    assert a.tokenizer.decode(told, skip_special_tokens=True).strip() == text.told
    assert b.tokenizer.decode(ids, skip_special_tokens=True).strip() == f"{text.prompt} {text.answer}"
    assert len(texts.source("countries", b, 32)(5).__next__()) == 2
    marks = {mark.phrase: mark for mark in world().landmarks}
    for test in (False, True):
        for n in range(100):
            one = texts.told_country(0, n, test=test)
            person, place = one.told.removesuffix(".").split(" is at ")
            assert marks[place].country == one.answer and held_out(person, marks[place].name) == test
            assert one.answer not in one.prompt and person in one.prompt
    (tmp_path / "t.jsonl").write_text('{"told": "Alice is here.", "prompt": "Where is Alice?", "answer": "here"}\n')
    ids, weights, told = next(texts.source(str(tmp_path / "t.jsonl"), b, 32, sharer=a)(0))
    assert told == a.encode("Alice is here.") and len(ids) == len(weights)
    ids, weights, told, columns = next(texts.source(str(tmp_path / "t.jsonl"), b, 32, sharer=a, aligned=True)(0))
    asked = weights.index(1.0)
    assert told == a.encode("Where is Alice?") == ids[:asked], "the pair's tokens are the same"
    assert columns == [*range(asked), *[-1] * (len(ids) - asked)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--text", "two-hop", "--out", "x"), "has nothing that only the sharer reads"),
        (
            ("train", "--kind", "c2c", "--text", "plain.txt", "--out", "x"),
            "acts between a prompt and its answer, give texts with both",
        ),
        (("train", "--rank", 0, "--out", "x"), "rank 0: the maps need at least 1"),
        (("train", "--kind", "c2c", "--hidden", 0, "--out", "x"), "hidden = 0"),
        (("train", "--text", "nothing.jsonl", "--out", "x"), "nothing.jsonl is no file"),
        (("train", "--columns", 4, "--out", "x"), "and rows hold 4: make rows longer (--columns)"),
        (("compare", "--seeds", 1, "--out", "x"), "seeds = 1: it must be at least 2"),
        (("compare", "--questions", 0, "--out", "x"), "questions = 0: it must be at least 1"),
        (
            ("compare", "--text", "two-hop", "--out", "x"),
            "two-hop has no questions of its own to test a gated bridge on",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("Alice is at Meteora.\n")
    error = refused(capsys, "bridge", words[0], *PAIR, *words[1:])
    assert message in error and not (tmp_path / "x").exists()


def test_bridges_of_others_are_refused(trained, tmp_path, capsys):
    play = ("play", "--protocol", "bridge", "--n", 2)
    assert "bridge needs --bridge" in refused(capsys, *play, *PAIR)
    assert "--bridge does not apply to the protocol silent" in refused(
        capsys, "play", *PAIR, "--protocol", "silent", "--bridge", trained
    )
    assert "holds no bridge: make one with jaxcomm bridge train" in refused(capsys, *play, *PAIR, "--bridge", tmp_path)
    for odd in (
        [],
        {"config": {}},
        {"config": json.loads((trained / "run.json").read_text())["config"] | {"models": None}},
    ):
        (tmp_path / "run.json").write_text(json.dumps(odd))
        assert "holds no bridge" in refused(capsys, *play, *PAIR, "--bridge", tmp_path)
    turned = ("--a", "pair:b", "--b", "pair:a")
    assert "was trained for model" in refused(capsys, *play, *turned, "--bridge", trained)
    told = refused(capsys, *play, *PAIR, "--system-a", "Be brief.", "--bridge", trained)
    assert "was trained with another tokenizer, chat template or system prompt of A" in told
    assert "leave out --others" in refused(
        capsys, "eval", *PAIR, "--others", "pair:a", "--tasks", "countries", "--protocols", "bridge", "--bridge", trained,
        "--out", tmp_path / "e",
    )  # fmt: skip


def test_nothing_but_the_bridge_is_kept(trained):
    import orbax.checkpoint as ocp

    from jaxcomm.evals.networks.training import manager

    with manager(trained) as checkpoints:
        item = ocp.args.Composite(model=ocp.args.StandardRestore())
        kept = checkpoints.restore(checkpoints.latest_step(), args=item)["model"]
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == 2 * 6 * (2 * 320 + 128 * 2) + 6 * 4
