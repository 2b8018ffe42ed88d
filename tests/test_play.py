"""Games that real models can play: what counts as an answer, which items are drawn, what agents read, how choices are scored, what
is kept of it, and one's own files."""

import copy
import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.special
import tyro
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm import forward
from jaxcomm.agent import Agent
from jaxcomm.converters import load_agent
from jaxcomm.evals import cli, conditions
from jaxcomm.evals.choices import Choice, choose, logprobs
from jaxcomm.evals.commands.play import Play
from jaxcomm.evals.games import GAMES, PRESETS, Game, Item, Wording, draw
from jaxcomm.evals.games.world import world
from jaxcomm.evals.options import command_line
from jaxcomm.evals.pair import folder
from jaxcomm.evals.play import Outcome, PlaySettings, play
from jaxcomm.protocols import activation, silent, skyline
from jaxcomm.protocols.base import start_turn

from command import jaxcomm, refused
from conftest import TEMPLATE

KEYS = ("prompt_a", "prompt_b", "answer")
LINE = dict(prompt_a="Ann is at the Louvre Museum.", prompt_b="Which country is Ann located in?", answer="France")
ANN = Item(*LINE.values())
BO = Item("Bo is at Mount Fuji.", "Which country is Bo located in?", "Japan")


@pytest.fixture(scope="module")
def b() -> Agent:
    return load_agent(folder("b"), name="b", unroll=False)


@pytest.fixture(scope="module")
def chatty(b) -> Agent:
    """The same model, through a chat template."""
    tokenizer = copy.deepcopy(b.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(b, tokenizer=tokenizer, chat=True, name="chatty")


def write_game(path: Path, *lines) -> str:
    """A file with these lines: objects, or as they are."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return str(path)


def lines_of(items) -> list[dict]:
    return [{key: getattr(item, key) for key in KEYS} for item in items]


def numbered(n: int) -> list[dict]:
    """Items that are told apart by their numbers."""
    return [dict(prompt_a=f"It is {i}.", prompt_b="Which is it?", answer=f"number {i}") for i in range(n)]


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


# What agents read ---------------------------------------------------------------------------------------------------

WHERE = dataclasses.replace(draw("countries", n=1), items=(ANN,))
SHOWN = dataclasses.replace(WHERE, examples=(BO, Item("Cy is in Rome.", "Where is Cy?", "Italy")))
READS = {
    "paper": ("Ann is at the Louvre Museum.", "Which country is Ann located in?"),
    "instructed": (
        "Ann is at the Louvre Museum.",
        "Which country is Ann located in? Answer with the country's name only.",
    ),
    "kvcomm": (
        "Instruction: Directly answer the question based on the context passage, no explanation is needed. You are required to extrapolate the country from the context. Context: Ann is at the Louvre Museum.",
        "Instruction: Directly answer the question based on the context passage, no explanation is needed. You are required to extrapolate the country from the context. Question: Which country is Ann located in?",
    ),
}


def read(game, wording, a, b, **how) -> tuple[str, str]:
    """What A is given before it sends, and what B is given of its own."""
    (told,), (asked,) = wording.prompts_a(game, a, **how), wording.prompts_b(game, b)
    return a.render(told), b.render(asked)


@pytest.mark.parametrize("preset", list(READS))
def test_a_wording_is_these_words_raw_or_in_a_chat_for_each_agent_apart(b, chatty, preset):
    assert set(READS) == set(PRESETS)
    told, asked = READS[preset]
    chat = lambda text: f"<s> user : {text} assistant :"
    wording = Wording(preset)
    assert read(WHERE, wording, b, b) == (told, asked)
    assert read(WHERE, wording, chatty, b) == (chat(told), asked)
    assert read(WHERE, wording, b, chatty) == (told, chat(asked))
    assert read(WHERE, wording, chatty, chatty) == (chat(told), chat(asked))


def test_tip_sheets_have_an_instruction_of_their_own_and_no_hint(b):
    item = Item("Doe LLC has doubled its profit.", "You must invest in {Doe LLC}. Which?", "Doe LLC", ("Doe LLC",))
    game = dataclasses.replace(draw("tip_sheets", n=1), items=(item,))
    assert read(game, Wording("instructed"), b, b)[1] == (
        "You must invest in {Doe LLC}. Which? Answer with the company's name only."
    )
    assert read(game, Wording("kvcomm"), b, b) == (
        "Instruction: Directly answer the question based on the context passage, no explanation is needed. Context: Doe LLC has doubled its profit.",
        "Instruction: Directly answer the question based on the context passage, no explanation is needed. Question: You must invest in {Doe LLC}. Which?",
    )


def test_worked_examples_stand_before_the_question_as_lines_or_as_turns(b, chatty):
    """A reads them where it reads the question."""
    alone, both = Wording(), Wording(reads="statement+question")
    lines = "Bo is at Mount Fuji. Which country is Bo located in? Japan\n\nCy is in Rome. Where is Cy? Italy\n\n"
    assert read(SHOWN, alone, b, b) == (ANN.prompt_a, f"{lines}Which country is Ann located in?")
    assert read(SHOWN, both, b, b) == (
        f"{lines}Ann is at the Louvre Museum. Which country is Ann located in?",
        f"{lines}Which country is Ann located in?",
    )
    turns = "<s> user : Bo is at Mount Fuji. Which country is Bo located in? assistant : Japan user : Cy is in Rome. Where is Cy? assistant : Italy user : "
    assert read(SHOWN, alone, chatty, chatty) == (
        "<s> user : Ann is at the Louvre Museum. assistant :",
        f"{turns}Which country is Ann located in? assistant :",
    )
    assert read(SHOWN, both, chatty, b) == (
        f"{turns}Ann is at the Louvre Museum. Which country is Ann located in? assistant :",
        f"{lines}Which country is Ann located in?",
    )
    assert read(SHOWN, Wording("instructed", "One word."), b, b)[1] == (
        "Bo is at Mount Fuji. Which country is Bo located in? One word. Japan\n\nCy is in Rome. Where is Cy? One word. Italy\n\nWhich country is Ann located in? One word."
    )


def test_a_system_prompt_is_a_paragraph_or_a_turn_and_each_agent_has_its_own(b, chatty):
    tell = lambda agent, text: dataclasses.replace(agent, system=text)
    assert read(WHERE, Wording(), tell(b, "You know."), tell(chatty, "You ask.")) == (
        "You know.\n\nAnn is at the Louvre Museum.",
        "<s> system : You ask. user : Which country is Ann located in? assistant :",
    )
    assert read(SHOWN, Wording(), tell(chatty, "You know."), tell(b, "You ask.")) == (
        "<s> system : You know. user : Ann is at the Louvre Museum. assistant :",
        "You ask.\n\nBo is at Mount Fuji. Which country is Bo located in? Japan\n\nCy is in Rome. Where is Cy? Italy\n\nWhich country is Ann located in?",
    )
    assert read(WHERE, Wording(), tell(b, "You know."), b)[1] == ANN.prompt_b, "of A alone"


def test_an_instruction_takes_the_games_place_and_a_game_without_one_needs_it(b, tmp_path, capsys):
    name = write_game(tmp_path / "mine.jsonl", LINE)
    mine = draw(name)
    with pytest.raises(ValueError, match="mine has no instruction of its own: give one, or another wording than instr"):
        Wording("instructed").prompts_b(mine, b)
    asked = ("play", "--a", "pair:b", "--b", "pair:b", "--protocol", "silent", "--game", name, "--wording")
    assert "mine has no instruction of its own: give one" in refused(capsys, *asked, "instructed")
    for game in (mine, WHERE):
        assert read(game, Wording("instructed", "One word."), b, b) == (ANN.prompt_a, f"{ANN.prompt_b} One word.")
    assert read(mine, Wording("kvcomm"), b, b)[1] == (
        "Instruction: Directly answer the question based on the context passage, no explanation is needed. Question: Which country is Ann located in?"
    )


@pytest.mark.parametrize("how", [{"preset": "rude"}, {"reads": "question"}])
def test_a_wording_that_there_is_not_is_refused_with_those_that_there_are(how):
    with pytest.raises(ValueError, match="rude.*: choose one of paper, inst|question.*: choose one of statement, stat"):
        Wording(**how)


@pytest.mark.parametrize("preset", list(READS))
@pytest.mark.parametrize("game", [WHERE, SHOWN], ids=["bare", "examples"])
def test_a_sender_that_reads_the_question_reads_what_b_reads_in_the_skyline(b, chatty, preset, game):
    """So that its last state may be the answer's."""
    wording = Wording(preset, reads="statement+question")
    roomy = b.params.replace(config=dataclasses.replace(b.params.config, max_positions=1024))
    for form, system in itertools.product((b, chatty), ("", "Be brief.")):
        agent = dataclasses.replace(form, system=system, params=roomy)
        (sent, _) = read(game, wording, agent, agent)
        told = wording.prompts_a(game, agent, sends=False), wording.prompts_b(game, agent)
        assert skyline(agent, agent, *told).rendered(0) == [sent]


# Choices ------------------------------------------------------------------------------------------------------------


def forced(agent: Agent, pairs) -> list[tuple[float, bool]]:
    """Log-probability of tokens after others, and whether greedy decoding writes them: one forward pass over all."""
    tokens = np.zeros((len(pairs), max(len(x) + len(y) for x, y in pairs)), np.int32)
    for row, (x, y) in zip(tokens, pairs, strict=True):
        row[: len(x) + len(y)] = [*x, *y]
    likely = scipy.special.log_softmax(np.asarray(forward(agent.params, tokens), np.float64), axis=-1)
    found = []
    for row, (x, y) in zip(likely, pairs, strict=True):
        at = np.arange(len(x) - 1, len(x) + len(y) - 1)
        found.append((float(row[at, y].sum()), row[at].argmax(axis=-1).tolist() == list(y)))
    return found


def by_hand(agent: Agent, text: str, choices) -> np.ndarray:
    """Log-probabilities of texts after a text that the tokenizer reads as it stands."""
    spell = lambda text: agent.tokenizer.encode(text, add_special_tokens=not agent.chat)
    before, pairs = spell(text), []
    for choice in choices:
        whole = spell(f"{text}{choice}")
        assert whole[: len(before)] == before
        pairs.append((before, whole[len(before) :]))
    return np.array([x for x, _ in forced(agent, pairs)])


def assert_placed(rank: float, among: float, values: np.ndarray, at: int) -> None:
    """Ranks as far as rounding lets them be told."""
    above, level = np.sum(values > values[at] + 1e-3), np.sum(abs(values - values[at]) <= 1e-3)
    assert 1 + above <= rank <= above + level
    assert among == pytest.approx(scipy.special.log_softmax(values)[at], abs=2e-3)


@pytest.mark.parametrize("form", ["raw", "chat"])
@pytest.mark.parametrize("protocol", ["skyline", "silent"])
def test_choices_are_scored_as_teacher_forcing_scores_them_and_calibrated_by_b_alone(b, chatty, form, protocol):
    agent, n = (b, chatty)[form == "chat"], 3
    game = draw("countries", 4, n)
    outcome = play(game, protocol, agent, agent, PlaySettings(choices=True, max_new_tokens=1))
    wrap = lambda text: f"<s> user : {text} assistant :" if agent.chat else text
    space = "" if agent.chat else " "
    ranks = []
    for item, choice in zip(game.items, outcome.choices, strict=True):
        texts, at = [space + country for country in game.answers], game.answers.index(item.answer)
        alone = by_hand(agent, wrap(item.prompt_b), texts)
        told = by_hand(agent, wrap(f"{item.prompt_a} {item.prompt_b}"), texts)
        values = told if protocol == "skyline" else alone
        assert choice.logprob == pytest.approx(values[at], abs=1e-3) and choice.choices == len(game.answers) > 40
        assert_placed(choice.rank, choice.among, values, at)
        assert choice.hit == (choice.rank == 1)
        if protocol == "skyline":
            assert_placed(choice.calibrated_rank, choice.calibrated_among, told - alone, at)
            assert choice.calibrated_hit == (choice.calibrated_rank == 1)
        else:
            assert choice.calibrated_rank is choice.calibrated_among is choice.calibrated_hit is None
        ranks.append(choice.rank)
    if form == "raw":
        assert (max(ranks) == 1) == (protocol == "skyline"), "what is told is the likeliest, alone it is not"


def test_equals_share_the_mean_of_their_ranks_and_none_of_them_is_a_hit():
    game = Game("ranks", (Item("", "", "x"), Item("", "", "y")), answers=("x", "y", "z"))
    first, second = choose(game, [np.array([-2.0, -4.0, -6.0])] * 2, [np.array([-1.0, -3.0, -6.0])] * 2)
    assert (first.rank, first.calibrated_rank, first.hit, first.calibrated_hit) == (1, 2.5, True, False)
    assert (second.rank, second.calibrated_rank, second.hit, second.calibrated_hit) == (2, 2.5, False, False)
    tied, behind = choose(game, [np.array([-1.0, -1.0, -1.0]), np.array([-1.0, -5.0, -1.0])], None)
    assert (tied.rank, tied.hit, behind.rank) == (2, False, 3)
    assert tied.among == pytest.approx(np.log(1 / 3)) and tied.logprob == -1
    assert tied == Choice(2, -1, tied.among, None, None, 3)


def test_with_its_own_state_in_its_own_place_b_makes_of_choices_what_it_makes_of_them_alone(b, chatty):
    game = draw("tip_sheets", 1, 5)
    for agent in (b, chatty):
        prompts = Wording().prompts_a(game, agent), Wording().prompts_b(game, agent)
        alone = logprobs(silent(agent, agent, *prompts), game, agent.chat)
        for k, j in ((5, 2), (1, 6)):
            own = logprobs(activation(agent, agent, *prompts, k=k, j=j, control="self"), game, agent.chat)
            np.testing.assert_allclose(own, alone, rtol=1e-4)
        sent = logprobs(activation(agent, agent, *prompts, k=5, j=2), game, agent.chat)
        assert not np.allclose(sent, alone, rtol=1e-2), "another's state changes something"


def test_texts_of_one_token_and_of_several_score_together_as_each_does_alone(b):
    """In rows of different numbers of texts."""
    rng = np.random.default_rng(0)
    prompts = [f"{x} Which country is Ann located in?" for x in ("Ann is at the Louvre Museum.", "", "Bo is at Bo.")]
    words = lambda n: rng.integers(2, 3000, n).tolist()
    turn = start_turn(b, prompts)
    greedy = [list(reply.ids)[:3] for reply in turn.write(6)]
    continuations = [
        [words(1), greedy[0], words(5), greedy[0][:1], words(2), words(9)],
        [words(3)],
        [greedy[2][:1], [*greedy[2][:1], 7], words(1)],
    ]
    together = turn.score_tokens(continuations)
    flags = []
    for prompt, row, texts, scored in zip(prompts, turn.rows, continuations, together, strict=True):
        assert scored.tokens == tuple(map(len, texts)) and len(scored.logprobs) == len(scored.greedy) == len(texts)
        alone = [start_turn(b, [prompt]).score_tokens([[text]])[0] for text in texts]
        np.testing.assert_allclose(scored.logprobs, [x.logprobs[0] for x in alone], rtol=1e-5)
        assert scored.greedy == tuple(x.greedy[0] for x in alone)
        want = forced(b, [(row, text) for text in texts])
        np.testing.assert_allclose(scored.logprobs, [x for x, _ in want], rtol=1e-4, atol=1e-4)
        assert scored.greedy == tuple(x for _, x in want)
        flags.append(scored.greedy)
    assert flags[0][1] and flags[0][3] and flags[2][0] and not flags[0][0] and not flags[2][1]
    short = turn.score_tokens([[texts[0][:1]] for texts in continuations])
    for one, every in zip(short, together, strict=True):
        assert one.tokens == (1,) and (every.tokens[0] > 1 or one.logprobs[0] == pytest.approx(every.logprobs[0]))
    nothing = turn.score_tokens([[], continuations[1], []])
    assert nothing[0].logprobs == () and nothing[1].logprobs == pytest.approx(together[1].logprobs, rel=1e-5)


# What is kept of a game ---------------------------------------------------------------------------------------------


def test_rows_hold_what_each_was_given_as_its_tokenizer_reads_it(b, chatty):
    game = draw("countries", 0, 3)
    for reads in ("statement", "statement+question"):
        ask = lambda protocol, reads=reads, **how: play(
            game, protocol, chatty, b, PlaySettings(Wording(reads=reads), max_new_tokens=3), **how
        ).rows()
        told = [i.prompt_a if reads == "statement" else f"{i.prompt_a} {i.prompt_b}" for i in game.items]
        sent = [f"<s> user : {text} assistant :" for text in told]
        for row, item in zip(ask("silent"), game.items, strict=True):
            assert (row["rendered_a"], row["rendered"], row["sender_reads"]) == ("", [item.prompt_b], None)
        for row, item in zip(ask("skyline"), game.items, strict=True):
            both = f"{item.prompt_a} {item.prompt_b}"
            assert (row["rendered_a"], row["rendered"], row["sender_reads"]) == ("", [both], None)
        for row, item, text in zip(ask("activation", k=5, j=2), game.items, sent, strict=True):
            assert (row["rendered_a"], row["rendered"], row["sender_reads"]) == (text, [item.prompt_b], reads)
            assert (row["k"], row["j"], row["graft"], row["mapped"]) == (5, 2, "replace", False)
        for row, item, text in zip(ask("debate", rounds=1, form="plain"), game.items, sent, strict=True):
            assert (row["rendered_a"], row["rendered"], row["sender_reads"]) == (text, [text, item.prompt_b], reads)


@pytest.mark.parametrize("reads", ["statement", "statement+question"])
def test_rows_of_a_message_hold_it_and_what_each_was_given_around_it(b, chatty, reads):
    game = draw("countries", 0, 3)
    words = dict(ask="Hear: {prompt}", tell="{prompt} {message}", max_message_tokens=6)
    settings = PlaySettings(Wording(reads=reads), max_new_tokens=2)
    rows = play(game, "message", b, chatty, settings, **words).rows()
    asked = [f"Hear: {i.prompt_a}" + (f" {i.prompt_b}" if reads == "statement+question" else "") for i in game.items]
    said = [reply.text for reply in start_turn(b, asked).write(6)]
    assert all(said)
    for row, item, text, message in zip(rows, game.items, asked, said, strict=True):
        assert (row["rendered_a"], row["sender_reads"], row["details"]["message"]) == (text, reads, message)
        assert row["rendered"] == [f"<s> user : {item.prompt_b} {message} assistant :"]


@pytest.mark.parametrize(
    ("form", "game", "wording", "metric", "because"),
    [
        ("raw", WHERE, "paper", "exact", "as in the paper"),
        ("raw", SHOWN, "paper", "exact", "worked examples"),
        ("raw", WHERE, "instructed", "found", "told how to answer"),
        ("raw", WHERE, "kvcomm", "exact", "raw text"),
        ("chat", WHERE, "paper", "found", "in a chat"),
        ("chat", SHOWN, "instructed", "found", "in a chat"),
    ],
)
def test_a_result_says_which_metric_is_shown_and_why(b, chatty, form, game, wording, metric, because):
    agent = (b, chatty)[form == "chat"]
    outcome = play(game, "silent", b, agent, PlaySettings(Wording(wording), max_new_tokens=1))
    for kept in (outcome.summary(), *outcome.rows()):
        assert kept["shown"] == metric and because in kept["shown_because"]
        assert (kept["wording"], kept["examples"]) == (wording, len(game.examples))
        assert (kept["chat_a"], kept["chat"]) == (False, form == "chat")


def test_a_reply_is_right_by_each_metric_as_that_metric_says(b):
    game = dataclasses.replace(WHERE, items=(ANN,) * 4)
    outcome = play(game, "silent", b, b, PlaySettings(max_new_tokens=1))
    texts = ("France", " the france.", "Ann is located in France, I think", "Peru or France")
    replies = [dataclasses.replace(reply, raw=text) for reply, text in zip(outcome.replies, texts, strict=True)]
    outcome: Outcome = dataclasses.replace(outcome, replies=replies)
    assert outcome.hits == outcome.scored("exact") == [True, False, False, False]
    assert outcome.normalised_hits == [True, True, False, False]
    assert outcome.found_hits == outcome.scored("found") == [True, True, True, False]
    said = outcome.summary()
    assert (said["accuracy"], said["normalised_accuracy"], said["found_accuracy"]) == (0.25, 0.5, 0.75)
    for name, hits in (("hit", outcome.hits), ("found_hit", outcome.found_hits)):
        assert [row[name] for row in outcome.rows()] == hits


@pytest.fixture(scope="module")
def lively(b) -> Agent:
    """It writes line ends, where `b` would stop."""
    (end,), (stop,) = b.line_ends, b.stop_tokens
    embed = b.params.embed.at[end].set(1.05 * b.params.embed[stop])
    return dataclasses.replace(b, params=b.params.replace(embed=embed))


def test_after_raw_worked_examples_nobody_writes_beyond_a_line(lively, b):
    game, bare = draw("countries", 0, 6, examples=2), draw("countries", 0, 6)
    wording, ended = Wording(reads="statement+question"), lambda written: "Ċ" not in "".join(written[:-1])
    for protocol, more in (("silent", {}), ("skyline", {}), ("activation", dict(k=5, j=2)), ("message", {})):
        replies = play(game, protocol, lively, lively, PlaySettings(wording), **more).replies
        assert all(ended(reply.written) and "\n" not in reply.text for reply in replies)
        assert any(reply.written[-1] == "Ċ" for reply in replies), "a line's end has stopped it"
        loose = play(bare, protocol, lively, lively, PlaySettings(wording), **more).replies
        assert not all(ended(reply.written) for reply in loose), "without examples none does"
    line = dataclasses.replace(lively, stop_tokens=(*lively.stop_tokens, *lively.line_ends))
    messages = start_turn(line, wording.prompts_a(game, line)).write(48)
    assert all(ended(said.written) for said in messages)
    for reply, said in zip(replies, messages, strict=True):
        assert reply.details["message"] == said.text and "\n" not in said.text
        assert reply.spent.written == len(said.written) + len(reply.written), "nor does A"


def test_in_a_chat_worked_examples_end_no_line(lively, chatty):
    agent = dataclasses.replace(lively, tokenizer=chatty.tokenizer, chat=True)
    assert Wording().writer(SHOWN, agent).stop_tokens == agent.stop_tokens
    assert Wording().writer(SHOWN, lively).stop_tokens == (*lively.stop_tokens, *lively.line_ends)
    assert Wording().writer(WHERE, lively).stop_tokens == lively.stop_tokens


# The command line ---------------------------------------------------------------------------------------------------

N = 6


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A game of one's own, which the embedded pair can play."""
    path = tmp_path_factory.mktemp("my games") / "mine.jsonl"
    write_game(path, *lines_of(GAMES["countries"](0, n=N)))
    return path


ARMS = [("silent", None), ("skyline", None), ("message", None), ("activation", None), ("activation", "shuffled")]


@pytest.fixture(scope="module")
def played(mine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("played") / "run"
    arms = ("--protocol", "silent", "skyline", "message", "activation", "--control", "shuffled")
    jaxcomm("play", "--a", "pair:b", "--b", "pair:b", "--game", mine, *arms, "--k", 5, "--j", 2, "--out", out)
    return out


def test_a_run_leaves_a_report_a_line_for_every_arm_and_one_for_every_answer(played, mine):
    assert {path.name for path in played.iterdir()} == {"report.html", "report.md", "results.jsonl", "items.jsonl"}
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
    by = {arm: result["found_accuracy"] for arm, result in zip(ARMS, results, strict=True)}
    assert by["skyline", None] > by["silent", None] and by["activation", None] > by["activation", "shuffled"]
    for name in ("report.html", "report.md"):
        text = (played / name).read_text()
        for part in ("control: shuffled", "calibrated choice", "found match", "Activation against the rest"):
            assert part in text
        assert text.count("B reads: ") == 2 * len(ARMS), "of the first two items"


def test_the_command_that_a_report_prints_gives_the_same_items_again(played, tmp_path):
    again = (played / "report.md").read_text().split("## This again")[1]
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
        dict(protocol=("cipher", "debate"), temperatures=(0.5, 0.0), rounds=4, form="harness", game="my game.jsonl"),
        dict(protocol=("message",), ask="{prompt} Tell.", tell="{prompt} {message}", temperature=0.7, top_p=0.9),
        dict(int8=True, tensor=2, dtype="bfloat16", json=Path("a b.json"), items=Path("i.jsonl"), out=Path("out")),
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_printed_command_asks_for_what_was_asked_for(given):
    command = Play(a="pair:b", b="some/model@revision", **given)
    name, *words = shlex.split(command_line(command))
    assert name == "jaxcomm" and tyro.cli(cli.prepare, args=words) == command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--instruction", "One word."), "an instruction is of the wording instructed, paper has no place for it"),
        (("--instruction", "A.", "--wording", "kvcomm"), "instructed, kvcomm has no place for it"),
        (("--protocol", "silent", "skyline", "silent"), "silent skyline silent: name at least one, each once"),
        (
            ("--protocol", "cipher", "--temperature", 0.7),
            "cipher draws nothing, its --temperatures soften what it says",
        ),
        (("--protocol", "cipher", "--temperatures", 0.1, 0.4), "--temperatures 0.1 0.4: B's must be lower"),
        (("--protocol", "cipher", "--temperatures", 0.4, 0.4), "--temperatures 0.4 0.4: B's must be lower"),
        (("--protocol", "silent", "--control", "zero"), "--control mean nothing to the protocol silent: leave them"),
        (("--protocol", "silent", "activation", "--k", 5), "activation needs --k (A's layer) and --j (B's layer)"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(capsys, tmp_path, words, message):
    words = words if "--protocol" in words else (*words, "--protocol", "silent")
    out = tmp_path / "run"
    assert message in refused(capsys, "play", "--a", "nowhere", "--b", "nowhere", *words, "--out", out)
    assert not out.exists()


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


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_hold_any_character_that_json_lets_stand(tmp_path, mark):
    """JSON escapes neither U+2028 nor U+0085, so a line of a file ends at line feeds alone."""
    line = dict(LINE, prompt_a=f"Ann is{mark}at the Louvre.")
    spelled = line["prompt_a"].join(json.dumps(dict(line, prompt_a="@")).split("@"))
    assert draw(write_game(tmp_path / "mine.jsonl", spelled)).items[0].prompt_a == line["prompt_a"]


def test_a_file_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(dict(LINE, answer="@")).encode().replace(b"@", b"T\xfcrkiye"))
    with pytest.raises(ValueError, match="mine.jsonl"):
        draw(str(path))


@pytest.mark.parametrize("choices", ["", 0, False, {}])
def test_choices_that_are_nothing_but_no_list_are_refused(tmp_path, choices):
    with pytest.raises(ValueError, match="line 1: choices = .* is not a list of texts"):
        draw(write_game(tmp_path / "mine.jsonl", dict(LINE, choices=choices)))


def test_a_reply_that_is_the_answer_of_ones_own_file_is_an_exact_match(tmp_path, b):
    """Or the answer is refused for the space around it."""
    try:
        game = draw(write_game(tmp_path / "mine.jsonl", dict(LINE, answer="France ")))
    except ValueError:
        return
    outcome = play(game, "silent", b, b, PlaySettings(max_new_tokens=1))
    assert dataclasses.replace(outcome, replies=[dataclasses.replace(outcome.replies[0], raw=" France ")]).hits == [
        True
    ]


@pytest.mark.parametrize(("n", "examples"), [(5, -3), (None, -1), (0, 0), (-2, 0)])
@pytest.mark.parametrize("own", [False, True], ids=["countries", "file"])
def test_numbers_below_what_can_be_meant_are_named_and_refused(tmp_path, n, examples, own):
    """Not played with fewer items than were asked for, and not told to ask for fewer."""
    name = write_game(tmp_path / "mine.jsonl", *numbered(8)) if own else "countries"
    with pytest.raises(ValueError) as error:
        draw(name, 0, n, examples=examples)
    assert str(examples or n) in str(error.value) and "ask for fewer" not in str(error.value)


@pytest.mark.parametrize("values", [[1.0] * 5, [0.0] * 5], ids=["rank", "logarithm"])
def test_the_interval_of_what_is_no_share_stays_where_its_values_can_be(b, values):
    """A rank is at least 1, a logarithm of a probability at most 0."""
    game = dataclasses.replace(WHERE, items=(ANN,) * len(values))
    outcome = play(game, "silent", b, b, PlaySettings(max_new_tokens=1))
    choices = [Choice(1 if x else 2, -1.0, -x, 1 if x else 2, -x, 5) for x in values]
    said = dataclasses.replace(outcome, choices=choices).summary()
    assert said["choice_rank_low"] >= 1 and said["choice_among_high"] <= 0


def test_the_interval_of_a_difference_in_nats_holds_it(b):
    """Of one item, too."""
    every = conditions.conditions(("silent", "activation"), {"activation": dict(k=5, j=2)}, ())
    outcomes = [play(WHERE, arm.protocol, b, b, PlaySettings(max_new_tokens=1), **arm.settings) for arm in every]
    alike = [Choice(1, x, x, None, None, 5) for x in (-4.0, -1.0)]
    outcomes = [dataclasses.replace(o, choices=[x]) for o, x in zip(outcomes, alike, strict=True)]
    ((*_, nats, _),) = conditions.differences(every, outcomes, "exact").rows
    value, low, high = map(float, re.findall(r"-?[\d.]+", nats))
    assert low <= value <= high and value == 3


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


def test_rounds_below_one_are_refused_and_not_taken_for_the_default(capsys):
    asked = ("--game", "countries", "--n", 1, "--max-new-tokens", 1, "--no-choices")
    words = ("play", "--a", "pair:b", "--b", "pair:b", "--protocol", "debate", "--rounds", 0, *asked)
    assert "rounds" in refused(capsys, *words)


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("play", "--control", "zero", "zero", "--k", 5, "--j", 2),
            "--control zero zero: name at least one, each once",
        ),
        (("play", "--n", 1, "--control", "shuffled", "--k", 5, "--j", 2), "shuffled needs at least two games"),
    ],
)
def test_arms_that_mean_nothing_are_refused_before_a_model_is_read(capsys, words, message):
    assert message in refused(capsys, *words, "--a", "nowhere", "--b", "nowhere")


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
