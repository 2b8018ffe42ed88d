"""Results of an evaluation: a line for every protocol, task and metric, and a row for every question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.special

from jaxcomm.protocols.answers import ANSWERS, RELEASED, correct

from .. import biographies
from ..effects import LIKELIHOOD
from ..scores import accuracy, mean
from .questions import Questions
from .settings import EvalSettings, answer_kind

if TYPE_CHECKING:  # it needs lm_eval
    from ..harness import ProtocolLM

UNPARSED = "[invalid]"
"""Result of the harness' filters if they find no answer."""


def arm_results(
    lm: ProtocolLM, scored: Mapping[str, Any], questions: Questions, settings: EvalSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Turns the harness' scores of an arm into lines and rows.

    Args:
        lm: The arm as a language model of the harness, with its records.
        scored: The harness' result.
        questions: The questions.
        settings: The settings of the evaluation.

    Returns:
        The lines of results.jsonl (one for each task or group, metric and filter), and the rows of items.parquet (one
        for each question and filter).
    """
    lines, rows = [], []
    for task in questions.tasks:
        lines += _task_lines(lm, task, scored)
        places = {true: local for local, true in enumerate(questions.chosen[task])} if questions.chosen else {}
        items = _items(lm, task, scored["samples"][task], places)
        lines += _likelihood(items, lines[-1])
        if settings.released_scoring:
            lines += _released(answer_kind(settings, task), items, lines[-1])
        rows += items
    return lines + list(group_lines(questions.groups, lines, rows, lm.arm.name)), rows


def _task_lines(lm: ProtocolLM, task: str, scored: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One line for every metric and filter."""
    spent = _spent([own for (name, _), own in sorted(lm.records.items()) if name == task])
    for name, value in scored["results"][task].items():
        metric, _, filtered = name.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        samples = [s for s in scored["samples"][task] if s["filter"] == filtered]
        yield (
            {"protocol": lm.arm.name, "sender_reads": lm.arm.reads, "task": task, "metric": metric, "filter": filtered}
            | {"information": lm.information.get(task), "overlap": lm.overlap.get(task)}
            | _value(value, [s[metric] for s in samples])
            | {"unparsed": sum(s["filtered_resps"] == [UNPARSED] for s in samples)}
            | spent
            | {"version": scored["versions"][task], "few_shot": scored["n-shot"].get(task)}
        )


def _likelihood(items: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One more line for a task with choices."""
    each = [json.loads(item["metrics"]).get(LIKELIHOOD) for item in items]
    if each and None not in each:
        value, low, high = mean(each)
        yield {**line, "metric": LIKELIHOOD, "value": value, "low": low, "high": high, "n": len(each), "unparsed": 0}


def _likely(task: Any, doc: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metric `LIKELIHOOD` of a question, if it has choices and one of them is right."""
    right = task.doc_to_target(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
    scored = [record["logprobs"] for record in records if "logprobs" in record and "rendered" in record]
    if not isinstance(right, int) or not scored or not 0 <= right < len(scored[0]):
        return {}
    return {LIKELIHOOD: float(scored[0][right] - scipy.special.logsumexp(scored[0]))}


def _released(kind: str, items: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Two more lines for a task whose written answers are numbers or letters: scored as Du et al. describe, and as in their
    released code (`protocols.answers`)."""
    first = [item for item in items if item["filter"] == items[0]["filter"]]
    said = [json.loads(item["said"])[0] for item in first]
    if kind == "text" or not all(isinstance(own[0], str) for own in said):
        return
    parse = ANSWERS[kind]
    for name, reads in (("described", parse), ("released", RELEASED[parse])):
        released = name == "released"
        hits = [correct(own[0], x["target"], parse, released=released) for own, x in zip(said, first, strict=True)]
        unparsed = sum(reads(own[0]) is None for own in said)
        yield {
            **line,
            "metric": f"Du et al., {name}",
            **_value(float(np.mean(hits)), hits),
            "unparsed": unparsed,
            "filter": kind,
        }


def group_lines(groups: Mapping[str, Sequence[str]], lines: Sequence[Mapping[str, Any]], rows, arm: str):
    """Makes the lines of the requested groups of tasks, such as mmlu.

    Args:
        groups: Names of the tasks of each group.
        lines: The lines of the tasks.
        rows: The rows of their questions.
        arm: Name of the arm.

    Yields:
        One line for each group, metric and filter. Its value and its 95 % interval are over all questions of the group.
    """
    for name, tasks in groups.items():
        own = [x for x in lines if x["protocol"] == arm and x["task"] in tasks]
        for metric, filtered in dict.fromkeys((x["metric"], x["filter"]) for x in own):
            part = [x for x in own if (x["metric"], x["filter"]) == (metric, filtered)]
            here = [r for r in rows if r["protocol"] == arm and r["task"] in tasks and r["filter"] == filtered]
            each, n = [json.loads(r["metrics"]).get(metric) for r in here], sum(x["n"] for x in part)
            if len(part) < 2 or len(each) != n or any(x["low"] is None for x in part):
                continue
            information = part[0].get("information")
            mean = lambda key, part=part, n=n: sum(x[key] * x["n"] for x in part) / n
            yield (
                {"protocol": arm, "task": name, "metric": metric, "filter": filtered}
                | {"information": information if len({x.get("information") for x in part}) == 1 else "mixed"}
                | _value(float(np.mean(each)), each)
                | {key: mean(key) for key in ("flops", "bytes_sent", "tokens_read", "tokens_written", "message_tokens")}
                | {key: sum(x[key] for x in part) for key in ("seconds", "unparsed", "truncated")}
                | {"version": None, "few_shot": part[0]["few_shot"]}
            )


def biography_lines(arm: str, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Makes the lines of an arm's biographies, one for each rule of scoring (`biographies.RULES`).

    Args:
        arm: Name of the arm.
        records: The texts about each person, with the judge's verdicts.

    Returns:
        The lines of results.jsonl.
    """
    base = {"protocol": arm, "task": biographies.TASK, "metric": "facts", "information": "shared"}
    spent = _spent([[record] for record in records.values()]) | {"version": None, "few_shot": 0}
    return [
        base | {"filter": rule} | line | spent for rule, line in biographies.summarise(list(records.values())).items()
    ]


def biography_rows(arm: str, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Makes the rows of an arm's biographies, one for each person and rule of scoring (`biographies.RULES`).

    Args:
        arm: Name of the arm.
        records: The texts about each person, with the judge's verdicts.

    Returns:
        The rows of items.parquet.
    """
    rows = []
    for question, (person, record) in enumerate(records.items()):
        for name, rule in biographies.RULES.items():
            total, count, _ = biographies.person_scores(rule, record["verdicts"][name])
            rows.append(
                {
                    "protocol": arm,
                    "task": biographies.TASK,
                    "question": question,
                    "filter": name,
                    "prompt": person,
                    "target": "",
                    "answer": json.dumps(record["texts"]),
                    "said": json.dumps(record["verdicts"][name]),
                    "metrics": json.dumps({"facts": total / count if count else None}),
                    "details": json.dumps(record["details"]),
                    "sender_reads": None,
                    "rendered_a": json.dumps([]),
                    "rendered": json.dumps([]),
                    "flops": record["flops"],
                    "bytes_sent": record["sent"],
                    "tokens_read": record["read"],
                    "tokens_written": record["written"],
                }
            )
    return rows


def _value(value: float, each: Sequence[Any]) -> dict[str, Any]:
    """A metric, with its interval if it is a mean over questions."""
    numbers = all(isinstance(x, int | float | np.number) for x in each)
    if not numbers or not np.isclose(value, np.mean(each), rtol=1e-6):
        return {"value": float(value), "low": None, "high": None, "n": len(each)}
    low, high = accuracy([float(x) for x in each])[1:]
    return {"value": float(value), "low": low, "high": high, "n": len(each)}


def _spent(questions: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Cost per question for all agents: means of FLOPs, bytes and tokens (written: the answer's; messages: all others), the
    total seconds, and the number of questions with a truncated prompt. questions: the records of each."""
    mean = lambda key: float(np.mean([sum(r[key] for r in own) for own in questions]))
    return {
        "flops": mean("flops"),
        "bytes_sent": mean("sent"),
        "tokens_read": mean("read"),
        "tokens_written": mean("written"),
        "message_tokens": mean("messages"),
        "seconds": float(sum(r["seconds"] for own in questions for r in own)),
        "truncated": sum(any(r["dropped"] for r in own) for own in questions),
    }


def _items(lm: ProtocolLM, task: str, samples: Sequence[Mapping[str, Any]], places: Mapping[int, int]):
    """places: number of a question in the data set -> its index among the asked questions; {}: all were asked."""
    rows = []
    for sample in samples:
        records = lm.records[task, places.get(sample["doc_id"], sample["doc_id"])]
        metrics = {m: sample[m] for m in sample["metrics"]} | _likely(lm.tasks[task], sample["doc"], records)
        sums = {key: sum(r[key] for r in records) for key in ("flops", "sent", "read", "written")}
        rows.append(
            {
                "protocol": lm.arm.name,
                "task": task,
                "question": int(sample["doc_id"]),
                "filter": sample["filter"],
                "prompt": str(sample["arguments"][0][0]),
                "target": str(sample["target"]),
                "answer": json.dumps(sample["filtered_resps"]),
                "said": json.dumps(sample["resps"]),
                "metrics": json.dumps(metrics, default=float),
                "details": json.dumps([record["details"] for record in records]),
                "sender_reads": lm.arm.reads,
                "rendered_a": json.dumps([record.get("rendered_a", "") for record in records]),
                "rendered": json.dumps([record.get("rendered", []) for record in records]),
                "flops": sums["flops"],
                "bytes_sent": sums["sent"],
                "tokens_read": sums["read"],
                "tokens_written": sums["written"],
            }
        )
    return rows
