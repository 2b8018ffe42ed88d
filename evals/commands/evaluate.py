"""`jaxcomm eval`: tasks of lm-evaluation-harness under one protocol or several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from . import options

if TYPE_CHECKING:  # commands load nothing before they run
    from ..evaluation.arms import Team
    from ..evaluation.settings import EvalSettings
    from ..maps import Fitted


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate protocols between agents on tasks of lm-evaluation-harness, whose prompts, answer extraction and metrics are used.

    Example: jaxcomm eval --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.1-8B-Instruct --tasks gsm8k,mmlu_high_school_psychology --protocols single sender debate activation --k 26 --j 26 --n 100 --temperature 1 --top-p 0.9 --out runs/table-3
    """

    typed: ClassVar = "eval"

    a: options.Sender
    b: str
    """Receiver, who answers; likewise."""
    tasks: str
    """Names of the harness, separated by commas, groups too (mmlu: 57 subjects); here also countries, tip_sheets, games of your own (FILE.jsonl, as jaxcomm play's --game), countries_choice, statements, and biographies (with --data biographies=FILE.json)."""
    out: Path
    """Run folder: every finished batch, results.jsonl, items.parquet."""
    resume: options.Resume = False
    protocols: tuple[
        Literal["single", "sender", "skyline", "message", "debate", "cipher", "activation", "activation-w", "exchange"],
        ...,
    ] = ("single",)
    """single: B alone; sender: A alone; skyline: B reads what A reads, too (as single does where a task has nothing that only A reads); exchange: both directions at once."""
    controls: options.Controls = ()
    """activation and activation-w: also graft these instead of A's activation."""
    others: tuple[str, ...] = ()
    """More agents: debaters, and senders of activations (whose mean is grafted)."""
    k: tuple[int, ...] = ()
    """A's layer, or one for each sender."""
    j: int | None = None
    """B's layer."""
    k_back: int | None = None
    """exchange: B's layer that is sent, if not k."""
    j_back: int | None = None
    """exchange: A's layer after which it is grafted in, if not j."""
    graft: options.Graft = "replace"
    where: Literal["last", "all"] = "last"
    """Edit the prompt's last token, or all (graft sum; appendix B.1)."""
    think: int = 0
    """A first writes so many tokens, and the state at the last of them is sent (appendices B.2, B.5)."""
    map: Path | None = None
    """activation-w: the folder of jaxcomm fit-map."""
    into: int | None = None
    """activation-w: the layer of B that W maps into, if it is not the one it is grafted at."""
    judge: str | None = None
    """biographies: the checkpoint of the agent that checks facts; default: b."""
    judge_by: Literal["text", "likelihood"] = "text"
    """biographies: read what the judge writes, or take the likeliest of its words."""
    rounds: int | None = None
    """Answers of each debater; default: 2 (debate), 3 (cipher)."""
    form: Literal["harness", "plain", "numeric", "choice", "biography"] = "harness"
    """Words of debates: around the harness' prompts, none, or Du et al.'s."""
    answer: Literal["numeric", "choice", "text"] | None = None
    """How votes are counted; default: numeric for gsm8k*, choice for mmlu*, else text."""
    tie: Literal["first", "last"] = "first"
    """Whose answer stands when the votes are even: B's, or the last of the debaters'."""
    released_scoring: bool = False
    """Numbers and letters that agents write: also score them as Du et al. describe, and as their released code does, which
    drops minus signs and takes what it cannot parse for right."""
    temperatures: tuple[float, ...] = ()
    """cipher: of B, of A, and of each of the others."""
    stop: Literal["argmax", "nearest", "none"] = "argmax"
    """cipher: a response ends where the likeliest, or the nearest token, is a stop token."""
    partial: Literal["off", "entropy", "maxprob"] = "off"
    """cipher: expected embeddings only where the model is unsure."""
    ask: str = "{prompt}"
    """message: what A reads before it writes."""
    tell: str = "{message}\n\n{prompt}"
    """message: what B reads."""
    max_message_tokens: int = 256
    max_new_tokens: int | None = None
    """Default: the task's."""
    temperature: float | None = None
    """Sample at this temperature, 0 is greedy; default: the task's own settings, mostly greedy."""
    top_p: options.TopP = 1.0
    n: int | None = None
    """So many random questions of every task, by seed; default: all."""
    seed: int = 0
    """Which questions and few-shot examples are drawn, and how sampling falls."""
    wording: options.Preset = "paper"
    """Of games, as jaxcomm play's."""
    instruction: str | None = None
    """Of games in the wording instructed, instead of their own."""
    sender_reads: options.Reads = "statement"
    """What A reads before it sends, in tasks that give it something: only that, or B's question after it, too."""
    system_a: options.SystemA = ""
    system_b: options.SystemB = ""
    few_shot: int | None = None
    """Examples in the prompt; default: the task's."""
    data: tuple[str, ...] = ()
    """TASK=FILE.jsonl, or TASK=FOLDER with a file per split: local records instead of the hub's. TASK=sample: a few made-up
    ones that come with the package (gsm8k, mmlu_high_school_geography, biographies)."""
    names: Literal["seen", "new"] = "seen"
    """Own tasks: people and companies the embedded pair has read of, or others."""
    batch_size: int = 16
    truncate: bool = False
    """Prompts that do not fit lose their first tokens (and are counted) instead of being refused."""
    chat: bool = False
    """Put prompts through each agent's chat template."""
    chat_args: options.ChatArgs = ()
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1
    int8: options.Int8 = False

    def run(self) -> None:
        """Evaluates into the run folder, and prints the tables.

        Raises:
            ValueError, OSError: `evaluation.run.run`'s, what is said of an agent or a map, and options that mean nothing.
        """
        from ..agents import read_as
        from ..documents import console
        from ..evaluation import run
        from ..evaluation.settings import check
        from ..evaluation.tables import tables

        settings = self._settings()
        check(settings, 1 + len(self.others), self.map is not None)
        team, fitted = self._team()
        recorded = {"a": self.a, "b": self.b, "others": self.others, "judge": self.judge or self.b}
        recorded |= {"chat": self.chat, "int8": self.int8, "into": self.into}
        recorded |= read_as((team.a, team.b, team.checker, *team.others))
        recorded |= {"W": None if fitted is None else {"recipe": fitted.recipe, "text": fitted.text}}
        how: dict[str, Any] = dict(resume=self.resume, command=options.command_line(self), recorded=recorded)
        lines, out = run.run(settings, team, self.out, **how), console(112)
        for table in tables(lines):
            out.print(table)
        out.print(f"{self.out}: run.json, results.jsonl, items.parquet", soft_wrap=True)

    def _settings(self) -> EvalSettings:
        """With names and paths as what they stand for. ValueError: one is not there."""
        from .. import tasks
        from ..evaluation.settings import EvalSettings

        data = {task: path for task, _, path in (given.partition("=") for given in self.data)}
        if odd := [task for task, path in data.items() if not path]:
            raise ValueError(f"--data {odd[0]}: write TASK=FILE")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(EvalSettings)}
        paths = {task: tasks.sample(task) if path == "sample" else Path(path) for task, path in data.items()}
        names = tuple(name for name in self.tasks.split(",") if name)
        return EvalSettings(**fields | {"tasks": names, "data": paths})

    def _team(self) -> tuple[Team, Fitted | None]:
        """The agents, and where W is from."""
        from .. import maps
        from ..agents import load, template_args
        from ..evaluation.arms import Team

        a, b, judge, *others = load(
            self.a, self.b, self.judge or self.b, *self.others, dtype=self.dtype, chat=self.chat, tensor=self.tensor,
            chat_args=template_args(self.chat_args), system=(self.system_a, self.system_b), int8=self.int8,
        )  # fmt: skip
        if self.map is None or "activation-w" not in self.protocols:
            return Team(a, b, others, judge), None
        fitted, layer = maps.load(self.map, a, b), self.j if self.into is None else self.into
        return Team(a, b, others, judge, [fitted.at(self.k[0], layer)]), fitted  # pyright: ignore[reportArgumentType]
