"""`jaxcomm eval`: tasks of lm-evaluation-harness under one protocol or several, in a run folder.

run.json          the command that makes this run again, settings, versions, fingerprints
results.jsonl     one line per protocol, task and metric: value, interval, FLOPs, tokens, seconds
items.parquet     one row per protocol, task, question and filter: what was answered, how it was scored
chunks/           the answers, batch by batch
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import rich.table

from jaxcomm.agent import Agent
from jaxcomm.compiled import check_layer
from jaxcomm.decoding import Sampling
from jaxcomm.protocols import activation, cipher_debate, debate, exchange, message, skyline
from jaxcomm.protocols.answers import ANSWERS, RELEASED, correct
from jaxcomm.protocols.base import hear
from jaxcomm.protocols.text import check_message

from . import biographies
from .games.wording import Reads, Wording
from .play import SENDS
from .runs import RunFolder, agent_fingerprint, parquet, surroundings
from .scores import Interval, accuracy, percent

PROTOCOLS = (
    "single", "sender", "skyline", "message", "debate", "cipher", "activation", "activation-w", "exchange",
)  # fmt: skip
SUBSET = 6
"""Seed of the random subset of the questions, with the run's."""
UNPARSED = "[invalid]"
"""What the harness' filters return where they find no answer."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """An evaluation as it is asked for (`jaxcomm eval --help` says what the fields mean)."""

    tasks: tuple[str, ...]
    protocols: tuple[str, ...] = ("single",)
    controls: tuple[str, ...] = ()
    data: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    n: int | None = None
    seed: int = 0
    names: str = "seen"
    wording: str = "paper"
    instruction: str | None = None
    sender_reads: Reads = "statement"
    few_shot: int | None = None
    k: tuple[int, ...] = ()
    j: int | None = None
    k_back: int | None = None
    j_back: int | None = None
    graft: str = "replace"
    where: str = "last"
    think: int = 0
    rounds: int | None = None
    form: str = "harness"
    answer: str | None = None
    tie: str = "first"
    temperatures: tuple[float, ...] = ()
    stop: str = "argmax"
    partial: str = "off"
    ask: str = "{prompt}"
    tell: str = "{message}\n\n{prompt}"
    max_message_tokens: int = 256
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    batch_size: int = 16
    truncate: bool = False
    released_scoring: bool = False
    judge_by: str = "text"

    @property
    def sampling(self) -> Sampling | Literal["task"] | None:
        """None is greedy."""
        if self.temperature is None:
            return "task"
        return Sampling(self.temperature, 0, self.top_p) if self.temperature else None


def answer_kind(asked: Asked, task: str) -> str:
    """How a debate's votes are counted: numbers in GSM8K, letters in MMLU, else the first line as it stands."""
    kinds = {"gsm": "numeric", "mmlu": "choice"}
    return asked.answer or next((kind for name, kind in kinds.items() if task.startswith(name)), "text")


def arms(asked: Asked, a: Agent, b: Agent, others: Sequence[Agent], maps: Sequence[Any] | None):
    """One for every protocol and control. maps: W of each sender, for activation-w. ValueError: something it needs is
    missing, before anything is loaded or computed."""
    from .harness import Arm

    senders, talks = (a, *others), asked.max_message_tokens
    check(asked, len(senders), maps)
    for protocol in asked.protocols:
        if protocol in ("single", "sender"):
            who = b if protocol == "single" else a
            yield Arm(protocol, (who,), lambda agents, x, y, **_: hear(agents[-1], y), alone=True)
        if protocol == "skyline":
            yield Arm(protocol, (a, b), lambda agents, x, y, **_: skyline(agents[0], agents[-1], x, y))
        if protocol == "message":
            words = dict(ask=asked.ask, tell=asked.tell, max_message_tokens=talks)
            tell = lambda agents, x, y, task, words=words, **how: message(agents[0], agents[-1], x, y, **words, **how)
            yield Arm(protocol, (a, b), tell, talks)
        if protocol == "debate":
            yield Arm(protocol, (*senders, b), functools.partial(_debate, asked), talks)
        if protocol == "cipher":
            yield Arm(protocol, (*senders, b), functools.partial(_cipher, asked), talks, draws=False)
        if protocol in ("activation", "activation-w", "exchange"):
            W = maps if protocol == "activation-w" else None
            send = _exchange if protocol == "exchange" else _activation
            yield Arm(protocol, (*senders, b), functools.partial(send, asked, W, None), asked.think)
            for control in asked.controls if protocol != "exchange" else ():
                # In a batch, "shuffled" would be of its neighbours; the harness takes another question of the task.
                stand_in = None if control == "shuffled" else control
                run = functools.partial(send, asked, W, stand_in)
                yield Arm(f"{protocol}, {control}", (*senders, b), run, asked.think, shuffled=control == "shuffled")


def check(asked: Asked, senders: int, maps: Sequence[Any] | None) -> None:
    """ValueError: see `arms`."""
    Wording(asked.wording, asked.instruction, asked.sender_reads)
    activates = [p for p in asked.protocols if p in ("activation", "activation-w", "exchange")]
    if activates and (not asked.k or asked.j is None):
        raise ValueError(f"{activates[0]} needs --k (A's layer) and --j (B's layer)")
    if activates and len(asked.k) not in (1, senders):
        raise ValueError(f"--k names {len(asked.k)} layers for {senders} senders: give one, or one for each")
    if "activation-w" in asked.protocols and maps is None:
        raise ValueError("activation-w needs --map, a folder that jaxcomm fit-map wrote for this pair")
    if "activation-w" in asked.protocols and senders > 1:
        raise ValueError("activation-w has a W from A alone: leave out --others")
    if "exchange" in asked.protocols and senders > 1:
        raise ValueError("exchange is between two: leave out --others")
    if "cipher" in asked.protocols and len(asked.temperatures) != senders + 1:
        raise ValueError(f"cipher needs --temperatures, {senders + 1} numbers: of B, of A, and of each of --others")
    if asked.controls and not {"activation", "activation-w"} & set(asked.protocols):
        raise ValueError("--controls stand in for an activation: they need the protocol activation or activation-w")
    if asked.where == "all" and activates and asked.graft != "sum":
        raise ValueError(f"--where all needs --graft sum: {asked.graft} would overwrite the whole prompt")
    if asked.where == "all" and asked.controls:
        raise ValueError("--controls stand in for one state per question: leave out --where all")
    if asked.temperature and "cipher" in asked.protocols:
        raise ValueError("cipher draws nothing, its --temperatures soften what it says: leave out --temperature")
    if asked.temperature is not None and asked.temperature < 0:
        raise ValueError(f"--temperature {asked.temperature}: it must be 0 (greedy) or above")
    if not asked.temperature and asked.top_p < 1:
        raise ValueError("--top-p cuts what is sampled from: it needs --temperature above 0")
    least = {
        "n": 1,
        "rounds": 1,
        "batch_size": 1,
        "max_new_tokens": 1,
        "max_message_tokens": 1,
        "think": 0,
        "few_shot": 0,
    }
    for name, smallest in least.items():
        value = getattr(asked, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least {smallest}")
    check_message(asked.ask, asked.tell, "--")


def _table(agents, prompts_a, prompts_b):
    """Who sits in a debate, B first, and what each is asked."""
    *senders, b = agents
    return (b, *senders), (prompts_b, *[prompts_a] * len(senders))


def _debate(asked, agents, prompts_a, prompts_b, *, task, until, sampling, seed):
    form = biographies.TASK_FORM if task == biographies.TASK else asked.form
    return debate(
        *_table(agents, prompts_a, prompts_b), rounds=2 if asked.rounds is None else asked.rounds, form=form, tie=asked.tie,
        answer=answer_kind(asked, task), max_message_tokens=asked.max_message_tokens, until=until, sampling=sampling,
        seed=seed,
    )  # fmt: skip


def _cipher(asked, agents, prompts_a, prompts_b, *, task, **_):
    form = biographies.TASK_FORM if task == biographies.TASK else asked.form
    return cipher_debate(
        *_table(agents, prompts_a, prompts_b), rounds=3 if asked.rounds is None else asked.rounds, form=form, stop=asked.stop,
        temperatures=asked.temperatures, max_message_tokens=asked.max_message_tokens, partial=asked.partial,
    )  # fmt: skip


def _activation(asked, maps, control, agents, prompts_a, prompts_b, *, task, until, sampling, seed):
    *senders, b = agents
    n = len(senders)
    return activation(
        senders, b, [prompts_a] * n, prompts_b, k=asked.k * (n // len(asked.k)), j=asked.j, graft=asked.graft, W=maps,
        where=asked.where, control=control, think=asked.think, until=until, sampling=sampling, seed=seed,
    )  # fmt: skip


def _exchange(asked, maps, control, agents, prompts_a, prompts_b, *, task, until, sampling, seed):
    a, b = agents
    return exchange(
        a, b, prompts_a, prompts_b, k=asked.k[0], j=asked.j, k_back=asked.k_back, j_back=asked.j_back,
        graft=asked.graft, where=asked.where, think=asked.think, answer=answer_kind(asked, task), tie=asked.tie,
        until=until, sampling=sampling, seed=seed,
    )  # fmt: skip


def check_layers(asked: Asked, senders: Sequence[Agent], b: Agent) -> None:
    """ValueError: a layer that an agent does not have, before anything is computed."""
    for sender, k in zip(senders, asked.k * (len(senders) // max(len(asked.k), 1)), strict=False):
        check_layer(sender.params, k)
    if asked.j is not None:
        check_layer(b.params, asked.j, "j")
    if "exchange" in asked.protocols:
        check_layer(b.params, asked.k[0] if asked.k_back is None else asked.k_back, "k_back")
        check_layer(senders[0].params, asked.j if asked.j_back is None else asked.j_back, "j_back")


def subset(tasks: Mapping[str, Any], n: int | None, seed: int) -> dict[str, list[int]] | None:
    """n random questions of every task, or all."""
    if n is None:
        return None
    draw = lambda size: np.random.default_rng([seed, SUBSET]).permutation(size)[:n]
    return {name: sorted(draw(len(task.eval_docs)).tolist()) for name, task in tasks.items()}


def run(
    asked: Asked, a: Agent, b: Agent, others: Sequence[Agent], out: Path, *,
    resume: bool, command: str, recorded: Mapping[str, Any], maps: Sequence[Any] | None = None,
    judge: Agent | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every protocol on every task; results.jsonl's lines.

    judge: who checks the facts of biographies (default: b). recorded: what else makes this run what it is; command: what
    to type to run it again.

    ValueError: `arms`', `tasks.load_tasks`', and a prompt too long for an agent. OSError: `RunFolder`'s.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        from .harness import Decoding, ProtocolLM, generation
        from .tasks import load_tasks
    except ImportError as error:
        raise ValueError(
            f"evaluation needs the extra: pip install 'jaxcomm[eval]' ({error.name} is not installed)"
        ) from error
    sends = lambda arm: arm.name.split(",")[0].removesuffix("-w") in SENDS
    every = list(arms(asked, a, b, others, maps))
    every = [dataclasses.replace(arm, reads=asked.sender_reads) if sends(arm) else arm for arm in every]
    check_layers(asked, (a, *others), b)
    harness = [name for name in asked.tasks if name != biographies.TASK]
    given = {name: path for name, path in asked.data.items() if name != biographies.TASK}
    put = Wording(asked.wording, asked.instruction)
    found = load_tasks(harness, given, seed=asked.seed, n=asked.n, group=asked.names, wording=put) if harness else {}
    tasks = {name: task for own in found.values() for name, task in own.items()}
    groups = {name: list(own) for name, own in found.items() if list(own) != [name]}
    people = _people(asked)
    files = {task: sorted(p.glob("*.jsonl")) if p.is_dir() else [p] for task, p in asked.data.items()}
    sha = lambda *parts: hashlib.sha256(b"".join(parts)).hexdigest()
    config = dataclasses.asdict(asked) | dict(recorded)
    config |= {"data": {task: sha(*(f.read_bytes() for f in own)) for task, own in files.items()}}
    if own := [sha(Path(name).read_bytes()) for name in asked.tasks if name.endswith(".jsonl")]:
        config |= {"games_sha256": own}
    config |= {"maps": None if maps is None else sha(*(np.asarray(W).tobytes() for W in maps))}
    judge = b if judge is None else judge
    prints = {id(agent): agent_fingerprint(agent) for agent in (a, b, *others, judge)}
    config |= {"fingerprints": [prints[id(agent)] for agent in (a, b, *others, judge)]}
    config |= surroundings("lm_eval")
    decoding = Decoding(asked.seed, asked.batch_size, asked.max_new_tokens, asked.sampling, asked.truncate)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            generation(name, task.config.generation_kwargs or {}, decoding)
    with RunFolder(out, config, dict, command=command, resume=resume, free=("batch_size",)) as folder:
        chosen, lines, rows = subset(tasks, asked.n, asked.seed), [], []
        manager = TaskManager(include_defaults=False)  # the index of all tasks takes seconds, once per protocol
        for arm in every:
            lm = ProtocolLM(arm, folder, decoding)
            if people:
                written = lm.biographies(people, judge, asked.judge_by)
                lines += _biography_lines(arm.name, written)
                rows += _biography_items(arm.name, written)
            if not tasks:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scored: Any = simple_evaluate(
                    model=lm, tasks=list(tasks.values()), samples=chosen, num_fewshot=asked.few_shot, bootstrap_iters=0,
                    apply_chat_template=b.chat, fewshot_random_seed=1234 + asked.seed, task_manager=manager,
                )  # fmt: skip
            for task in tasks:
                spent = _spent([own for (name, _), own in sorted(lm.records.items()) if name == task])
                for name, value in scored["results"][task].items():
                    metric, _, filtered = name.partition(",")
                    if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                        continue
                    samples = [s for s in scored["samples"][task] if s["filter"] == filtered]
                    lines.append(
                        {
                            "protocol": arm.name,
                            "sender_reads": arm.reads,
                            "task": task,
                            "metric": metric,
                            "filter": filtered,
                        }
                        | _value(value, [s[metric] for s in samples])
                        | {"unparsed": sum(s["filtered_resps"] == [UNPARSED] for s in samples)}
                        | spent
                        | {"version": scored["versions"][task], "few_shot": scored["n-shot"].get(task)}
                    )
                places = {true: local for local, true in enumerate(chosen[task])} if chosen else {}
                items = _items(arm.name, task, scored["samples"][task], lm, places)
                if asked.released_scoring:
                    lines += _released(answer_kind(asked, task), items, lines[-1])
                rows += items
            lines += list(_groups(groups, lines, rows, arm.name))
        folder.put("results.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        folder.put("items.parquet", parquet(pa.Table.from_pylist(rows)))
        return lines


def _released(kind: str, items: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Two more lines for a task whose answers are numbers or letters that agents write: scored as Du et al. describe it, and
    as the code they released does (`protocols.answers`)."""
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


def _groups(groups: Mapping[str, Sequence[str]], lines: Sequence[Mapping[str, Any]], rows, arm: str):
    """A line for every group of tasks that was asked for by name (mmlu), over all its questions together."""
    for name, tasks in groups.items():
        own = [x for x in lines if x["protocol"] == arm and x["task"] in tasks]
        for metric, filtered in dict.fromkeys((x["metric"], x["filter"]) for x in own):
            part = [x for x in own if (x["metric"], x["filter"]) == (metric, filtered)]
            here = [r for r in rows if r["protocol"] == arm and r["task"] in tasks and r["filter"] == filtered]
            each, n = [json.loads(r["metrics"]).get(metric) for r in here], sum(x["n"] for x in part)
            if len(part) < 2 or len(each) != n or any(x["low"] is None for x in part):
                continue
            mean = lambda key, part=part, n=n: sum(x[key] * x["n"] for x in part) / n
            yield (
                {"protocol": arm, "task": name, "metric": metric, "filter": filtered}
                | _value(float(np.mean(each)), each)
                | {key: mean(key) for key in ("flops", "tokens_read", "tokens_written", "message_tokens")}
                | {key: sum(x[key] for x in part) for key in ("seconds", "unparsed", "truncated")}
                | {"version": None, "few_shot": part[0]["few_shot"]}
            )


def _people(asked: Asked) -> dict[str, list[str]]:
    """Who is written about: n of the file, drawn by seed."""
    if biographies.TASK not in asked.tasks:
        return {}
    if biographies.TASK not in asked.data:
        raise ValueError("biographies needs people and facts: --data biographies=FILE.json, {name: bullets}")
    people = biographies.read_people(asked.data[biographies.TASK])
    order = np.random.default_rng([asked.seed, SUBSET]).permutation(len(people))[: asked.n]
    return {name: people[name] for name in (list(people)[i] for i in sorted(order))}


def _biography_lines(arm: str, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    base = {"protocol": arm, "task": biographies.TASK, "metric": "facts"}
    spent = _spent([[record] for record in records.values()]) | {"version": None, "few_shot": 0}
    return [
        base | {"filter": rule} | line | spent for rule, line in biographies.summarise(list(records.values())).items()
    ]


def _biography_items(arm: str, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
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
                    "tokens_read": record["read"],
                    "tokens_written": record["written"],
                }
            )
    return rows


def _value(value: float, each: Sequence[Any]) -> dict[str, Any]:
    """A metric with its interval, where it is a mean over questions."""
    numbers = all(isinstance(x, int | float | np.number) for x in each)
    if not numbers or not np.isclose(value, np.mean(each), rtol=1e-6):
        return {"value": float(value), "low": None, "high": None, "n": len(each)}
    low, high = accuracy([float(x) for x in each])[1:]
    return {"value": float(value), "low": low, "high": high, "n": len(each)}


def _spent(questions: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What a question cost, of all agents: means of FLOPs and tokens (written: the answer's; messages: all others), the sum
    of seconds, and of how many questions a prompt was cut. questions: the records of each."""
    mean = lambda key: float(np.mean([sum(r[key] for r in own) for own in questions]))
    return {
        "flops": mean("flops"),
        "tokens_read": mean("read"),
        "tokens_written": mean("written"),
        "message_tokens": mean("messages"),
        "seconds": float(sum(r["seconds"] for own in questions for r in own)),
        "truncated": sum(any(r["dropped"] for r in own) for own in questions),
    }


def _items(arm: str, task: str, samples: Sequence[Mapping[str, Any]], lm: Any, places: Mapping[int, int]):
    """places: of a question of the data set among those that were asked; {}: all were."""
    rows = []
    for sample in samples:
        metrics = {m: sample[m] for m in sample["metrics"]}
        records = lm.records[task, places.get(sample["doc_id"], sample["doc_id"])]
        sums = {key: sum(r[key] for r in records) for key in ("flops", "read", "written")}
        rows.append(
            {
                "protocol": arm,
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
                "tokens_read": sums["read"],
                "tokens_written": sums["written"],
            }
        )
    return rows


def tables(lines: Sequence[Mapping[str, Any]]) -> Iterator[rich.table.Table]:
    """Results as they are printed: a table for every task and metric, a row for every protocol."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        filtered = "" if line["filter"] == "none" else f", {line['filter']}"
        groups.setdefault(f"{line['task']}, {line['metric']}{filtered} (n = {line['n']})", []).append(line)
    for title, rows in groups.items():
        shown = rich.table.Table(title=title, title_justify="left")
        for name in ("protocol", "value", "unparsed", "MFLOPs a question", "tokens read + written", "seconds"):
            shown.add_column(name, justify="left" if name == "protocol" else "right")
        for line in rows:
            value, low, high = line["value"], line["low"], line["high"]
            if low is not None and high is not None:
                shown_value = percent(Interval(value, low, high))
            else:
                shown_value = "none scored" if value is None else f"{value:.4g}"
            tokens = f"{line['tokens_read']:.0f} + {line['tokens_written'] + line['message_tokens']:.0f}"
            cost = (f"{line['flops'] / 1e6:.0f}", tokens, f"{line['seconds']:.1f}")
            shown.add_row(line["protocol"], shown_value, str(line["unparsed"] or ""), *cost)
        yield shown
