"""`jaxcomm sweep`: its run folder survives anything, its figures are what was computed, its report does not flatter."""

import dataclasses
import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

import jaxcomm
from jaxcomm.converters import load_agent
from jaxcomm.evals import files as writing
from jaxcomm.evals.games import GAMES, draw
from jaxcomm.evals.pair import NAMES, folder
from jaxcomm.evals.scores import sign_flip
from jaxcomm.evals.sweeps import fitting, grid, report, run
from jaxcomm.evals.sweeps.cells import Cells
from jaxcomm.evals.sweeps.halves import halve
from jaxcomm.evals.sweeps.parts import GameSweep, SweepSettings
from jaxcomm.fingerprint import fingerprint
from jaxcomm.layer_sweep import Plan
from jaxcomm.protocols import Control, StandIn, activation, silent

from command import refused
from crashes import crash_everywhere, kills, there

ASKED = SweepSettings(
    games=("countries", "tip_sheets"), ks=(3, 5), js=(1, 4), grafts=("replace", "sum"), decode=6, text=None, into=None,
    n=6, seed=3, names="seen", memory=None,
)  # fmt: skip
SMALL = 1_510_000
"""Bytes that cut the runs here into several chunks."""


@pytest.fixture(scope="module")
def pair():
    return {name: load_agent(folder(name), name=name, unroll=False) for name in NAMES}


def sweep(pair, out, asked=ASKED, sender="b", resume=False, **recorded):
    run.run(asked, pair[sender], pair["b"], out, resume=resume, command="jaxcomm sweep", recorded=recorded)


def rows(out: Path) -> list[dict]:
    return pq.read_table(out / "results.parquet").to_pylist()


@pytest.fixture
def plain():
    """Neither pictures nor controls: for what is about files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.figures, "layer_maps", lambda drawn, **_: b"a picture")
        patch.setattr(report.figures, "page", lambda *_: "a page")
        patch.setattr(report, "halve", lambda *_: ())
        yield


@pytest.fixture(scope="module")
def done(pair, tmp_path_factory):
    """A run that nothing went wrong with."""
    out = tmp_path_factory.mktemp("done") / "run"
    sweep(pair, out)
    return out


def test_every_row_is_the_activation_protocols_answer(pair, done):
    found = {(r["game"], r["graft"], r["k"], r["j"], r["question"]): r for r in rows(done)}
    assert len(found) == len(rows(done)) == 2 * 2 * 2 * 2 * 6
    for game, graft, k, j in itertools.product(ASKED.games, ASKED.grafts, ASKED.ks, ASKED.js):
        items = GAMES[game](3, n=6)
        read = [[i.prompt_a for i in items], [i.prompt_b for i in items]]
        replies = activation(pair["b"], pair["b"], *read, k=k, j=j, graft=graft).write(6)
        for n, (reply, item) in enumerate(zip(replies, items, strict=True)):
            row = found[game, graft, k, j, n]
            assert row["text"] == reply.text and row["hit"] == (reply.text == item.answer)
            assert len(row["tokens"]) == len(row["token_logprobs"]) == len(reply.written)
            assert abs(sum(row["token_logprobs"]) - reply.logprob) < 1e-3
            assert abs(row["logprob"] - sum(row["answer_logprobs"])) < 1e-4


def test_a_map_of_content_is_every_cell_with_another_questions_message(pair, done):
    """What B answers there is what the protocol says under the control other, and alone what it says alone."""
    found = {(r["game"], r["graft"], r["k"], r["j"], r["question"]): r for r in rows(done)}
    for game, graft in itertools.product(ASKED.games, ASKED.grafts):
        items = draw(game, 3, 6).items
        told, asked, answers = zip(*((i.prompt_a, i.prompt_b, i.answer) for i in items), strict=True)
        order = jaxcomm.derange(answers, ASKED.seed)
        alone = silent(pair["b"], pair["b"], told, asked)
        likely = [x.logprobs[0] for x in alone.score([[f" {answer}"] for answer in answers])]
        for k, j in itertools.product(ASKED.ks, ASKED.js):
            control = StandIn("other", order=order.tolist())
            turn = activation(pair["b"], pair["b"], told, asked, k=k, j=j, graft=graft, control=control)
            for n, (reply, answer) in enumerate(zip(turn.write(6), answers, strict=True)):
                row = found[game, graft, k, j, n]
                assert row["other_text"] == reply.text and row["other_hit"] == (reply.text == answer)
                # The rows' log-probabilities are of the answer and of its end.
                assert row["alone_logprob"] <= likely[n] + 1e-3 and row["alone_exact"] in (True, False)


@pytest.mark.parametrize("game", list(GAMES))
def test_exact_match_is_what_decoding_finds_in_every_cell_of_both_games(pair, game):
    """Without decoding: the answer's tokens are all the argmax. Every layer, one map W per cell, names seen and new."""
    a, b = pair["a"], pair["b"]
    ks, js = grid.layers(a), grid.layers(b)
    maps = fitting.fit(a, b, fitting.own_statements(game)[:200], ks, js).W
    verdicts = []
    for names in ("seen", "new"):
        drawn = draw(game, 7, 20, names=names)
        decoded, answers = (
            (plan := grid.plan_game(drawn, a, b, ks=ks, js=js, maps=maps, max_new_tokens=new)).gather(
                [plan.run(chunk) for chunk in plan.chunks]
            )
            for new in (16, None)
        )
        said = grid.texts(b, decoded["tokens"])
        np.testing.assert_array_equal(grid.right(said, drawn, range(20), "exact"), answers["exact"])
        verdicts.append(answers["exact"].mean())
    assert 0.1 < verdicts[0] < 0.9


def test_a_run_leaves_what_it_says(done):
    names = {p.name for p in done.iterdir()}
    measures = ("accuracy", "content", "logprob", "content-logprob")
    pictures = {f"{what}-{graft}.png" for what in measures for graft in ASKED.grafts}
    assert names == {"run.json", "chunks", "results.parquet", "report.txt", "sweep.html", *pictures}
    text = (done / "report.txt").read_text()
    assert "agree in 48 of 48 answers" in text and "adversarial" in text and "private information" in text
    assert "agree in 48 of 48" in (done / "sweep.html").read_text()


def test_a_finished_run_is_not_begun_again_and_a_different_one_is_refused(pair, done, tmp_path):
    with pytest.raises(ValueError, match="holds this run already: add --resume"):
        sweep(pair, done)
    other = dataclasses.replace(ASKED, seed=4)
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"holds a different run \(seed: 3 there, 4 here\)"):
            sweep(pair, done, other, resume=resume)
    with pytest.raises(ValueError, match="different run .*fingerprint_a"):
        sweep(pair, done, sender="a", resume=True)
    (tmp_path / "lost" / "chunks").mkdir(parents=True)
    (tmp_path / "lost" / "chunks" / "countries-answers-0-00000.parquet").write_bytes(b"whose?")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        sweep(pair, tmp_path / "lost", resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        sweep(pair, tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        sweep(pair, tmp_path / "notes.txt")
    with pytest.raises(OSError, match="notes.txt"):
        sweep(pair, tmp_path / "notes.txt" / "run")


def test_what_is_missing_is_done_and_the_bytes_are_the_same(plain, pair, done, tmp_path):
    """The chunks need not be whole, nor in order; what is there is not touched."""
    out = tmp_path / "run"
    cut = dataclasses.replace(ASKED, memory=SMALL)
    sweep(pair, out, cut)
    want = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    chunks = sorted((out / "chunks").iterdir())
    assert len(chunks) >= 8
    for chunk in chunks[1::2]:
        chunk.unlink()
    (out / "results.parquet").unlink()
    (out / "chunks" / ".countries-answers-0-00001.parquet.x7").write_bytes(b"half a ch")
    kept = {p: p.stat().st_mtime_ns for p in chunks[::2]}
    sweep(pair, out, cut, resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == want
    assert {p: p.stat().st_mtime_ns for p in kept} == kept and len(list((out / "chunks").iterdir())) == len(chunks)
    # Chunks of another size: the same tokens and verdicts.
    for x, y in zip(rows(out), rows(done), strict=True):
        rounded = dict.fromkeys((name for name in x if name.endswith(("logprob", "logprobs"))), 0)
        assert x | rounded == y | rounded
        assert abs(x["logprob"] - y["logprob"]) < 1e-3


def test_a_run_goes_on_with_less_memory(plain, pair, done, tmp_path, monkeypatch):
    """As after running out of it: what is done stays, and what is missing is computed in smaller pieces, with the same verdicts."""
    out = tmp_path / "run"
    sweep(pair, out, dataclasses.replace(ASKED, memory=100 * SMALL))
    chunks = sorted((out / "chunks").iterdir())
    kept, want = chunks[0].stat().st_mtime_ns, {path: pq.read_table(path).num_rows for path in chunks}
    for path in [*chunks[1:], out / "results.parquet"]:
        path.unlink()
    ran, real = [], Plan.run
    monkeypatch.setattr(Plan, "run", lambda plan, piece: ran.append(piece) or real(plan, piece))
    for memory in (SMALL, None):
        asked = dataclasses.replace(ASKED, memory=memory)
        ran.clear()
        sweep(pair, out, asked, resume=True)
        assert {path: pq.read_table(path).num_rows for path in chunks} == want and chunks[0].stat().st_mtime_ns == kept
        assert len(ran) > 2 * (len(chunks) - 1) if memory else not ran
        for x, y in zip(rows(out), rows(done), strict=True):
            same = ("game", "graft", "k", "j", "question", "exact", "text", "hit", "tokens")
            assert {name: x[name] for name in same} == {name: y[name] for name in same}
            assert abs(x["logprob"] - y["logprob"]) < 1e-3


def test_a_full_disk_stops_with_an_error_and_keeps_what_is_done(plain, pair, tmp_path, monkeypatch):
    writes, real = [], os.fsync

    def fsync(file):
        writes.append(file)
        if len(writes) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(writing.os, "fsync", fsync)
    cut = dataclasses.replace(ASKED, memory=SMALL)
    with pytest.raises(OSError, match="No space left"):
        sweep(pair, tmp_path / "run", cut)
    assert len(list((tmp_path / "run" / "chunks").glob("*"))) == 4  # and run.json; nothing half-written
    monkeypatch.undo()
    sweep(pair, tmp_path / "run", cut, resume=True)
    assert len(rows(tmp_path / "run")) == 96


def test_a_damaged_chunk_is_named(plain, pair, tmp_path):
    asked = dataclasses.replace(ASKED, games=("countries",), decode=None)
    sweep(pair, tmp_path / "run", asked)
    chunk = tmp_path / "run" / "chunks" / "countries-answers-0-00000.parquet"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=r"countries-answers-0-00000.parquet is damaged .*: remove it and add --resume"
    ):
        sweep(pair, tmp_path / "run", asked, resume=True)


KILLED = """
from transformers import AutoConfig, AutoTokenizer
from jaxcomm.evals import cli
from jaxcomm.evals.sweeps import run

command = "sweep --a pair:b --b pair:b --n 6 --games countries --ks 3 4 5 --js 1 2 4 --decode 4 --memory 0.0013"
chunks = lambda out: len(list((home / out / "chunks").glob("*.parquet")))

def go(out, *more):
    sys.argv = ["jaxcomm", *command.split(), "--out", str(home / out), *more]
    cli.main()

in_peace(go, "peace")
assert chunks("peace") >= 12
for wanted in (1, 7, None):  # while the first chunks are made, in the middle, while the results are written
    written = lambda: (home / "killed" / "results.parquet").exists() if wanted is None else chunks("killed") >= wanted
    killed(written, go, "killed", "--resume")
    print(chunks("killed"), flush=True)
in_peace(go, "killed", "--resume")
"""


def test_real_kills_leave_no_trace(tmp_path):
    """SIGKILL while starting, computing and writing; the last run's files are those of a run in peace."""
    assert len(set(kills(KILLED, tmp_path))) == 3, "killed at different moments"
    assert there(tmp_path / "killed") == there(tmp_path / "peace")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences to fit W on: what A reads in games, but in none of these."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(fitting.own_statements("countries")[:300]))
    return str(path)


def test_a_crash_at_any_step_of_any_file_leaves_no_trace(plain, pair, text, tmp_path, monkeypatch):
    """What is there is whole at every crash, and what a run ends with is what one in peace does. (What takes long is computed
    once, or stood in for: this is about files.)"""
    made = {}
    for where, name in ((Plan, "run"), (run, "fit")):
        real = getattr(where, name)
        once = lambda *args, real=real: made.get(str(args[-1])) or made.setdefault(str(args[-1]), real(*args))
        monkeypatch.setattr(where, name, once)
    asked = dataclasses.replace(
        ASKED, games=("countries",), grafts=("replace",), decode=None, memory=SMALL, text=text, into=4
    )
    sweep(pair, tmp_path / "peace", asked, sender="a")
    want = there(tmp_path / "peace")

    def whole():
        assert there(tmp_path / "run").items() <= want.items()

    crashed = crash_everywhere(lambda: sweep(pair, tmp_path / "run", asked, sender="a", resume=True), whole)
    assert crashed > 2 * 4 and there(tmp_path / "run") == want


def test_a_folder_belongs_to_one_process_at_a_time(plain, pair, tmp_path):
    """And to nobody once that has ended, whatever ended it."""
    out = tmp_path / "run"
    out.mkdir()
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="run is in use by another process: wait for its end, or choose another"):
            sweep(pair, out)
        other.kill()
    asked = dataclasses.replace(ASKED, games=("countries",), decode=None, n=4)
    sweep(pair, out, asked)
    sweep(pair, out, asked, resume=True)


def test_hidden_things_in_a_folder_are_in_nobodys_way(plain, pair, tmp_path):
    asked = dataclasses.replace(ASKED, games=("countries",), decode=None, n=4)
    for name in (".cache.d", "chunks/.x.y"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "mine.txt").write_text("mine")
    sweep(pair, tmp_path / "run", asked)
    sweep(pair, tmp_path / "run", asked, resume=True)
    assert (tmp_path / "run" / ".cache.d" / "mine.txt").read_text() == "mine"


def test_best_cells_are_chosen_on_one_half_and_reported_on_the_other():
    """On pure noise the half a cell was chosen on flatters it, the other half does not."""
    rng = np.random.default_rng(0)
    exact = rng.random((1, 20, 20, 100)) < 0.3
    cells = Cells(exact, np.zeros(exact.shape), None)
    chosen, reported = np.arange(50), np.arange(50, 100)
    k, j = cells.best(0, chosen)
    assert exact[0, k, j, chosen].mean() > 0.45 and exact[0, k, j, reported].mean() < 0.4
    likely = np.zeros(exact.shape)
    likely[0, 3, 4] = 1.0
    assert Cells(np.ones(exact.shape, bool), likely, None).best(0) == (3, 4)


def test_the_reported_half_is_not_the_one_chosen_on(pair):
    """And what is reported there is what the protocols say."""
    b, asked = pair["b"], dataclasses.replace(ASKED, games=("countries",), grafts=("replace",), n=8, decode=5)
    games = {"countries": draw("countries", 3, 8)}
    exact = np.random.default_rng(1).random((1, 2, 2, 8)) < 0.5
    cells = {"countries": Cells(exact, np.zeros(exact.shape), None)}
    (found,) = halve(GameSweep(asked, b, b, games), cells, {})
    assert sorted([*found.chosen_on, *found.reported]) == list(range(8)) and len(found.reported) == 4
    k, j = ASKED.ks.index(found.k), ASKED.js.index(found.j)
    np.testing.assert_array_equal(found.flattering, exact[0, k, j, found.chosen_on])
    assert found.flattering.sum() == exact[0][..., found.chosen_on].sum(axis=-1).max()
    questions = [games["countries"].items[i] for i in found.reported]
    read = [i.prompt_a for i in questions], [i.prompt_b for i in questions]
    says = lambda **how: [
        r.text == i.answer
        for r, i in zip(activation(b, b, *read, k=found.k, j=found.j, **how).write(5), questions, strict=True)
    ]
    answers = [item.answer for item in questions]
    assert found.ours == says()
    assert found.controls == {c: says(control=StandIn(c, answers=answers)) for c in get_args(Control)}
    assert found.silent == found.controls["self"], "replacing B's state by itself is silence"


def test_maps_are_fitted_once(pair, text, tmp_path, monkeypatch):
    asked = dataclasses.replace(ASKED, games=("countries",), grafts=("replace",), decode=None, text=text, into=4)
    sweep(pair, tmp_path / "run", asked, sender="a")
    want = (tmp_path / "run" / "results.parquet").read_bytes()
    monkeypatch.setattr(run, "fit", None)
    sweep(pair, tmp_path / "run", asked, sender="a", resume=True)
    assert (tmp_path / "run" / "results.parquet").read_bytes() == want
    assert np.mean([r["exact"] for r in rows(tmp_path / "run") if r["k"] == 5]) > 0.4


def test_sign_flips_equal_an_enumeration_of_all_of_them():
    x, y = np.array([1, 1, 1, 0, 1, 1, 0, 1], bool), np.array([0, 0, 1, 0, 0, 1, 1, 0], bool)
    d = x.astype(int) - y
    means = [np.mean(d * signs) for signs in itertools.product((1, -1), repeat=8)]
    want = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
    assert sign_flip(x, y) == pytest.approx(want)
    assert sign_flip(x, x) == 1.0


def test_a_fingerprint_is_of_the_weights_and_not_of_their_layout(pair):
    b = pair["b"].params
    assert fingerprint(b) == fingerprint(b.unroll()) != fingerprint(pair["a"].params)
    changed = b.replace(norm={"weight": b.norm["weight"].at[0].add(1e-3)})
    assert fingerprint(changed) != fingerprint(b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ks", "0", "9"], "k = 9 is out of range"),
        (["--ks", "2", "2"], "ks names 2 twice"),
        (["--into", "3"], "--into is the layer that W maps into"),
        (["--memory", "0.0001"], "budget of 107374 bytes is too small: one cell of one game needs"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "statements", "--into", "9"], "into = 9 is out of range"),
        (["--n", "3"], "3 questions of countries: a report on halves needs at least 4"),
        (["--games", "countries", "countries"], "games = countries countries: name at least one, each once"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in refused(capsys, "sweep", "--a", "pair:b", "--b", "pair:b", "--out", out, *arguments)
    assert not (out / "run.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("sweep", "--a", "pair:b", "--b", "pair:b", "--out"),
        ("eval", "--a", "pair:b", "--b", "pair:b", "--tasks", "countries", "--out"),
        ("play", "--a", "pair:b", "--b", "pair:b", "--k", 1, "--j", 1, "--json"),
        ("fit-map", "--a", "pair:a", "--b", "pair:b", "--ks", 1, "--js", 1, "--text", "statements:countries", "--out"),
        ("monitor", "--a", "pair:b", "--k", 1, "--out"),
        ("lmnet", "train", "--out"),
        ("convert", "pair:a", "--out"),
        ("train-pair", "a", "--out"),
        ("report", "--out"),
        ("demo", "--out"),
    ],
    ids=lambda words: words[0],
)
def test_results_go_where_files_are(capsys, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("gs://bucket/run", "s3://bucket/run", "hdfs://host:90/run"):
        assert f"{place} is not local: name a local folder" in refused(capsys, *words, place)
    assert not list(tmp_path.iterdir())
