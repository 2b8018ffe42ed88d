"""`jaxcomm eval`: tasks of lm-evaluation-harness under one protocol or several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import options
from ..evaluation.options import EvalOptions

if TYPE_CHECKING:  # commands load nothing before they run
    from ..evaluation.arms import Team
    from ..evaluation.settings import EvalSettings
    from ..maps import Fitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(EvalOptions):
    """Evaluate protocols between agents on tasks of lm-evaluation-harness, with its prompts, answer extraction and metrics.

    Example: jaxcomm eval --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.1-8B-Instruct --tasks gsm8k,mmlu_high_school_psychology --protocols single sender debate activation --k 26 --j 26 --n 100 --temperature 1 --top-p 0.9 --out runs/table-3
    """

    typed: ClassVar = "eval"

    a: options.Sender
    b: str
    """Receiver, which answers. It is named in the same way."""
    tasks: str
    """Tasks and groups of the harness (mmlu: 57 subjects), separated by commas. Also countries, tip_sheets, games of your own (FILE.jsonl, as jaxcomm play's --game), countries_choice, statements, and biographies (with --data biographies=FILE.json)."""
    out: Path
    """Run folder: every finished batch, results.jsonl, items.parquet."""
    resume: options.Resume = False
    others: tuple[str, ...] = ()
    """More agents: debaters, or senders of activations (the mean of the activations is grafted)."""
    map: Path | None = None
    """activation-w: the folder of jaxcomm fit-map."""
    into: int | None = None
    """activation-w: the layer of B that W maps into, if it is not j."""
    judge: str | None = None
    """biographies: the checkpoint of the agent that checks facts; default: b."""
    system_a: options.SystemA = ""
    system_b: options.SystemB = ""
    data: tuple[str, ...] = ()
    """TASK=FILE.jsonl, or TASK=FOLDER with a file per split: local records instead of the hub's. TASK=sample: a few made-up
    records that come with the package (gsm8k, mmlu_high_school_geography, biographies)."""
    chat: bool = False
    """Put prompts through each agent's chat template."""
    chat_args: options.ChatArgs = ()
    dtype: options.Dtype = "auto"
    tensor: options.Tensor = 1
    int8: options.Int8 = False

    def run(self) -> None:
        """Evaluates into the run folder, and prints the tables.

        Raises:
            ValueError: An option, an agent, a map or a task is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from ..agents import read_as
        from ..documents import console, show
        from ..evaluation import run
        from ..evaluation.settings import check
        from ..finished import Run, compare, read_run
        from ..report import HOW_TO_READ, grouped, told_of

        settings = self._settings()
        check(settings, 1 + len(self.others), self.map is not None)
        team, fitted = self._team()
        team, chosen = self._seen(team, settings)
        recorded = {"a": self.a, "b": self.b, "others": self.others, "judge": self.judge or self.b}
        recorded |= {"chat": self.chat, "int8": self.int8, "into": self.into}
        recorded |= read_as((team.a, team.b, team.checker, *team.others))
        recorded |= chosen
        recorded |= {"W": None if fitted is None else {"recipe": fitted.recipe, "text": fitted.text}}
        how: dict[str, Any] = dict(resume=self.resume, command=options.command_line(self), recorded=recorded)
        run.run(settings, team, self.out, **how)
        done, out = read_run("run", self.out), console(180)
        assert isinstance(done, Run)
        tasks = grouped(compare(done), lambda row: row.line["task"])
        show([HOW_TO_READ, *(block for task, rows in tasks.items() for block in told_of(task, rows))], out)
        out.print(f"{self.out}: run.json, results.jsonl, items.parquet", soft_wrap=True)

    def _settings(self) -> EvalSettings:
        """The settings, with names and paths resolved. ValueError: one does not exist."""
        from .. import tasks
        from ..evaluation.settings import EvalSettings

        data = {task: path for task, _, path in (given.partition("=") for given in self.data)}
        if odd := [task for task, path in data.items() if not path]:
            raise ValueError(f"--data {odd[0]}: write TASK=FILE")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(EvalOptions)}
        paths = {task: tasks.sample(task) if path == "sample" else Path(path) for task, path in data.items()}
        names = tuple(name for name in self.tasks.split(",") if name)
        return EvalSettings(**fields, tasks=names, data=paths)

    def _seen(self, team: Team, settings: EvalSettings) -> tuple[Team, dict[str, Any]]:
        """The team with B's layers that see a prefix, and a record of their choice."""
        from jaxcomm.protocols import Prefixing

        from ..games import Wording

        team = dataclasses.replace(team, kv_maps=settings.kv_maps(team.a, team.b))
        choice = settings.layer_choice(self.seed)
        if choice.scheme is None or not {"kv", "latent"} & {*self.protocols}:
            return team, {}
        wording = Wording(self.wording, self.instruction, self.sender_reads)
        items = choice.calibration_items(None) if choice.calibration else None
        layers, told = choice(None, team.a, team.b, wording, Prefixing(maps=team.kv_maps, place=self.place))
        known = [] if items is None else [item.prompt_a for item in items.items]
        return dataclasses.replace(team, layers=layers, calibrated=known), {"layers_chosen": layers, **told}

    def _team(self) -> tuple[Team, Fitted | None]:
        """The agents, and the fitted maps that W comes from."""
        from .. import maps
        from ..agents import load_agents, template_args
        from ..evaluation.arms import Team

        a, b, judge, *others = load_agents(
            self.a, self.b, self.judge or self.b, *self.others, dtype=self.dtype, chat=self.chat, tensor=self.tensor,
            chat_args=template_args(self.chat_args), system=(self.system_a, self.system_b), int8=self.int8,
        )  # fmt: skip
        made = None
        if "bridge" in self.protocols:
            from ..bridges.folders import load_bridge

            made = load_bridge(str(self.bridge), a, b)
        if self.map is None or "activation-w" not in self.protocols:
            return Team(a, b, others, judge, bridge=made), None
        fitted, layer = maps.load(self.map, a, b), self.j if self.into is None else self.into
        maps_of = [fitted.at(self.k[0], layer)]  # pyright: ignore[reportArgumentType]
        return Team(a, b, others, judge, maps_of, bridge=made), fitted
