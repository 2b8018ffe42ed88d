"""Plan a sweep: check it, and cut it into chunks that can be computed in any order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jaxcomm.communication import ReadPrompt, check_games, read_prompt
from jaxcomm.compiled import check_layer, check_texts, check_tokens
from jaxcomm.config import AnyArray
from jaxcomm.decoding import Decoding, check_keys
from jaxcomm.edits import Graft, GraftFunction
from jaxcomm.language_model import check_room
from jaxcomm.layer_sweep.programs import (
    Cells,
    Drawing,
    Tail,
    Targets,
    decode_cells,
    edit_states,
    map_states,
    read_answers,
    score_cells,
)
from jaxcomm.layer_sweep.sizes import FULL_ROWS, REFILLS, SCORED_ROWS, Chunk, Need, Sizes, device_memory, fit_sizes
from jaxcomm.model import Params
from jaxcomm.prompts import Prompts, as_prompts
from jaxcomm.reading import hidden_states
from jaxcomm.sharding import all_devices, by_rows, mesh_of, move, put, sweep_mesh

Progress = Callable[[int, int], None]
"""progress(done, all), called after every chunk with the numbers of finished and of all cells, counted for each item."""


class SweepOptions(Decoding, total=False):
    """Options of `sweep` and `sweep_answers`.

    Attributes:
        grafts: Names in `GRAFTS`, or functions f(a, b). Default: replace.
        maps: W for every k and j, [len(ks), len(js), D_B, D_A], or for every k, [len(ks), 1, D_B, D_A].
        memory: Bytes that a device may use besides the weights (`sizes.Need`). Default: nine tenths of the free memory, if
            the device reports it, else `sizes.MEMORY`. The results do not depend on it.
        mesh: The devices to use. Default: the mesh that B's weights are placed on (`sharding.shard`), or all of this
            process's devices.
        progress: Called after every chunk as progress(done, all), which counts cells of items.
        max_new_tokens: As in `Decoding`.
        sampling: As in `Decoding`.
        keys: Random key of each item, [G]. It is the same for all cells.
        stop_tokens: As in `Decoding`.
    """

    grafts: Sequence[GraftFunction]
    maps: Float[AnyArray, "_ _ _ _"] | None
    memory: int | None
    mesh: Mesh | None
    progress: Progress | None


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a sweep.

    Attributes:
        ks: Layers of A.
        js: Layers of B.
        grafts: Names in `GRAFTS`, or functions f(a, b).
        maps: As in `SweepOptions`.

    Raises:
        ValueError: One of `ks`, `js` and `grafts` is empty, or names the same value twice; there is no such graft.
    """

    ks: Sequence[int]
    js: Sequence[int]
    grafts: Sequence[GraftFunction] = ("replace",)
    maps: Float[AnyArray, "_ _ DB DA"] | None = None

    def __post_init__(self):
        for name in ("ks", "js", "grafts"):
            values = [x if name == "grafts" else int(x) for x in getattr(self, name)]
            if not values:
                raise ValueError(f"{name} is empty: a sweep needs at least one")
            if repeated := [v for i, v in enumerate(values) if v in values[:i]]:
                raise ValueError(f"{name} names {repeated[0]} twice: leave out the duplicate")
            object.__setattr__(self, name, tuple(values))
        for f in self.grafts:
            Graft(f)

    def check(self, params_a: Params, params_b: Params) -> None:
        """Checks that the models have these layers and widths.

        Args:
            params_a: The sender A.
            params_b: The receiver B.

        Raises:
            ValueError: A layer is out of range; the maps have a wrong shape.
        """
        for k in self.ks:
            check_layer(params_a, k)
        for j in self.js:
            check_layer(params_b, j, "j")
        shapes = [(len(self.ks), n, params_b.config.width, params_a.config.width) for n in (len(self.js), 1)]
        if self.maps is not None and self.maps.shape not in shapes:
            raise ValueError(
                f"maps is {self.maps.shape}: give one W per (k, j), {shapes[0]}, or one per k, {shapes[1]}"
            )

    @functools.cached_property
    def cells(self) -> Int[np.ndarray, "C 3"]:
        """All cells as indices (graft, k, j) into the requested values, in the order of computation: by j."""
        every = itertools.product(*(range(len(values)) for values in (self.grafts, self.ks, self.js)))
        return np.array(sorted(every, key=lambda cell: self.js[cell[2]]), np.int32)

    def map(self, k: Any, j: Any) -> np.ndarray:
        """Returns the map of one pair of layers, on the host. A chunk uses one map at a time.

        Args:
            k: Index into `ks`.
            j: Index into `js`.

        Returns:
            W, [D_B, D_A].
        """
        assert self.maps is not None
        return np.asarray(self.maps[k, j if self.maps.shape[1] > 1 else 0])


@dataclasses.dataclass(frozen=True)
class Shared:
    """Data that all cells of some games share: A's states [ks, G, D_A], B's own [js, G, D_B], B's prompts, the answers."""

    sent: Array
    own: Array
    prompt: ReadPrompt
    keys: Key[Array, "G"] | None
    answers: tuple[Targets, Tail] | None


class Plan:
    """One sweep. The arguments are those of `sweep` or, with answers, of `sweep_answers`; `sizes` replaces the budget."""

    def __init__(
        self,
        params_a: Params,
        params_b: Params,
        prompts_a: Prompts | AnyArray,
        prompts_b: Prompts | AnyArray,
        grid: Grid,
        answers: Int[AnyArray, "_ T"] | None = None,
        sizes: Sizes | None = None,
        **options: Unpack[SweepOptions],
    ):
        grid.check(params_a, params_b)
        self.grid, self.options = grid, options
        self.prompts = as_prompts(prompts_a), as_prompts(prompts_b)
        self.games, self.sampling, self.keys = len(self.prompts[1]), options.get("sampling"), options.get("keys")
        check_games(*self.prompts)
        if not self.games:
            raise ValueError("there are no prompts: a sweep needs at least one item")
        if self.sampling is not None and self.keys is None and self.sampling.greedy:
            self.sampling = None
        if self.sampling is not None:
            check_keys(self.keys, self.games, "item")
        if (new := options.get("max_new_tokens", 16 if answers is None else 1)) < 1:
            raise ValueError(f"max_new_tokens = {new}: it must be at least 1")
        self.stop_tokens = jnp.asarray(np.unique(np.asarray(options.get("stop_tokens", ()), np.int32)))
        self.answers = None if answers is None else self._targets(np.asarray(answers))
        if answers is not None:
            check_texts(params_b, answers, "answers")
        self.new = new if self.answers is None else self.answers[0].shape[1]
        for params, prompts, room in zip((params_a, params_b), self.prompts, (0, self.new), strict=True):
            check_tokens(params, prompts)
            check_room(params, prompts, room)
        self._place(params_a, params_b, sizes)
        self.chunks = tuple(Chunk(range(self.games), range(len(grid.cells))).cut(self.sizes))
        self._read_games: tuple[range, Shared] | None = None

    def _targets(self, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [G, T] (-1: none) and ends [G, T]. With stop tokens, one more column holds the end."""
        if answers.ndim != 2 or len(answers) != self.games:
            raise ValueError(f"{len(answers)} answers for {self.games} items: give one row of tokens per item")
        if found := sorted({int(i) for i in answers.ravel()} & {int(i) for i in np.asarray(self.stop_tokens)}):
            raise ValueError(
                f"an answer contains the stop token {found[0]}: leave it out, the end is asked for by itself"
            )
        lengths = (answers >= 0).sum(axis=1)
        if not lengths.all() or np.any((answers >= 0) != (np.arange(answers.shape[1]) < lengths[:, None])):
            raise ValueError("an answer is at least one token, with -1 after its end and nowhere else")
        if len(self.stop_tokens):
            answers = np.pad(answers, ((0, 0), (0, 1)), constant_values=-1)
        ends = (np.arange(answers.shape[1]) == lengths[:, None]) & (len(self.stop_tokens) > 0)
        return answers.astype(np.int32), ends

    def _place(self, params_a: Params, params_b: Params, sizes: Sizes | None) -> None:
        """Choose the sizes of the chunks, and put the models on the mesh. A sender on its own devices stays there; its
        states are moved to the receiver's."""
        mesh = self.options.get("mesh") or mesh_of(params_b) or all_devices()
        self.sizes = sizes or self._fit(params_a, params_b, mesh)
        self.mesh = None if mesh is None else sweep_mesh(mesh, self.sizes.games)
        place = lambda params: move(params, self.mesh) if self.mesh and mesh_of(params) else put(self.mesh, params)
        self.params_b = place(params_b)
        home = mesh_of(params_a)
        self.apart = home is not None and (mesh is None or {*home.devices.flat} != {*mesh.devices.flat})
        if params_a is params_b:
            self.params_a = self.params_b
        else:
            self.params_a = params_a if self.apart else place(params_a)

    def need(self, params_a: Params, params_b: Params) -> Need:
        """The quantities that a chunk's memory depends on."""
        return Need(
            params_a.config,
            params_b.config,
            params_b.dtype.itemsize,
            columns=(self.prompts[0].shape[1], self.prompts[1].shape[1]),
            new=self.new,
            decoding=self.answers is None,
            sampling=self.sampling is not None,
            mapped=self.grid.maps is not None,
        )

    def _fit(self, params_a: Params, params_b: Params, mesh: Mesh | None) -> Sizes:
        devices = params_b.embed.devices() if mesh is None else mesh.devices.flat
        memory, need = self.options.get("memory"), self.need(params_a, params_b)
        budget = min(map(device_memory, devices)) if memory is None else memory
        rows, refills = (FULL_ROWS, REFILLS) if self.answers is None else (SCORED_ROWS // self.new, 1)
        rows *= 1 if mesh is None else sweep_mesh(mesh, 1).shape["cells"]

        def bytes_of(sizes: Sizes) -> int:
            shape = {"games": 1, "cells": 1} if mesh is None else sweep_mesh(mesh, sizes.games).shape
            return need.bytes(sizes, (shape["games"], shape["cells"]))

        return fit_sizes(self.games, len(self.grid.cells), budget, bytes_of, rows, refills)

    def shared(self, games: range) -> Shared:
        """Data that all cells of these games share. Computed once, because chunks of the same games are consecutive."""
        if self._read_games is None or self._read_games[0] != games:
            self._read_games = None  # free the previous games' data first
            self._read_games = games, self._read(games)
        return self._read_games[1]

    def _read(self, games: range) -> Shared:
        rows = np.minimum(np.arange(games.start, games.start + self.sizes.games), self.games - 1)
        place = lambda a: put(self.mesh, jnp.asarray(np.asarray(a)[rows]), "games")
        there = lambda a: by_rows(self.params_a, jnp.asarray(np.asarray(a)[rows])) if self.apart else place(a)
        whole = lambda p: p if p.mask is not None else p.replace(mask=np.ones(p.shape, bool))
        prompts_a = jax.tree.map(there, whole(self.prompts[0]))
        prompts_b = jax.tree.map(place, whole(self.prompts[1]))
        states = hidden_states(self.params_a, prompts_a, last=True)
        prompt = read_prompt(self.params_b, prompts_b)
        keys = None if self.keys is None else put(self.mesh, self.keys[jnp.asarray(rows)], "games")
        answers = None
        if self.answers is not None:
            tokens, ends = map(place, self.answers)
            targets = Targets(tokens, ends, self.stop_tokens)
            answers = targets, read_answers(self.params_b, prompt, targets.tokens)
        sent = put(self.mesh, states[np.array(self.grid.ks)], None, "games")
        own = prompt.states[np.array(self.grid.js)]
        return Shared(sent, own, prompt, keys, answers)

    def run(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """Compute a chunk, and return on the host: tokens, logprobs [cells, games, T] and forwarded; or exact [cells, games]
        and logprobs."""
        shared = self.shared(chunk.games)
        rows = np.minimum(np.arange(chunk.cells.start, chunk.cells.start + self.sizes.cells), chunk.cells.stop - 1)
        named = self.grid.cells[rows]
        edits = edit_states(self._sent(shared.sent, named), shared.own, jnp.asarray(named), grafts=self.grid.grafts)
        layers = jnp.asarray(np.array(self.grid.js, np.int32)[named[:, 2]])
        cells, steps = Cells(edits[:, :, None], None, layers), None
        if shared.answers is None:
            count = np.where(np.arange(self.sizes.games) < len(chunk.games), len(chunk.cells), 0).astype(np.int32)
            tokens, logprobs, steps = decode_cells(
                self.params_b, shared.prompt, cells, put(self.mesh, jnp.asarray(count), "games"),
                Drawing(self.stop_tokens, self.sampling, shared.keys), slots=self.sizes.slots, max_new_tokens=self.new,
                mesh=self.mesh,
            )  # fmt: skip
            out = {"tokens": tokens, "logprobs": logprobs}
        else:
            targets, tail = shared.answers
            exact, logprobs = score_cells(self.params_b, tail, cells, targets, mesh=self.mesh)
            out = {"exact": exact, "logprobs": logprobs}
        trim = lambda a: np.swapaxes(np.asarray(a), 0, 1)[: len(chunk.cells), : len(chunk.games)]
        host = {name: trim(a) for name, a in jax.device_get(out).items()}
        if steps is not None:
            host["forwarded"] = np.asarray(np.int64(steps) * self.sizes.games * self.sizes.slots)
        return host

    def _sent(self, sent: Array, cells: np.ndarray) -> Array:
        """A's states as they arrive in every cell, after the maps, [C, G, D]."""
        if self.grid.maps is None:
            return sent[cells[:, 1]]
        width = self.params_b.config.width
        through = lambda k, j: map_states(sent[k], put(self.mesh, jnp.asarray(self.grid.map(k, j))), width=width)
        return jnp.stack([through(k, j).block_until_ready() for _, k, j in cells])  # one W at a time

    def work(self, chunk: Chunk) -> int:
        """Upper bound on a chunk's token-layers: tokens of all cells times the blocks that each goes through."""
        layers = np.array(self.grid.js)[self.grid.cells[chunk.cells.start : chunk.cells.stop, 2]]
        blocks = self.params_b.config.layers - (0 if self.answers is None else layers.min())
        return int(self.sizes.games * self.sizes.cells * self.new * max(blocks, 1))

    def gather(self, results: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The chunks' results, in the order of `chunks`, as arrays [grafts, ks, js, games, ..]."""
        out: dict[str, np.ndarray] = {}
        for chunk, result in zip(self.chunks, results, strict=True):
            g, k, j = self.grid.cells[chunk.cells.start : chunk.cells.stop].T
            for name, value in result.items():
                if value.ndim == 0:
                    out[name] = out.get(name, np.int64(0)) + value
                    continue
                axes = (len(self.grid.grafts), len(self.grid.ks), len(self.grid.js), self.games)
                whole = out.setdefault(name, np.zeros((*axes, *value.shape[2:]), value.dtype))
                whole[g, k, j, chunk.games.start : chunk.games.stop] = value
        return out
