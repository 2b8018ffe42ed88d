"""Biographies: facts and verdicts as their authors read them, scores by hand, and whole runs of the task."""

import json

import numpy as np
import pytest

from jaxcomm.evals import biographies
from jaxcomm.evals.biographies import RULES, bullets, judged, person_scores, read_people
from jaxcomm.evals.evaluation.settings import EvalSettings
from jaxcomm.evals.scores import accuracy, ratio

from evaluations import SAMPLE, items, run


def test_the_judge_is_asked_about_every_fact_and_both_rules_score_by_hand(b, monkeypatch):
    """Verdicts are given by hand; the scores are worked out on paper."""
    people = {"P": ["f1", "f2"], "Q": ["g1"]}
    written = [("P", ["- one\n- two", "- uno\n- due"]), ("Q", ["- short", "- x\n- y"])]
    said = {
        "consistent": ["Yes.", "no", "uncertain", "hm", "yes"],
        "supported": ["supported", "partially supported", "unsupported", "hm", "not supported", "Supported"],
    }
    asked = []

    def judge_all(judge, by, rule, questions):
        asked.append(questions)
        name = next(n for n, r in RULES.items() if r is rule)
        assert len(questions) == len(said[name])
        return [(rule.parse(text), text) for text in said[name]]

    monkeypatch.setattr(biographies, "judge_all", judge_all)
    found = judged(b, "text", people, written)
    assert asked[0][:2] == [("P", written[0][1][0], "f1"), ("P", written[0][1][0], "f2")]
    consistent = [person_scores(RULES["consistent"], record["consistent"]) for record in found]
    assert consistent == [(1.0, 2, 2), (1.0, 1, 0)], "P: yes, no, two dropped; Q: the short one is not asked about"
    supported = [person_scores(RULES["supported"], record["supported"]) for record in found]
    assert supported == [((0.75 + 0.0) / 2, 1, 1), (0.5, 1, 0)]
    records = [{"verdicts": record} for record in found]
    lines = biographies.summarise(records)
    assert lines["consistent"]["value"] == pytest.approx(2 / 3) and lines["supported"]["value"] == pytest.approx(0.4375)
    assert lines["consistent"]["skipped"] == 1 and lines["consistent"]["unparsed"] == 2


def test_verdicts_are_read_in_the_authors_order():
    assert [RULES["consistent"].parse(t) for t in ("Yes, no doubt", "uncertain, no", "No.", "maybe")] == [
        1,
        None,
        0,
        None,
    ]
    assert [RULES["supported"].parse(t) for t in ("Partially supported", "Unsupported", "is supported", "?")] == [
        0.5,
        0,
        1,
        None,
    ]


def test_people_are_read_as_the_authors_wrote_them(tmp_path):
    people = read_people(SAMPLE / "biographies.json")
    assert "Tomas Ridderkerk" in people and people["Ines Calloway"][1] == "She designed the type system of Marl."
    assert bullets("- a b\n\n  * c\n1. d\n---") == ["a b", "c", "d"]
    for text, said in (
        ("[]", "not a JSON object"),
        ('{"X": ""}', "'X' has no facts"),
        ('{"X": 3}', "neither a text"),
        ("{", "not JSON"),
    ):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_people(tmp_path / "p.json")


def test_biographies_run_end_to_end_with_any_judge(b, tmp_path):
    asked = EvalSettings(
        tasks=("biographies",), data={"biographies": SAMPLE / "biographies.json"}, n=3, judge_by="likelihood",
        protocols=("single", "debate"), max_message_tokens=16, max_new_tokens=16, truncate=True,
    )  # fmt: skip
    lines = run(asked, b, tmp_path / "run")
    arms = (*asked.protocols, "debate, other")
    assert {(x["protocol"], x["filter"]) for x in lines} == {(p, r) for p in arms for r in RULES}
    assert all(x["n"] == 3 and 0 <= x["value"] <= 1 for x in lines if x["filter"] == "supported")
    agents = {r["protocol"]: len(json.loads(r["answer"])) for r in items(tmp_path / "run")}
    assert agents == {"single": 1, "debate": 2, "debate, other": 2}
    json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def test_a_ratios_interval_is_over_people():
    value, low, high = ratio([3.0, 0.0, 5.0], [4, 2, 5])
    assert value == 8 / 11 and 0 <= low < value < high <= 1
    assert np.isnan(ratio([0.0, 0.0], [0, 0]).value)
    assert ratio([4.0, 2.0], [4, 2]) == accuracy([True, True]), "no certainty from two people"
