"""The cells of a finished sweep: hits at every graft, layer pair and question, and the best cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import rich.table

from ..games import Game
from ..runs import RunFolder
from ..scores import accuracy, percent
from .parts import Job, SweepSettings


@dataclasses.dataclass(frozen=True)
class Cells:
    """The results of one game at every cell. A cell is a graft and a layer pair (k, j).

    Arrays are [grafts, K, J, questions], where K and J are the numbers of layers k and j.

    Attributes:
        exact: Whether greedy decoding would generate the tokens of the answer.
        logprob: Log-probability of the answer, in nats.
        written: For each metric ("exact", "found"), whether the decoded text is right. None: nothing was decoded.
        metric: The metric of the report.
        other: The same cells with another question's message. None: they were not played.
        alone: B alone, as a single cell. None: it was not played.
    """

    exact: np.ndarray
    logprob: np.ndarray
    written: Mapping[str, np.ndarray] | None = None
    metric: str = "exact"
    other: Cells | None = None
    alone: Cells | None = None

    @property
    def hits(self) -> np.ndarray:
        """The reported hits, [grafts, K, J, questions]: for decoded texts if there are any, else for the answers' tokens."""
        return self.exact if self.written is None else self.written[self.metric]

    def best(self, graft: int, questions: Any = slice(None)) -> tuple[int, int]:
        """Finds the best cell of a graft.

        Args:
            graft: Index of the graft.
            questions: Indices of the questions to use. Default: all.

        Returns:
            Indices of the k and j with most hits. Among equal cells, the one with the highest log-probability of the
            answers.
        """
        hits = self.hits[graft][..., questions].mean(axis=-1)
        likely = np.where(hits == hits.max(), self.logprob[graft][..., questions].mean(axis=-1), -np.inf)
        k, j = np.unravel_index(np.argmax(likely), likely.shape)
        return int(k), int(j)


def collect(
    folder: RunFolder, jobs: Sequence[Job], games: Mapping[str, Game], metric: str
) -> tuple[pa.Table, dict[str, Cells]]:
    """Reads all finished chunks of a sweep.

    Args:
        folder: The run folder.
        jobs: The jobs of the sweep. All of their chunks are finished.
        games: The games, by name.
        metric: The metric of the report.

    Returns:
        One table with a row for each cell and question, and the cells of each game.

    Raises:
        ValueError: A chunk is missing or damaged.
    """
    tables, cells = [], {}
    for game in games:
        own = [job for job in jobs if job.part.game == game]
        joined, found = None, {}
        for message in dict.fromkeys(job.part.message for job in own):
            table, found[message] = _played(folder, [job for job in own if job.part.message == message], metric)
            if joined is None:
                joined = table
            elif message == "other":
                for name in ("exact", "logprob", *(("text", "hit", "found") if "hit" in table.column_names else ())):
                    joined = joined.append_column(f"other_{name}", table[name])
            else:
                for name in ("exact", "logprob"):
                    each = getattr(found[message], name)[0, 0, 0][joined["question"].to_numpy()]
                    joined = joined.append_column(f"alone_{name}", pa.array(each))
        tables.append(joined)
        cells[game] = dataclasses.replace(found["own"], other=found.get("other"), alone=found.get("none"))
    return pa.concat_tables(tables), cells


def _played(folder: RunFolder, jobs: Sequence[Job], metric: str) -> tuple[pa.Table, Cells]:
    """All cells of a game with one kind of message: a row for each cell and question, and the arrays of `Cells`."""
    grid, joined, found = jobs[0].plan.grid, None, {}
    grafts = [f if isinstance(f, str) else "none" for f in grid.grafts]
    shape = (len(grafts), len(grid.ks), len(grid.js), -1)
    for kind in dict.fromkeys(job.part.kind for job in jobs):
        files = [job.name(i) for job in jobs if job.part.kind == kind for i in range(len(job.chunks))]
        table = pa.concat_tables(folder.read(name) for name in files)
        index = [
            np.array([list(values).index(v) for v in table[name].to_pylist()])
            for name, values in (("graft", grafts), ("k", grid.ks), ("j", grid.js))
        ]
        table = table.take(np.lexsort((table["question"].to_numpy(), *reversed(index))))
        for name in {"exact", "logprob", "hit", "found"} & set(table.column_names):
            found[name] = table[name].to_numpy().reshape(shape)
        if joined is None:
            joined = table.rename_columns({"token_logprobs": "answer_logprobs"})
        else:
            for name in ("text", "hit", "found", "tokens", "token_logprobs"):
                joined = joined.append_column(name, table[name])
    written = {"exact": found["hit"], "found": found["found"]} if "hit" in found else None
    assert joined is not None  # a game has answers
    return joined, Cells(found["exact"], found["logprob"], written, metric)


def best_table(settings: SweepSettings, cells: Mapping[str, Cells], most: int = 3) -> rich.table.Table:
    """Makes the table of the best cells of every game and graft, on all questions.

    Args:
        settings: The settings of the sweep.
        cells: The cells of each game.
        most: Number of cells for each game and graft.

    Returns:
        The table. Hits are in %, with 95 % intervals.
    """
    table = rich.table.Table()
    for column in ("game", "graft", "k", "j", "hits", "mean log-probability of the answer"):
        table.add_column(column, justify="left" if column in ("game", "graft") else "right")
    for game, found in cells.items():
        for g, graft in enumerate(settings.grafts):
            hits, likely = found.hits[g], found.logprob[g].mean(axis=-1)
            for flat in np.lexsort((-likely.ravel(), -hits.mean(axis=-1).ravel()))[:most]:
                k, j = np.unravel_index(flat, likely.shape)
                score = percent(accuracy(hits[k, j]))
                table.add_row(game, graft, str(settings.ks[k]), str(settings.js[j]), score, f"{likely[k, j]:.2f}")
    return table


def agreement(cells: Mapping[str, Cells]) -> Iterable[str]:
    """Says how often decoding and the exact match of the answer's tokens agree.

    Args:
        cells: The cells of each game.

    Yields:
        One sentence for each game that was decoded.
    """
    for game, found in cells.items():
        if found.written is not None:
            same = found.written["exact"] == found.exact
            yield f"{game}: decoding and the exact match of the answer's tokens agree in {same.sum()} of {same.size} answers."
