"""The study: what its maps and scores are, that layers are chosen on other items than are reported, its tests, its report."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from jaxcomm.controls import derange
from jaxcomm.evals.effects import effect
from jaxcomm.evals.games import draw
from jaxcomm.evals.play import PlaySettings, play
from jaxcomm.evals.study import analysis, measure, report, run
from jaxcomm.evals.study.design import PREREGISTRATION, SIZES, Block, Cell, Setup, Size, halves, setups, spread
from jaxcomm.protocols import PROTOCOLS

from command import jaxcomm, refused
from game_files import numbered, write_game

RAW = Setup("raw", "statement", 0)
LAYERS = ((3, 6), (2, 4))


@pytest.fixture(scope="module")
def game():
    return draw("countries", 5, 8)


@pytest.fixture(scope="module")
def maps(game, b):
    return measure.layer_maps(game, (b, b), RAW.wording, LAYERS, ("replace", "mean"))


@pytest.mark.parametrize("graft", [0, 1])
def test_a_map_is_the_likelihood_that_the_protocol_gives(game, maps, b, graft):
    name, texts = ("replace", "mean")[graft], [[f" {item.answer}{b.tokenizer.eos_token}"] for item in game.items]
    told, asked = RAW.wording.prompts_a(game, b), RAW.wording.prompts_b(game, b)
    order = derange([item.answer for item in game.items], 0)
    for (n, k), (m, j) in [((0, 3), (1, 4)), ((1, 6), (0, 2))]:
        for whose, prompts in (("own", told), ("other", [told[i] for i in order])):
            turn = PROTOCOLS["activation"](b, b, prompts, asked, k=k, j=j, graft=name)
            scored = turn.score([[text.removesuffix(b.tokenizer.eos_token)] for (text,) in texts])
            # The map also asks for the end of the answer, so it is at most as likely.
            answer = np.array([x.logprobs[0] for x in scored])
            assert (maps[whose][graft, n, m] <= answer + 1e-4).all()


def test_other_sites_of_the_stream_are_the_diagonal_of_the_map(game, b):
    found = measure.other_sites(game, (b, b), RAW.wording)
    every = measure.layer_maps(game, (b, b), RAW.wording, (range(1, 7), range(1, 7)), ("replace",))
    texts = [[f" {item.answer}"] for item in game.items]
    asked, told = RAW.wording.prompts_b(game, b), RAW.wording.prompts_a(game, b)
    for layer in (2, 5):
        turn = PROTOCOLS["activation"](b, b, told, asked, k=layer, j=layer)
        likely = [x.logprobs[0] for x in turn.score(texts)]
        np.testing.assert_allclose(found["own"][0, layer - 1], likely, atol=1e-3)
    for whose in ("own", "other"):
        diagonal = np.einsum("lln->ln", every[whose][0])
        assert (diagonal <= found[whose][0] + 1e-3).all()
        assert np.corrcoef(diagonal.ravel(), found[whose][0].ravel())[0, 1] > 0.99


def test_the_entity_is_the_last_token_of_the_place(game, b):
    for item, row in zip(game.items, b.rows([i.prompt_a for i in measure.entity(game).items]), strict=True):
        whole = b.rows([item.prompt_a])[0]
        assert row == whole[: len(row)] and b.tokenizer.decode(whole[len(row) :]).strip() == "."
        assert item.prompt_a.endswith(b.tokenizer.decode(row[-1:]).strip() + ".")


def test_layers_are_chosen_by_the_rule_and_on_the_first_half_only(maps):
    layers, found = {"replace": LAYERS}, {"replace": {name: x[0] for name, x in maps.items()}}
    cells = {cell.rule: cell for cell in analysis.choose_cells(layers, found)}
    own, other = (found["replace"][name].mean(axis=-1) for name in ("own", "other"))
    k, j = np.unravel_index(np.argmax(own - other), own.shape)
    assert (cells["content"].k, cells["content"].j) == (LAYERS[0][k], LAYERS[1][j])
    k, j = np.unravel_index(np.argmax(own), own.shape)
    assert (cells["likelihood"].k, cells["likelihood"].j) == (LAYERS[0][k], LAYERS[1][j])
    tied = {"replace": {name: np.zeros((2, 2, 4)) for name in ("own", "other")}}
    assert {(cell.k, cell.j) for cell in analysis.choose_cells(layers, tied)} == {(3, 2)}
    assert [cell.j for cell in analysis.choose_cells({"replace": ((3, 6), (4, 5))}, tied) if cell.rule == "early"] == []
    late = {"replace": {"own": np.arange(4.0).reshape(2, 2, 1), "other": np.zeros((2, 2, 1))}}
    (early,) = [cell for cell in analysis.choose_cells(layers, late) if cell.rule == "early"]
    assert (early.k, early.j) == (6, 2)


@pytest.mark.parametrize("name, each", [("countries", 100), ("tip_sheets", 70)])
def test_halves_are_the_papers_number_and_share_no_statement(name, each):
    game = run.drawn(name, Setup("raw", "statement", 4), run.Settings(SIZES["full"], 2026))
    first, second = (game.part(rows).items for rows in halves(len(game.items)))
    assert len(first) == len(second) == each
    assert not {i.prompt_a for i in first} & {i.prompt_a for i in second}
    if name == "countries":
        place = lambda items: {item.prompt_a.split(" at ", 1)[1] for item in items}
        assert not place(first) & place(second) and not place(game.examples) & (place(first) | place(second))
    plain = run.drawn(name, RAW, run.Settings(SIZES["full"], 2026))
    assert plain.items == game.items


def test_set_ups_are_those_that_are_registered():
    names = {setup.name for setup in setups(chat=True, instructed=True, whole=True)}
    for form in ("raw", "chat"):
        for reads in ("statement", "statement+question"):
            for n in (0, 4):
                assert f"{form}, {reads}, {n} examples" in names
    assert len(names) == 9 and "KVComm's wording, statement, 0 examples" in names
    assert not any("chat" in setup.name for setup in setups(chat=False, instructed=True, whole=True))


def made_up(effects, n=40, seed=0):
    """A block whose message adds `effects` = (content, presence) nats and turns so many decisions."""
    rng = np.random.default_rng(seed)
    silent = rng.normal(-4, 0.5, n)
    content, presence = effects
    other = silent + presence + rng.normal(0, 0.1, n)
    own = other + content + rng.normal(0, 0.1, n)
    score = lambda x: {"among": x, "choice": (x > -2).astype(float)}
    cells = Cell("replace", "content", 4, 4), Cell("replace", "likelihood", 5, 4)
    scores = {"silent": score(silent)}
    for cell in cells:
        scores |= {cell.label: score(own), f"{cell.label}, other": score(other)}
    game = draw("countries", 0, 2 * n)
    values = {name: np.zeros((1, 1, n)) for name in ("own", "other")}
    return Block(game, RAW, {"replace": ((4, 5), (4, 8))}, {"replace": values}, cells, scores)


def test_registered_tests_find_known_effects_and_holm_is_over_the_family():
    blocks = [made_up((3.0, 0.0), seed=1), made_up((0.0, -2.0), seed=2), made_up((0.0, 0.0), seed=3)]
    content, use = analysis.family(blocks, "content"), analysis.family(blocks, "likelihood")
    at = {(blocks.index(block), outcome): (found, p) for block, outcome, found, p in content}
    assert len(content) == len(use) == 6
    assert at[0, "among"][0].value.value == pytest.approx(3, abs=0.1) and at[0, "among"][1] < 0.01
    assert at[0, "choice"][1] < 0.01 and at[1, "among"][1] > 0.05 and at[2, "among"][1] > 0.05
    used = {(blocks.index(block), outcome): (found, p) for block, outcome, found, p in use}
    assert used[0, "among"][1] < 0.01 and used[1, "among"][0].value.value < -1.5 and used[1, "among"][1] < 0.01
    raw = sorted(
        effect(b.scores[b.cells[0].label][o], b.scores[f"{b.cells[0].label}, other"][o]).p for b, o, _, _ in content
    )
    adjusted = sorted(p for *_, p in content)
    assert adjusted[0] == pytest.approx(min(1, 6 * raw[0]))
    wins = int(blocks[0].scores[blocks[0].cells[0].label]["choice"].sum())
    assert raw[0] <= scipy.stats.binomtest(wins, wins).pvalue or raw[0] < 1e-3
    lines = list(report.short(blocks))
    assert lines[0].endswith("nats.") and "in 1 of 3 set-ups; most in countries" in lines[0]
    assert "the opposite in 1" in lines[2] and "B's last layer" not in lines[2]
    last = dataclasses.replace(blocks[0], layers={"replace": ((4, 5), (4,))})
    assert next(report.short([last])).endswith("in 1 of them j is B's last layer.")


def test_nothing_is_found_where_there_is_nothing():
    found = 0
    for seed in range(40):
        tests = analysis.family([made_up((0.0, 0.0), seed=10 * seed + n) for n in range(3)], "content")
        found += any(p < 0.05 for *_, p in tests)
    assert found <= 6  # 5 % of 40, and chance


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "run"
    words = ("study", "--a", "pair:b", "--b", "pair:b", "--items", 6, "--layers", 3, "--out", out)
    jaxcomm(*words)
    return out, words


def table_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_report_stands_on_scores_that_play_gives(studied, b):
    out, _ = studied
    rows = table_of(out / "results.csv")
    game = run.drawn("countries", RAW, run.Settings(dataclasses.replace(SIZES["quick"], items=6), 2026))
    reported = game.part(halves(12)[1])
    cells = {row["condition"] for row in rows if row["setup"] == RAW.name and row["condition"].startswith("replace")}
    for label in cells:
        k, j = (int(x.split()[1]) for x in label.split(", ")[1:3])
        control = {"control": "other"} if label.endswith(", other") else {}
        settings = PlaySettings(RAW.wording, True, run.NEW_TOKENS, seed=2026)
        outcome = play(reported, "activation", b, b, settings, k=k, j=j, **control)
        own = [row for row in rows if (row["setup"], row["condition"]) == (RAW.name, label)]
        assert [int(row["item"]) for row in own] == list(range(6, 12))
        np.testing.assert_allclose([float(row["among"]) for row in own], [c.among for c in outcome.choices], atol=1e-4)
        assert [float(row["choice"]) for row in own] == [float(c.hit) for c in outcome.choices]
        np.testing.assert_allclose([float(row["flops"]) for row in own], [x.flops for x in outcome.heard], rtol=1e-5)
    assert "found" not in rows[0]  # the quick size writes no replies
    text = (out / "report.md").read_text()
    assert "content-countries.png" in text and (out / "content-countries.png").exists()
    for heading in ("In short", "Set-up", "(registered)", "exploratory", "published figures", "Threats", "Command"):
        assert heading in text
    assert "Ramesh & Li 2025, Table 2" in text.replace("&amp;", "&") and "KVComm, Table 1" in text


def test_a_study_goes_on_where_it_was_and_says_the_same(studied, capsys, monkeypatch):
    out, words = studied
    before = {name: (out / name).read_bytes() for name in ("report.md", "results.csv")}
    gone = sorted(out.glob("play-*.npz"))[:2]
    for path in gone:
        path.unlink()
    monkeypatch.setattr(measure, "layer_maps", lambda *a, **k: pytest.fail("maps were there already"))
    jaxcomm(*words, "--resume")
    assert {name: (out / name).read_bytes() for name in before} == before
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("... ")]
    assert {*said} == {f"... {path.stem}" for path in gone} and len(said) == len(gone)


def test_another_registration_is_another_study(studied, capsys):
    out, words = studied
    record = json.loads((out / "run.json").read_text())
    kept = (out / "run.json").read_bytes()
    record["config"]["preregistration_sha256"] = "0" * 64
    (out / "run.json").write_text(json.dumps(record))
    assert "preregistration_sha256" in refused(capsys, *words, "--resume")
    (out / "run.json").write_bytes(kept)


def test_the_full_size_plays_every_graft_site_control_and_channel(tmp_path, b):
    size = Size(4, ("countries",), 2, 2, True)
    settings = run.Settings(size, 7)
    with run.opened(settings, b, b, tmp_path / "run", command="jaxcomm study", resume=False) as folder:
        study = run.Study(settings, b, b, folder)
        study.blocks = lambda: iter([study._block(run.drawn("countries", RAW, settings), RAW)])
        (block,) = study.blocks()
        report.report(study, [block], "jaxcomm study")
    operators = {label.split(", k ")[0] for label in block.scores}
    assert {"replace", "sum", "mean", "W, statements", "entity", "attn_out", "mlp_out"} <= operators
    assert {"message", "message, other", "debate", "kv", "latent", "latent, other", "skyline", "silent"} <= {
        *block.scores
    }
    chosen = analysis.cell_of(block.cells, "replace", "content").label
    for control in (
        "generated",
        "mean",
        "moments",
        "noise",
        "zero",
        "adversarial",
        "self",
        "equal-flops",
        "equal-bytes",
    ):
        assert f"{chosen}, {control}" in block.scores
    assert all({*measure.SCORES} == {*scores} for label, scores in block.scores.items() if label != "silent")
    same = block.scores[f"{chosen}, self"]["among"]
    np.testing.assert_allclose(same, block.scores["silent"]["among"], atol=1e-3)


def test_a_game_of_ones_own_is_halved(tmp_path, capsys):
    path = write_game(tmp_path / "own.jsonl", *numbered(12))
    out = tmp_path / "run"
    jaxcomm("study", "--a", "pair:b", "--b", "pair:b", "--games", path, "--items", 4, "--layers", 1, "--out", out)
    rows = table_of(out / "results.csv")
    assert {row["game"] for row in rows} == {"own"} and {int(row["item"]) for row in rows} == {4, 5, 6, 7}
    line = refused(capsys, "study", "--a", "pair:b", "--b", "pair:b", "--games", path, "--out", tmp_path / "many")
    assert "12 items" in line


def test_between_models_of_unlike_shape_a_map_is_fitted_on_a_text(tmp_path):
    words = ("study", "--a", "pair:a", "--b", "pair:b", "--items", 4, "--layers", 2, "--text", "statements")
    jaxcomm(*words, "--out", tmp_path / "run")
    cells = {row["condition"] for row in table_of(tmp_path / "run" / "results.csv")}
    assert any(cell.startswith("W, text, k") and cell.endswith(", other") for cell in cells)
    assert not any(cell.startswith(("sum", "mean")) for cell in cells)
    assert "text_sha256" in json.loads((tmp_path / "run" / "run.json").read_text())["config"]


def test_what_is_not_possible_is_said(tmp_path, capsys):
    out = ("--out", tmp_path / "run")
    assert "--items 3: it must be at least 4" in refused(capsys, "study", *out, "--items", 3)
    assert "--prompts is empty: name raw" in refused(capsys, "study", *out, "--prompts", "--items", 4)
    assert "words.txt" in refused(capsys, "study", "--a", "pair:b", "--b", "pair:b", *out, "--text", "words.txt")
    assert "no game 'chess'" in refused(capsys, "study", *out, "--games", "chess", "--a", "pair:b", "--b", "pair:b")
    assert not (tmp_path / "run").exists()


def test_chats_can_be_added_to_a_run_of_raw_prompts(studied, tmp_path, capsys):
    out, words = studied
    alone = (*words[:-1], tmp_path / "run")
    assert "pair:b has no chat template" in refused(capsys, *alone, "--prompts", "chat")
    assert not (tmp_path / "run").exists()
    jaxcomm(*alone, "--prompts", "raw")
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Set-ups with chat prompts were left out" in text and "--prompts raw" in text
    assert table_of(tmp_path / "run" / "results.csv") == table_of(out / "results.csv")  # this model has no chats
    capsys.readouterr()
    jaxcomm(*alone, "--resume")
    assert "left out (--prompts)" not in (tmp_path / "run" / "report.md").read_text()
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("... ")]


def test_layers_are_spread_to_the_last():
    assert spread(18, 6) == (3, 6, 9, 12, 15, 18) and spread(30, None) == tuple(range(1, 31))
    for count in range(1, 40):
        for n in range(1, 12):
            found = spread(count, n)
            assert found[-1] == count and found[0] >= 1 and len(found) == min(n, count)


def test_the_registration_states_what_the_code_does():
    text = PREREGISTRATION.read_text()
    full, quick = SIZES["full"], SIZES["quick"]
    assert "seed 2026" in text and f"{quick.items} + {quick.items} items" in text and quick.games == ("countries",)
    assert full.games == ("countries", "tip_sheets") and "0 or 4 worked examples" in text
