"""Pairs as models of Inspect AI: its own runner, tasks and logs, nothing mocked."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo

from jaxcomm.evals.agents import load_agents
from jaxcomm.evals.games import Wording, draw
from jaxcomm.evals.inspect_ai.model import conversation
from jaxcomm.evals.inspect_ai.tasks import game as game_of
from jaxcomm.evals.inspect_ai.tasks import game_task
from jaxcomm.evals.play import PlaySettings, play

PAIR = dict(a="pair:b", b="pair:b")


@pytest.fixture(scope="module")
def pair():
    return load_agents("pair:b", "pair:b", layers=True)


def run(task, name, tmp_path, args, **how):
    (log,) = inspect_eval(
        task, model=get_model(f"jaxcomm/{name}", **args), log_dir=str(tmp_path), display="none", **how
    )
    assert log.status == "success", log.error
    return log


@pytest.mark.parametrize(
    "name, own", [("activation", dict(k=5, j=2)), ("message", {}), ("skyline", {}), ("silent", {})]
)
def test_a_game_under_inspect_is_the_game_as_it_is_played(name, own, pair, tmp_path):
    game, wording = draw("countries", 0, 10), Wording()
    log = run(game_of(n=10), name, tmp_path, PAIR | own, max_tokens=8, logprobs=True)
    outcome = play(game, name, *pair, PlaySettings(wording, max_new_tokens=8), **own)
    samples = sorted(log.samples, key=lambda sample: int(sample.id))
    assert [s.output.completion for s in samples] == [reply.text for reply in outcome.replies]
    assert [s.scores["names_answer"].value == "C" for s in samples] == outcome.found_hits
    for sample, reply in zip(samples, outcome.replies, strict=True):
        told = sample.output.choices[0].logprobs.content
        assert [x.token for x in told] == list(reply.written)
        assert sum(x.logprob for x in told) == pytest.approx(reply.logprob, abs=1e-3)
        assert (sample.output.usage.input_tokens, sample.output.usage.output_tokens) == (
            reply.spent.read,
            reply.spent.written,
        )
        assert sample.output.metadata["flops"] == reply.flops


def test_worked_examples_and_the_question_reach_the_agents_as_in_play(pair, tmp_path):
    game, wording = draw("countries", 1, 4, examples=2), Wording(reads="statement+question")
    log = run(game_task(game, wording), "activation", tmp_path, PAIR | dict(k=5, j=2), max_tokens=8, stop_seqs=["\n"])
    outcome = play(game, "activation", *pair, PlaySettings(wording, max_new_tokens=8), k=5, j=2)
    samples = sorted(log.samples, key=lambda sample: int(sample.id))
    assert [s.output.completion for s in samples] == [reply.text for reply in outcome.replies]


def test_the_command_plays_a_file(pair, tmp_path):
    ask = "Which country is {} located in?"
    names = "Bob", "Alice", "Adam"
    rows = [dict(prompt_a=f"{name} is at Petra.", prompt_b=ask.format(name), answer="Jordan") for name in names]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "inspect_ai", "eval", "jaxcomm/game", "-T", f"game={file}", "-T", "seed=3"]
    command += ["--model", "jaxcomm/activation", "-M", "a=pair:b", "-M", "b=pair:b", "-M", "k=4", "-M", "j=1"]
    command += ["--max-tokens", "8", "--display", "none", "--log-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (log,) = [read_eval_log(found) for found in list_eval_logs(str(tmp_path))]
    outcome = play(draw(str(file), 3), "activation", *pair, PlaySettings(Wording(), max_new_tokens=8), k=4, j=1)
    samples = sorted(log.samples, key=lambda sample: int(sample.id))
    assert [s.output.completion for s in samples] == [reply.text for reply in outcome.replies]
    assert [s.target for s in samples] == ["Jordan"] * 3


def test_a_game_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="there is no game 'chess': name countries, tip_sheets or a file"):
        game_of("chess")


def test_unmarked_messages_are_read_by_both(tmp_path):
    both = Sample(input=[ChatMessageUser(content="Bob is at Petra. Which country is Bob located in?")], target="Jordan")
    log = run(
        Task(dataset=MemoryDataset([both]), solver=generate(), scorer=includes()),
        "activation",
        tmp_path,
        PAIR | dict(k=6, j=6),
        max_tokens=4,
    )
    assert log.results.scores[0].metrics["accuracy"].value == 1


def test_draws_differ_and_are_the_same_again():
    async def drawn(**how):
        model = get_model("jaxcomm/silent", **PAIR, memoize=False)
        told = ChatMessageUser(content="Giulia is at")
        output = await model.generate(
            [told], config=GenerateConfig(temperature=2.0, max_tokens=6, num_choices=6, **how)
        )
        return [choice.message.text for choice in output.choices]

    first, again, other = asyncio.run(drawn(seed=3)), asyncio.run(drawn(seed=3)), asyncio.run(drawn(seed=4))
    assert first == again != other and len(set(first)) > 1


def test_requests_that_come_together_are_answered_together(monkeypatch):
    async def asked(n):
        model = get_model("jaxcomm/skyline", **PAIR, batch_size=8, memoize=False)
        sizes, answer = [], model.api.batches.answer
        model.api.batches.answer = lambda requests: (sizes.append(len(requests)), answer(requests))[1]
        prompts = [
            [ChatMessageUser(content=f"{name} is at Petra. Which country is {name} located in?")] for name in names[:n]
        ]
        config = GenerateConfig(max_tokens=4)
        outputs = await asyncio.gather(*(model.generate(prompt, config=config) for prompt in prompts))
        return sizes, [output.completion for output in outputs]

    names = ["Alice", "Bob", "Giulia", "Adam", "Priya", "Yasmin", "Carol", "David"]
    sizes, texts = asyncio.run(asked(8))
    assert sum(sizes) == 8 and max(sizes) > 1 and texts == ["Jordan"] * 8


@pytest.mark.parametrize(
    "name, args, config, message",
    [
        ("telepathy", PAIR, {}, "there is no protocol 'telepathy'"),
        ("activation", {"a": "pair:a"}, {}, "needs b"),
        ("activation", PAIR | dict(k=5, j=2, control="other"), {}, "controls need the right answers"),
        ("activation", PAIR | dict(k=50, j=2), {}, "k = 50"),
        ("silent", PAIR, dict(presence_penalty=1.0), "presence_penalty"),
        ("silent", PAIR, dict(top_logprobs=3, logprobs=True), "top_logprobs"),
        ("silent", PAIR, dict(max_tokens=10_000), "10000"),
    ],
)
def test_what_is_not_possible_is_said(name, args, config, message):
    async def ask():
        model = get_model(f"jaxcomm/{name}", **args, memoize=False)
        return await model.api.generate([ChatMessageUser(content="Hello")], [], "none", GenerateConfig(**config))

    with pytest.raises(ValueError, match=message):
        asyncio.run(ask())


def test_tools_and_other_marks_are_refused():
    api = get_model("jaxcomm/silent", **PAIR, memoize=False).api
    tool = ToolInfo(name="search", description="looks things up")
    with pytest.raises(ValueError, match="calls no tools: leave out search"):
        asyncio.run(api.generate([ChatMessageUser(content="Hello")], [tool], "auto", GenerateConfig()))
    with pytest.raises(ValueError, match="marked for 'c'"):
        marked = ChatMessageUser(content="Hello", metadata={"agent": "c"})
        asyncio.run(api.generate([marked], [], "none", GenerateConfig()))
    with pytest.raises(ValueError, match="no message for one of the agents"):
        only_a = ChatMessageUser(content="Hello", metadata={"agent": "a"})
        asyncio.run(api.generate([only_a], [], "none", GenerateConfig()))


def test_raw_agents_read_a_question_and_its_answer_as_one_paragraph():
    turns = [ChatMessageUser(content="2 + 2?"), ChatMessageAssistant(content="4"), ChatMessageUser(content="3 + 3?")]
    assert [turn["content"] for turn in conversation(turns, chat=False)] == ["2 + 2? 4", "3 + 3?"]
    assert [turn["role"] for turn in conversation(turns, chat=True)] == ["user", "assistant", "user"]


def test_what_goes_into_the_log_is_json(tmp_path):
    log = run(game_of(n=2), "activation", tmp_path, PAIR | dict(k=5, j=2), max_tokens=4)
    told = log.samples[0].output.metadata
    assert json.loads(json.dumps(told)) == told and told["bytes_sent"] == 512
    assert np.isfinite(told["norm_sent"])
