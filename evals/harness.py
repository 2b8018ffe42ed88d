"""Run lm-evaluation-harness with protocols: its prompts, answer extraction and metrics, our agents.

For the harness, a protocol with its agents is one `LM`. It answers in batches. Each batch is saved in the run folder as
soon as it is done, so a stopped run repeats nothing. Needs the extra `jaxcomm[eval]`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import tqdm
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxcomm.agent import Agent, Prompt, TooLong
from jaxcomm.controls import derange, overlap
from jaxcomm.decoding import Sampling
from jaxcomm.protocols import Panel, Turn
from jaxcomm.protocols.base import Spent, start_turn, total
from jaxcomm.protocols.text import put, text

from . import biographies, programs
from .evaluation.arms import Arm, Batch
from .games import information
from .runs import RunFolder

BIOGRAPHY_TOKENS = 400
BOTH = "statement+question"
CHAT = "jaxcomm-chat:"
"""Mark of a conversation packed in a string, because the harness accepts only strings. Each agent renders the conversation
with its own template."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How an evaluation decodes. It overrides the generation settings of the tasks.

    Attributes:
        seed: Seed of all random draws.
        batch_size: Largest number of prompts in a batch.
        max_new_tokens: Largest number of new tokens. None: the task's own number.
        sampling: How tokens are sampled. None: decoding is greedy. "task": as each task specifies.
        truncate: Whether to truncate a prompt that is too long at its start. If not, it is refused.
    """

    seed: int = 0
    batch_size: int = 16
    max_new_tokens: int | None = None
    sampling: Sampling | Literal["task"] | None = "task"
    truncate: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of a task, with all requests for it.

    Attributes:
        task: Name of the task.
        question: Number of the question in the task.
        doc: The question's record in the data set.
        prompt: Prompt of the answering agent.
        items: The texts to score after the prompt. Empty: the agent writes a text.
        numbers: Indices of its requests in the harness' list.
        seed: Seed of sampling.
    """

    task: str
    question: int
    doc: Mapping[str, Any]
    prompt: Prompt
    items: tuple[Any, ...]
    numbers: tuple[int, ...]
    seed: int

    @property
    def prompt_a(self) -> Prompt:
        """The sender's prompt: the record's field `prompt_a`, or else the answering agent's prompt."""
        return self.doc.get("prompt_a", self.prompt)


FOLLOWED = ("do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks")
OF_BEAMS = ("length_penalty", "early_stopping", "diversity_penalty", "use_cache")
OF_DRAWING = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_a": 0, "tfs": 1}
OF_ALL = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "n": 1, "best_of": 1, "repetition_penalty": 1,
    "encoder_repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "penalty_alpha": 0,
}  # fmt: skip
"""Unsupported generation settings, with their neutral value: those for sampling, and those for all decoding. Settings of
beam search have no effect with one beam."""


def generation(
    task: str, kwargs: Mapping[str, Any], decoding: Decoding
) -> tuple[tuple[str, ...], int, Sampling | None]:
    """Reads the generation settings of a task, and applies the overrides.

    Args:
        task: Name of the task, for messages.
        kwargs: The task's `generation_kwargs`.
        decoding: The overrides.

    Returns:
        The stop strings, the largest number of new tokens, and the sampling (None: greedy).

    Raises:
        ValueError: The task samples without a temperature, or has an unsupported setting that would change the text.
    """
    how: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs)))
    sampling, matters = decoding.sampling, OF_ALL
    if sampling == "task":
        if how["do_sample"] and "temperature" not in how:
            raise ValueError(f"{task} samples (do_sample) at no temperature: give --temperature, 0 is greedy")
        drawn, top_k = how["do_sample"] and how["temperature"] > 0, max(0, how.get("top_k") or 0)  # -1 is vLLM's 0
        sampling = Sampling(how["temperature"], top_k, how.get("top_p") or 1.0) if drawn else None
        matters = OF_ALL | OF_DRAWING if drawn else OF_ALL
    ignored = {*FOLLOWED, *OF_BEAMS, *(OF_DRAWING.keys() - matters.keys())}
    for name, value in sorted(how.items()):
        if name not in ignored and value is not None and value != matters.get(name):
            raise ValueError(
                f"{task} asks for {name} = {value}, but of its settings only {', '.join(FOLLOWED)} are followed here: take it out of its generation_kwargs"
            )
    return tuple(filter(None, how["until"])), decoding.max_new_tokens or how["max_gen_toks"], sampling


class ProtocolLM(LM):
    """A protocol as a language model of lm-evaluation-harness.

    Attributes:
        arm: The protocol and its agents.
        folder: Run folder. Each batch of answers is written there as soon as it is done.
        decoding: Options of decoding.
        tasks: The tasks of the harness, by name.
        information: Private or shared information, by task (`games.information`).
        overlap: By task, the share of questions that get a message with their own answer under the control "other".
        records: The answers so far, by task and number of the question.
    """

    def __init__(self, arm: Arm, folder: RunFolder, decoding: Decoding, tasks: Mapping[str, Any] | None = None):
        super().__init__()
        self.arm, self.folder, self.decoding, self.tasks = arm, folder, decoding, tasks or {}
        self.information: dict[str, str] = {}
        self.overlap: dict[str, float] = {}
        self._others: dict[str, dict[int, Row]] = {}
        self.records: dict[tuple[str, int], list[dict[str, Any]]] = {}

    # What the harness calls ---------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Writes a text for every request.

        Args:
            requests: The harness' requests: a prompt and generation settings each.
            disable_tqdm: Not used.

        Returns:
            The texts, in the order of the requests.

        Raises:
            ValueError: A generation setting is not supported, or a prompt is too long.
        """
        groups: dict[str, list[Row]] = defaultdict(list)
        times: Counter[int] = Counter()  # a repeated request comes as the same object again
        for n, request in enumerate(requests):
            context, kwargs = self._args(request)
            row = self._row(request, context, (), (n,), times[id(request)])
            times[id(request)] += 1
            groups[json.dumps(kwargs, sort_keys=True)].append(row)
        texts = [""] * len(requests)
        for kwargs, rows in groups.items():
            for row, record in self._answer(rows, functools.partial(self._write, json.loads(kwargs)), kwargs):
                texts[row.numbers[0]] = record["text"]
                self._keep(row, record)
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores a given continuation of a prompt for every request.

        Args:
            requests: The harness' requests: a prompt and a continuation each.
            disable_tqdm: Not used.

        Returns:
            For each request, the log-probability of the continuation in nats, and whether greedy decoding would generate
            it.

        Raises:
            ValueError: A prompt is too long.
        """
        together: dict[tuple, list[int]] = defaultdict(list)
        for n, request in enumerate(requests):
            together[request.task_name, request.doc_id, request.args[0]].append(n)
        rows = []
        for (_, _, context), ns in together.items():
            space = context[len(context.rstrip()) :]  # space at the end belongs to the texts
            items = tuple(space + self._args(requests[n])[1] for n in ns)
            rows.append(self._row(requests[ns[0]], context.rstrip(), items, tuple(ns)))
        return self._scored(requests, self._answer(rows, self._score, "loglikelihood"))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts without a prompt, such as for perplexity.

        A text that is longer than the model's positions is cut into disjoint windows. Each window is read after one token:
        the last token of the previous window, or, for the first window, the begin-of-text token.

        Args:
            requests: The harness' requests, with one text each.
            disable_tqdm: Not used.

        Returns:
            The log-probability of each text, in nats.

        Raises:
            ValueError: The protocol has more than one agent, so it needs a prompt.
        """
        if not self.arm.alone:
            raise ValueError(
                f"{requests[0].task_name} scores texts without a prompt, so there is nothing to communicate: use the protocols single and sender"
            )
        rows = [self._row(request, "", (request.args[0],), (n,)) for n, request in enumerate(requests)]
        return [x for x, _ in self._scored(requests, self._answer(rows, self._roll, "rolling"))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Packs a conversation into one string, since the harness takes only strings.

        Each agent later renders the conversation with its own chat template.

        Args:
            chat_history: The turns: role and content.
            add_generation_prompt: Not used.

        Returns:
            The conversation as JSON, after a mark.
        """
        return CHAT + json.dumps(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """A name that the harness uses in its cache of requests."""
        return "jaxcomm"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text that the harness records as the chat template."""
        return "each agent's own"

    def biographies(self, people: Mapping[str, Sequence[str]], judge: Agent, by: str) -> dict[str, dict[str, Any]]:
        """Lets the agents write biographies, and lets a judge check them (`evals.biographies`).

        Args:
            people: The facts about each person.
            judge: The agent that checks the facts.
            by: How to get a verdict: "text" or "likelihood" (`biographies.JudgeBy`).

        Returns:
            For each person, the agents' texts, the judge's verdicts, and the cost.

        Raises:
            ValueError: A prompt is too long.
        """
        new = self.decoding.max_new_tokens or BIOGRAPHY_TOKENS
        if self.decoding.truncate:
            judge = _keeping(judge, biographies.VERDICT_TOKENS)
        rows = []
        for n, person in enumerate(people):
            prompt, seed = biographies.prompt(self.arm.name, person), f"{self.decoding.seed}/{biographies.TASK}/{n}"
            rows.append(Row(biographies.TASK, n, {"person": person}, prompt, (), (n,), zlib.crc32(seed.encode())))

        def answer(rows: Sequence[Row]) -> list[dict[str, Any]]:
            every = self._with_others(rows)
            turn = self._converse(every, (), self._sampling, new)
            replies = turn.write(new, sampling=self._sampling, seed=[row.seed for row in every])[: len(rows)]
            texts = [r.details.get("texts", [r.text]) for r in replies]
            written = [(row.doc["person"], own) for row, own in zip(rows, texts, strict=True)]
            verdicts = biographies.judged(judge, by, people, written)
            return [
                {**_spent(r.spent, len(r.written), r.details), "texts": own, "verdicts": found}
                for r, own, found in zip(replies, texts, verdicts, strict=True)
            ]

        facts = zlib.crc32(json.dumps([people, judge.name, by]).encode())
        answers = self._answer(rows, answer, f"{biographies.TASK}{{{facts}")
        return dict(
            sorted(((row.doc["person"], record) for row, record in answers), key=lambda x: list(people).index(x[0]))
        )

    # How it is answered -------------------------------------------------------------------------------------------

    @staticmethod
    def _args(request: Instance) -> tuple[Any, ...]:
        return request.args

    def _row(
        self, request: Instance, context: str, items: tuple[str, ...], numbers: tuple[int, ...], time: int = 0
    ) -> Row:
        prompt = json.loads(context.removeprefix(CHAT)) if context.startswith(CHAT) else context
        name = f"{self.decoding.seed}/{request.task_name}/{request.doc_id}/{time}"
        seed, doc = zlib.crc32(name.encode()), request.doc
        if self.arm.reads == BOTH and "prompt_a" in doc:
            doc = {**doc, "prompt_a": put("{text} {prompt}", prompt, text=doc["prompt_a"])}
        return Row(str(request.task_name), int(request.doc_id or 0), doc, prompt, items, numbers, seed)

    def _answer(self, rows: Sequence[Row], answer: Callable[[Sequence[Row]], list[dict]], kind: str):
        """Yield every row with its record. Records of an earlier run are reused. Other rows are answered and saved, batch by
        batch."""
        by_task: dict[tuple[str, bool], list[Row]] = defaultdict(list)
        for row in rows:
            by_task[row.task, bool(row.prompt)].append(row)
        for (task, prompted), own in by_task.items():
            if prompted:
                self.information[task] = information((text(row.prompt_a), text(row.prompt)) for row in own)
        if self.arm.control == "other":
            self._draw_others([row for (_, prompted), own in by_task.items() if prompted for row in own])
        done = f"{self.arm.name}, {kind.split('{')[0] or 'writing'}"
        for batch, size in tqdm.tqdm(self._batches(by_task.values()), desc=done, mininterval=2):
            task, keys = batch[0].task, [self._key(kind, row) for row in batch]
            digest = zlib.crc32("".join(keys).encode())
            name = f"{self.arm.name.replace(' ', '-').replace(':', '')}-{task}-{digest:08x}-{len(batch)}"
            if not self.folder.done(name):
                programs.release()
                start, had = time.perf_counter(), self._had
                left = [row for row, key in zip(batch, keys, strict=True) if key not in had]
                filled = [*left, *left[:1] * (size - len(left))]
                if self.arm.pooled:  # do not repeat a message, or it would count among the other questions' messages
                    filled = left
                try:
                    records = iter(answer(filled) if left else ())
                except TooLong as error:
                    cut = ", or let prompts lose their first tokens with --truncate" * (not self.decoding.truncate)
                    raise ValueError(
                        f"{task}, {self.arm.name}: {error}, write less with --max-new-tokens{cut}"
                    ) from error
                except ValueError as error:
                    raise ValueError(f"{task}, {self.arm.name}: {error}") from error
                took = (time.perf_counter() - start) / max(1, len(left))
                each = [had.get(key) or (json.dumps(next(records)), took) for key in keys]
                lines, seconds = zip(*each, strict=True)
                columns = {"key": keys, "record": lines, "seconds": seconds}
                self.folder.write(name, {name: pa.array(column) for name, column in columns.items()})
            table = self.folder.read(name)
            for row, line, seconds in zip(
                batch, table["record"].to_pylist(), table["seconds"].to_pylist(), strict=True
            ):
                yield row, json.loads(line) | {"seconds": seconds}

    def _batches(self, tasks: Iterable[Sequence[Row]]) -> list[tuple[list[Row], int]]:
        """Batches of rows of one task with similar lengths, and the size to pad them to. The size is the same for a whole
        task, so one program serves all batches and shared few-shot examples are read once.
        """
        answering, batches = self.arm.agents[-1], []
        length = lambda row: -len(answering.render(row.prompt)) - max(map(len, row.items), default=0)
        for rows in tasks:
            ordered = sorted(rows, key=length)
            count = -(-len(ordered) // self.decoding.batch_size)
            parts = np.array_split(np.arange(len(ordered)), count)
            batches += [([ordered[i] for i in part], -(-len(ordered) // count)) for part in parts]
        return batches

    def _key(self, kind: str, row: Row) -> str:
        """A key made of everything that a row's answer depends on, as each agent reads it."""
        prompts = [row.prompt] if row.prompt_a is row.prompt else [row.prompt_a, row.prompt]
        read = [agent.render(prompt) for agent in self.arm.agents for prompt in prompts if prompt]
        asked = json.dumps([self.arm.name, kind, row.task, read, row.items, row.seed])
        return hashlib.sha256(asked.encode()).hexdigest()[:32]

    @functools.cached_property
    def _had(self) -> dict[str, tuple[str, float]]:
        """Answers and seconds from the run that this one resumes, by key. Its batches may have been different."""
        found = {}
        for path in sorted(self.folder.chunks.glob("*.parquet")):
            table = self.folder.read(path.stem)
            for row in table.to_pylist():
                found[row["key"]] = row["record"], row["seconds"]
        return found

    @property
    def _sampling(self) -> Sampling | None:
        """The sampling for a task without its own settings. Default: greedy."""
        if self.decoding.sampling == "task" or not self.arm.draws:
            return None
        return self.decoding.sampling  # pyright: ignore[reportReturnType]

    def _converse(self, rows: Sequence[Row], until: Sequence[str], sampling: Sampling | None, new: int) -> Turn | Panel:
        agents, count = self.arm.agents, len(rows) // (2 if self.arm.control == "other" else 1)
        if self.decoding.truncate:
            agents = tuple(_keeping(agent, max(new, self.arm.message_tokens)) for agent in agents)
        prompts_a, prompts_b = [row.prompt_a for row in rows], [row.prompt for row in rows]
        writing = dict(until=until, sampling=sampling, seed=[row.seed for row in rows])
        order = None if count == len(rows) else [*range(count, len(rows)), *range(count)]
        answers = [self._gold(row) for row in rows] if self.arm.control else ()
        return self.arm.converse(Batch(agents, prompts_a, prompts_b, rows[0].task, writing, answers, order))

    def _gold(self, row: Row) -> str:
        """The right answer of a question as a text, so that equal answers are equal texts."""
        if (task := self.tasks.get(row.task)) is None:
            return str(row.doc.get("person"))
        target = task.doc_to_target(row.doc)
        choices = task.doc_to_choice(row.doc) if task.OUTPUT_TYPE == "multiple_choice" else ()
        known = isinstance(target, int) and 0 <= target < len(choices)  # -100 in the harness means no answer
        return str(choices[target] if known else target)

    def _with_others(self, rows: Sequence[Row]) -> list[Row]:
        """The rows; under the control "other", followed by the rows whose messages they get. These are drawn once for a
        whole task, so nothing depends on the batches."""
        if self.arm.control != "other":
            return list(rows)
        return [*rows, *(self._others[row.task][row.question] for row in rows)]

    def _draw_others(self, rows: Sequence[Row]) -> None:
        """Draw for each question another question of its task with another answer. ValueError: there is only one."""
        tasks: dict[str, dict[int, Row]] = defaultdict(dict)
        for row in rows:
            tasks[row.task].setdefault(row.question, row)
        for task, own in tasks.items():
            if len(own) < 2:
                raise ValueError(f"{task} has one question: the control other needs at least two")
            questions = sorted(own)
            answers = [self._gold(own[n]) for n in questions]
            order = derange(answers, self.decoding.seed)
            self._others[task] = {n: own[questions[m]] for n, m in zip(questions, order, strict=True)}
            self.overlap[task] = overlap(answers, order)

    def _write(self, kwargs: dict[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
        until, new, sampling = generation(rows[0].task, kwargs, self.decoding)
        sampling, every = sampling if self.arm.draws else None, self._with_others(rows)
        turn = self._converse(every, until, sampling, new)
        replies = turn.write(new, until=until, sampling=sampling, seed=[row.seed for row in every])
        told = self._rendered(rows, turn)
        return [
            {"text": r.raw, **_spent(r.spent, len(r.written), r.details), **x}
            for r, x in zip(replies[: len(rows)], told, strict=True)
        ]

    def _score(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        b = self.arm.agents[-1]
        if not rows[0].prompt:  # no prompt: score with the answering agent alone
            turn = start_turn(b, [""] * len(rows), rows=[[b.first_token]] * len(rows))
            found, told = turn.score_tokens([[_spell(b, text) for text in row.items] for row in rows]), [{}] * len(rows)
        else:
            new = max(len(_spell(agent, text)) for agent in self.arm.agents for row in rows for text in row.items)
            every = self._with_others(rows)
            turn = self._converse(every, (), self._sampling, new)
            scored = turn.score([row.items if n < len(rows) else row.items[:1] for n, row in enumerate(every)])
            found, told = scored[: len(rows)], self._rendered(rows, turn)
        return [
            {"logprobs": x.logprobs, "greedy": x.greedy, **_spent(x.spent, sum(x.tokens), x.details), **own}
            for x, own in zip(found, told, strict=True)
        ]

    def _rendered(self, rows: Sequence[Row], turn: Turn | Panel) -> list[dict[str, Any]]:
        """The prompts as their tokenizers read them: the sender's, if there is one, and those of all answering agents."""
        sender = self.arm.agents[0]
        return [
            {"rendered_a": "" if self.arm.reads is None else sender.render(row.prompt_a), "rendered": turn.rendered(i)}
            for i, row in enumerate(rows)
        ]

    def _roll(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Score texts in disjoint windows, if they are longer than the model's positions. Each window follows the last token
        of the previous one, the first follows a begin-of-text token. (The harness' own backend adds that token twice if the
        tokenizer adds it too.)"""
        b = self.arm.agents[-1]
        limit, spelled = b.params.config.max_positions, [_spell(b, row.items[0]) for row in rows]
        cut = lambda tokens: get_rolling_token_windows(tokens, b.first_token, limit, 1)
        windows = [[make_disjoint_window(w) for w in cut(tokens)] for tokens in spelled]
        flat = [w for own in windows for w in own]
        scored = []
        for start in range(0, len(flat), len(rows)):
            part = flat[start : start + len(rows)]
            turn = start_turn(b, [""] * len(part), rows=[context for context, _ in part])
            scored += turn.score_tokens([[text] for _, text in part])
        found = iter(scored)
        records = []
        for own, tokens in zip(windows, spelled, strict=True):
            each = [next(found) for _ in own]
            record = {"logprobs": [sum(x.logprobs[0] for x in each)], "greedy": [all(x.greedy[0] for x in each)]}
            records.append(record | _spent(total(x.spent for x in each), len(tokens), {"windows": len(own)}))
        return records

    def _scored(self, requests: Sequence[Instance], answers) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for row, record in answers:
            for n, logprob, greedy in zip(row.numbers, record["logprobs"], record["greedy"], strict=True):
                found[n] = logprob, greedy
            self._keep(row, record)
        return found

    def _keep(self, row: Row, record: dict[str, Any]) -> None:
        self.records.setdefault((row.task, row.question), []).append(record)


def _spent(spent: Spent, answer: int, details: Mapping[str, Any]) -> dict[str, Any]:
    """The cost as a record. answer: number of tokens of the answer; all other generated tokens are messages."""
    told = {"read": spent.read, "written": answer, "messages": spent.written - answer, "dropped": spent.dropped}
    told |= {"sent": spent.sent}
    return {**told, "flops": spent.flops, "details": dict(details)}


def _keeping(agent: Agent, new: int) -> Agent:
    """The agent, with prompts truncated at their start to leave room for `new` tokens. ValueError: no token is left."""
    positions = agent.params.config.max_positions
    if new >= positions:
        raise ValueError(
            f"{new} new tokens leave no room for a prompt in the {positions} positions of {agent.name}: write less with --max-new-tokens, --max-message-tokens or --think"
        )
    return dataclasses.replace(agent, longest=positions - new)


def _spell(agent: Agent, text: str) -> list[int]:
    return agent.tokenizer.encode(text, add_special_tokens=False)
