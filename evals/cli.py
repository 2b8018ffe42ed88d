"""The command line: `jaxcomm demo | play | sweep | eval | report | cost | fit-map | lmnet | convert | train-pair`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro

from . import lmnet_commands


@dataclasses.dataclass(frozen=True)
class Demo:
    """Play both games with the embedded pair: table with intervals and controls, transcripts, layer maps.

    Example: jaxcomm demo --out demo
    """

    out: Path = Path("demo")
    """Folder for layers.png, results.jsonl and items.jsonl."""
    json: Path | None = None
    """Also write one JSON line per result here."""

    def run(self) -> None:
        from .demo import run

        run(self.out, self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Put:
    """How a game is put to the agents."""

    wording: Literal["paper", "instructed", "kvcomm"] = "paper"
    """paper: the bare statement and the bare question; instructed: the question with an instruction on the answer's form, which chat models need; kvcomm: KVComm's."""
    instruction: str | None = None
    """Of the wording instructed, instead of the game's own ("Answer with the country's name only.")."""
    examples: int = 0
    """Worked examples before the question; they are drawn besides and never played."""
    sender_reads: Literal["statement", "statement+question"] = "statement"
    """What A reads before it sends: only what it knows, or B's question after it, too."""
    system_a: str = ""
    """System prompt of A; of a raw prompt, its first paragraph."""
    system_b: str = ""
    """Likewise, of B."""
    chat: bool = False
    """Put prompts through each tokenizer's chat template instead of reading them raw."""
    prompts_a: Literal["raw", "chat"] | None = None
    """Of A alone, against --chat."""
    prompts_b: Literal["raw", "chat"] | None = None
    """Of B alone, likewise."""
    chat_args: tuple[str, ...] = ()
    """What the chat template is given besides: NAME=VALUE, such as enable_thinking=false."""

    @property
    def chats(self) -> tuple[bool, bool]:
        """Whether A's prompts go through a chat template, and B's."""
        a, b = (self.chat if form is None else form == "chat" for form in (self.prompts_a, self.prompts_b))
        return a, b

    @property
    def told(self) -> dict[str, Any]:
        """What the agents are told besides prompts. ValueError: `agents.template_args`'."""
        from .agents import template_args

        return {"chat_args": template_args(self.chat_args), "system": (self.system_a, self.system_b)}

    def put(self) -> Any:
        """ValueError: `Wording`'s."""
        from .games import Wording

        return Wording(self.wording, self.instruction, self.sender_reads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Play(Put):
    """Play a game with any pair of checkpoints, under one protocol or several, with controls; a table, and what was said.

    Example: jaxcomm play --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.2-3B-Instruct --game countries --protocol silent skyline message activation --k 26 --j 26
    """

    a: str
    """Sender: a checkpoint folder (either form), a .gguf file, real:smollm2, a hub id (also id@revision), a network's run folder, or pair:a / pair:b for the embedded pair."""
    b: str
    """Receiver, likewise."""
    game: str = "countries"
    """countries, tip_sheets, or a file of your own: FILE.jsonl, whose lines have prompt_a, prompt_b, answer and, if you like, choices."""
    protocol: tuple[Literal["silent", "skyline", "message", "debate", "cipher", "activation"], ...] = ("activation",)
    k: int | None = None
    """A's layer, 0 (embedding) to its number of layers; activation only."""
    j: int | None = None
    """B's layer, likewise."""
    graft: Literal["sum", "mean", "replace"] = "replace"
    """How B's state b and A's state a are combined."""
    control: tuple[Literal["unrelated", "shuffled", "zero", "noise", "self"], ...] = ()
    """Also graft these instead of A's activation."""
    n: int | None = None
    """Number of games; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Which games are drawn, and how sampling and noise fall."""
    names: Literal["seen", "new"] = "seen"
    """People and companies the embedded pair has read of, or others."""
    choices: bool = True
    """Also score the right answer among the game's choices; nothing is decoded for it."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share; needs --temperature."""
    ask: str = "{prompt}"
    """message: what A reads before it writes. Real models want asking: "{prompt} Tell your partner what you know." """
    tell: str = "{message} {prompt}"
    """message: what B reads."""
    turns: int = 1
    """message: how often A writes; between two of its messages B writes back."""
    form: Literal["harness", "plain"] = "plain"
    """debate, cipher: words around the prompts."""
    rounds: int | None = None
    """debate, cipher: answers of each; default: 2, 3."""
    temperatures: tuple[float, float] = (0.4, 0.1)
    """cipher: of A, and of B, whose must be lower: it answers."""
    max_message_tokens: int = 48
    """How much A may write."""
    max_new_tokens: int = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the checkpoint's own; on CPU, where XLA is slow in two bytes, float32."""
    tensor: int = 1
    """Cut every weight matrix over so many devices; the rest share the questions."""
    int8: bool = False
    """Keep weight matrices in 8 bits (needs jaxcomm[int8])."""
    cluster: str | None = None
    """Several processes, each with its share: auto (TPU pods, Slurm), or HOST:PORT,COUNT,INDEX."""
    out: Path | None = None
    """Folder for report.html, report.md, results.jsonl and items.jsonl."""
    json: Path | None = None
    """Write one JSON line per result here."""
    items: Path | None = None
    """Write one JSON line per game here: what was rendered, tokens read and written, positions, norms."""

    def run(self) -> None:
        import rich.console

        from jaxcomm.decoding import Sampling

        from . import arms, documents, processes
        from .agents import load, read_as
        from .files import check_file, check_folder, write_lines, write_whole
        from .games import draw

        processes.join(self.cluster)
        for path in (self.json, self.items):
            check_file(path)
        if self.out is not None:
            check_folder(self.out)
        wording, every = self.put(), arms.arms(self.protocol, self._settings(), self.control)
        game = draw(self.game, self.seed, self.n, names=self.names, examples=self.examples)
        if "shuffled" in self.control and len(game.items) < 2:
            raise ValueError("--control shuffled needs at least two games")
        how: dict[str, Any] = dict(dtype=self.dtype, chat=self.chats, **self.told)
        a, b = load(self.a, self.b, tensor=self.tensor, int8=self.int8, **how)
        outcomes = list(
            arms.play_all(
                game, every, a, b, wording=wording, choices=self.choices, max_new_tokens=self.max_new_tokens,
                sampling=Sampling(self.temperature, 0, self.top_p) if self.temperature > 0 else None,
                seed=self.seed, drawn={"int8": self.int8} | read_as((a, b)),
            )
        )  # fmt: skip
        if not processes.first():
            return
        blocks = arms.blocks(every, outcomes, a, b, wording)
        documents.show(blocks, rich.console.Console(width=None if sys.stdout.isatty() else 180))
        results, rows = [o.summary() for o in outcomes], [row for o in outcomes for row in o.rows()]
        for path, lines in ((self.json, results), (self.items, rows)):
            if path is not None:
                write_lines(path, lines)
        if self.out is not None:
            blocks.append(documents.Heading(2, "This again"))
            blocks.append(documents.Code(command_line(self)))
            write_whole(self.out / "report.html", documents.page(f"{game.name}, {a.name} -> {b.name}", blocks).encode())
            write_whole(self.out / "report.md", documents.markdown(blocks).encode())
            write_lines(self.out / "results.jsonl", results)
            write_lines(self.out / "items.jsonl", rows)

    def _settings(self) -> dict[str, dict[str, Any]]:
        """Of each protocol. ValueError: options that mean nothing, or are missing."""
        from jaxcomm.protocols.text import check_message

        if self.temperature < 0 or (self.top_p < 1 and not self.temperature):
            raise ValueError(
                "sampling needs --temperature above 0; without it decoding is greedy and --top-p means nothing"
            )
        for name in ("n", "rounds", "turns", "max_message_tokens", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        for name, given in (("protocol", self.protocol), ("control", self.control)):
            if len(set(given)) < len(given) or not (given or name == "control"):
                raise ValueError(f"--{name} {' '.join(given) or 'none'}: name at least one, each once")
        if "activation" not in self.protocol and (self.k, self.j, self.control, self.graft) != (
            None,
            None,
            (),
            "replace",
        ):
            raise ValueError(
                f"--k, --j, --graft and --control mean nothing to the protocol {', '.join(self.protocol)}: leave them out, or name activation"
            )
        if "activation" in self.protocol and (self.k is None or self.j is None):
            raise ValueError("activation needs --k (A's layer) and --j (B's layer)")
        if "message" in self.protocol:
            check_message(self.ask, self.tell, "--")
        if "cipher" in self.protocol and self.temperature:
            raise ValueError("cipher draws nothing, its --temperatures soften what it says: leave out --temperature")
        if self.temperatures[1] >= self.temperatures[0]:
            raise ValueError(
                f"--temperatures {self.temperatures[0]} {self.temperatures[1]}: B's must be lower, since it answers"
            )
        talk: dict[str, Any] = dict(form=self.form, max_message_tokens=self.max_message_tokens)
        rounds = lambda default: default if self.rounds is None else self.rounds
        return {
            "message": dict(ask=self.ask, tell=self.tell, turns=self.turns, max_message_tokens=self.max_message_tokens),
            "debate": dict(talk, rounds=rounds(2), tie="last"),
            "cipher": dict(talk, rounds=rounds(3), temperatures=self.temperatures),
            "activation": dict(k=self.k, j=self.j, graft=self.graft),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Put):
    """Play games at every layer pair: maps of accuracy and of the answer's log-probability, and what the best layers are
    worth on questions they were not chosen on.

    Example: jaxcomm sweep --a pair:b --b pair:b --out runs/b-b
    """

    a: str
    """Sender: a checkpoint folder (either form), a .gguf file, real:smollm2, a hub id (also id@revision), or pair:a / pair:b for the embedded pair."""
    b: str
    """Receiver, likewise."""
    out: Path
    """Run folder: every finished chunk, results.parquet, pictures, sweep.html, report.txt."""
    resume: bool = False
    """Go on with the run in the folder."""
    games: tuple[str, ...] = ("countries", "tip_sheets")
    """countries, tip_sheets, files of your own (as jaxcomm play's --game)."""
    ks: tuple[int, ...] | None = None
    """A's layers; default: 1 to its number of layers."""
    js: tuple[int, ...] | None = None
    """B's layers, likewise."""
    grafts: tuple[Literal["sum", "mean", "replace"], ...] = ("replace",)
    decode: int | None = None
    """Also write so many tokens in every cell, and count the texts that are right; else only the answer's tokens are read."""
    text: str | None = None
    """Fit a map W for every (k, j) on this file, one sentence per line, or on "statements": the games' own, of no game."""
    into: int | None = None
    """Fit W into this layer of B instead of the one it is grafted at; needs --text."""
    n: int | None = None
    """Number of games; default: the paper's 100 (countries) and 70 (tip_sheets), all of a file."""
    seed: int = 0
    """Which games are drawn, and how they are halved."""
    names: Literal["seen", "new"] = "seen"
    """People and companies the embedded pair has read of, or others."""
    memory: float | None = None
    """GiB a device may use beside the weights; default: what is free where the device tells, else 1. A run may go on with less."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the checkpoint's own; on CPU, where XLA is slow in two bytes, float32."""
    tensor: int = 1
    """Cut every weight matrix over so many devices; the rest share the questions."""
    int8: bool = False
    """Keep weight matrices in 8 bits (needs jaxcomm[int8])."""
    cluster: str | None = None
    """Several processes, each with its share: auto (TPU pods, Slurm), or HOST:PORT,COUNT,INDEX."""

    def run(self) -> None:
        from . import processes, sweeps
        from .agents import load, read_as

        processes.join(self.cluster)
        if self.into is not None and self.text is None:
            raise ValueError("--into says where W maps to: it needs --text to fit W on")
        if self.decode is not None and self.decode < 1:
            raise ValueError(f"--decode {self.decode}: it must be at least 1")
        how: dict[str, Any] = dict(dtype=self.dtype, chat=self.chats, **self.told)
        wording = self.put()
        a, b = load(self.a, self.b, layers=True, tensor=self.tensor, int8=self.int8, **how)
        asked = sweeps.Asked(
            games=self.games,
            ks=tuple(sorted(self.ks)) if self.ks is not None else tuple(sweeps.layers(a)),
            js=tuple(sorted(self.js)) if self.js is not None else tuple(sweeps.layers(b)),
            grafts=self.grafts,
            decode=self.decode,
            text=self.text,
            into=self.into,
            n=self.n,
            seed=self.seed,
            names=self.names,
            memory=None if self.memory is None else int(self.memory * 2**30),
            wording=wording,
            examples=self.examples,
        )
        recorded = {"a": self.a, "b": self.b, "chat_a": a.chat, "chat": b.chat, "int8": self.int8} | read_as((a, b))
        sweeps.run(asked, a, b, self.out, resume=self.resume, command=command_line(self), recorded=recorded)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate protocols between agents on tasks of lm-evaluation-harness, whose prompts, answer extraction and metrics are used.

    Example: jaxcomm eval --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.1-8B-Instruct --tasks gsm8k,mmlu_high_school_psychology --protocols single sender debate activation --k 26 --j 26 --n 100 --temperature 1 --top-p 0.9 --out runs/table-3
    """

    a: str
    """Sender: a checkpoint folder (either form), a .gguf file, real:smollm2, a hub id (also id@revision), a network's run folder, or pair:a / pair:b for the embedded pair."""
    b: str
    """Receiver, who answers; likewise."""
    tasks: str
    """Names of the harness, separated by commas, groups too (mmlu: 57 subjects); here also countries, tip_sheets, games of your own (FILE.jsonl, as jaxcomm play's --game), countries_choice, statements, and biographies (with --data biographies=FILE.json)."""
    out: Path
    """Run folder: every finished batch, results.jsonl, items.parquet."""
    resume: bool = False
    """Go on with the run in the folder."""
    protocols: tuple[
        Literal["single", "sender", "skyline", "message", "debate", "cipher", "activation", "activation-w", "exchange"],
        ...,
    ] = ("single",)
    """single: B alone; sender: A alone; skyline: B reads what A reads, too (as single does where a task has nothing that only A reads); exchange: both directions at once."""
    controls: tuple[Literal["unrelated", "shuffled", "zero", "noise", "self"], ...] = ()
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
    graft: Literal["sum", "mean", "replace"] = "replace"
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
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share; needs --temperature."""
    n: int | None = None
    """So many random questions of every task, by seed; default: all."""
    seed: int = 0
    """Which questions and few-shot examples are drawn, and how sampling falls."""
    wording: Literal["paper", "instructed", "kvcomm"] = "paper"
    """Of games, as jaxcomm play's."""
    instruction: str | None = None
    """Of games in the wording instructed, instead of their own."""
    sender_reads: Literal["statement", "statement+question"] = "statement"
    """What A reads before it sends, in tasks that give it something: only that, or B's question after it, too."""
    system_a: str = ""
    """System prompt of A; of a raw prompt, its first paragraph."""
    system_b: str = ""
    """Likewise, of B."""
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
    chat_args: tuple[str, ...] = ()
    """What the chat template is given besides: NAME=VALUE, such as enable_thinking=false."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the checkpoint's own; on CPU, where XLA is slow in two bytes, float32."""
    tensor: int = 1
    """Cut every weight matrix over so many devices; the rest share the questions."""
    int8: bool = False
    """Keep weight matrices in 8 bits (needs jaxcomm[int8])."""

    def run(self) -> None:
        import rich.console

        from . import evaluate, maps, tasks
        from .agents import load, read_as, template_args

        data: dict[str, str] = {task: path for task, _, path in (given.partition("=") for given in self.data)}
        if odd := [task for task, path in data.items() if not path]:
            raise ValueError(f"--data {odd[0]}: write TASK=FILE")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(evaluate.Asked)}
        paths = {task: tasks.sample(task) if path == "sample" else Path(path) for task, path in data.items()}
        names = tuple(name for name in self.tasks.split(",") if name)
        asked = evaluate.Asked(**fields | {"tasks": names, "data": paths})
        evaluate.check(asked, 1 + len(self.others), None if self.map is None else ())
        who = (self.a, self.b, self.judge or self.b, *self.others)
        systems = (self.system_a, self.system_b)
        told: dict[str, Any] = dict(dtype=self.dtype, chat=self.chat, chat_args=template_args(self.chat_args))
        a, b, judge, *others = load(*who, tensor=self.tensor, int8=self.int8, system=systems, **told)
        W = fitted = None
        if self.map is not None and "activation-w" in self.protocols:
            fitted = maps.load(self.map, a, b)
            layer: Any = self.j if self.into is None else self.into
            W = [fitted.at(self.k[0], layer)]
        recorded = {"a": self.a, "b": self.b, "others": self.others, "judge": self.judge or self.b}
        recorded |= {"chat": self.chat, "int8": self.int8, "into": self.into} | read_as((a, b, judge, *others))
        recorded |= {"W": None if fitted is None else {"recipe": fitted.recipe, "text": fitted.text}}
        how: dict[str, Any] = dict(resume=self.resume, command=command_line(self), recorded=recorded)
        how |= dict(maps=W, judge=judge)
        lines = evaluate.run(asked, a, b, others, self.out, **how)
        console = rich.console.Console(width=None if sys.stdout.isatty() else 112)
        for table in evaluate.tables(lines):
            console.print(table)
        console.print(f"{self.out}: run.json, results.jsonl, items.parquet", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of every protocol, by the paper's formulas, exactly with a KV cache, and as XLA counts them.

    Example: jaxcomm cost --a llama-3.2-3b --b llama-3.1-8b --k 26 --j 26
    """

    a: str = "llama-3.2-3b"
    """Sender: llama-3.2-3b, llama-3.1-8b, pair:a, pair:b, or a checkpoint's folder, .gguf file or hub id."""
    b: str = "llama-3.1-8b"
    """Receiver, likewise."""
    k: int = 26
    j: int = 26
    tokens: tuple[int, int, int] | None = None
    """Of the prompt, of a message, of the answer; default: four settings."""

    def run(self) -> None:
        import rich.console

        from . import cost

        a, b = (cost.shape(name) for name in (self.a, self.b))
        console = rich.console.Console(width=None if sys.stdout.isatty() else 112)
        for P, M, T in [self.tokens] if self.tokens else cost.SETTINGS:
            title = (
                f"{self.a} -> {self.b}, GFLOPs: {P} prompt, {M} message, {T} answer tokens, k = {self.k}, j = {self.j}"
            )
            console.print(cost.table(title, list(cost.counts(a, b, P, M, T, self.k, self.j, compiled=True))))


@dataclasses.dataclass(frozen=True)
class Report:
    """Put finished runs beside each other and beside the published numbers: Markdown, HTML, CSV, accuracy against compute.

    Example: jaxcomm report runs/table-3 runs/table-3-w --out reports/table-3
    """

    out: Path
    """Folder for report.md, report.html, report.csv and the pictures."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders of jaxcomm eval; of jaxcomm sweep, too, whose own report is put in."""

    def run(self) -> None:
        import rich.console

        from .report import report

        report(self.runs, self.out, rich.console.Console(width=None if sys.stdout.isatty() else 180))


@dataclasses.dataclass(frozen=True)
class FitMap:
    """Fit the map W from A's layers into B's, in closed form and by the paper's gradient descent; keep one, and print both
    errors on held-out sentences and how alike the two spaces are.

    Example: jaxcomm fit-map --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.1-8B-Instruct --ks 26 --js 26 --text hub:allenai/c4:en:train:text --out maps/3b-8b
    """

    a: str
    """Sender: a checkpoint folder (either form), a .gguf file, real:smollm2, a hub id (also id@revision), or pair:a / pair:b for the embedded pair."""
    b: str
    """Receiver, likewise."""
    ks: tuple[int, ...]
    """A's layers."""
    js: tuple[int, ...]
    """B's layers; there is a W for every k and j."""
    text: str
    """statements:countries or statements:tip_sheets (what A reads there), a file with a sentence per line, FILE.jsonl or
    FILE.jsonl:FIELD, or a hub's data set, hub:NAME:CONFIG:SPLIT:FIELD."""
    out: Path
    """New folder for W; it must not exist."""
    n: int | None = None
    """Number of sentences; default: all of a file, the paper's 3072 of the others."""
    recipe: Literal["ridge", "gradient"] = "ridge"
    """Which W is kept."""
    seed: int = 0
    """Which sentences are drawn, and how gradient descent begins and shuffles."""
    chat: bool = False
    """Put sentences through each tokenizer's chat template instead of reading them raw."""
    chat_args: tuple[str, ...] = ()
    """What the chat template is given besides: NAME=VALUE, such as enable_thinking=false."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the checkpoint's own; on CPU, where XLA is slow in two bytes, float32."""

    def run(self) -> None:
        import jax
        import rich

        from jaxcomm.mapping import fit_maps, similarity, train_maps

        from . import maps
        from .agents import load, template_args
        from .files import check_new
        from .sentences import read_both, sentences

        check_new(self.out)
        text = sentences(self.text, self.n, seed=self.seed)
        told: dict[str, Any] = dict(dtype=self.dtype, chat=self.chat, chat_args=template_args(self.chat_args))
        a, b = load(self.a, self.b, layers=True, **told)
        at = dict(ks=self.ks, js=self.js)
        on = lambda function, **more: function(a.params, b.params, read_both(a, b, text), **at, **more)
        fits = {"ridge": on(fit_maps), "gradient": on(train_maps, key=jax.random.key(self.seed))}
        how = dict(at, recipe=self.recipe, text=self.text, seed=self.seed)
        maps.save(self.out, maps.Fitted.of(fits[self.recipe], text, **how), a, b)
        title = f"W, {a.name} -> {b.name}, {len(text)} sentences of {self.text}"
        maps.show(title, **at, fits=fits, alike=on(similarity))
        rich.print(f"{self.out}: W by {self.recipe}.")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Read a checkpoint, check every tensor, and write it again: as JAX keeps models (Orbax), which every command takes, or as a
    Hugging Face folder.

    Example: jaxcomm convert meta-llama/Llama-3.2-3B-Instruct --out llama
    """

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint folder in either form, a .gguf file, real:smollm2, a hub id (also id@revision), or pair:a / pair:b for the embedded pair."""
    out: Path
    """New folder; it must not exist."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: what the checkpoint has."""
    to: Literal["orbax", "hf"] = "orbax"
    """orbax: read in parallel, straight to where it stays; hf: safetensors, for transformers."""
    max_positions: int | None = None
    """How long texts may be; default: as long as the config says, with longrope as its short numbers serve."""
    tokenizer: str | None = None
    """A folder or hub id whose tokenizer is written instead of the checkpoint's own."""

    def run(self) -> None:
        import rich

        from ..converters import load_agent, save, to_hf
        from ..converters.agents import stored_dtype
        from . import pair
        from .files import check_new

        check_new(self.out)
        how: dict[str, Any] = dict(unroll=False, max_positions=self.max_positions, tokenizer=self.tokenizer)
        source = pair.checkpoint(self.source)
        agent = load_agent(source, stored_dtype(source) if self.dtype == "auto" else self.dtype, **how)
        write = save if self.to == "orbax" else to_hf
        write(agent.params, self.out, tokenizer=agent.tokenizer, stop_tokens=agent.stop_tokens)
        rich.print(f"{self.source} -> {self.out}, {agent.params.dtype.name}: {agent.params.config}")


@dataclasses.dataclass(frozen=True)
class TrainPair:
    """Train one model of the embedded pair again, from the seed. On CPU: one model per core, both at once.

    Example: jaxcomm train-pair a --out my-a
    """

    model: Annotated[Literal["a", "b"], tyro.conf.Positional]
    """a: the sender, wider and deeper; b: the receiver."""
    out: Path
    """New folder for the checkpoint; it must not exist."""
    steps: int | None = None
    """Default: what the shipped model was trained for."""
    seed: int = 0

    def run(self) -> None:
        from .pair.train import train_and_save

        train_and_save(self.model, self.out, steps=self.steps, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Lmnet:
    """Networks of language models with trainable edges: train, compare with LoRA, look inside."""

    do: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[lmnet_commands.Train, tyro.conf.subcommand("train")]
            | Annotated[lmnet_commands.Compare, tyro.conf.subcommand("compare")]
            | Annotated[lmnet_commands.Show, tyro.conf.subcommand("show")]
        ]
    ]

    def run(self) -> None:
        name = type(self.do).__name__.lower()
        self.do.run(command_line(self.do, f"lmnet {name}"))


def command_line(command, name: str | None = None) -> str:
    """What to type to run it again, in a new folder."""
    words = ["jaxcomm", *(name or next(name for name, kind in COMMANDS.items() if kind is type(command))).split()]
    given = sorted(dataclasses.fields(command), key=lambda field: field.name not in ("a", "b"))
    for field in given:
        value = getattr(command, field.name)
        if value == field.default or field.name == "resume":
            continue
        words.append("--" + ("no-" if value is False else "") + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            words += [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


def check_outputs(command: Any) -> None:
    """ValueError: results would not be local (`files.check_local`)."""
    from .files import check_local

    asked = command.do if isinstance(command, Lmnet) else command
    for name in ("out", "json", "items"):
        if (path := getattr(asked, name, None)) is not None:
            check_local(path)


COMMANDS = {
    "demo": Demo,
    "play": Play,
    "sweep": Sweep,
    "eval": Eval,
    "report": Report,
    "cost": Cost,
    "fit-map": FitMap,
    "lmnet": Lmnet,
    "convert": Convert,
    "train-pair": TrainPair,
}


if TYPE_CHECKING:
    Command = Any
else:
    Command = Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())]  # noqa: UP007


def prepare(
    command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Command]],
    keep_programs: bool = True,
) -> Command:
    """Language models that communicate through activations.

    Args:
        command: What to do.
        keep_programs: Keep compiled programs for the next command, in the user's cache folder or the one that JAXCOMM_PROGRAMS names (JAXCOMM_PROGRAMS=off: nowhere).
    """
    if keep_programs:
        from . import programs

        programs.keep()
    return command


def main() -> None:
    """Exit status 0, or 2 with one line on stderr that says what is wrong and how to mend it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    command = tyro.cli(prepare, prog="jaxcomm")
    try:
        check_outputs(command)
        command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"jaxcomm: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
