"""Games, text, scores: what is asked has one right answer, and training never saw it."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.evals.games import GAMES, countries, tip_sheets
from jaxcomm.evals.games.companies import CATCH
from jaxcomm.evals.games.world import held_out, world
from jaxcomm.evals.pair.text import DOCUMENTS, documents, plain, statements
from jaxcomm.evals.scores import accuracy, difference, exact_match, normalised_match

from command import refused


def test_the_world_is_as_large_as_promised_and_names_do_not_give_the_answer_away():
    w = world()
    assert len(w.landmarks) >= 150 and len({x.country for x in w.landmarks}) >= 40
    assert len({x.name for x in w.landmarks}) == len(w.landmarks)
    assert not any(x.country.lower() in x.name.lower() for x in w.landmarks)
    for group in (w.names, w.stems):
        assert not set(group["seen"]) & set(group["new"])


def test_games_have_the_papers_sizes_and_a_seed_gives_the_same_games_twice():
    assert len(countries()) == 100 and len(tip_sheets()) == 70
    for game in GAMES.values():
        assert game(3) == game(3) and game(3) != game(4)


def roles(sheet: str) -> str:
    """An independent reading of a tip sheet: good news, and nothing against it."""
    good, caught = set(), set()
    for sentence in re.split(r"(?<!Inc)(?<!Ltd)(?<!Corp)\. (?:Meanwhile )?|(?<=%)\. ", sheet.rstrip(".")):
        head = re.split(r" has | is | have ", sentence)[0]
        companies = head.split(" and ")
        bad = re.search(r"nosedive|profit warning|lost \d+%|closing \d+", sentence)
        good |= set() if bad else set(companies)
        if catch := re.search(r", but (\w+) (" + "|".join(map(re.escape, CATCH)) + ")", sentence):
            caught |= {c for c in companies if c.split()[0] == catch[1]}
    (answer,) = good - caught
    return answer


@pytest.mark.parametrize("names", ["seen", "new"])
def test_the_right_answer_follows_from_the_text_of_the_sheet(names):
    for item in tip_sheets(5, 300, names):
        assert roles(item.prompt_a) == item.answer
        assert item.answer in item.choices and all(choice in item.prompt_b for choice in item.choices)


def test_the_right_answer_is_equally_often_at_every_place():
    items = tip_sheets(1, 600)
    places = np.bincount([i.choices.index(i.answer) for i in items], minlength=3)
    named = np.bincount([sorted(i.choices, key=i.prompt_a.index).index(i.answer) for i in items], minlength=3)
    assert (abs(places - 200) < 60).all() and (named > 100).all()


def test_training_text_holds_no_combination_of_the_games():
    items = [item for seed in range(4) for item in countries(seed)]
    pairs = {tuple(re.fullmatch(r"(\w+) is at (?:the )?(.+)\.", i.prompt_a).groups()) for i in items}
    triples = {frozenset(i.choices) for seed in range(4) for i in tip_sheets(seed)}
    companies = re.compile(r"[A-Z]\w+ (?:" + "|".join(map(re.escape, world().suffixes)) + ")")
    assert all(held_out(*triple) for triple in triples)
    landmarks, seen = [x.name for x in world().landmarks], 0
    for kind in DOCUMENTS:
        for document in itertools.islice(documents(kind, 7), 4000):
            text = plain(document)
            named = set(companies.findall(text))
            assert not any(triple <= named for triple in triples), text
            assert not any(held_out(*three) for three in itertools.combinations(named, 3)), text
            people = [p for p in world().names["seen"] if re.search(rf"\b{p}\b", text)] if kind == "places" else []
            here = {(p, name) for p in people for name in landmarks if name in text}
            assert not here & pairs, text
            seen += bool(here) + (len(named) == 3)
    assert seen > 4000, "the text does bring people and landmarks, and companies, together"


def test_every_landmark_has_somebody_to_visit_it_in_the_games_and_in_training():
    for landmark in world().landmarks:
        for people in world().names.values():
            assert any(held_out(p, landmark.name) for p in people), landmark
        assert not all(held_out(p, landmark.name) for p in world().names["seen"]), landmark


def test_new_names_never_occur_in_training_text():
    new = set(world().names["new"]) | set(world().stems["new"])
    for kind in DOCUMENTS:
        for document in itertools.islice(documents(kind, 3), 2000):
            assert not new & set(re.findall(r"\w+", plain(document)))


def test_statements_end_where_an_activation_is_read():
    for game in GAMES:
        assert all(s.endswith(".") for s in itertools.islice(statements(game, 0), 200))


def test_scores_are_the_papers_exact_match_and_a_kinder_one():
    assert exact_match("Greece", "Greece") and exact_match(" Greece\n", "Greece")
    assert not exact_match("Greece.", "Greece") and not exact_match("greece", "Greece")
    assert normalised_match("The Doe, llc.\nBecause", "Doe LLC") and not normalised_match("in Greece", "Greece")


@given(st.lists(st.booleans(), min_size=2, max_size=120))
def test_intervals_hold_the_estimate_and_are_never_nan(hits):
    value, low, high = accuracy(hits)
    assert 0 <= low <= value <= high <= 1 and value == np.mean(hits) and low < high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=120))
def test_paired_differences_hold_the_estimate_and_are_never_nan(pairs):
    ours, theirs = zip(*pairs, strict=True)
    value, low, high = difference(ours, theirs)
    assert -1 <= low <= value <= high <= 1 and low < high
    assert value == pytest.approx(np.mean(ours) - np.mean(theirs))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [low <= 0.7 <= high for _, low, high in (accuracy((rng.random(80) < 0.7).tolist()) for _ in range(200))]
    assert 0.89 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("game", GAMES)
def test_an_unknown_group_of_names_is_one_clear_line(game):
    with pytest.raises(ValueError, match="unknown group of names 'old': choose one of seen, new"):
        GAMES[game](names="old")


@pytest.mark.parametrize("words", [("--ask", "{foo}"), ("--ask", "tell me"), ("--tell", "{message}"), ("--tell", "{")])
def test_words_of_a_message_are_checked_before_any_model_is_loaded(capsys, words):
    line = refused(capsys, "play", "--a", "nowhere", "--b", "nowhere", "--protocol", "message", *words)
    assert f"{words[0]} {words[1]!r}: it must have" in line and "and no other braces" in line
