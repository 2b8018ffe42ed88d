"""`jaxcomm lmnet`, and networks wherever an agent is asked for."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxcomm.evals import games
from jaxcomm.evals.agents import load_agents
from jaxcomm.evals.networks import compare, wires
from jaxcomm.evals.networks.arms import EDGES, LORA, Field, arms
from jaxcomm.evals.networks.settings import Recipe, Shape
from jaxcomm.evals.play import PlaySettings, play
from jaxcomm.fingerprint import fingerprint
from jaxcomm.lmnet import Network, forward
from jaxcomm.protocols.base import start_turn

from command import jaxcomm, refused

PROMPT = "Alice is at the Colosseum. Bob is at Meteora. Which countries are they located in?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network of the embedded pair's b, a few steps old."""
    out = tmp_path_factory.mktemp("networks") / "run"
    jaxcomm("lmnet", "train", "--steps", 4, "--every", 2, "--edge", "attention", "--out", out)
    return out


def test_a_finished_run_is_an_agent(trained, tmp_path, monkeypatch, capsys):
    (agent,) = load_agents(str(trained))
    assert isinstance(agent.params, Network) and agent.params.config.widths == (1, 2, 1)
    settings = json.loads((trained / "run.json").read_text())
    assert settings["command"].startswith("jaxcomm lmnet train --steps 4 --every 2 --edge attention")
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 4
    for command in (
        ("play", "--a", trained, "--b", trained, "--protocol", "silent", "--n", 2, "--items", tmp_path / "items.jsonl"),
        ("eval", "--a", trained, "--b", trained, "--tasks", "countries", "--protocols", "single", "--n", 2, "--batch-size", 2, "--out", tmp_path / "eval"),
        ("report", tmp_path / "eval", "--out", tmp_path / "report"),
    ):  # fmt: skip
        jaxcomm(*command)
    assert str(trained) in (tmp_path / "report" / "report.md").read_text()
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    asked = [item["prompt_b"] for item in items]
    assert [item["text"] for item in items] == [reply.text for reply in start_turn(agent, asked).write(16)]


def test_the_second_stage_begins_with_the_first_and_moves_everything(trained, tmp_path, monkeypatch, capsys):
    low = tmp_path / "low"  # of bfloat16 vertices; the second stage trains float32 ones
    jaxcomm("lmnet", "train", "--edge", "attention", "--steps", 1, "--dtype", "bfloat16", "--out", low)
    (agent,) = load_agents(str(low), dtype="bfloat16")
    assert {m.dtype.name for m in agent.params.models} == {"bfloat16"}
    assert {a.dtype.name for a in jax.tree.leaves(agent.params.edges)} == {"float32"}
    words = ("--edge", "attention", "--steps", 1, "--train", "all", "--start", low, "--out", tmp_path / "all")
    jaxcomm("lmnet", "train", *words)
    again = ("--edge", "attention", "--steps", 1, "--start", tmp_path / "all", "--out", tmp_path / "x")
    capsys.readouterr()  # a run of edges would forget how the vertices moved
    assert "use --train all" in refused(capsys, "lmnet", "train", *again)
    (first,), (second,) = load_agents(str(trained)), load_agents(str(tmp_path / "all"))
    (vertex,) = load_agents("pair:b", layers=True)
    same = lambda x, y: [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]
    assert all(same(first.params.models[0], vertex.params)) and not any(same(second.params.models[0], vertex.params))
    assert fingerprint(first.params) != fingerprint(second.params)


def test_vertices_that_share_nothing_move_apart_and_a_moved_run_goes_on(tmp_path, monkeypatch):
    words = ("--widths", 1, 1, "--no-share", "--edge", "linear", "--train", "all", "--steps", 2, "--every", 1)
    jaxcomm("lmnet", "train", *words, "--out", tmp_path / "here")
    lines = (tmp_path / "here" / "metrics.jsonl").read_bytes()
    (tmp_path / "here").rename(tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "checkpoints" / "2")
    jaxcomm("lmnet", "train", *words, "--resume", "--out", tmp_path / "there")
    assert (tmp_path / "there" / "metrics.jsonl").read_bytes() == lines
    (agent,) = load_agents(str(tmp_path / "there"))
    reader, writer = (jax.tree.leaves(model) for model in agent.params.models)
    assert not any(np.array_equal(x, y) for x, y in zip(reader[1:], writer[1:], strict=True))


def test_what_wires_carry(trained, tmp_path, monkeypatch):
    (agent,) = load_agents(str(trained))
    reading = wires.read(agent, PROMPT)
    tokens = np.asarray([agent.encode(PROMPT)], np.int32)
    last = jax.nn.softmax(forward(agent.params, tokens)[0, -1])
    said = reading.wires[-1]
    assert said.name == "vertex 2.0" and said.words[0][1] == pytest.approx(float(last.max()), abs=1e-5)
    assert said.words[0][0].strip() == agent.tokenizer.decode([int(last.argmax())]).strip()
    assert [wire.name for wire in reading.wires] == [
        "vertex 0.0", "edge 0.0 -> 1.0", "edge 0.0 -> 1.1", "vertex 1.0", "vertex 1.1", "edge 1.0 -> 2.0", "edge 1.1 -> 2.0", "vertex 2.0",
    ]  # fmt: skip
    seen = wires.carried(agent.params, tokens)
    fed = np.asarray(seen["edge 1.0-0"]).sum(axis=0)[0]
    single = agent.params.models[0]
    np.testing.assert_allclose(
        np.asarray(single.read(fed, jnp.arange(tokens.shape[1])[None])[0]), seen["vertex 2.0"][0], atol=1e-4
    )
    jaxcomm("lmnet", "show", trained, "--prompt", PROMPT, "--out", tmp_path)
    assert (tmp_path / "wires.png").read_bytes().startswith(b"\x89PNG")
    assert "edge 1.1 -> 2.0" in (tmp_path / "wires.txt").read_text()


def test_control_splits_what_edges_give(trained, tmp_path, monkeypatch, capsys):
    jaxcomm("lmnet", "control", trained, "--n", 4, "--control", "mean", "--each", "--out", tmp_path)
    told, game = (tmp_path / "report.md").read_text(), games.draw("countries", n=4)
    assert "## Presence and content (private information)" in told and "But a network is one agent" in told
    assert "all 36 tests of the table" in told and "all 12 tests" in told, "six sets, two metrics, three parts"
    assert f"jaxcomm lmnet control {trained} --control mean --each --n 4 --out {tmp_path}" in told
    assert "Presence and content" in capsys.readouterr().out and "<table>" in (tmp_path / "report.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    edges = [line["edges"] for line in lines if line["control"] == "other"]
    assert edges == ["all edges", "edges into layer 1", *(f"edge {x}" for x in ("0.0 -> 1.0", "0.0 -> 1.1", "1.0 -> 2.0", "1.1 -> 2.0"))]  # fmt: skip
    assert [line["edges"] for line in lines if line["control"] == "own"] == ["no edges"] and len(lines) == 1 + 3 * 6
    (agent,) = load_agents(str(trained))
    both = play(game, "skyline", agent, agent, PlaySettings(choices=True))
    np.testing.assert_allclose(lines[0]["among"], both.scored("among"), atol=1e-4)
    assert lines[0]["hits"] == both.scored("choice") and {line["information"] for line in lines} == {"private"}


def test_control_plays_a_game_of_ones_own_and_says_when_nothing_is_private(trained, tmp_path, monkeypatch, capsys):
    line = lambda n, answer: {
        "prompt_a": "Ask:",
        "prompt_b": f"Ask: {n} or no?",
        "answer": answer,
        "choices": ["yes", answer],
    }
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps(line(n, x)) for n, x in (("Is it", "no"), ("Are we late", "no way"))))
    jaxcomm("lmnet", "control", trained, "--game", own)
    said = capsys.readouterr().out
    assert "own, edges of" in said and "Presence and content (shared information)" in said


def test_compare_reports_both_and_goes_on(tmp_path, monkeypatch, capsys):
    words = ("--steps", 2, "--edge", "linear", "--questions", 5, "--seeds", 2, "--out", tmp_path / "c")
    jaxcomm("lmnet", "compare", *words)
    files = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*.*") if p.name != "run.json"}
    lines = {line["arm"]: line for line in map(json.loads, (tmp_path / "c" / "results.jsonl").read_text().splitlines())}
    assert set(lines) == {"vertex alone", "network, new", "LoRA", "edges", "edges - LoRA"}
    edges, low = lines["edges"], lines["LoRA"]
    assert edges["numbers"] == 4 * (128 * 128 + 1) and 0.7 < low["numbers"] / edges["numbers"] < 1.3
    assert edges["seeds"] == low["seeds"] == 2 and edges["loss"] > 0
    assert "edges - LoRA" in (tmp_path / "c" / "report.txt").read_text()
    monkeypatch.setattr(compare, "train", None)  # nothing is trained twice
    jaxcomm("lmnet", "compare", *words, "--resume")
    assert {p: p.read_bytes() for p in files} == files


def test_compare_draws_learning_curves_of_every_arm_at_equal_tokens_and_flops(tmp_path, monkeypatch, capsys):
    items = games.draw("countries", n=6).items
    known = [{"prompt": f"{item.prompt_a} {item.prompt_b}", "answer": item.answer} for item in items]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    words = (
        "--steps",
        3,
        "--edge",
        "linear",
        "--questions",
        4,
        "--seeds",
        2,
        "--retain",
        tmp_path / "known.jsonl",
        "--out",
        tmp_path / "c",
    )
    more = ("--arms", "all", "scratch", "--equal", "flops", "--widths", 1, 1, "--examples", 2, 8)
    jaxcomm("lmnet", "compare", *words, *more)
    lines = [json.loads(line) for line in (tmp_path / "c" / "results.jsonl").read_text().splitlines()]
    every = arms(["all", "scratch"], ["flops"])
    for amount in (2, 8):
        at = {line["arm"]: line for line in lines if line["examples"] == amount}
        assert [*at] == [arm.name for arm in every]
        assert at["vertex alone"]["retained"] == 1
        edges = at[EDGES.name]
        for arm in every[2:-1]:
            line = at[arm.name]
            assert line["steps"] == len(next(iter(rows(tmp_path / "c", arm.name, amount)))["losses"])
            assert abs(line["flops"] - edges["flops"]) <= line["flops"] / line["steps"] / 2 + 1
        network = edges["numbers"] + at["vertex, trained on, equal FLOPs"]["numbers"]
        assert 0.85 < at["larger model, from scratch, equal FLOPs"]["numbers"] / network < 1.15
    assert (tmp_path / "c" / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert "still known" in (tmp_path / "c" / "report.txt").read_text()
    trained, train = [], compare.train
    monkeypatch.setattr(compare, "train", lambda *args, **how: trained.append(how["title"]) or train(*args, **how))
    jaxcomm("lmnet", "compare", *words, *more[:-2], 2, 4, 8, "--resume")
    assert len(trained) == 6 and all("-4-" in name for name in trained), "only the new number of examples is trained"
    assert json.loads((tmp_path / "c" / "run.json").read_text())["config"]["examples"] == [2, 4, 8]
    longer = [json.loads(line) for line in (tmp_path / "c" / "results.jsonl").read_text().splitlines()]
    assert [line for line in longer if line["examples"] != 4] == lines


def rows(folder, arm, amount):
    for path in folder.glob(f"chunks/{arm.replace(' ', '_').replace(',', '')}-{amount}-*.parquet"):
        yield from pq.read_table(path).to_pylist()


def test_steps_of_training_cost_what_their_products_do(b):
    """Oracle: 6 FLOPs a trained weight and token, 4 a frozen one (Kaplan et al. 2020), and the scores of attention."""
    field = Field(Shape(edge="linear"), [b], Recipe(rows=2, columns=16))
    c, tokens = b.params.config, 32
    layer = 4 * c.width * c.heads * c.head_dim + 3 * c.width * c.ff
    weights, scores = c.layers * layer + c.width * c.vocab, c.layers * 4 * c.heads * c.head_dim * 2 * (16 * 17 // 2)
    assert field.step_flops(LORA) == 6 * weights * tokens + 3 * scores
    edges = 4 * c.width**2  # 1-2-1: four edges
    vertices = 4 * c.layers * layer + c.width * c.vocab
    assert field.step_flops(EDGES) == 4 * (vertices + edges) * tokens + 2 * edges * tokens + 2 * 4 * scores


def test_a_rate_that_diverges_answers_nothing_and_is_not_chosen(tmp_path, monkeypatch, capsys):
    def diverging(trained, frozen, texts, recipe, *, title, losses):
        losses += [9.0, 1.0]
        if recipe.learning_rate == 1e-1:
            raise FloatingPointError("the loss is nan at step 3")
        return SimpleNamespace(trained=trained)

    monkeypatch.setattr(compare, "train", diverging)
    monkeypatch.setattr(compare, "answers", lambda agent, asked: [q.answer for q in asked])
    words = ("--edge", "linear", "--widths", 1, 1, "--questions", 2, "--seeds", 2, "--learning-rates", 1e-1, 1e-3)
    jaxcomm("lmnet", "compare", *words, "--out", tmp_path / "c")
    assert "edges-all-0.1-1: the loss is nan at step 3" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "c" / "results.jsonl").read_text().splitlines()]
    chosen = {row["arm"]: (row["learning_rate"], row["accuracy"]) for row in rows if row.get("rates")}
    assert chosen == {"LoRA": (1e-3, 1.0), "edges": (1e-3, 1.0)}
    assert (tmp_path / "c" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_summary_chooses_the_rate_on_the_first_half_and_reports_on_the_other():
    rest = {"losses": [1.0], "seconds": 1.0, "retained": [True, False], "numbers": 1, "flops": 1.0, "steps": 1}
    row = lambda first, second: {"hits": [first] * 4 + [second] * 4, **rest}
    done = {
        ("edges", rate, seed): row(*hits)
        for seed in (0, 1)
        for rate, hits in ((1e-3, (True, False)), (1e-2, (False, True)))
    }
    done |= {("LoRA", 1e-3, seed): row(True, seed == 0) for seed in (0, 1)} | {
        ("LoRA", 1e-2, seed): row(False, True) for seed in (0, 1)
    }
    done |= {("vertex alone", 1e-3, 0): row(True, True)} | {
        ("network, new", 1e-3, seed): row(False, False) for seed in (0, 1)
    }
    lines = {line["arm"]: line for line in compare.summary(done, arms(["LoRA"], ["tokens"]), None, 4)}
    assert (lines["edges"]["learning_rate"], lines["edges"]["accuracy"]) == (1e-3, 0.0)
    assert lines["LoRA"]["accuracy"] == 0.5 and lines["edges - LoRA"]["accuracy"] == -0.5
    assert lines["edges"]["retained"] == 0.5
    half = 12.706 * 0.5  # Student's, of two values 0 and 1
    assert lines["LoRA"]["high"] - 0.5 == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--widths", "1", "2", "--out", "x"), "must begin and end with 1"),
        (("train", "--columns", "300", "--out", "x"), "rows of 300 tokens are longer than the model's 256 positions"),
        (("train", "--columns", "20", "--out", "x"), "tokens, and rows hold 20: make rows longer"),
        (("train", "--widths", "1", "--out", "x"), "nothing to train on the edges"),
        (("train", "--no-residual", "--out", "x"), "carry nothing if they begin at zero"),
        (("train", "--start", "OTHER", "--out", "x"), "OTHER is the folder of another command"),
        (("train", "--text", "nothing.txt", "--out", "x"), "nothing.txt is no file: name one, or two-places or two-hop"),
        (("train", "--out", "RUN"), "holds a different run"),
        (("train", "--edge", "attention", "--steps", "4", "--every", "2", "--out", "RUN"), "add --resume to go on"),
        (("train", "--widths", "1", "1", "1", "--start", "RUN", "--out", "x"), "RUN holds another network"),
        (("show", "nowhere", "--prompt", "x"), "nowhere"),
        (("show", "pair:b", "--prompt", "x"), "only networks have wires"),
        (("show", "RUN", "--prompt", "x", "--words", "0"), "words = 0: name at least 1"),
        (("control", "nowhere"), "nowhere"),
        (("control", "pair:b", "--n", "2"), "only networks have wires"),
        (("control", "RUN", "--n", "1"), "the control other needs at least two items"),
        (("control", "RUN", "--game", "chess"), "there is no game 'chess'"),
        (("compare", "--questions", "0", "--out", "x"), "questions = 0: it must be at least 1"),
        (("compare", "--learning-rates", "1e-3", "0", "--out", "x"), "learning rate and clip must be above 0"),
        (("compare", "--seeds", "1", "--out", "x"), "needs at least 2"),
        (("compare", "--examples", "0", "--out", "x"), "--examples 0: it must be at least 1"),
        (("compare", "--equal", "flops", "flops", "--out", "x"), "--equal flops flops: name at least one, each once"),
        (("compare", "--text", "t.jsonl", "--out", "x"), "has no questions of its own"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(trained, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "run.json").write_text('{"config": {"arm": "edges"}}')
    error = refused(capsys, "lmnet", *(trained if word == "RUN" else word for word in words))
    assert message.replace("RUN", str(trained)) in error and not (tmp_path / "x").exists()


def test_networks_are_refused_where_layers_are_asked_for(trained, tmp_path, monkeypatch, capsys):
    for words in (
        ("sweep", "--a", trained, "--b", trained, "--out", tmp_path / "s"),
        ("play", "--a", trained, "--b", trained, "--k", 1, "--j", 1, "--n", 1),
    ):
        assert "no layers to be split at" in refused(capsys, *words)


def test_a_network_of_other_vertices_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    record["config"]["vertices"] = ["pair:a"]
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was made of other vertices than pair:a"):
        load_agents(str(copy))
