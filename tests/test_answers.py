"""Answers read from texts, and votes on them."""
# ruff: noqa: RUF001 (the characters are what is read)

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.protocols.answers import choice, correct, numeric, vote, whole

NUMBERS = st.decimals(-(10**9), 10**9, allow_nan=False, places=3)
PROSE = st.text(st.characters(blacklist_categories=("Nd", "No", "Cs"), blacklist_characters="{}-$"), max_size=20)


@given(NUMBERS, PROSE, PROSE, st.booleans(), st.booleans())
def test_a_number_is_read_back_however_it_is_set(value, before, after, commas, dollar):
    digits = f"{abs(value):,f}" if commas else f"{abs(value):f}"
    written = f"{'-' if value < 0 else ''}{'$' if dollar else ''}{digits}"
    plain = f"{value.normalize():f}" if value else "0"
    assert numeric(f"{before} \\boxed{{{written}}} {after} , so 5 apples") == plain, "the last in braces"
    assert numeric(f"First 17 , then {before} {written} {after}") == plain, "or else the last of all"


NUMERALS = [
    ('It costs $1,250.00.', '1250'),
    ('72.', '72'),
    ('{ 3 } and then \\boxed{ 72 }', '72'),
    ('1,000 or 007', '7'),
    ('100', '100'),
    ('{x} is 4', '4'),
    ('5-10 minutes', '10'),
    ('x-3', '3'),
    ('(3)-4', '4'),
    ('so...5', '5'),
    ('it is -4', '-4'),
    ('=-$4', '-4'),
    ('it is .5', '0.5'),
    ('-0.0', '0'),
    ('{1.2.3}', None),
    ('none', None),
    ('', None),
    ('\\boxed{1{,}250}', '1250'),
    ('\\boxed{\\$72} for 3 people', '72'),
    ('\\boxed{\\frac{1}{2}}', '0.5'),
    ('\\boxed{-3}', '-3'),
    ('\\boxed{−3}', '-3'),
    ('it is −7', '-7'),
    ('1\u2009250 people', '1250'),
    ('1\u202f250', '1250'),
    ('1\xa0250', '1250'),
    ('\\boxed{1\\,250\\,000}', '1250000'),
    ('1.5e3', '1500'),
    ('x_{1} = 7', '7'),
    ('10^{2}', '100'),
    ('50%', '50'),
    ('\\boxed{50\\%}', '50'),
    ('€1.250,50', '1250.5'),
    ('#### 42', '42'),
    ('#### 1,234\n', '1234'),
    ('\\boxed{72 \\text{ apples}}', '72'),
    ('\\boxed{x = 7}', '7'),
    ('\\boxed{x_1 = 7}', '7'),
    ('\\boxed{\\text{72}}', '72'),
    ('\\boxed{\\textbf{72}}', '72'),
    ('$\\boxed{72}$ and 5 more', '72'),
    ('\\boxed{2\\sqrt{3}}', None),
    ('\\boxed{2\\pi}', None),
    ('\\boxed{1\\frac{1}{2}}', '1.5'),
    ('1 1/2 cups', '1.5'),
    ('1½', '1.5'),
    ('½', '0.5'),
    ('\\boxed{\\dfrac{1}{3}}', '1/3'),
    ('1/3', '1/3'),
    ('\\boxed{-\\frac{3}{4}}', '-0.75'),
    ('\\frac12', '0.5'),
    ('The answer is 72 dollars for 3 people.', '72'),
    ('The answer is 3 apples + 4 apples = 7 apples.', '7'),
    ('The answer is 72, because 70 = 10*7', '72'),
    ('The final answer is:\n\n**42**', '42'),
    ('**Answer:** 42', '42'),
    ('The answer is not 5. It is 6', '6'),
    ('Answer: $-5', '-5'),
    ('25 cm^2', '25'),
    ('25 m²', '25'),
    ('10²', '100'),
    ('25 \\text{ cm}^{2}', '25'),
    ('3 x 10^5', '300000'),
    ('3 \\times 10^{5}', '300000'),
    ('3 × 10⁵', '300000'),
    ('1.5 million', '1500000'),
    ('$72k', '72000'),
    ('90^\\circ', '90'),
    ('90°', '90'),
    ('48/2 = 24', '24'),
    ('H2O', None),
    ('x1 is 5', '5'),
    ('答案是72。', '72'),
    ('答案是-5', '-5'),
    ('7,8,9', '9'),
    ('(3,5)', '5'),
    ('3,5 kg', '3.5'),
    ('1,00,000', '100000'),
    ('12/25/2023', '12'),
    ('\\boxed{answer} so 5', '5'),
    ('\\boxed{\\text{no solution}} x=3', None),
    ('\\boxed{3, 4}', None),
    ('\\boxed{3+4}', None),
    ('\\boxed{3+4=7}', '7'),
    ('\\boxed{ - 5 }', '-5'),
    ('\\boxed{72', '72'),
    ('\\boxed{12} \\boxed{13}', '13'),
    ('9^999999', None),
    ('5/0', None),
    ('2^{-1}', '0.5'),
    ('Step 1: 5. Step 2: 7.', '7'),
    ('The answer is 18.\n\nQuestion: 5 apples', '18'),
    ('so the answer is $18.50 per day', '18.5'),
    ('\\(\\boxed{18}\\)', '18'),
    ('The answer is \\(18\\).', '18'),
    ('The answer is $\\frac{3}{4}$.', '0.75'),
    ('answer = 1e-3', '0.001'),
    ('٧٢', '72'),
    ("1'250'000", '1250000'),
    ('The value is -$1,250.75', '-1250.75'),
    ('$-1,250', '-1250'),
    ('\\boxed{\\$1{,}250.00}', '1250'),
    ('\\boxed{18\\,\\text{km/h}}', '18'),
    ('\\boxed{0.\\overline{3}}', None),
    ('\\boxed{5:1}', None),
    ('5 -4', '-4'),
    ('3-year-old is 5', '5'),
    ('COVID-19 hit 5', '5'),
    ('COVID-19', '19'),
    ('Thus 20%.', '20'),
    ('\\boxed{ \\$ 72 }', '72'),
    ('\\fbox{3} ', '3'),
    ('\\boxed{\\left(\\frac{1}{2}\\right)}', '0.5'),
    ('\\boxed{\\approx 3.3}', '3.3'),
    ('\\boxed{10^{-2}}', '0.01'),
    ('\\boxed{1.5 \\cdot 10^{3}}', '1500'),
    ('1 250', '250'),
    ("\\boxed{\\boxed{5}} 6", "5"),
    ('4 x 5 = 20 and the total is 20.', '20'),
    ('She has 3 left. #### 3 ', '3'),
    ('3.0', '3'),
    ('0.50', '0.5'),
    ('+5', '5'),
    ('\\boxed{+5}', '5'),
    ('Answer: 5/8', '0.625'),
]  # fmt: skip


@pytest.mark.parametrize("text, number", NUMERALS)
def test_the_number_that_is_given_as_the_answer(text, number):
    assert numeric(text) == number


STATED = ("\\boxed{%s}", "\\boxed{ %s \\text{ m}^2 }", "$\\boxed{\\$%s}$", "#### %s", "The answer is %s m.")


@given(NUMBERS, st.sampled_from(STATED), st.sampled_from("-−–"), st.sampled_from(["", ",", "{,}", "\\,", "\u202f"]))
def test_a_stated_number_is_read_whatever_follows(value, frame, minus, separator):
    digits = f"{abs(value):,f}".replace(",", separator)
    written = frame % f"{minus if value < 0 else ''}{digits}"
    assert numeric(f"First 17. {written}\nFor 3 people.") == (f"{value.normalize():f}" if value else "0")


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_their_value(over, under):
    want = numeric("\\boxed{\\frac{%d}{%d}}" % (over, under))  # noqa: UP031
    assert want is not None and Fraction(want) == Fraction(over, under)
    assert numeric(f"it is {over}/{under}") == want


def test_any_text_is_read_in_little_time():
    for part in ("1", "{", "\\boxed{", "1,", "answer is ", "^9", "e9", "A. ", "(", "\\frac{ ", "*", "\n"):
        numeric(part * 5000), choice(part * 5000)


@given(st.text())
def test_whatever_a_model_writes_holds_a_number_or_none(text):
    found = numeric(text)
    assert found is None or numeric(found) == found
    assert choice(text) in {None, *"ABCDEFGHIJ"}


LETTERS = [
    ('(A) no, (c)', 'C'),
    ('It is B, not D.', 'B'),
    ('A (b) C', 'B'),
    ('Because', None),
    ('', None),
    ('(AB) J', 'J'),
    ('The answer is (B).', 'B'),
    ('B. Option A is wrong', 'B'),
    ('(B) given the reason(s) above', 'B'),
    ('**B**', 'B'),
    ('Answer: b)', 'B'),
    ('I choose option C because A is silly', 'C'),
    ('The answer is B because of the reason(s).', 'B'),
    ('(A) is right; see item(s) 2', 'A'),
    ('\\boxed{B}', 'B'),
    ('\\boxed{\\text{B}}', 'B'),
    ('\\boxed{(B)} since (A)', 'B'),
    ('\\boxed{\\textbf{(C)}}', 'C'),
    ('\\boxed{B. Paris}', 'B'),
    ('A good choice would be Paris.', None),
    ('The answer is A.', 'A'),
    ('The answer is a dog', None),
    ('Answer: A dog', None),
    ('answer is b.', 'B'),
    ('B', 'B'),
    (' b', 'B'),
    ('b.', 'B'),
    ('(b)', 'B'),
    ('[D]', 'D'),
    ('B)', 'B'),
    ('B) Paris', 'B'),
    ('B: Paris', 'B'),
    ('Option B is correct, A is not.', 'B'),
    ('The correct answer is not A but B.', 'B'),
    ('The correct option is **C) Rome**.', 'C'),
    ('**Answer: (D)**', 'D'),
    ('The answer is **B**', 'B'),
    ('Final answer: $\\text{C}$', 'C'),
    ('Therefore, the answer is D, since A fails.', 'D'),
    ('A. Paris is wrong. B. Rome is right. So the answer is B.', 'B'),
    ('A. Paris is wrong. B. Rome is right.', 'B'),
    ('A. Paris. B. Rome. C. Oslo.', None),
    ('答案是B。', 'B'),
    ('答案是(B)', 'B'),
    ('Both A and B are right', None),
    ('Is it A or B? B.', 'B'),
    ('The answer is A) or B)', None),
    ('The answer is B and A is wrong', 'B'),
    ('I previously said the answer is (A), but now the answer is (B).', 'B'),
    ('I change my answer from (A) to (B).', 'B'),
    ('Vitamin B-12', None),
    ('hepatitis in the U.S.A.', None),
    ('f(a) = P(B)', None),
    ('the plural(s)', None),
    ("Let's think.\nB", 'B'),
    ("Let's think about A and C.\n(B)", 'B'),
    ("Let's think.\nB) Rome", 'B'),
    ('So B.', 'B'),
    ('Thus, (C)', 'C'),
    ('I think B', 'B'),
    ("I think it's C", 'C'),
    ('I would go with option D', 'D'),
    ('Both (A) and (B) are wrong; (C)', 'C'),
    ('The answer is A or B', None),
    ('#### B', 'B'),
    ('Neither A nor B', None),
    ('(K)', None),
    ('(s)', None),
    ('K', None),
    ('（B）', 'B'),
    ('The best answer is option (E).', 'E'),
    ('I', 'I'),
    ('(I)', 'I'),
    ('I am unsure', None),
    ('C is the correct answer. A is close.', 'C'),
    ('(C) Berlin is wrong. (B) Rome', 'B'),
    ('Choice: D', 'D'),
    ('The answer to the question is H', 'H'),
    ('J. It follows', 'J'),
    ('B is correct', 'B'),
    ('Answer:\nB', 'B'),
    ('Answer:\n\n(B) Paris', 'B'),
    ('My updated answer is (X)', None),
    ('the answer in the form (X): (D)', 'D'),
    ('Selected: E', 'E'),
    ('We select B since A', 'B'),
    ('A', 'A'),
    ('A.', 'A'),
    ('A because of that', 'A'),
    ('a)', 'A'),
    ('a', 'A'),
    ('The answer is (a) since it', 'A'),
    ('the right answer: c', 'C'),
    ('the answer is a good one', None),
    ('Grade A students choose B', 'B'),
    ('A is the answer.', 'A'),
    ('Answer is B\n\nQuestion: What? (A) x (B) y (C) z', 'B'),
    ('The answer is:\n**(C)**', 'C'),
    ('The answer is: **D. None of these**', 'D'),
    ('"B"', 'B'),
    ('`C`', 'C'),
    ('answer: B, C is close', 'B'),
    ('_B_', 'B'),
    ("It can't be A, so it must be C.", 'C'),
    ('It cannot be (A) so (C)', 'C'),
    ("the answer isn't A; B", 'B'),
    ("A isn't right. C.", 'C'),
    ('Eliminate A, B and C. D', 'D'),
    ('Hence (A) and not (B).', 'A'),
    ('Statement A: true. The answer is B', 'B'),
    ('C, because A and B are false', 'C'),
    ('The answer is I.', 'I'),
]  # fmt: skip


@pytest.mark.parametrize("text, letter", LETTERS)
def test_the_letter_that_is_given_as_the_choice(text, letter):
    assert choice(text) == letter


SAID = ("(%s)", "%s", "**%s**", "(%s) Paris", "\\boxed{%s}", "$\\text{%s}$")
AFTER = ("", " because A is wrong", " given the reason(s) above", ". (K) is not there", "\nIt is that.")


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from(SAID), st.sampled_from(AFTER))
def test_a_stated_letter_is_read_whatever_follows(letter, frame, after):
    for before in ("The answer is ", "After (A) and (B): answer: ", "I choose option "):
        assert choice(before + frame % letter + after) == letter


def test_whole_texts_are_compared_by_their_first_line():
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
    cases |= {("\\boxed{1{,}250}", "1250"): (True, False), ("so {4} of 5", "4"): (True, True)}
    for (text, gold), want in cases.items():
        assert (correct(text, gold, numeric), correct(text, gold, numeric, released=True)) == want, (text, gold)
    letters = {("(B) of the reason(s)", "B"): (True, False), ("(B)", "B"): (True, True), ("B", "B"): (True, True)}
    for (text, gold), want in letters.items():
        assert (correct(text, gold, choice), correct(text, gold, choice, released=True)) == want, (text, gold)
