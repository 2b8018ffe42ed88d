"""Evaluation: the harness' numbers, games as tasks, runs that resume, and requests that are followed or refused."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import transformers

from jaxcomm.converters import load_agent
from jaxcomm.decoding import Sampling
from jaxcomm.evals import harness
from jaxcomm.evals.evaluation.arms import Arm
from jaxcomm.evals.evaluation.questions import subset
from jaxcomm.evals.evaluation.results import group_lines
from jaxcomm.evals.evaluation.settings import EvalSettings
from jaxcomm.evals.pair import folder
from jaxcomm.evals.runs import RunFolder
from jaxcomm.evals.tasks import load_tasks, read_records
from jaxcomm.protocols import skyline
from jaxcomm.protocols.base import start_turn

from conftest import make_checkpoint
from crashes import crash_everywhere, kills, there
from evaluations import SAMPLE, items, run

GEOGRAPHY = "mmlu_high_school_geography"
TEXT = dict(form="plain", tell="{message} {prompt}", max_message_tokens=24)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Random weights with the embedded pair's tokenizer."""
    path = tmp_path_factory.mktemp("random")
    vocab = json.loads((folder("b") / "config.json").read_text())["vocab_size"]
    make_checkpoint(path, "llama", seed=5, vocab_size=vocab, eos_token_id=1, bos_token_id=0, pad_token_id=1)
    transformers.AutoTokenizer.from_pretrained(folder("b")).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    """Local data with few-shot examples of their own: {task: folder}."""
    made = {}
    for task, shots in (("gsm8k", "train"), (GEOGRAPHY, "dev")):
        lines = (SAMPLE / f"{task}.jsonl").read_text().splitlines(keepends=True)
        made[task] = tmp_path_factory.mktemp(task)
        (made[task] / f"{shots}.jsonl").write_text("".join(lines[:3]))
        (made[task] / "test.jsonl").write_text("".join(lines))
    return made


def test_single_models_score_as_the_harness_own_hf_backend(checkpoint, splits, tmp_path):
    """All three kinds of request: text written after few-shot examples, choices by likelihood, perplexity (of which theirs
    begins with two BOS, unless they are told not to add one: of ours it is the same)."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("gsm8k", GEOGRAPHY, "statements", "countries_choice")
    asked = EvalSettings(tasks=names, data=splits, n=5, batch_size=4, few_shot=2, max_new_tokens=None)
    lines = run(asked, load_agent(checkpoint, name="b", unroll=False), tmp_path / "run")

    tasks = {name: own[name] for name, own in load_tasks(names, splits, seed=0, n=5).items()}
    theirs = {"results": {}, "samples": {}}
    for added in (None, False):
        own = {name: task for name, task in tasks.items() if (name == "statements") == (added is False)}
        found = simple_evaluate(
            model=HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4, add_bos_token=added),
            tasks=list(own.values()), samples=subset(own, 5, 0), num_fewshot=2, bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        for part, kept in theirs.items():
            kept |= found[part]
    for line in lines:
        if line["metric"].startswith("log p"):
            continue  # ours alone
        value = theirs["results"][line["task"]][f"{line['metric']},{line['filter']}"]
        assert line["value"] == pytest.approx(value, rel=1e-5), line
    assert {line["task"] for line in lines} == set(names)
    said = {(r["task"], r["question"], r["filter"]): json.loads(r["said"]) for r in items(tmp_path / "run")}
    for task, samples in theirs["samples"].items():
        for sample in samples:
            ours, want = said[task, sample["doc_id"], sample["filter"]], json.loads(json.dumps(sample["resps"]))
            if task == "gsm8k":
                assert ours == want and len(want[0][0]) > 20
            else:
                np.testing.assert_allclose(numbers(ours), numbers(want), rtol=1e-5, atol=1e-4)


def numbers(nested) -> list[float]:
    return [x for part in nested for x in numbers(part)] if isinstance(nested, list) else [float(nested)]


def test_every_protocol_plays_the_games_as_tasks(b, tmp_path):
    """What is told arrives: in text, in vectors and as an activation; a control's does not."""
    asked = EvalSettings(
        tasks=("countries", "countries_choice"), n=24, k=(4,), j=1, temperatures=(0.1, 0.4), controls=("other",),
        protocols=("single", "skyline", "message", "debate", "cipher", "activation", "exchange"), **TEXT,
    )  # fmt: skip
    lines = run(asked, b, tmp_path / "run")
    value = {(x["protocol"], x["task"]): x for x in lines if not x["metric"].startswith("log p")}
    for task in asked.tasks:
        alone, wrong = value["single", task]["value"], value["activation, other", task]["value"]
        for told in ("skyline", "message", "debate", "cipher", "activation", "exchange"):
            assert value[told, task]["value"] > max(alone, wrong) + 0.4, (told, task)
            if told != "skyline":
                other = value[f"{told}, other", task]
                assert (other["overlap"], other["information"]) == (0.0, "private")
                if told in ("debate", "exchange") and task == "countries_choice":
                    continue  # everybody's choices count, and A knows
                assert value[told, task]["value"] > other["value"] + 0.4, "what is told is of this question"
        assert value["message", task]["flops"] > 1.5 * value["activation", task]["flops"]
        assert value["message", task]["message_tokens"] > 0 and value["single", task]["message_tokens"] == 0
    assert all(x["n"] == 24 and x["low"] <= x["value"] <= x["high"] and x["seconds"] > 0 for x in lines)
    likely = {x["protocol"]: x["value"] for x in lines if x["metric"] == "log p(right | choices)"}
    assert likely["activation"] > max(likely["single"], likely["activation, other"]) + 1
    for row in items(tmp_path / "run"):
        if row["task"] == "countries_choice":
            each = scipy.special.log_softmax(numbers(json.loads(row["said"]))[::2])
            assert json.loads(row["metrics"])["log p(right | choices)"] == pytest.approx(each[int(row["target"])])


def test_the_control_other_is_of_another_question_whatever_the_batches(b, tmp_path):
    """25 questions in batches of 16 are two of 13 rows, the second filled up."""
    asked = EvalSettings(tasks=("countries",), n=25, k=(4,), j=1, protocols=("activation",), controls=("other",))
    said = []
    for size in (16, 1, 25):
        run(dataclasses.replace(asked, batch_size=size), b, tmp_path / str(size))
        norms: dict[str, dict] = {"activation": {}, "activation, other": {}, "single": {}}
        for row in items(tmp_path / str(size)):
            (details,) = json.loads(row["details"])
            norms[row["protocol"]][row["question"]] = round(details.get("norm_sent", 0), 3)
        own, other = norms["activation"], norms["activation, other"]
        assert all(own[q] != other[q] for q in own) and sorted(own.values()) == sorted(other.values())
        said.append({(r["protocol"], r["question"]): r["said"] for r in items(tmp_path / str(size))})
    assert said[0] == said[1] == said[2]
    with pytest.raises(ValueError, match="countries has one question: the control other needs at least two"):
        run(dataclasses.replace(asked, n=1), b, tmp_path / "one")


@pytest.mark.parametrize(
    ("target", "kind", "gold"),
    [(1, "multiple_choice", "no"), (-100, "multiple_choice", "-100"), (7, "multiple_choice", "7"), ([0, 1], "multiple_choice", "[0, 1]"), (1, "generate_until", "1"), ("x", "generate_until", "x")],
)  # fmt: skip
def test_answers_are_told_apart_by_what_they_say(b, target, kind, gold):
    """Whatever a task calls the right one; some have none."""
    task = SimpleNamespace(OUTPUT_TYPE=kind, doc_to_target=lambda doc: target, doc_to_choice=lambda doc: ["yes", "no"])
    lm = harness.ProtocolLM(Arm("any", (b,), None), None, harness.Decoding(), {"task": task})
    assert lm._gold(harness.Row("task", 0, {}, "asked", (), (0,), 0)) == gold


def test_a_game_as_a_task_is_the_game(b, tmp_path):
    from jaxcomm.evals.games import draw
    from jaxcomm.evals.play import play

    asked = EvalSettings(tasks=("tip_sheets",), n=12, seed=3, k=(5,), j=3, protocols=("activation",), controls=())
    run(asked, b, tmp_path / "run")
    outcome = play(draw("tip_sheets", 3, 12), "activation", b, b, k=5, j=3)
    rows = sorted(items(tmp_path / "run"), key=lambda r: r["question"])
    assert [json.loads(r["answer"])[0] for r in rows] == [r.text for r in outcome.replies]
    assert [r["flops"] for r in rows] == [r.flops for r in outcome.replies]


def test_ones_own_game_is_a_task_and_what_the_sender_reads_is_in_every_row(b, tmp_path):
    """Found match beside exact match; what was rendered, of each."""
    game = tmp_path / "boxes.jsonl"
    lines = [
        {"prompt_a": f"The {colour} box is in the {room}.", "prompt_b": f"Where is the {colour} box?", "answer": room}
        for colour, room in (("red", "kitchen"), ("blue", "garden"), ("old", "cellar"), ("new", "attic"))
    ]
    game.write_text("\n".join(map(json.dumps, lines)))
    asked = EvalSettings(
        tasks=(str(game),), k=(5,), j=2, protocols=("single", "message", "activation"), wording="instructed",
        instruction="Say the room.", sender_reads="statement+question", max_message_tokens=8, max_new_tokens=8,
        controls=(),
    )  # fmt: skip
    out = run(asked, b, tmp_path / "run")
    assert {(x["task"], x["metric"]) for x in out} == {("boxes", "exact_match"), ("boxes", "found_match")}
    assert {x["protocol"]: x["sender_reads"] for x in out} == {
        "single": None, "message": "statement+question", "activation": "statement+question",
    }  # fmt: skip
    for row in items(tmp_path / "run"):
        line = lines[row["question"]]
        question = f"{line['prompt_b']} Say the room."
        sends = row["protocol"] != "single"
        assert json.loads(row["rendered_a"]) == [f"{line['prompt_a']} {question}" if sends else ""]
        assert row["sender_reads"] == ("statement+question" if sends else None)
        ((heard,),) = json.loads(row["rendered"])
        assert heard.endswith(question) and (heard == question) == (row["protocol"] != "message")
    game.write_text(game.read_text().replace("attic", "loft"))
    with pytest.raises(ValueError, match="games_sha256"):
        run(asked, b, tmp_path / "run", resume=True)


SAMPLED = EvalSettings(
    tasks=("countries",), n=20, temperature=1.0, top_p=0.9, protocols=("single", "message"), controls=(), **TEXT
)


def test_a_seed_gives_the_same_rows_twice_and_another_seed_others(b, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        run(dataclasses.replace(SAMPLED, seed=seed, batch_size=7), b, tmp_path / name)
    same = [(tmp_path / name / "items.parquet").read_bytes() for name in ("one", "two", "other")]
    assert same[0] == same[1] != same[2]
    answers = {r["answer"] for r in items(tmp_path / "one") if r["protocol"] == "single"}
    assert len(answers) > 3, "nothing was sampled"


def test_a_rows_text_does_not_depend_on_its_batch(b, tmp_path):
    said = []
    for size in (3, 20):
        run(dataclasses.replace(SAMPLED, batch_size=size), b, tmp_path / str(size))
        said.append({(r["protocol"], r["question"]): r["said"] for r in items(tmp_path / str(size))})
    assert said[0] == said[1]


KILLED = """
import json
import lm_eval
from transformers import AutoConfig, AutoTokenizer
from jaxcomm.evals import cli, harness
from jaxcomm.evals.evaluation import run

command = "eval --a pair:b --b pair:b --tasks countries,countries_choice --protocols single message --max-message-tokens 12 --batch-size 8 --n 24"
chunks = lambda: {p.name: p.stat().st_mtime_ns for p in (home / "killed").glob("chunks/*.parquet")}

def go(out, *more):
    sys.argv = ["jaxcomm", *command.split(), "--temperature", "0.7", "--out", str(home / out), *more]
    cli.main()

in_peace(go, "peace")
killed(lambda: len(chunks()) >= 5, go, "killed")
kept = chunks()
in_peace(go, "killed", "--resume")
print(len(kept), kept.items() <= chunks().items())
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle: nothing that was done is done again, and the rows are those of a run in peace."""
    there, stays = kills(KILLED, tmp_path)
    out = tmp_path / "killed"
    assert int(there) >= 5 and stays == "True"
    assert (out / "items.parquet").read_bytes() == (tmp_path / "peace" / "items.parquet").read_bytes()
    lines = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
    want = [json.loads(x) for x in (tmp_path / "peace" / "results.jsonl").read_text().splitlines()]
    assert [x | {"seconds": 0} for x in lines] == [x | {"seconds": 0} for x in want]
    record = json.loads((out / "run.json").read_text())
    assert next(iter(record)) == "command" and record["command"].startswith("jaxcomm eval --a pair:b --b pair:b")


def test_a_crash_at_any_step_of_any_file_leaves_no_trace(b, tmp_path, monkeypatch):
    """What is there at every crash is whole and stays, and what a run ends with is what one in peace does."""
    monkeypatch.setattr("jaxcomm.evals.harness.time.perf_counter", lambda: 0.0)  # seconds are kept, too
    asked = EvalSettings(tasks=("countries",), n=6, batch_size=2, protocols=("single", "skyline"), temperature=0.7)
    run(asked, b, tmp_path / "peace")
    want = there(tmp_path / "peace")
    assert len(want) == 3 + 2 * 3

    def whole():
        assert there(tmp_path / "run").items() <= want.items()

    def resumed():
        run(asked, b, tmp_path / "run", resume=True)

    assert crash_everywhere(resumed, whole) >= 6 and there(tmp_path / "run") == want


def test_a_run_goes_on_in_other_batches_and_on_another_patch_release(b, tmp_path, monkeypatch):
    """As after running out of memory: nothing that was answered is asked again. What changes texts is still refused."""
    asked, out = EvalSettings(tasks=("countries", "countries_choice"), n=9, batch_size=4), tmp_path / "run"
    run(asked, b, tmp_path / "peace")
    run(asked, b, out)
    chunks = sorted(out.glob("chunks/*.parquet"))
    assert len(chunks) == 6
    for chunk in chunks[::3]:
        chunk.unlink()
    for name in ("results.jsonl", "items.parquet"):
        (out / name).unlink()
    rows, real = [], harness.ProtocolLM._converse
    monkeypatch.setattr(harness.ProtocolLM, "_converse", lambda lm, own, *how: rows.append(own) or real(lm, own, *how))
    record = json.loads((out / "run.json").read_text())
    record["config"] |= {name: record["config"][name] + ".post1" for name in ("jax", "numpy", "python")}
    (out / "run.json").write_text(json.dumps(record))
    run(dataclasses.replace(asked, batch_size=2), b, out, resume=True)
    assert len({(row.task, row.question) for own in rows for row in own}) == 6, "two batches of three were missing"
    scores = lambda row: {name: round(value, 4) for name, value in json.loads(row["metrics"]).items()}
    said = [{(r["task"], r["question"]): scores(r) for r in items(tmp_path / name)} for name in ("peace", "run")]
    assert all(said[0][key] == pytest.approx(said[1][key], abs=2e-4) for key in said[0]) and len(said[0]) == 18
    record["config"]["jax"] = "0.1.2"
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r'different run \(jax: "0.1" there'):
        run(asked, b, out, resume=True)
    with pytest.raises(ValueError, match="different run .*temperature"):
        run(dataclasses.replace(asked, temperature=1.0), b, out, resume=True)


def test_answers_are_kept_under_what_is_read(checkpoint, tmp_path):
    """The same question through another template is another question, whatever the folder says of the agent."""
    agent = load_agent(checkpoint, name="b", unroll=False)
    names, kept = [], RunFolder(tmp_path / "run", {}, dict, command="", resume=False)
    for day in ("Monday", "Tuesday", "Tuesday"):
        template = "{% for m in messages %}" + day + " {{ m.content }}{% endfor %}"
        agent.tokenizer.chat_template = template
        arm = Arm("single", (dataclasses.replace(agent, chat=True),), start_turn)
        lm = harness.ProtocolLM(arm, kept, harness.Decoding())
        names.append(lm._key("", harness.Row("task", 0, {}, [{"role": "user", "content": "Who?"}], (), (0,), 0)))
    assert names[0] != names[1] == names[2]


def test_a_tasks_settings_are_followed_or_refused_by_name():
    task = harness.Decoding()
    follow = lambda decoding=task, **kwargs: harness.generation("t", kwargs, decoding)
    assert follow(until="x", max_gen_toks=7) == (("x",), 7, None)
    assert follow(until=["x", ""], do_sample=True, temperature=0.5, top_k=-1, top_p=0.9)[2] == Sampling(0.5, 0, 0.9)
    assert follow(do_sample=True, temperature=0.5, top_k=7)[2] == Sampling(0.5, 7, 1.0)
    harmless = dict(
        num_beams=1, repetition_penalty=1.0, do_sample=False, temperature=0.0, length_penalty=2.0, min_p=0.1
    )
    assert follow(**harmless, typical_p=None, use_cache=True, early_stopping=True) == ((), 256, None)
    for name, value in (("num_beams", 4), ("repetition_penalty", 1.2), ("no_repeat_ngram_size", 3), ("max_length", 9), ("odd", 1)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^t asks for {name} = {value}, but of its settings only .* take it out"):
            follow(**{name: value})
    drawn = dict(do_sample=True, temperature=0.5)
    for name, value in (("min_p", 0.1), ("typical_p", 0.9)):
        with pytest.raises(ValueError, match=f"t asks for {name} = {value}"):
            follow(**drawn, **{name: value})
        follow(harness.Decoding(sampling=Sampling(1.0)), **drawn, **{name: value})  # what is asked for overrides it
    follow(**drawn, min_p=0.0, typical_p=1.0)
    with pytest.raises(ValueError, match="t samples .* at no temperature: give --temperature"):
        follow(do_sample=True)


def test_a_tasks_settings_are_refused_before_anything_is_computed(b, tmp_path, monkeypatch):
    found = load_tasks(("countries",), {}, seed=0, n=2)
    found["countries"]["countries"].config.generation_kwargs["num_beams"] = 4
    monkeypatch.setattr("jaxcomm.evals.evaluation.questions.load_tasks", lambda *_, **__: found)
    with pytest.raises(ValueError, match="countries asks for num_beams = 4"):
        run(EvalSettings(tasks=("countries",), n=2), b, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_leaves_no_room_for_a_prompt_is_refused_and_what_was_given_not_recommended(b):
    for new in (256, 257, 1000):
        with pytest.raises(ValueError, match=f"{new} new tokens leave no room for a prompt in the 256 positions of b"):
            harness._keeping(b, new)
    assert harness._keeping(b, 255).longest == 1


def test_a_text_without_a_prompt_is_read_after_one_token_that_begins_it(b, tmp_path):
    asked = EvalSettings(tasks=("statements",), n=2)
    run(asked, b, tmp_path / "run")
    for row in items(tmp_path / "run"):
        tokens = b.tokenizer.encode(row["prompt"], add_special_tokens=False)
        assert row["tokens_read"] == 1 and row["tokens_written"] == len(tokens)


def test_a_prompt_that_both_read_is_read_once(b):
    both, own = ["Alice is at Meteora. Which country is Alice located in?"], ["Which country is Alice located in?"]
    assert skyline(b, b, both, both).rows == start_turn(b, both).rows
    assert skyline(b, b, ["Alice is at Meteora."], own).rows == start_turn(b, both).rows


def test_a_groups_line_is_over_all_its_questions():
    lines = [
        {"protocol": p, "task": f"mmlu_{t}", "metric": "acc", "filter": "none", "value": v, "low": 0, "high": 1, "n": n}
        | {
            "flops": 10.0 * n,
            "bytes_sent": 7.0 * n,
            "tokens_read": 5.0,
            "tokens_written": 1.0,
            "message_tokens": 0.0,
            "seconds": 1.0,
        }
        | {"unparsed": 0, "truncated": 1, "few_shot": 5}
        for p, t, v, n in (("single", "x", 1.0, 2), ("single", "y", 0.25, 4), ("other", "x", 0.0, 2))
    ]
    rows = [
        {"protocol": "single", "task": f"mmlu_{t}", "filter": "none", "metrics": json.dumps({"acc": x})}
        for t, each in (("x", (1, 1)), ("y", (1, 0, 0, 0)))
        for x in each
    ]
    groups = {"mmlu": ["mmlu_x", "mmlu_y"]}
    (line,) = group_lines(groups, lines, rows, "single")
    assert (line["task"], line["value"], line["n"], line["truncated"]) == ("mmlu", 0.5, 6, 2)
    mean = pytest.approx((2 * 2 + 4 * 4) / 6)
    assert line["flops"] / 10 == mean and line["bytes_sent"] / 7 == mean and line["low"] < 0.5 < line["high"]
    assert not list(group_lines(groups, lines, rows, "other")), "one subject is no group"


def test_chat_prompts_reach_each_agent_in_its_own_template(checkpoint, splits, tmp_path):
    """Few-shot examples are turns, A's template is A's, and the message is put into B's last turn."""
    template = "{% for m in messages %}" + "NAME {{ m.role }} : {{ m.content }} " + "{% endfor %}NAME assistant :"
    agents, seen = [], {"a": [], "b": []}
    for name in "ab":
        agent = load_agent(checkpoint, name=name, unroll=False)
        agent.tokenizer.chat_template = template.replace("NAME", name)
        original = agent.tokenizer.encode
        agent.tokenizer.encode = lambda text, name=name, original=original, **k: (
            seen[name].append(text) or original(text, **k)
        )
        agents.append(dataclasses.replace(agent, chat=True))
    asked = EvalSettings(
        tasks=(GEOGRAPHY,),
        data={GEOGRAPHY: splits[GEOGRAPHY]},
        n=2,
        few_shot=2,
        protocols=("message",),
        truncate=True,
        **TEXT,
    )
    run(asked, agents[1], tmp_path / "run", a=agents[0])
    a, b = (next(x for x in seen[name] if "assistant :" in x) for name in "ab")
    assert a.count("a user :") == 3 and a.count("a assistant :") == 3 and "b user" not in a
    assert b.count("b user :") == 3 and "a user" not in b
    assert a.split("a user :")[-1].split("a assistant")[0].strip() in b.split("b user :")[-1]


def test_prompts_that_do_not_fit_are_refused_or_cut_and_counted(b, splits, tmp_path):
    asked = EvalSettings(tasks=("gsm8k",), data={"gsm8k": splits["gsm8k"]}, few_shot=3, n=4)
    with pytest.raises(ValueError, match=r"gsm8k, single: a prompt of \d+ tokens does not fit: .*--truncate"):
        run(asked, b, tmp_path / "refused")
    asked = dataclasses.replace(asked, truncate=True, max_new_tokens=32, released_scoring=True)
    (line, _, described, released) = run(asked, b, tmp_path / "cut")
    assert line["truncated"] == 4 and line["tokens_read"] == 256 - 32 and line["unparsed"] == 4
    assert line["value"] == described["value"] == 0
    assert described["metric"] == "Du et al., described" and released["metric"] == "Du et al., released"
    assert released["value"] == released["unparsed"] / 4 == described["unparsed"] / 4


def test_unusable_requests_are_one_clear_line(b, splits, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"question": "x"}\n')
    ask = lambda **settings: run(EvalSettings(**{"tasks": ("countries",), **settings}), b, tmp_path / "never")
    for settings, said in (
        (dict(tasks=("gsm9k",)), r"unknown task 'gsm9k': did you mean .*gsm8k"),
        (dict(tasks=("gsm8k",)), r"needs openai/gsm8k from the hub, which cannot be reached .*answer, question: --data gsm8k=FILE"),
        (dict(tasks=("gsm8k",), data={"gsm8k": SAMPLE / "absent.jsonl"}), "absent.jsonl does not exist"),
        (dict(tasks=("gsm8k",), data={"gsm8k": tmp_path / "odd.jsonl"}), "record 1 has no field 'answer'; gsm8k needs answer, question"),
        (dict(data={"gsm8k": SAMPLE / "gsm8k.jsonl"}), "--data names gsm8k, which is not among --tasks countries"),
        (dict(protocols=("activation",)), "activation needs --k"),
        (dict(protocols=("activation-w",), k=(1,), j=1), "activation-w needs --map"),
        (dict(protocols=("single", "activation"), k=(7,), j=1), "k = 7 is out of range"),
        (dict(protocols=("exchange",), k=(6,), j=1, j_back=9), "j_back = 9 is out of range"),
        (dict(protocols=("cipher",), temperatures=(0.1,)), "cipher needs --temperatures, 2 numbers"),
        (dict(protocols=("message",), tasks=("statements",), n=2), "scores texts without a prompt"),
        (dict(controls=("zero",)), "--controls stand in for messages, single sends none"),
        (dict(protocols=("message",), controls=("zero", "zero")), "--controls zero zero: name each once"),
        (dict(top_p=0.5), "--top-p needs --temperature above 0"),
        (dict(temperature=-1.0), "--temperature -1.0: it must be 0"),
        (dict(batch_size=0), "--batch-size 0: it must be at least 1"),
        (dict(protocols=("debate",), rounds=0), "--rounds 0: it must be at least 1"),
        (dict(protocols=("message",), tell="{message}"), "--tell '{message}': it must have {message} and {prompt}"),
        (dict(protocols=("message",), ask="{question}"), "--ask '{question}': it must have {prompt}"),
        (dict(protocols=("message",), ask="{prompt} {"), "--ask '{prompt} {': it must have {prompt}"),
        (dict(protocols=("activation",), k=(1,), j=1, where="all"), "--where all needs --graft sum: replace would"),
        (dict(protocols=("exchange",), k=(1,), j=1, where="all", graft="mean"), "--where all needs --graft sum"),
        (dict(protocols=("cipher",), temperatures=(0.1, 0.2), temperature=0.5), "cipher does not sample"),
        (dict(tasks=("mmlu",), data={"mmlu": SAMPLE / "gsm8k.jsonl"}), "no single task has this name"),
        (dict(tasks=("biographies",)), "biographies needs people and facts"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            ask(**settings)
    (tmp_path / "odd.jsonl").write_text('{"question": "x", "answer": "y"}\n{"question": \n')
    with pytest.raises(ValueError, match=r"odd\.jsonl, line 2 is not JSON"):
        read_records(tmp_path / "odd.jsonl")


def test_all_57_subjects_of_mmlu_are_found_by_name():
    import lm_eval.tasks

    from jaxcomm.evals.tasks import _find

    root = next(iter(lm_eval.tasks.__path__))
    names = sorted(p.stem for p in __import__("pathlib").Path(root, "mmlu", "default").glob("mmlu_*.yaml"))
    assert len(names) == 57 and all(_find(name) is not None for name in names[::19]) and _find("gsm8k") is not None
