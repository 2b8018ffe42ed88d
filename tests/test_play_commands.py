"""Games by the command line: reports, the commands they print, what is refused, and sweeps over games of one's own."""

import html
import json
import re
import shlex
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import tyro

from jaxcomm.evals import cli, options
from jaxcomm.evals.commands.play import Play
from jaxcomm.evals.games import GAMES, draw
from jaxcomm.evals.hearing import EQUAL
from jaxcomm.evals.options import command_line
from jaxcomm.evals.play import play
from jaxcomm.protocols import Control

from command import jaxcomm, refused
from game_files import lines_of, numbered, write_game

N = 6


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A game of one's own, which the embedded pair can play."""
    path = tmp_path_factory.mktemp("my games") / "mine.jsonl"
    write_game(path, *lines_of(GAMES["countries"](0, n=N)))
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Reports ------------------------------------------------------------------------------------------------------------

ARMS = [
    ("silent", None), ("skyline", None), ("message", None), ("message", "other"), ("activation", None),
    ("activation", "other"), ("message", "equal-flops"),
]  # fmt: skip
"""In the order in which they are played. A message of equal cost is a control of the activation."""


@pytest.fixture(scope="module")
def played(mine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("played") / "run"
    arms = ("--protocol", "silent", "skyline", "message", "activation", "--control", "other", "equal-flops")
    jaxcomm("play", "--a", "pair:b", "--b", "pair:b", "--game", mine, *arms, "--k", 5, "--j", 2, "--out", out)
    return out


def test_a_run_leaves_a_report_a_line_for_every_arm_and_one_for_every_answer(played, mine):
    files = {"report.html", "report.md", "results.jsonl", "items.jsonl", "effects.png", "costs.png"}
    assert {path.name for path in played.iterdir()} == files
    results, items = records(played / "results.jsonl"), records(played / "items.jsonl")
    assert [(r["protocol"], r["control"]) for r in results] == ARMS and len(items) == len(ARMS) * N
    for n, result in enumerate(results):
        rows = items[n * N : (n + 1) * N]
        assert {(row["protocol"], row.get("control")) for row in rows} == {ARMS[n]}
        assert [row["prompt_a"] for row in rows] == [line["prompt_a"] for line in records(mine)]
        mean = lambda values: float(np.mean([bool(x) for x in values]))
        assert result["accuracy"] == mean(row["hit"] for row in rows)
        assert result["found_accuracy"] == mean(row["found_hit"] for row in rows)
        assert result["choice_accuracy"] == mean(row["choice"]["rank"] == 1 for row in rows)
        if ARMS[n][0] == "silent":
            assert result["calibrated_accuracy"] is None
        else:
            assert result["calibrated_accuracy"] == mean(row["choice"]["calibrated_rank"] == 1 for row in rows)
        assert (result["n"], result["game"], result["file"]) == (N, "mine", "mine.jsonl")
        assert result["flops"] > 0 and result["seconds"] > 0
    far = [("kl_from_none" in row, row.get("kl_from_other", 0) > 0) for row in items]
    assert far == [(arm in (("message", None), ("activation", None)),) * 2 for arm in ARMS for _ in range(N)]
    by = {arm: result["found_accuracy"] for arm, result in zip(ARMS, results, strict=True)}
    assert by["skyline", None] > by["silent", None] and by["activation", None] > by["activation", "other"]
    assert {result["information"] for result in results} == {"private"}
    for name in ("report.html", "report.md"):
        text = (played / name).read_text()
        for part in (
            "activation, other", "calibrated choice", "found match", "Presence and content (private information)",
            "Against every control", "activation, equal-flops", "Sent and heard", "Holm's method", "other against none",
        ):  # fmt: skip
            assert part in text or html.escape(part) in text
        assert text.count("B reads: ") == 2 * len(ARMS), "of the first two items"


def test_the_command_that_a_report_prints_gives_the_same_items_again(played, tmp_path):
    again = (played / "report.md").read_text().split("## Command")[1]
    (command,) = re.findall(r"```\n(.*)\n```", again)
    name, *words = shlex.split(command)
    assert name == "jaxcomm" and words[words.index("--out") + 1] == str(played)
    words[words.index("--out") + 1] = str(tmp_path / "again")
    jaxcomm(*words)
    assert (tmp_path / "again" / "items.jsonl").read_bytes() == (played / "items.jsonl").read_bytes()


@pytest.mark.parametrize(
    "given",
    [
        dict(protocol=("silent",)),
        dict(k=0, j=3, control=("zero", "noise"), graft="sum", choices=False, n=4, seed=2, names="new"),
        dict(
            wording="instructed", instruction='Say "it" in one word, {please}.', examples=2, chat=True, prompts_b="raw"
        ),
        dict(sender_reads="statement+question", system_a="It's you.", system_b="Two\nlines", chat_args=("x=1", "y=z")),
        dict(protocol=("cipher", "debate"), temperatures=(0.0, 0.5), rounds=4, form="harness", game="my game.jsonl"),
        dict(protocol=("message",), ask="{prompt} Tell.", tell="{prompt} {message}", temperature=0.7, top_p=0.9),
        dict(int8=True, tensor=2, dtype="bfloat16", json=Path("a b.json"), items=Path("i.jsonl"), out=Path("out")),
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_printed_command_asks_for_what_was_asked_for(given):
    command = Play(a="pair:b", b="some/model@revision", **given)
    name, *words = shlex.split(command_line(command))
    assert name == "jaxcomm" and tyro.cli(cli.prepare, args=words) == command


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--instruction", "One word."), "only the wording instructed takes an instruction, paper does not"),
        (("--instruction", "A.", "--wording", "kvcomm"), "instructed takes an instruction, kvcomm does not"),
        (("--protocol", "silent", "skyline", "silent"), "silent skyline silent: name at least one, each once"),
        (
            ("--protocol", "cipher", "--temperature", 0.7),
            "cipher does not sample, it only uses --temperatures",
        ),
        (("--protocol", "cipher", "--temperatures", 0.4, 0.1), "--temperatures 0.4 0.1: B's must be lower"),
        (("--protocol", "cipher", "--temperatures", 0.4, 0.4), "--temperatures 0.4 0.4: B's must be lower"),
        (("--protocol", "silent", "--control", "zero"), "--control does not apply to the protocol silent, which sends"),
        (("--protocol", "exchange", "--k", 5), "exchange needs --k (A's layer) and --j (B's layer)"),
        (("--protocol", "activation", "--k", 5, "--j", 2, "--where", "all"), "--where all needs --graft sum: replace"),
        (("--protocol", "silent", "--where", "all"), "--where do not apply to the protocol silent"),
        (
            ("--protocol", "message", "--turns", 2, "--control", "equal-bytes"),
            "--turns 2: a message of equal cost has one",
        ),
        (("--protocol", "message", "--probe", -1), "--probe -1: it must be at least 0"),
        (("--protocol", "silent", "activation", "--k", 5), "activation needs --k (A's layer) and --j (B's layer)"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(capsys, tmp_path, words, message):
    words = words if "--protocol" in words else (*words, "--protocol", "silent")
    out = tmp_path / "run"
    assert message in refused(capsys, "play", "--a", "nowhere", "--b", "nowhere", *words, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("play", "--control", "zero", "zero", "--k", 5, "--j", 2),
            "--control zero zero: name at least one, each once",
        ),
        (("play", "--n", 1, "--control", "mean", "--k", 5, "--j", 2), "--control mean needs at least two items"),
    ],
)
def test_arms_that_mean_nothing_are_refused_before_a_model_is_read(capsys, words, message):
    assert message in refused(capsys, *words, "--a", "nowhere", "--b", "nowhere")


def test_rounds_below_one_are_refused_and_not_taken_for_the_default(capsys):
    asked = ("--game", "countries", "--n", 1, "--max-new-tokens", 1, "--no-choices")
    words = ("play", "--a", "pair:b", "--b", "pair:b", "--protocol", "debate", "--rounds", 0, *asked)
    assert "rounds" in refused(capsys, *words)


# Sweeps over games of one's own -------------------------------------------------------------------------------------


def test_a_sweep_over_a_game_of_ones_own_is_not_gone_on_with_after_the_file_changed(b, mine, tmp_path, capsys):
    name, out = tmp_path / mine.name, tmp_path / "run"
    name.write_bytes(mine.read_bytes())
    words = ("sweep", "--a", "pair:b", "--b", "pair:b", "--games", name, "--ks", 5, "--js", 2, "--out", out)
    jaxcomm(*words)
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [(row["game"], row["k"], row["j"], row["question"]) for row in rows] == [("mine", 5, 2, i) for i in range(N)]
    outcome = play(draw(str(name)), "activation", b, b, k=5, j=2)
    assert [row["exact"] for row in rows] == outcome.hits and sum(outcome.hits) > 0
    capsys.readouterr()
    assert "holds this run already: add --resume" in refused(capsys, *words)
    first, *rest = lines_of(draw(str(name)).items)
    write_game(name, dict(first, prompt_a=f"{first['prompt_a']} Yes."), *rest)
    line = refused(capsys, *words, "--resume")
    assert "holds a different run (games_sha256: " in line and "choose another folder" in line
    assert pq.read_table(out / "results.parquet").to_pylist() == rows


def test_statements_of_ones_own_game_are_not_made_up(capsys, tmp_path):
    name = write_game(tmp_path / "mine.jsonl", *numbered(8))
    words = (
        "sweep",
        "--a",
        "pair:b",
        "--b",
        "pair:b",
        "--games",
        name,
        "--text",
        "statements",
        "--out",
        tmp_path / "run",
    )
    assert "name a file of sentences" in refused(capsys, *words)


def test_the_command_knows_every_control():
    """It names them itself, since commands load nothing before they run."""
    assert get_args(options.Control) == (*get_args(Control), *EQUAL)
