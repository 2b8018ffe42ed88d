"""Answers read from texts, and votes on them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.protocols.answers import choice, correct, numeric, vote, whole

NUMBERS = st.decimals(-(10**9), 10**9, allow_nan=False, places=3)
PROSE = st.text(st.characters(blacklist_categories=("Nd", "Cs"), blacklist_characters="{}-$"), max_size=20)


@given(NUMBERS, PROSE, PROSE, st.booleans(), st.booleans())
def test_a_number_is_read_back_however_it_is_set(value, before, after, commas, dollar):
    digits = f"{abs(value):,f}" if commas else f"{abs(value):f}"
    written = f"{'-' if value < 0 else ''}{'$' if dollar else ''}{digits}"
    plain = f"{value.normalize():f}" if value else "0"
    assert numeric(f"{before} \\boxed{{{written}}} {after} , so 5 apples") == plain, "the last in braces"
    assert numeric(f"First 17 , then {before} {written} {after}") == plain, "or else the last of all"


@pytest.mark.parametrize(
    "text, number",
    [
        ("It costs $1,250.00.", "1250"),
        ("72.", "72"),
        ("{ 3 } and then \\boxed{ 72 }", "72"),
        ("1,000 or 007", "7"),
        ("100", "100"),
        ("{x} is 4", "4"),
        ("5-10 minutes", "10"),
        ("x-3", "3"),
        ("(3)-4", "4"),
        ("so...5", "5"),
        ("it is -4", "-4"),
        ("=-$4", "-4"),
        ("it is .5", "0.5"),
        ("-0.0", "0"),
        ("{1.2.3}", None),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_at_the_edges(text, number):
    assert numeric(text) == number


def test_a_choice_is_the_last_letter_in_brackets_or_the_last_capital_alone():
    said = {"(A) no, (c)": "C", "It is B, not D.": "D", "A (b) C": "B", "Because": None, "": None, "(AB) J": "J"}
    assert {text: choice(text) for text in said} == said
    assert [whole(t) for t in (" Paris.\nNo", "paris", " ", ".")] == ["paris", "paris", None, None]


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc")), min_size=1, max_size=7))
def test_a_vote_elects_who_gave_an_answer_that_no_other_outnumbers(answers):
    counts = {a: answers.count(a) for a in answers if a is not None}
    best = [i for i, a in enumerate(answers) if a is not None and counts[a] == max(counts.values())]
    best = best or list(range(len(answers)))
    assert (vote(answers), vote(answers, "last")) == (min(best), max(best))


def test_the_released_scoring_differs_only_where_it_is_asked_for():
    cases = {("no idea", "4"): (False, True), ("-4", "4"): (False, True), ("4", "-4"): (False, True)}
    cases |= {("it is 4.0", "so 4"): (True, True), ("5", "4"): (False, False), ("-4", "-4"): (True, True)}
    for (text, gold), want in cases.items():
        assert (correct(text, gold, numeric), correct(text, gold, numeric, released=True)) == want, (text, gold)
