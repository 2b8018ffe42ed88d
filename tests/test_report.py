"""Reports say what was run and what was published, number by number, and how the two differ. Their runs are made by hand."""

import csv
import html
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich.console

from jaxcomm.evals import figures
from jaxcomm.evals.documents import Code, markdown, plain
from jaxcomm.evals.evaluation.options import PROTOCOLS
from jaxcomm.evals.finished import read_run
from jaxcomm.evals.published import PUBLISHED, SETUP, differences, read_published
from jaxcomm.evals.report import report
from jaxcomm.evals.scores import accuracy, difference

from command import refused

CONFIG = {
    "tasks": ["countries"], "protocols": ["single", "activation"], "controls": ["zero"], "data": {}, "n": None, "seed": 0,
    "names": "seen", "few_shot": None, "k": [4], "j": 1, "graft": "replace", "where": "last", "think": 0, "rounds": None,
    "temperatures": [], "max_message_tokens": 24, "max_new_tokens": None, "temperature": None, "top_p": 1.0, "a": "A",
    "b": "B", "others": [], "chat": False, "dtype": "float32", "python": "3.11", "jaxcomm": "0.1", "jax": "0.10",
    "device": "TPU v9", "devices": 4,
}  # fmt: skip
COUNTRIES = {
    "single": [0, 0, 0, 1, 0, 0, 0, 0, 1],
    "activation": [1, 1, 1, 1, 0, 1, 1, 0, 1],
    "activation, zero": [0, 0, 0, 0, 0, 0, 0, 0, 0],
    "activation, other": [0, 1, 0, 1, 0, 0, 0, 0, 1],
}


def make_run(
    folder: Path, hits=COUNTRIES, task="countries", metric="exact_match", filters=("stripped",), **config
) -> Path:
    """A run folder as jaxcomm eval leaves it: hits[protocol], question by question; the filters say the same."""
    lines, rows = [], []
    for n, (protocol, own) in enumerate(hits.items()):
        for name in filters:
            value, low, high = accuracy([float(hit) for hit in own])
            line = {"protocol": protocol, "task": task, "metric": metric, "filter": name, "value": value, "low": low}
            line |= {"high": high, "n": len(own), "unparsed": n, "flops": 1e6 * (n + 1) / 3, "tokens_read": 8.5 + n}
            line |= {"tokens_written": 3.25, "message_tokens": 1.0, "seconds": 4.176364220999862, "truncated": 2 * n}
            lines.append(line | {"version": 1.0, "few_shot": 0})
            rows += [
                {
                    "protocol": protocol,
                    "task": task,
                    "question": 7 * q,
                    "filter": name,
                    "metrics": json.dumps({metric: hit}),
                }
                for q, hit in enumerate(own)
            ]
    folder.mkdir()
    run = {"command": f"jaxcomm eval --out {folder.name}", "config": CONFIG | config, "plan": {}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    return folder


def make_report(out: Path, *runs: Path) -> tuple[str, str, list[dict[str, str]]]:
    """Markdown, HTML, and the rows of the CSV."""
    report(runs, out, rich.console.Console(file=io.StringIO(), width=180))
    with open(out / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return (out / "report.md").read_text(), (out / "report.html").read_text(), rows


def test_the_numbers_are_those_of_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    _, _, rows = make_report(tmp_path / "out", run)
    found = [row for row in rows if row["kind"] == "run"]
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert len(found) == len(lines) == 4
    for row, line in zip(found, lines, strict=True):
        assert {key: row[key] for key in line} == {key: str(value) for key, value in line.items()}
        assert (row["source"], row["a"], row["b"]) == (str(run), "A", "B")


def test_presence_and_content_are_paired_question_by_question(tmp_path):
    run = make_run(tmp_path / "run")
    table = pq.read_table(run / "items.parquet").to_pylist()
    hits = {
        protocol: np.array([json.loads(r["metrics"])["exact_match"] for r in table if r["protocol"] == protocol], float)
        for protocol in COUNTRIES
    }
    text, _, rows = make_report(tmp_path / "out", run)
    row = next(row for row in rows if row["protocol"] == "activation" and row["kind"] == "run")
    own, other, alone = (hits[name] for name in ("activation", "activation, other", "single"))
    assert float(row["total"]) == pytest.approx(float(row["presence"]) + float(row["content"]))
    for column, x, y in (("total", own, alone), ("presence", other, alone), ("content", own, other)):
        apart = x - y
        flips = np.array(list(itertools.product((-1, 1), repeat=len(apart)))) @ apart / len(apart)
        assert float(row[column]) == pytest.approx(apart.mean())
        assert float(row[f"{column}_p"]) == pytest.approx(np.mean(np.abs(flips) >= abs(apart.mean()) - 1e-12))
        assert [float(row[f"{column}_{end}"]) for end in ("low", "high")] == list(difference(x, y))[1:]
        assert int(row[f"{column}_pairs"]) == 9
    assert "Holm's method" in text and (tmp_path / "out" / "pair1-countries-effects.png").exists()


def test_questions_without_a_score_are_left_out_of_a_pair_and_that_is_said(tmp_path):
    run = make_run(tmp_path / "run", {"single": [0, 0, 1, 0], "debate": [1, 1, 1, 1]})
    rows = pq.read_table(run / "items.parquet").to_pylist()
    rows[0]["metrics"] = json.dumps({"exact_match": None})
    pq.write_table(pa.Table.from_pylist(rows), run / "items.parquet")
    text, _, found = make_report(tmp_path / "out", run)
    debate = next(row for row in found if row["protocol"] == "debate" and row["kind"] == "run")
    assert (debate["total_pairs"], float(debate["total"])) == ("3", pytest.approx(2 / 3))
    assert "differences are over 3 to 4 questions" in text and "need not add up" in text


def test_published_numbers_are_those_of_the_file(tmp_path):
    runs = [make_run(tmp_path / "games"), make_run(tmp_path / "sums", task="gsm8k", filters=("strict", "flexible"))]
    text, page, rows = make_report(tmp_path / "out", *runs)
    tables = json.loads(PUBLISHED.read_text())["tables"]
    for task in ("countries", "gsm8k"):
        told = [(t["unit"], row["values"][task]) for t in tables for row in t["rows"] if task in row["values"]]
        found = [row for row in rows if row["kind"] == "published" and row["task"] == task]
        assert [(row["unit"], float(row["as_published"].split()[0])) for row in found] == told
        assert [float(row["value"]) for row in found] == [pytest.approx(x / 100 if u == "%" else x) for u, x in told]
        assert all(row["as_published"] in text and row["as_published"] in page for row in found)
    filled = [re.sub(r"(\|  )+\|", "|", line) for line in text.splitlines()]
    assert any(
        x.startswith("| Ramesh &amp; Li 2025, Table 3 | LLaMA-3.2-3B → LLaMA-3.1-8B | 60.0 | 58.0 | 75.0 |")
        for x in filled
    )
    assert ".3 of the layers 0.51<br>.5 0.62<br>.7 0.62<br>random .7 0.63" in text
    assert (
        "lets B&#x27;s prompt also see its own later tokens" in text
        or "lets B's prompt also see its own later tokens" in text
    )
    assert "60.0 ± 2.3" in text and "sum 34.0<br>mean 36.0<br>replace 78.0" in text


def test_published_settings_have_the_names_that_are_compared():
    metrics, entries = read_published()
    assert {name for e in entries for name in e.setting} == set(SETUP)
    assert {e.protocol for e in entries} - {None} <= set(PROTOCOLS)
    assert set(metrics.values()) <= {e.setting.get("metric") for e in entries}


def set_up(tmp_path: Path, source: str, **how) -> list[str]:
    """What differs between a run and a published table of its task."""
    run = read_run("run 1", make_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", **how))
    metrics, entries = read_published()
    task = run.lines[0]["task"]
    return differences(run, run.lines, [e for e in entries if e.source == source and e.task == task], metrics)


def test_what_differs_in_the_set_up_is_found(tmp_path):
    two = "Ramesh & Li 2025, Table 2"
    like = dict(a="LLaMA-3.1-8B", b="LLaMA-3.1-8B", k=[26], j=26, hits={p: h * 12 for p, h in COUNTRIES.items()})
    like["hits"] = {protocol: own[:100] for protocol, own in like["hits"].items()}
    asked = "prompts: this package's here, the authors' own, not public there"
    unknown = "not stated there: prompt format, few-shot examples"
    assert set_up(tmp_path, two, **like) == [asked, unknown]
    assert set_up(tmp_path, two, **like | dict(graft="sum")) == [asked, unknown]  # one of the table's three
    for change, said in (
        (
            dict(b="C"),
            "models: LLaMA-3.1-8B → C here, LLaMA-3.2-3B → LLaMA-3.2-3B or LLaMA-3.1-8B → LLaMA-3.1-8B there",
        ),
        (dict(others=["C"]), "models: LLaMA-3.1-8B + C → LLaMA-3.1-8B here"),
        (dict(hits=COUNTRIES), "questions: 9 here, 100 there"),
        (dict(temperature=0.7, top_p=0.9), "decoding: temperature 0.7, p = 0.9 here, greedy there"),
        (dict(j=3), "layers: k = 26, j = 3 here, k = 26, j = 26 there"),
        (dict(where="all"), "edited: all tokens here, last token there"),
        (dict(think=9), "A writes first: 9 tokens here, nothing there"),
        (dict(filters=("loose",)), "metric: exact_match, loose here, exact string match there"),
    ):
        assert any(text.startswith(said) for text in set_up(tmp_path, two, **like | change)), said
    rounds = dict(task="gsm8k", hits={"debate": [1, 0], "single": [0, 0]}, rounds=3, data={"gsm8k": "a1"}, chat=True)
    said = set_up(tmp_path, "Du et al. 2023, main results", **rounds)
    assert "rounds: 3 here, 2 there" in said and "agents: 2 here, 3 there" in said
    assert any("questions from a local file here" in text for text in said)
    assert not any("prompt format" in text for text in said)


def test_what_differs_in_a_channel_is_found(tmp_path):
    """Which layers see a prefix, under which mask; how long was thought; where deltas were added."""
    channel = dict(layers=(), scheme=None, ratio=None, published_mask=False, steps=10, delta_layers=())
    hits = lambda protocol: {"single": [0, 0], protocol: [1, 0]}
    for source, task, protocol, changed, said in (
        ("KVComm, Table 1", "countries", "kv", {}, "layers that see the prefix: all here, 0.3 by score or 0.5 by score or 0.7 by score, and 1 more there"),
        ("KVComm, Table 1", "countries", "kv", dict(layers=(1, 2)), "layers that see the prefix: 1, 2 here"),
        ("KVComm, Table 1", "countries", "kv", dict(scheme="score", ratio=0.5), "mask: what comes before here, KVComm's published there"),
        ("LatentMAS, Table 1", "gsm8k", "latent", {}, "steps: 10 here, by task, of 0 to 80 there"),
        ("State Delta Encoding, Table 2", "gsm8k", "deltas", dict(delta_layers=(3, 4)), "delta layers: 3, 4 here, 22 or 17, 20 or 21, 23, 33 there"),
    ):  # fmt: skip
        found = set_up(tmp_path, source, task=task, hits=hits(protocol), **channel | changed)
        assert any(text.startswith(said) for text in found), (said, found)
    same = set_up(
        tmp_path, "KVComm, Table 1", hits=hits("kv"), **channel | dict(scheme="score", ratio=0.3, published_mask=True)
    )
    assert not any(text.startswith(("layers that", "mask")) for text in same)


def test_runs_of_one_pair_and_all_filters_stand_in_one_table(tmp_path):
    how = dict(task="gsm8k", filters=("strict-match", "flexible-extract"))
    runs = [make_run(tmp_path / "one", **how), make_run(tmp_path / "two", **how, chat=True)]
    text, _, _ = make_report(tmp_path / "out", *runs, make_run(tmp_path / "other", b="C"))
    assert text.count("### gsm8k") == 1 and text.count("### countries") == 1
    for run, name in itertools.product(("run 1", "run 2"), how["filters"]):
        assert f"| {run} | exact_match, {name} | activation |" in text
    assert "run 1: models" in text and "run 2: models" in text and text.count("prompt format: raw text here") > 1
    assert (tmp_path / "out" / "pair1-gsm8k.png").exists() and (tmp_path / "out" / "pair2-countries.png").exists()


def test_commands_versions_and_devices_come_first(tmp_path):
    text, page, _ = make_report(tmp_path / "out", make_run(tmp_path / "run"))
    head = text[: text.index("## A → B")]
    assert "jaxcomm eval --out run" in head and "jaxcomm 0.1, jax 0.10, python 3.11" in head and "4 x TPU v9" in head
    assert "jaxcomm eval --out run" in page


def test_what_was_not_run_is_said(tmp_path):
    text, _, rows = make_report(tmp_path / "out", make_run(tmp_path / "run", {"activation": [1, 0], "skyline": [1, 1]}))
    assert text.count("single was not run") == 2 and text.count("the control other was not run") == 1
    assert rows[0]["total"] == rows[0]["content"] == ""


def test_a_control_that_could_not_be_scored_was_run(tmp_path):
    run = make_run(tmp_path / "run", {"single": [0, 0], "activation": [1, 0], "activation, other": [0, 0]})
    *lines, other = (run / "results.jsonl").read_text().splitlines()
    other = json.dumps(json.loads(other) | {"value": None, "low": None, "high": None})
    (run / "results.jsonl").write_text("\n".join([*lines, other]))
    text, _, _ = make_report(tmp_path / "out", run)
    assert "was not run" not in text and text.count("| none scored |") == 1


def test_whether_information_is_private_heads_a_table(tmp_path):
    run = make_run(tmp_path / "run", {"single": [0, 0], "message": [1, 0], "message, other": [0, 0]})
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    told = "".join(json.dumps(line | {"information": "shared", "overlap": 0.5}) + "\n" for line in lines)
    (run / "results.jsonl").write_text(told)
    text, _, _ = make_report(tmp_path / "out", run)
    assert "### countries (shared information: B reads all that A knows)" in text
    assert "50% of the questions get a message with their own answer" in text


def test_a_metric_that_is_no_mean_says_that_it_has_no_interval(tmp_path):
    run = make_run(tmp_path / "run", {"single": [1, 0]}, task="statements", metric="word_perplexity", filters=("none",))
    line = json.loads((run / "results.jsonl").read_text()) | {"value": 4.84, "low": None, "high": None}
    (run / "results.jsonl").write_text(json.dumps(line) + "\n")
    text, _, _ = make_report(tmp_path / "out", run)
    assert "4.84 (no interval)" in text and "not a mean over questions" in text
    assert not list((tmp_path / "out").glob("*.png"))


def test_names_are_shown_unchanged(tmp_path):
    run = make_run(tmp_path / "run", a="<script>alert(1)</script>", b="B & C|*D*", device="<b>")
    text, page, _ = make_report(tmp_path / "out", run)
    assert "<script" not in page and "<b>" not in page and 'src="http' not in page
    assert html.escape("<script>alert(1)</script> → B & C|*D*") in page
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; → B &amp; C\|\*D\*" in text
    assert 'src="data:image/png;base64,' in page and "](pair1-countries.png)" in text


def test_a_sweep_brings_its_own_report(tmp_path):
    sweep = make_run(tmp_path / "sweep", games=["countries"])
    (sweep / "results.parquet").touch()
    (sweep / "report.txt").write_text("best cell k < 4 & j\n")
    text, page, rows = make_report(tmp_path / "out", sweep)
    assert "best cell k < 4 & j" in text and "best cell k &lt; 4 &amp; j" in page and not rows


def damaged(tmp_path: Path, file: str, change) -> list[Path]:
    run = make_run(tmp_path / "run")
    data = (run / file).read_bytes()
    (run / file).write_bytes(change(data))
    return [run]


def without(tmp_path: Path, file: str) -> list[Path]:
    run = make_run(tmp_path / "run")
    (run / file).unlink()
    return [run]


cut = lambda data: data[: data.index(b"\n") + 20]
BAD = {
    "none": (lambda p: [], "name at least one run folder"),
    "not there": (lambda p: [p / "no"], "no does not exist"),
    "no run": (lambda p: [p], "is no run folder: it has no run.json"),
    "twice": (lambda p: [make_run(p / "run"), p / "x" / ".." / "run"], "is named twice"),
    "no results": (lambda p: without(p, "results.jsonl"), "go on with jaxcomm eval --out run --resume"),
    "no items": (lambda p: without(p, "items.parquet"), "go on with jaxcomm eval --out run --resume"),
    "no sweep report": (lambda p: [make_run(p / "run", games=[])], "go on with jaxcomm eval --out run --resume"),
    "run.json": (lambda p: damaged(p, "run.json", lambda data: data[:50]), "run.json is damaged"),
    "another run": (lambda p: damaged(p, "run.json", lambda data: data.replace(b'"k"', b'"q"')), "config has no 'k'"),
    "line": (lambda p: damaged(p, "results.jsonl", cut), "results.jsonl line 2 is damaged"),
    "list": (lambda p: damaged(p, "results.jsonl", lambda data: data + b"[]"), "line 5 is damaged: no object"),
    "no value": (
        lambda p: damaged(p, "results.jsonl", lambda data: data.replace(b'"value"', b'"v"', 1)),
        "results.jsonl line 1 is damaged: it has no 'value'",
    ),
    "bytes": (
        lambda p: damaged(p, "results.jsonl", lambda data: data + b"\xff\xfe"),
        "results.jsonl line 5 is damaged",
    ),
    "items": (lambda p: damaged(p, "items.parquet", lambda data: data[:99]), "items.parquet is damaged"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, bad):
    runs, message = BAD[bad]
    assert message in refused(capsys, "report", *runs(tmp_path), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_question_is_enough_for_a_report(tmp_path):
    hits = {"single": [0], "message": [1], "activation": [1], "activation, zero": [0]}
    text, _, rows = make_report(tmp_path / "out", make_run(tmp_path / "run", hits))
    found = {row["protocol"]: row for row in rows if row["kind"] == "run"}
    assert (found["message"]["total"], found["message"]["total_p"]) == ("1.0", "1.0")
    assert found["activation"]["total_p"] == "1.0" and "+100 [" in text


def shown(markdown: str) -> str:
    """Markdown's text as it is read: an independent reading of what escapes and tags do."""
    html_text = re.sub(r"<br>", "\n", re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))
    return html.unescape(html_text)


MARKS = ("[x](http://e.vil)", "![x](y)", "[x]: http://e.vil", "`code`", "```", "<b>", "a|b", "*a*", "_a_", "~~a~~", "$x$", "# x", "- x", "1. x", "1) x", "---", "===", "a\n# b", "&lt;", "\\", "> x")  # fmt: skip


@pytest.mark.parametrize("name", MARKS)
def test_values_are_shown_unchanged_in_markdown(name):
    text = plain(name)
    assert shown(text) == name and "\n" not in text
    bare = re.sub(r"\\.", "x", text.replace("<br>", "\n"))  # without what is escaped
    assert not re.search(r"[`*|<~]|\]\(|\]:|(?m:^(?:[-+] |#+ |\d+[.)] |--|==))", bare)


def test_a_command_with_a_fence_stays_in_its_block(tmp_path):
    command = "jaxcomm eval --tell '```` {message} {prompt}'"
    text = markdown([Code(command)])
    fence = text.split("\n")[0]
    assert set(fence) == {"`"} and fence not in command and text == f"{fence}\n{command}\n{fence}\n"


def test_a_report_goes_into_a_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out is a file: name a folder"):
        make_report(tmp_path / "out", make_run(tmp_path / "run"))


def test_the_same_runs_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run")
    for out in ("one", "two"):
        make_report(tmp_path / out, run)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["pair1-countries-effects.png", "pair1-countries.png", "report.csv", "report.html", "report.md"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_labels_cover_no_point_and_no_other_label():
    import matplotlib.pyplot as plt

    points = [
        figures.Cost(name, flops, value, value, min(1.0, value + 0.05), control=", " in name)
        for name, flops, value in (
            ("single", 27e6, 0.03), ("skyline", 30e6, 1.0), ("message", 82e6, 1.0), ("debate", 90e6, 1.0),
            ("activation", 37e6, 0.87), ("activation, zero", 51e6, 0.0), ("activation, other", 37e6, 0.04),
            ("activation, self", 40e6, 0.03), ("activation, noise", 37e6, 0.05), ("cipher", 95e6, 0.94),
        )
    ]  # fmt: skip
    figure, axis = plt.subplots(figsize=(6.6, 4.8), dpi=130)
    figures.draw_costs(axis, points, figures.palette(points))
    figure.draw_without_rendering()
    labels = figures.name_points(axis, points)
    spots = axis.transData.transform([(p.amount, 100 * p.value) for p in points])
    left, bottom, right, top = axis.get_window_extent().extents
    plt.close(figure)
    for n, label in enumerate(labels):
        assert figures.common(label[None], np.delete(labels, n, axis=0)) == 0
        assert not np.all((label[:2] < spots) & (spots < label[2:]), axis=1).any()
        assert left <= label[0] and bottom <= label[1] and label[2] <= right and label[3] <= top


@pytest.mark.parametrize("n", [1, 2])
def test_costs_are_a_png_even_of_one_point(n):
    panels = {f"panel {i}, $x$": [figures.Cost("single $", 1e9, 0.5, 0.5, 0.5)] for i in range(n)}
    assert figures.costs({"FLOPs": panels, "bytes": dict([*panels.items()][:1])}, label="%").startswith(
        b"\x89PNG\r\n\x1a\n"
    )
