"""Games that real models can play: what agents read, how choices are scored, and what is kept of it."""

import copy
import dataclasses
import itertools
import re

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm import forward
from jaxcomm.agent import Agent
from jaxcomm.evals import conditions
from jaxcomm.evals.choices import Choice, choose, logprobs
from jaxcomm.evals.games import PRESETS, Game, Item, Wording, draw
from jaxcomm.evals.play import Outcome, PlaySettings, play
from jaxcomm.protocols import activation, silent, skyline
from jaxcomm.protocols.base import start_turn
from jaxcomm.protocols.passes import PASS, further, passes

from command import refused
from conftest import TEMPLATE
from game_files import ANN, LINE, write_game

BO = Item("Bo is at Mount Fuji.", "Which country is Bo located in?", "Japan")
WHERE = dataclasses.replace(draw("countries", n=1), items=(ANN,))
SHOWN = dataclasses.replace(WHERE, examples=(BO, Item("Cy is in Rome.", "Where is Cy?", "Italy")))


@pytest.fixture(scope="module")
def chatty(b) -> Agent:
    """The same model, through a chat template."""
    tokenizer = copy.deepcopy(b.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(b, tokenizer=tokenizer, chat=True, name="chatty")


# What agents read ---------------------------------------------------------------------------------------------------

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
    many = [texts + [words(2 + i % 3) for i in range(30)] for texts in continuations]
    assert len(passes([[*map(len, texts)] for texts in many])) > 1
    for scored, every, texts in zip(turn.score_tokens(many), together, many, strict=True):
        n = len(every.logprobs)
        np.testing.assert_allclose(scored.logprobs[:n], every.logprobs, rtol=1e-5)
        last = start_turn(b, [prompts[many.index(texts)]]).score_tokens([texts[-3:]])[0]
        np.testing.assert_allclose(scored.logprobs[-3:], last.logprobs, rtol=1e-5)
    nothing = turn.score_tokens([[], continuations[1], []])
    assert nothing[0].logprobs == () and nothing[1].logprobs == pytest.approx(together[1].logprobs, rel=1e-5)


@given(st.lists(st.lists(st.integers(1, 12), max_size=8), min_size=1, max_size=4))
def test_passes_take_every_longer_text_once_and_are_the_cheapest(lengths):
    made = passes(lengths)
    longer = sorted({n for texts in lengths for n in texts if n > 1})
    assert [n for low, high in made for n in longer if low <= n <= high] == longer

    def cost(groups):
        rows = [max(sum(low <= n <= high for n in texts) for texts in lengths) for low, high in groups]
        return sum(
            (n if n <= 4 else -(-n // 4) * 4) * further(high) + PASS for n, (_, high) in zip(rows, groups, strict=True)
        )

    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(longer)), n) for n in range(len(longer)))
    groups = [[(longer[i], longer[j - 1]) for i, j in itertools.pairwise((0, *cut, len(longer)))] for cut in cuts]
    assert cost(made) == min(map(cost, groups), default=0)


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
    every = conditions.conditions(("silent", "activation"), {"activation": dict(k=5, j=2)}, ("zero",))
    outcomes = [play(WHERE, arm.protocol, b, b, PlaySettings(max_new_tokens=1), **arm.settings) for arm in every]
    alike = [Choice(1, x, x, None, None, 5) for x in (-9.0, -1.0, -4.0)]
    by = {c.label: dataclasses.replace(o, choices=[x]) for c, o, x in zip(every, outcomes, alike, strict=True)}
    ((*_, nats),) = conditions.against(every, by, ["activation"], "exact")
    value, low, high = map(float, re.findall(r"-?[\d.]+", nats))
    assert low <= value <= high and value == 3


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
