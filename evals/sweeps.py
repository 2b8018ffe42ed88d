"""Layer sweeps over the games: computed chunk by chunk into a run folder, drawn, and reported without a selection effect.

The best of many cells is partly luck, so a cell that is chosen and reported on the same questions looks better than it
is. Here it is chosen on one half of the questions and reported on the other, beside silence and every control.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pyarrow as pa
import rich.console
import rich.table
import tqdm

from jaxcomm.agent import Agent
from jaxcomm.compiled import check_layer
from jaxcomm.decoding import Generation
from jaxcomm.fingerprint import fingerprint
from jaxcomm.layer_sweep import Chunk, Plan, Sizes, by_length
from jaxcomm.mapping import HELD_OUT, Maps, fit_maps
from jaxcomm.protocols import Control
from jaxcomm.sharding import spread

from . import figures, processes
from .games import Game, Item, Wording, draw
from .play import METRICS, PlaySettings, play, shown
from .runs import RunFolder, parquet, surroundings
from .scores import accuracy, difference, exact_match, percent, sign_flip
from .sentences import read_both, sentences

SENTENCES = 1000
FIT = 2
"""Seed of the game's own statements that W is fitted on. They hold no combination of any game (`held_out`)."""
STATEMENTS = "statements"
PLAIN = Wording()


def fit(a: Agent, b: Agent, sentences: Sequence[str], ks: Sequence[int], js: Sequence[int]) -> Maps:
    """W from layers ks of A to layers js of B, from the states at the last token of the sentences."""
    return fit_maps(a.params, b.params, read_both(a, b, sentences), ks=ks, js=js)


def own_statements(game: str) -> list[str]:
    """What A reads in a game, but none of its games: the paper's in-distribution text (appendix B.3)."""
    return sentences(f"{STATEMENTS}:{game}", SENTENCES, seed=FIT)


def read_text(text: str | None, game: str) -> list[str] | None:
    """The sentences to fit W on: none, the game's own, or another source's (`evals.sentences`). ValueError: too few."""
    if text is None:
        return None
    if text == STATEMENTS and game.endswith(".jsonl"):
        raise ValueError(
            f"--text {STATEMENTS} are of the paper's games, {game} has none of its own: name a file of sentences"
        )
    found = own_statements(game) if text == STATEMENTS else sentences(text)
    if len(found) < HELD_OUT:
        raise ValueError(f"{text} has {len(found)} sentences: fitting W needs at least {HELD_OUT}")
    return found


def plan_game(game: Game, a: Agent, b: Agent, *, max_new_tokens: int | None, wording: Wording = PLAIN, **how) -> Plan:
    """A sweep over a game: decoded if there is a number of tokens to write, else the exact match of its answers."""
    a, b = (wording.writer(game, agent) for agent in (a, b))
    tokens_a, mask_a = a.read(wording.prompts_a(game, a))
    prompts_b = wording.prompts_b(game, b)
    answers = None if max_new_tokens else b.spell(prompts_b, [i.answer for i in game.items])
    room = max_new_tokens or answers.shape[1] + 1  # pyright: ignore[reportOptionalMemberAccess]
    tokens_b, mask_b = b.read(prompts_b, room)
    return Plan(
        a.params, b.params, tokens_a, tokens_b, mask_a=mask_a, mask_b=mask_b, answers=answers,
        max_new_tokens=max_new_tokens or 1, stop_tokens=b.stop_tokens, **how,
    )  # fmt: skip


def answer_groups(game: Game, b: Agent, wording: Wording) -> list[np.ndarray]:
    """Questions whose answers have about as many tokens."""
    b = wording.writer(game, b)
    return by_length(b.spell(wording.prompts_b(game, b), [item.answer for item in game.items]))


def texts(b: Agent, tokens: np.ndarray) -> np.ndarray:
    """What tokens [.., T] say, as strings [..]. Cells say the same few things: each is put together once."""
    rows, back = np.unique(tokens.reshape(-1, tokens.shape[-1]), axis=0, return_inverse=True)
    said = b.text(Generation(rows, np.zeros(rows.shape, np.float32), (rows >= 0).sum(axis=-1)))
    return np.array(said, object)[back.reshape(tokens.shape[:-1])]


def right(said: np.ndarray, game: Game, indices: Iterable[int], metric: str) -> np.ndarray:
    """Whether texts [.., items] answer these of a game's items, by a metric of `play.METRICS`. Cells say the same few things: each
    is judged once."""
    judged = functools.cache(lambda text, i: hit(game, text, game.items[i], metric))
    return np.vectorize(judged, otypes=[bool])(said, np.array(list(indices)))


def hit(game: Game, text: str, item: Item, metric: str) -> bool:
    """Whether a reply is right, by exact or found match."""
    return exact_match(text, item.answer) if metric == "exact" else game.named(text, item) == item.answer


def layer_map(game: Game, a: Agent, b: Agent, *, maps=None, max_new_tokens: int = 16) -> np.ndarray:
    """Exact match, decoded, of `replace` at every k = 1 .. L_A (rows) and j = 1 .. L_B (columns). maps: as `sweep`'s."""
    ks, js = layers(a), layers(b)
    plan = plan_game(game, a, b, ks=ks, js=js, maps=maps, max_new_tokens=max_new_tokens)
    tokens = plan.gather([plan.run(chunk) for chunk in plan.chunks])["tokens"][0]
    return right(texts(b, tokens), game, range(len(game.items)), "exact").mean(axis=-1)


def layers(agent: Agent) -> list[int]:
    """1 .. L."""
    return list(range(1, agent.params.config.layers + 1))


# Computing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sweep as it is asked for; with the models' fingerprints and the versions it makes a run what it is."""

    games: tuple[str, ...]
    ks: tuple[int, ...]
    js: tuple[int, ...]
    grafts: tuple[str, ...]
    decode: int | None
    """Also write so many tokens in every cell."""
    text: str | None
    """W per cell: `STATEMENTS`, or a file with a sentence per line. None: no W."""
    into: int | None
    """The layer of B that W maps into, if it is not the one it is grafted at."""
    n: int | None
    seed: int
    names: str
    memory: int | None
    wording: Wording = PLAIN
    examples: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """One game, scored in one way."""

    game: str
    kind: str
    """answers or decoded"""
    reads: str
    """What A reads."""
    group: int
    questions: np.ndarray
    """Those it is about: answers are scored in groups of about one length (`layer_sweep.by_length`)."""
    plan: Plan
    chunks: tuple[Chunk, ...]
    """As they were cut when the run began: a file each. The plan's own are smaller if it goes on with less memory."""

    def name(self, index: int) -> str:
        return f"{self.game}-{self.kind}-{self.group}-{index:05d}"

    def run(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """`Plan.run`'s arrays [cells, games, ..] of one of the chunks."""
        found: dict[str, np.ndarray] = {}
        for piece in chunk.cut(self.plan.sizes):
            for name, value in self.plan.run(piece).items():
                if not value.ndim:  # what it took, which nothing here asks for
                    continue
                whole = found.setdefault(
                    name, np.zeros((len(chunk.cells), len(chunk.games), *value.shape[2:]), value.dtype)
                )
                at = lambda part, whole: slice(part.start - whole.start, part.stop - whole.start)
                whole[at(piece.cells, chunk.cells), at(piece.games, chunk.games)] = value
        return found


def columns(task: Task, chunk: Chunk, result: Mapping[str, np.ndarray], b: Agent, game: Game) -> dict[str, Any]:
    """A finished chunk as a table: one row per cell and question."""
    plan, games = task.plan, list(chunk.games)
    questions = task.questions[games]
    g, k, j = np.repeat(plan.cells[chunk.cells.start : chunk.cells.stop], len(games), axis=0).T
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    rows = {
        "game": pa.array([task.game] * len(g)),
        "sender_reads": pa.array([task.reads] * len(g)),
        "graft": pa.array(np.array(plan.grafts)[g].tolist()),
        "k": pa.array(np.array(plan.ks, np.int32)[k]),
        "j": pa.array(np.array(plan.js, np.int32)[j]),
        "question": pa.array(np.tile(questions.astype(np.int32), len(chunk.cells))),
    }
    logprobs = flat(result["logprobs"])
    if plan.answers is not None:
        answers, ends = plan.answers
        used = ((answers >= 0) | ends)[np.tile(games, len(chunk.cells))]
        rows["exact"] = pa.array(flat(result["exact"]))
        rows["logprob"] = pa.array(logprobs.sum(axis=-1))
        rows["token_logprobs"] = pa.array(
            [row[u].tolist() for row, u in zip(logprobs, used, strict=True)], pa.list_(pa.float32())
        )
        return rows
    tokens = flat(result["tokens"])
    said = texts(b, result["tokens"])
    written = tokens >= 0
    rows["text"] = pa.array(flat(said).tolist())
    for name, metric in (("hit", "exact"), ("found", "found")):
        rows[name] = pa.array(flat(right(said, game, questions, metric)))
    rows["tokens"] = pa.array([row[w].tolist() for row, w in zip(tokens, written, strict=True)], pa.list_(pa.int32()))
    rows["token_logprobs"] = pa.array(
        [row[w].tolist() for row, w in zip(logprobs, written, strict=True)], pa.list_(pa.float32())
    )
    return rows


@functools.cache
def _compiling() -> list[float]:
    """Seconds this process has spent compiling since the first call, in a list of one."""
    spent = [0.0]

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        spent[0] += duration_secs * event.startswith("/jax/core/compile")

    jax.monitoring.register_event_duration_secs_listener(add)
    return spent


def compute(folder: RunFolder, tasks: Sequence[Task], b: Agent, games: Mapping[str, Game]) -> None:
    """Every chunk that is not in the folder yet and is this process' to do. The time left is the work left at the median speed of the
    chunks of its kind that this process has done, compiling not counted; "?" while a kind has none."""
    every = [(task, i, chunk) for task in tasks for i, chunk in enumerate(task.chunks)]
    work = {t.name(i): t.plan.work(chunk) for t, i, chunk in every}
    todo = processes.mine([(t, i, chunk) for t, i, chunk in every if not folder.done(t.name(i))])
    left, paces, compiling = collections.Counter(), collections.defaultdict(list), _compiling()
    for task, i, _ in todo:
        left[task.kind] += work[task.name(i)]
    bar = tqdm.tqdm(
        total=len(every),
        initial=len(every) - len(todo),
        disable=not processes.first(),
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} chunks{postfix}",
    )
    with bar:
        for task, i, chunk in todo:
            bar.set_description(f"{task.game}, {task.kind}")
            start, compiled = time.perf_counter(), compiling[0]
            result = task.run(chunk)
            seconds = time.perf_counter() - start - (compiling[0] - compiled)
            folder.write(task.name(i), columns(task, chunk, result, b, games[task.game]))
            cost = work[task.name(i)]
            left[task.kind] -= cost
            paces[task.kind].append(seconds / cost)
            known = all(paces[kind] for kind in +left)
            still = sum(left[kind] * float(np.median(paces[kind])) for kind in +left if known)
            bar.set_postfix_str(f"{tqdm.tqdm.format_interval(still) if known else '?'} left", refresh=False)
            bar.update()


def run(
    asked: Asked, a: Agent, b: Agent, out: Path, *, resume: bool, command: str, recorded: Mapping[str, Any]
) -> None:
    """Sweeps, keeps every finished chunk, then writes results.parquet, the pictures, sweep.html and report.txt. Of several
    processes each does its share of the chunks, in one folder that all of them see.

    recorded: what else makes this run what it is; command: what to type to run it again. ValueError, OSError:
    `RunFolder`'s, before anything is computed.
    """
    drawn = [draw(g, asked.seed, asked.n, names=asked.names, examples=asked.examples) for g in asked.games]
    games = {game.name: game for game in drawn}
    if not games or len(games) < len(drawn):
        raise ValueError(f"games = {' '.join(asked.games) or 'none'}: name at least one, each once")
    if asked.into is not None:
        check_layer(b.params, asked.into, "into")
    # Placed once: every plan would put its own copy on every device.
    same, b = a.params is b.params, dataclasses.replace(b, params=spread(b.params))
    a = dataclasses.replace(a, params=b.params if same else spread(a.params))
    if few := [game for game in drawn if len(game.items) < 4]:
        raise ValueError(f"{len(few[0].items)} questions of {few[0].name}: a report on halves needs at least 4")
    how = dict(ks=asked.ks, js=asked.js, grafts=asked.grafts, wording=asked.wording)
    parts = [
        (game, kind, n, questions)
        for game, kind in itertools.product(games, ("answers", "decoded") if asked.decode else ("answers",))
        for n, questions in enumerate(
            answer_groups(games[game], b, asked.wording) if kind == "answers" else [np.arange(len(games[game].items))]
        )
    ]

    def plan_for(game: str, kind: str, questions: np.ndarray, **more) -> Plan:
        new = asked.decode if kind == "decoded" else None
        return plan_game(games[game].part(questions), a, b, max_new_tokens=new, **how, **more)

    def sizes() -> dict[str, list[int]]:
        fit = lambda game, kind, questions: plan_for(game, kind, questions, memory=asked.memory).sizes
        return {
            f"{g} {kind} {n}": list(dataclasses.astuple(fit(g, kind, questions))) for g, kind, n, questions in parts
        }

    sentences = {game.name: read_text(asked.text, name) for game, name in zip(drawn, asked.games, strict=True)}
    config = dataclasses.asdict(asked) | dict(recorded)
    if own := [game for game in drawn if "file" in game.source]:
        config |= {"games_sha256": hashlib.sha256(repr(own).encode()).hexdigest()}
    config |= {"sentences_sha256": hashlib.sha256(repr(sentences).encode()).hexdigest()}
    config |= {"fingerprint_a": fingerprint(a.params), "fingerprint_b": fingerprint(b.params), **surroundings()}
    first, agreed = processes.first(), processes.agreed
    opened = lambda first: RunFolder(
        out, config, sizes, command=command, resume=resume or not first, free={"memory"}, shared=not first
    )
    with agreed(lambda: opened(True) if first else contextlib.ExitStack()) as made:
        folder = agreed(lambda: made if isinstance(made, RunFolder) else opened(False))
        into = asked.js if asked.into is None else (asked.into,)
        fitted = lambda game, text: folder.arrays(f"maps-{game}", lambda: vars(fit(a, b, text, asked.ks, into)))["W"]
        every = lambda: {game: fitted(game, text) for game, text in sentences.items() if text is not None}
        maps = agreed(lambda: every() if first else {}) or every()
        now = folder.plan if asked.memory is None else sizes()

        def task(game: str, kind: str, n: int, questions: np.ndarray) -> Task:
            begun, fit = (plan[f"{game} {kind} {n}"] for plan in (folder.plan, now))
            plan = plan_for(game, kind, questions, maps=maps.get(game), sizes=Sizes(*map(min, begun, fit)))
            every = Chunk(range(plan.games), range(len(plan.cells)))
            return Task(game, kind, asked.wording.reads, n, questions, plan, tuple(every.cut(Sizes(*begun))))

        tasks = [task(*part) for part in parts]
        agreed(lambda: compute(folder, tasks, b, games))
        agreed(lambda: report(folder, tasks, asked, a, b, games, maps) if first else None)


# Reporting ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cells:
    """One game, [grafts, ks, js, questions]: exact match and log-probability of the answers, and of what was written, if
    anything was, the hits by each metric of `play.METRICS`."""

    exact: np.ndarray
    logprob: np.ndarray
    written: Mapping[str, np.ndarray] | None = None
    metric: str = "exact"

    @property
    def hits(self) -> np.ndarray:
        """By the metric that is reported; where nothing was written, of the answers' tokens."""
        return self.exact if self.written is None else self.written[self.metric]

    def best(self, graft: int, questions: Any = slice(None)) -> tuple[int, int]:
        """The (k, j), as indices, with most hits on these questions; of equals the one that finds the answers likeliest."""
        hits = self.hits[graft][..., questions].mean(axis=-1)
        likely = np.where(hits == hits.max(), self.logprob[graft][..., questions].mean(axis=-1), -np.inf)
        k, j = np.unravel_index(np.argmax(likely), likely.shape)
        return int(k), int(j)


def collect(
    folder: RunFolder, tasks: Sequence[Task], games: Mapping[str, Game], metric: str
) -> tuple[pa.Table, dict[str, Cells]]:
    """All finished chunks: one table, answers and decoded side by side, and per game its cells."""
    tables, cells = [], {}
    for game in games:
        own = [t for t in tasks if t.game == game]
        plan = own[0].plan
        shape = (len(plan.grafts), len(plan.ks), len(plan.js), len(games[game].items))
        joined, found = None, {}
        for kind in dict.fromkeys(t.kind for t in own):
            files = [t.name(i) for t in own if t.kind == kind for i in range(len(t.chunks))]
            table = pa.concat_tables(folder.read(name) for name in files)
            index = [
                np.array([list(values).index(v) for v in table[name].to_pylist()])
                for name, values in (("graft", plan.grafts), ("k", plan.ks), ("j", plan.js))
            ]
            order = np.lexsort((table["question"].to_numpy(), *reversed(index)))
            table = table.take(order)
            for name in {"exact", "logprob", "hit", "found"} & set(table.column_names):
                found[name] = table[name].to_numpy().reshape(shape)
            if joined is None:
                joined = table.rename_columns({"token_logprobs": "answer_logprobs"})
            else:
                for name in ("text", "hit", "found", "tokens", "token_logprobs"):
                    joined = joined.append_column(name, table[name])
        tables.append(joined)
        written = {"exact": found["hit"], "found": found["found"]} if "hit" in found else None
        cells[game] = Cells(found["exact"], found["logprob"], written, metric)
    return pa.concat_tables(tables), cells


def best_table(asked: Asked, cells: Mapping[str, Cells], most: int = 3) -> rich.table.Table:
    """The best cells of every game and graft, on all questions."""
    table = rich.table.Table()
    for column in ("game", "graft", "k", "j", "hits", "mean log-probability of the answer"):
        table.add_column(column, justify="left" if column in ("game", "graft") else "right")
    for game, found in cells.items():
        for g, graft in enumerate(asked.grafts):
            hits, likely = found.hits[g], found.logprob[g].mean(axis=-1)
            for flat in np.lexsort((-likely.ravel(), -hits.mean(axis=-1).ravel()))[:most]:
                k, j = np.unravel_index(flat, likely.shape)
                score = percent(accuracy(hits[k, j]))
                table.add_row(game, graft, str(asked.ks[k]), str(asked.js[j]), score, f"{likely[k, j]:.2f}")
    return table


@dataclasses.dataclass(frozen=True)
class Halved:
    """A cell chosen on one half of a game's questions and played, decoded, on the other; hits are question by question."""

    game: str
    graft: str
    k: int
    j: int
    chosen_on: np.ndarray
    """Which questions; there, `flattering` are its hits."""
    flattering: np.ndarray
    reported: np.ndarray
    """Which questions; there, `ours` are its hits, and those of silence and of each control."""
    ours: list[bool]
    silent: list[bool]
    controls: dict[str, list[bool]]


def halve(
    asked: Asked,
    cells: Mapping[str, Cells],
    a: Agent,
    b: Agent,
    games: Mapping[str, Game],
    maps: Mapping[str, Any],
) -> Iterator[Halved]:
    """For every game and graft: the layers that are best on half of the questions, on the other half."""
    for game, found in cells.items():
        order = np.random.default_rng([asked.seed, 4]).permutation(len(games[game].items))
        chosen_on, reported = np.split(order, [len(order) // 2])
        part, new, metric = games[game].part(reported), asked.decode or 16, shown(b, asked.wording, asked.examples)[0]

        def played(protocol: str, part=part, new=new, metric=metric, **at) -> list[bool]:
            return play(part, protocol, a, b, PlaySettings(asked.wording, max_new_tokens=new), **at).scored(metric)

        silent = played("silent")
        for g, graft in enumerate(asked.grafts):
            k, j = found.best(g, chosen_on)
            W = None if game not in maps else maps[game][k, j if maps[game].shape[1] > 1 else 0]
            at: dict[str, Any] = dict(protocol="activation", k=asked.ks[k], j=asked.js[j], graft=graft, W=W)
            controls = {name: played(**at, control=name) for name in get_args(Control)}
            yield Halved(
                game, graft, asked.ks[k], asked.js[j], chosen_on, found.hits[g, k, j, chosen_on], reported,
                played(**at), silent, controls,
            )  # fmt: skip


def halves_table(halves: Iterable[Halved]) -> rich.table.Table:
    """Both halves, and on the reported one how far the cell is above silence and above the best control."""
    table = rich.table.Table()
    for name in (
        "game",
        "graft",
        "k",
        "j",
        "half chosen on",
        "other half",
        "silent",
        "+",
        "p",
        "best control",
        "+",
        "p",
    ):
        table.add_column(name)
    for h in halves:
        name = max(h.controls, key=lambda name: np.mean(h.controls[name]))
        above = lambda others, h=h: (percent(difference(h.ours, others)), f"{sign_flip(h.ours, others):.4f}")
        score = lambda hits: percent(accuracy(hits))
        table.add_row(
            h.game, h.graft, str(h.k), str(h.j), score(h.flattering), score(h.ours), score(h.silent), *above(h.silent),
            f"{name} {score(h.controls[name])}", *above(h.controls[name]),
        )  # fmt: skip
    return table


def agreement(cells: Mapping[str, Cells]) -> Iterable[str]:
    """How often decoding and the argmax test give the same verdict."""
    for game, found in cells.items():
        if found.written is not None:
            same = found.written["exact"] == found.exact
            yield f"{game}: decoding and the exact match of the answer's tokens agree in {same.sum()} of {same.size} answers."


def report(
    folder: RunFolder,
    tasks: Sequence[Task],
    asked: Asked,
    a: Agent,
    b: Agent,
    games: Mapping[str, Game],
    maps: Mapping[str, Any],
) -> None:
    """Pictures, page and tables of a finished sweep."""
    metric, why = shown(b, asked.wording, asked.examples)
    table, cells = collect(folder, tasks, games, metric)
    on_map = metric if asked.decode else "exact"
    folder.put("results.parquet", parquet(table))
    # To the next ten above the best cell: of a small real model that is far below 100.
    top = 10.0 * np.ceil(max(1.0, *(100 * found.hits.mean(axis=-1).max() for found in cells.values())) / 10)
    measures = {
        "accuracy": (f"{on_map} match, %", (0.0, float(top)), lambda found, g: 100 * found.hits[g].mean(axis=-1)),
        "logprob": ("mean log-probability of the answer", None, lambda found, g: found.logprob[g].mean(axis=-1)),
    }
    groups = {}
    for (measure, (label, limits, value)), (g, graft) in itertools.product(measures.items(), enumerate(asked.grafts)):
        drawn = []
        for game, found in cells.items():
            values = value(found, g)
            k, j = found.best(g) if measure == "accuracy" else np.unravel_index(np.argmax(values), values.shape)
            title = f"{game.replace('_', ' ')}, {graft}"
            drawn.append(figures.LayerMap(title, values, asked.ks, asked.js, (asked.ks[k], asked.js[j])))
        groups[f"{label}, {graft}"] = label, drawn
        folder.put(f"{measure}-{graft}.png", figures.contours(drawn, label=label, columns=len(drawn), limits=limits))
    text = io.StringIO()
    parts = [
        f"{a.name} -> {b.name}, {len(asked.grafts)} x {len(asked.ks)} x {len(asked.js)} cells\n",
        f"Hits are of {METRICS[metric]} ({why}).",
        *(
            []
            if on_map == metric
            else ["Maps and best cells: exact match of the answer's tokens, since nothing was written (--decode)."]
        ),
        f"A reads: {asked.wording.reads}.\n",
        "Best cells on all questions, % [95 % interval]. The best of many look better than they are:",
        best_table(asked, cells),
        "\nLayers chosen on one half of the questions, reported on the other, %. +: points above, paired; p by sign flips:",
        halves_table(halve(asked, cells, a, b, games, maps)),
        *agreement(cells),
    ]
    for file in (sys.stdout, text):
        console = rich.console.Console(file=file, width=None if file.isatty() else 150, emoji=False, markup=False)
        for part in parts:
            console.print(part, highlight=False)
    folder.put("report.txt", text.getvalue().encode())
    folder.put("sweep.html", figures.page(f"{a.name} -> {b.name}", groups, text.getvalue()).encode())
    print(f"\n{folder.path}: results.parquet, accuracy-*.png, logprob-*.png, sweep.html, report.txt")
