"""Items of games: what in a text counts as their answer, which of them are drawn, and files of one's own."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm.evals.games import GAMES, Game, Item, draw
from jaxcomm.evals.games.world import world

from command import refused
from game_files import ANN, LINE, lines_of, numbered, write_game

# What a text names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("George is located in Japan.", "Japan"),
        ("japan", "Japan"),
        ("**JAPAN**, of course", "Japan"),
        ("Japan's capital", "Japan"),
        ("Answer:\nJapan\nGreece", "Japan"),
        ("Not Greece but Japan.", "Greece"),
        ("It is in Australia, not in Austria.", "Australia"),
        ("He eats japanese food", None),
        ("Perusing a Nigerian map", None),
        ("the UK", "United Kingdom"),
        ("in Great Britain", "United Kingdom"),
        ("England, I think, not France", "United Kingdom"),
        ("somewhere in the USA", "United States"),
        ("The US.", "United States"),
        ("the U.S. of course", "United States"),
        ("the united states of america", "United States"),
        ("Czech Republic", "Czechia"),
        ("the czech republic", "Czechia"),
        ("Holland", "Netherlands"),
        ("Türkiye", "Turkey"),
        ("Republic of Korea", "South Korea"),
        ("North Korea", None),
        ("Tell us more, then we know.", None),
        ("a uk of my own", None),
        ("usage of busy users", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_a_text_names_the_country_it_says_first_in_any_spelling(text, named):
    game = draw("countries", n=1)
    assert game.named(text, game.items[0]) == named


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Romania", None),
        ("Nigeria", None),
        ("Niger, or Oman", "Niger"),
        ("Guinea-Bissau", "Guinea-Bissau"),
        ("guinea-bissau and not Guinea", "Guinea-Bissau"),
        ("Guinea, not Guinea-Bissau", "Guinea"),
        ("Northern Ireland", "Northern Ireland"),
        ("Ireland, its north", "Ireland"),
        ("It is C++.", "C++"),
        ("C+++", "C++"),
        ("CC", None),
        ("axb", None),
        ("a.b", "a.b"),
        ("NO", "NO"),
        ("no", None),
    ],
)
def test_choices_are_whole_words_and_of_two_that_begin_alike_the_longer_is_meant(text, named):
    choices = ("Oman", "Niger", "Guinea", "Guinea-Bissau", "Ireland", "Northern Ireland", "C++", "a.b", "NO")
    for order in (choices, choices[::-1]):
        assert Game("places", (ANN,), answers=order).named(text, ANN) == named
        item = dataclasses.replace(ANN, choices=order)
        assert Game("places", (item,), answers=("Romania", "Nigeria", "no")).named(text, item) == named, "its own only"


@pytest.mark.parametrize("names", ["seen", "new"])
def test_a_companys_first_word_names_it_and_what_companies_share_names_none(names):
    game = draw("tip_sheets", 2, 20, names=names)
    for item in game.items:
        for choice in item.choices:
            first, rest = choice.split()
            for text in (choice, f"I would take {first}.", f"{first.lower()}, whatever else"):
                assert game.named(text, item) == choice
            assert game.named(f"{rest} of {first}s or {first}land", item) is None


COUNTRIES = draw("countries", n=1)
FILLER = [
    "the",
    "answer",
    "is",
    "in",
    "us",
    "person",
    "Romania",
    "he",
    "...",
    "-",
    "Japanese",
    "located",
    "\n",
    "42",
    "é",
]
fillers = st.lists(st.sampled_from(FILLER), max_size=8).map(" ".join)
after = st.tuples(st.sampled_from(" .,;:!?\n-*\"'"), st.text(max_size=20)).map("".join)


@given(fillers, st.lists(st.sampled_from(COUNTRIES.answers), min_size=2, max_size=2, unique=True), after)
def test_an_answer_is_found_after_whatever_names_nothing_and_not_after_another_choice(before, both, after):
    answer, other = both
    item = Item("", "", answer)
    assert COUNTRIES.named(f"{before} {answer}{after}", item) == answer
    assert COUNTRIES.named(f"{before} {answer.upper()}{after}", item) == answer
    assert COUNTRIES.named(f"{before} {other}, {answer}{after}", item) == other


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Sydney, New South Wales, Australia", "Australia"),
        ("Belfast, Northern Ireland, United Kingdom", "United Kingdom"),
        ("_Japan_", "Japan"),
        ("in the U.S", "United States"),
        ("in the U.S.A", "United States"),
    ],
)
def test_a_country_is_named_by_its_name_and_not_by_a_place_that_holds_it(text, named):
    assert COUNTRIES.named(text, COUNTRIES.items[0]) == named


# What is drawn ------------------------------------------------------------------------------------------------------


def place(item: Item) -> str:
    return re.fullmatch(r"\w+ is at (.+)\.", item.prompt_a)[1]


@pytest.mark.parametrize("name", list(GAMES))
@pytest.mark.parametrize("seed", range(3))
def test_worked_examples_are_drawn_besides_and_change_nothing_of_what_is_played(name, seed):
    bare = draw(name, seed)
    assert bare.items == tuple(GAMES[name](seed)) and bare.examples == ()
    for n, k in ((None, 4), (7, 3), (1, 1)):
        game = draw(name, seed, n, examples=k)
        assert game.items == bare.items[:n] and len(game.examples) == len(set(game.examples)) == k
        assert not {item.prompt_a for item in game.items} & {item.prompt_a for item in game.examples}
        if name == "countries":
            assert not set(map(place, game.items)) & set(map(place, game.examples))
    assert draw(name, seed).items != draw(name, seed + 1).items


def test_there_are_as_many_countries_items_and_examples_as_landmarks():
    places = len(world().landmarks)
    game = draw("countries", 1, places - 5, examples=5)
    assert len(set(map(place, (*game.items, *game.examples)))) == places
    with pytest.raises(ValueError, match=f"{places - 4} games and 5 examples need {places + 1} landmarks, there are"):
        draw("countries", 1, places - 4, examples=5)


@pytest.mark.parametrize(("n", "examples"), [(5, -3), (None, -1), (0, 0), (-2, 0)])
@pytest.mark.parametrize("own", [False, True], ids=["countries", "file"])
def test_numbers_below_what_can_be_meant_are_named_and_refused(tmp_path, n, examples, own):
    """Not played with fewer items than were asked for, and not told to ask for fewer."""
    name = write_game(tmp_path / "mine.jsonl", *numbered(8)) if own else "countries"
    with pytest.raises(ValueError) as error:
        draw(name, 0, n, examples=examples)
    assert str(examples or n) in str(error.value) and "ask for fewer" not in str(error.value)


def test_a_file_is_played_whole_and_in_its_order(tmp_path):
    name = write_game(tmp_path / "mine.jsonl", *numbered(7)[:4], "", *numbered(7)[4:], "  ")
    for seed in range(3):
        game = draw(name, seed)
        assert lines_of(game.items) == numbered(7) and not game.examples and game.name == "mine"


def test_of_a_file_n_and_the_seed_choose_and_no_example_is_played(tmp_path):
    name = write_game(tmp_path / "mine.jsonl", *numbered(12))
    of = lambda items: [int(item.answer.split()[1]) for item in items]
    drawn = [of(draw(name, seed, 5).items) for seed in range(6)]
    assert all(x == sorted(set(x)) and len(x) == 5 for x in drawn) and len(set(map(tuple, drawn))) > 3
    for seed, n in ((0, 5), (1, 5), (2, None), (3, 9)):
        game = draw(name, seed, n, examples=3)
        assert len(game.items) == (n or 9) and len(game.examples) == 3
        assert len({*of(game.items), *of(game.examples)}) == (n or 9) + 3
        assert of(game.items) == of(draw(name, seed, n or 9).items), "the same with examples as without"
        assert game == draw(name, seed, n, examples=3)
    assert len({tuple(of(draw(name, seed, examples=3).examples)) for seed in range(6)}) > 3


def test_where_items_name_no_choices_the_files_answers_are_all_there_are(tmp_path):
    every = [*numbered(3), numbered(1)[0], dict(LINE, choices=["Peru", "France"]), dict(numbered(5)[4], choices=[])]
    game = draw(write_game(tmp_path / "mine.jsonl", *every))
    closed = ("number 0", "number 1", "number 2", "France", "number 4")
    assert [game.choices(item) for item in game.items] == [closed] * 4 + [("Peru", "France"), closed]
    few = draw(write_game(tmp_path / "mine.jsonl", *every), n=2)
    assert few.answers == closed, "whichever are drawn"
    assert game.named("Peru, or number 1", game.items[0]) == "number 1"
    assert game.named("number 1, or Peru", game.items[4]) == "Peru"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_hold_any_character_that_json_lets_stand(tmp_path, mark):
    """JSON escapes neither U+2028 nor U+0085, so a line of a file ends at line feeds alone."""
    line = dict(LINE, prompt_a=f"Ann is{mark}at the Louvre.")
    spelled = line["prompt_a"].join(json.dumps(dict(line, prompt_a="@")).split("@"))
    assert draw(write_game(tmp_path / "mine.jsonl", spelled)).items[0].prompt_a == line["prompt_a"]


# Files that are no games --------------------------------------------------------------------------------------------

WITHOUT = {key: value for key, value in LINE.items() if key != "prompt_b"}
WRONG = {
    "missing": (WITHOUT, "has no field 'prompt_b': it must be a text"),
    "empty": (dict(LINE, answer=" "), "has an empty field 'answer': it must be a text"),
    "number": (dict(LINE, prompt_a=3), "field 'prompt_a': it must be a text"),
    "unknown": (
        dict(LINE, hint="P"),
        "has an unknown field 'hint': its fields are prompt_a, prompt_b, answer, choices",
    ),
    "no JSON": ("France", "is not JSON"),
    "half": ('{"prompt_a": "Ann', "is not JSON"),
    "list": ("[1, 2]", "is not a JSON object"),
    "other": (dict(LINE, choices=["Peru", "Fiji"]), "the answer 'France' is not among its choices Peru, Fiji: add it"),
    "twice": (dict(LINE, choices=["France", "Fiji", "Fiji"]), "has the choice 'Fiji' twice: leave one out"),
    "text": (dict(LINE, choices="France"), "choices = 'France' is not a list of texts"),
    "numbers": (dict(LINE, choices=["France", 3]), "choices = ['France', 3] is not a list of texts"),
    "blank": (dict(LINE, choices=["France", " "]), "choices = ['France', ' '] is not a list of texts"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_line_that_is_no_item_is_refused_by_file_line_and_remedy(tmp_path, capsys, kind):
    line, message = WRONG[kind]
    name = write_game(tmp_path / "mine.jsonl", LINE, "", LINE, line, LINE)
    with pytest.raises(ValueError) as error:
        draw(name)
    said = str(error.value)
    assert said.startswith(f"{name}, line 4") and message in said and "\n" not in said
    asked = ("--a", "nowhere", "--b", "nowhere", "--protocol", "silent")
    assert refused(capsys, "play", *asked, "--game", name) == f"jaxcomm: {said}\n", "before a model is loaded"


@pytest.mark.parametrize("choices", ["", 0, False, {}])
def test_choices_that_are_nothing_but_no_list_are_refused(tmp_path, choices):
    with pytest.raises(ValueError, match="line 1: choices = .* is not a list of texts"):
        draw(write_game(tmp_path / "mine.jsonl", dict(LINE, choices=choices)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (dict(LINE, choices=[LINE["answer"], LINE["answer"].upper()]), "differ in case only"),
        (json.dumps(dict(LINE, prompt_a="half a \ud800 character")), "half a character"),
    ],
)
def test_what_no_reply_can_be_told_by_is_refused(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"mine.jsonl, line 1.*{message}"):
        draw(write_game(tmp_path / "mine.jsonl", line))


def test_a_file_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(dict(LINE, answer="@")).encode().replace(b"@", b"T\xfcrkiye"))
    with pytest.raises(ValueError, match="mine.jsonl"):
        draw(str(path))


@pytest.mark.parametrize(
    ("lines", "how", "message"),
    [
        ([], {}, "has no items: write a JSON object with prompt_a, prompt_b, answer, choices in every line"),
        (["", " "], {}, "has no items: write a JSON object"),
        (numbered(3), {"n": 4}, "has 3 items, 4 and 0 examples were asked for: ask for fewer"),
        (numbered(3), {"n": 2, "examples": 2}, "has 3 items, 2 and 2 examples were asked for: ask for fewer"),
        (numbered(3), {"examples": 3}, "has 3 items"),
        (None, {}, "does not exist: name a game's file, with the fields prompt_a, prompt_b, answer, choices"),
    ],
)
def test_a_file_without_enough_items_is_one_clear_line(tmp_path, capsys, lines, how, message):
    path = tmp_path / "mine.jsonl"
    if lines is not None:
        write_game(path, *lines)
    with pytest.raises(FileNotFoundError if lines is None else ValueError) as error:
        draw(str(path), **how)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    line = refused(capsys, "play", "--a", "nowhere", "--b", "nowhere", "--protocol", "silent", "--game", path, *words)
    assert line == f"jaxcomm: {error.value}\n"


@pytest.mark.parametrize("name", ["mine.json", "chess", "countries.txt", ""])
def test_a_game_that_there_is_not_is_named_with_those_that_there_are(tmp_path, capsys, name):
    message = f"there is no game {name!r}: name countries, tip_sheets or a file, FILE.jsonl"
    with pytest.raises(ValueError) as error:
        draw(name)
    assert str(error.value) == message
    words = ("--a", "nowhere", "--b", "nowhere", "--protocol", "silent", "--game", name)
    assert refused(capsys, "play", *words) == f"jaxcomm: {message}\n"
