"""Every (graft, k, j) of activation communication in one program.

Cells of a sweep differ in B's last prompt token above layer j and in what B says then, in nothing else. So A reads its
prompts once (the last token's h_A of all layers), B reads its own once (`communication.read_prompt`), and the cells go on
from there, all games side by side: a row is a game, its cells are branches of it (`layers.Segment`) that attend to the
one prompt where it lies. Nothing is read twice and no program depends on which layers are tried.

`sweep` decodes: a game has a number of slots, and a slot whose cell has stopped takes the game's next one, so that no cell
waits for a longer one. All slots write the same column of their caches at every step, in a ring; where their tokens stand
is said by positions alone. `sweep_answers` decodes nothing: the streams of given answers below j are the same
for every cell, so they are computed once and each cell runs blocks j + 1 .. L_B on the answer's tokens, all in parallel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcomm.cache import KVCache
from jaxcomm.communication import Prompt, read_prompt
from jaxcomm.compiled import check_layer, check_prompts, check_texts
from jaxcomm.config import AnyArray, ModelConfig
from jaxcomm.decoding import Sampling, check_keys, choose, top_and_total
from jaxcomm.flops import block_weights
from jaxcomm.graft import Graft, apply_graft, carry, resolve
from jaxcomm.model import Params, check_room, embed, hidden_states, recorder, run_blocks, unembed
from jaxcomm.sharding import all_devices, by_rows, constrain, grid, mesh_of, move, put

MEMORY = 2**30
"""Bytes for a sweep's own arrays on a device that does not say how much it has (CPU)."""
FULL_ROWS = 2048
"""Tokens in flight per device; on two CPU cores 550 to 6050 of them were equally fast, so more only cost memory."""
SCORED_ROWS = 768
"""The same where answers are scored: a chunk goes through all blocks above its lowest j, so small ones do less."""
REFILLS = 8
"""Cells per slot in a chunk: the last ones leave slots idle, for about one cell's length of so many."""


class Sweep(struct.PyTreeNode):
    """tokens and logprobs [grafts, ks, js, games, T] and lengths [grafts, ks, js, games], each as `Generation` has them;
    `forwarded`: tokens that went through all of B's blocks for the cells, idle slots included."""

    tokens: Any
    logprobs: Any
    lengths: Any
    forwarded: Any


class AnswerSweep(struct.PyTreeNode):
    """exact [grafts, ks, js, games]: greedy decoding gives the answer. logprobs [grafts, ks, js, games, T]: of its tokens, the
    end included where there is one, 0 after it."""

    exact: Any
    logprobs: Any


class _Slots(struct.PyTreeNode):
    step: Any
    cell: Any
    """[G, R] which cell a slot works on; past the last one: idle."""
    t: Any
    """[G, R] tokens it has written for it."""
    token: Any
    following: Any
    """[G] the next cell nobody has begun."""
    tokens: Any
    logprobs: Any
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("slots", "max_new_tokens", "mesh"))
def _decode(
    params, prompt: Prompt, last, edits, layers, count, stop_tokens, sampling, keys, *, slots, max_new_tokens, mesh
):
    """tokens, logprobs [G, C, T] of the first `count` [G] cells of every game: edits [G, C, D] at layers [C], after
    prompts whose last tokens are `last` [G]. Also the number of steps."""
    (G, C), T = edits.shape[:2], max_new_tokens
    end = prompt.last.positions
    split = functools.partial(constrain, mesh)

    def step(s: _Slots) -> _Slots:
        active = s.cell < count[:, None]
        fresh = active & (s.t == 0)
        cell = jnp.minimum(s.cell, C - 1)
        edit = jnp.take_along_axis(edits, cell[..., None], axis=1)
        at = jnp.where(fresh, layers[cell], -1)
        graft = lambda h, state, i: (split(jnp.where((at == i)[..., None], edit, h), "games", "cells"), state)

        # A cell begins with the prompt's last token, read again from its embedding and edited on its way up.
        ids = jnp.where(fresh, last[:, None], s.token)
        positions, column = jnp.where(active, end + s.t, -1), s.step % T
        cleared = jnp.where(fresh[..., None], -1, s.cache.positions)
        cache = s.cache.replace(positions=cleared).announce(positions, column)
        h, _ = graft(embed(params, ids, positions), None, 0)
        h, cache, _ = run_blocks(
            params, h, positions, past=(prompt.earlier,), cache=cache, column=column, visit=(graft, None)
        )
        logits = unembed(params, h)

        drawn = None
        if keys is not None:
            drawn = jax.vmap(lambda key, t: jax.vmap(lambda t: jax.random.fold_in(key, t))(t))(keys, s.t)
        token = jax.vmap(lambda logits, drawn: choose(logits, sampling, drawn))(logits, drawn)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        logprob = chosen - top_and_total(logits)[1]
        write = jax.vmap(lambda out, cell, t, new: out.at[cell, t].set(new, mode="drop"))
        ended = active & (jnp.isin(token, stop_tokens) | (s.t + 1 == T))
        return _Slots(
            step=s.step + 1,
            cell=jnp.where(ended, s.following[:, None] + jnp.cumsum(ended, axis=1, dtype=jnp.int32) - 1, s.cell),
            t=jnp.where(ended, 0, s.t + 1),
            token=token,
            following=s.following + jnp.sum(ended, axis=1, dtype=jnp.int32),
            tokens=write(s.tokens, jnp.where(active, s.cell, C), s.t, token),
            logprobs=write(s.logprobs, jnp.where(active, s.cell, C), s.t, logprob),
            cache=cache,
        )

    empty = params.empty_cache(G, T, slots)
    lead = () if params.unrolled else (None,)
    by_row = lambda a: split(a, *lead, "games", jax.sharding.PartitionSpec.UNCONSTRAINED, "cells")
    start = _Slots(
        step=jnp.int32(0),
        cell=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (G, slots)),
        t=jnp.zeros((G, slots), jnp.int32),
        token=jnp.zeros((G, slots), jnp.int32),
        following=jnp.full(G, slots, jnp.int32),
        tokens=jnp.full((G, C, T), -1, jnp.int32),
        logprobs=jnp.zeros((G, C, T), jnp.float32),
        cache=empty.replace(k=jax.tree.map(by_row, empty.k), v=jax.tree.map(by_row, empty.v)),
    )
    done = jax.lax.while_loop(lambda s: jnp.any(s.cell < count[:, None]), step, start)
    return done.tokens, done.logprobs, done.step


@functools.partial(jax.jit, static_argnames="mesh")
def _score(params, prompt: Prompt, states, edits, layers, answers, ends, stop_tokens, *, mesh):
    """exact [G, C] and logprobs [G, C, T] of answers [G, T] (-1: no token) whose `ends` [G, T] is True where a stop token
    must come. states [L + 1, G, T, D]: of the prompts' last tokens and of the answers' as they are without an edit."""
    (G, C, D), T = edits.shape, answers.shape[1]
    positions = jnp.broadcast_to((prompt.last.positions + jnp.arange(T))[:, None], (G, C, T)).reshape(G, C * T)

    def enter(h, state, i):
        """Cells whose layer this is begin here: all they have passed is as it was without the edit."""

        def begin(h):
            known = jax.lax.dynamic_index_in_dim(states, i, keepdims=False)[:, None]
            known = jnp.broadcast_to(known, (G, C, T, D)).at[:, :, 0].set(edits)
            return jnp.where((layers == i)[:, None, None], known, h)

        h = jax.lax.cond(jnp.any(layers == i), begin, lambda h: h, h.reshape(G, C, T, D))
        return constrain(mesh, h, "games", "cells").reshape(G, C * T, D), state

    first = jnp.min(layers)
    h, _ = enter(jnp.zeros((G, C * T, D), edits.dtype), None, first)
    h, *_ = run_blocks(params, h, positions, first, past=(prompt.earlier,), branches=C, visit=(enter, None))

    def column(t):
        # No second array of the logits' size is written.
        logits = unembed(params, h.reshape(G, C, T, D)[:, :, t])
        most, everything = top_and_total(logits)
        answer, end = answers[:, t, None], ends[:, t, None]
        token = jnp.take_along_axis(logits, jnp.maximum(answer, 0)[..., None], axis=-1)[..., 0]
        hit, found = token >= most, token
        if stop_tokens.size:
            stops = logits[..., stop_tokens]
            hit = jnp.where(end, jnp.max(stops, axis=-1) >= most, hit)
            found = jnp.where(end, jax.nn.logsumexp(stops, axis=-1), found)
        asked = end | (answer >= 0)
        return hit | ~asked, jnp.where(asked, found - everything, 0.0)

    hits, logprobs = jax.lax.map(column, jnp.arange(T))
    return jnp.all(hits, axis=0), jnp.moveaxis(logprobs, 0, -1)


@functools.partial(jax.jit, static_argnames="grafts")
def _edits(sent, own, cells, *, grafts):
    """f(a, b) of every cell, [G, C, D]: sent [C, G, _], own [J, G, D], cells [C, 3] (graft, k, j as indices)."""
    functions = [functools.partial(apply_graft, f) for f in grafts]
    one = lambda x: jax.lax.switch(x[1][0], functions, x[0], own[x[1][2]])
    return jnp.swapaxes(jax.lax.map(one, (sent, cells)), 0, 1)


_carry = jax.jit(carry, static_argnames="width")


@jax.jit
def _read_answers(params, prompt: Prompt, tokens):
    """The last prompt token's and the answers' streams h[0] .. h[L] with no edit, [L + 1, G, T, D]."""
    if not tokens.shape[1]:
        return prompt.states[:, :, None]
    positions = prompt.last.positions + 1 + jnp.arange(tokens.shape[1])
    h = embed(params, tokens, positions)
    past = (prompt.earlier, prompt.last)
    states = run_blocks(params, h, positions, past=past, visit=recorder(params, h, last=False))[2]
    return jnp.concatenate([prompt.states[:, :, None], states], axis=2)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is computed at once: games x cells, with `slots` cells of a game in flight when decoding."""

    games: int
    cells: int
    slots: int


def peak_bytes(
    config_a: ModelConfig,
    config: ModelConfig,
    itemsize: int,
    *,
    sizes: Sizes,
    columns_a: int,
    columns: int,
    new: int,
    decoding: bool,
    sampling: bool = False,
    mapped: bool = False,
    devices: tuple[int, int] = (1, 1),
) -> int:
    """Most bytes a device needs for a chunk beside the weights.

    With s the bytes of a number, G games, R slots of each, C cells, P columns of B's prompt, T new tokens and B's own
    letters (G and R, C a device's share of them), the largest of

        reading    G P (4 D + 2 F) s + 8 G N P^2                    (B's prompts; likewise A's)
        decoding   G R (2 L K H T s + max(8 N (P + T) + (4 D + 2 F) s, 8 V))          (sampling: 32 V)
        answers    G C max(T (8 N (P + T) + (6 D + 2 F) s), 8 V + 2 T D s)

    (F of all experts a token goes through, and 4 D more for each of them)

    plus what stays: the prompts' K/V and states 2 L K H G P s + (L + 1) G (D + D_A + T D) s, what is sent, edits and
    results G C ((D + D_A) s + 8 T), and one layer's weights and K/V (XLA on CPU copies them out of their stacks).
    With maps also 4 D D_A: one W is on the device at a time.
    """
    c, a, s = config, config_a, itemsize
    by_game, by_cell = devices
    G, C, P, T = sizes.games // by_game, sizes.cells, columns, new
    R = -(-(sizes.slots if decoding else C) // by_cell)
    kv = 2 * c.kv_heads * c.head_dim * s

    # What a token's way through the MLP takes.
    mlp = lambda m: max(1, m.experts_per_token) * 2 * m.ff + m.experts_per_token * 4 * m.width
    reading = lambda m, P: G * P * (4 * m.width + mlp(m)) * s + 8 * G * m.heads * P * P

    every = dataclasses.replace(c, experts_per_token=c.experts)  # a layer's, not a token's
    stays = c.layers * G * P * kv + G * ((c.layers + 1) * (c.width + T * c.width) + (a.layers + 1) * a.width) * s
    stays += G * C * ((c.width + a.width) * s + 8 * T) + block_weights(every) * s + G * P * kv
    stays += 4 * c.width * a.width * mapped
    scores = 8 * c.heads * (P + T)
    if decoding:
        row = (c.layers + 1) * T * kv + max(scores + (4 * c.width + mlp(c)) * s, (32 if sampling else 8) * c.vocab)
    else:
        row = max(T * (scores + (6 * c.width + mlp(c)) * s), 8 * c.vocab + 2 * T * c.width * s)
    return stays + max(reading(a, columns_a), reading(c, P), G * R * row)


def device_memory(device) -> int:
    """Bytes a sweep may take on a device: nine tenths of what is free, or `MEMORY` where the device does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return MEMORY
    return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))


def fit_sizes(games: int, cells: int, budget: int, need: Callable[[Sizes], int], rows: int, refills: int) -> Sizes:
    """The largest chunk that stays within `budget` bytes and has no more than `rows` cells of games in flight, which is
    enough to be fast. Games are cut last: every cut reads prompts in smaller batches, and none is read twice.

    ValueError if not even one cell of one game fits.
    """
    even = lambda total, most: -(-total // -(-total // most))
    halves = lambda n: [-(-n // 2**i) for i in range(n.bit_length() + 1)]
    for g in halves(games):
        g = even(games, g)
        for slots in halves(min(cells, max(1, rows // g))):
            for c in sorted({even(cells, min(cells, slots * n)) for n in (1, refills)}, reverse=True):
                sizes = Sizes(g, c, even(c, min(slots, c)))
                if need(sizes) <= budget:
                    return sizes
    raise ValueError(
        f"a memory budget of {budget} bytes is too small: one cell of one game needs {need(Sizes(1, 1, 1))} beside the weights"
    )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Games, and rows of `Plan.cells`, that are computed together."""

    games: range
    cells: range

    def cut(self, sizes: Sizes) -> Iterator[Chunk]:
        """Into chunks of these sizes; those of the same games follow each other."""
        parts = lambda whole, size: [whole[i : i + size] for i in range(0, len(whole), size)]
        for games, cells in itertools.product(parts(self.games, sizes.games), parts(self.cells, sizes.cells)):
            yield Chunk(games, cells)


class Plan:
    """One sweep, checked and cut into chunks that can be computed in any order, each once.

    Takes what `sweep` and `sweep_answers` take (answers decide which it is), and `sizes` instead of a memory budget.
    cells [C, 3]: graft, k, j as indices into what was asked for, in the order they are computed.
    """

    def __init__(
        self,
        params_a: Params,
        params_b: Params,
        tokens_a: Int[AnyArray, "_ PA"],
        tokens_b: Int[AnyArray, "G PB"],
        *,
        ks: Sequence[int],
        js: Sequence[int],
        grafts: Sequence[Graft] = ("replace",),
        maps: Float[AnyArray, "_ _ _ _"] | None = None,
        mask_a: Bool[AnyArray, "_ PA"] | None = None,
        mask_b: Bool[AnyArray, "G PB"] | None = None,
        answers: Int[AnyArray, "_ T"] | None = None,
        max_new_tokens: int = 1,
        sampling: Sampling | None = None,
        keys: Key[Array, "G"] | None = None,
        stop_tokens: Sequence[int] | AnyArray = (),
        memory: int | None = None,
        sizes: Sizes | None = None,
        mesh: Mesh | None = None,
    ):
        asked = {"ks": [int(k) for k in ks], "js": [int(j) for j in js], "grafts": list(grafts)}
        for name, values in asked.items():
            if not values:
                raise ValueError(f"{name} is empty: a sweep needs at least one")
            if repeated := [v for i, v in enumerate(values) if v in values[:i]]:
                raise ValueError(f"{name} names {repeated[0]} twice: leave out the duplicate")
        self.ks, self.js, self.grafts = asked["ks"], asked["js"], tuple(grafts)
        for layer in self.ks:
            check_layer(params_a, layer)
        for layer in self.js:
            check_layer(params_b, layer, "j")
        for graft in self.grafts:
            resolve(graft)
        self.games = len(tokens_b)
        if len(tokens_a) != self.games or not self.games:
            raise ValueError(
                f"A has {len(tokens_a)} prompts, B has {self.games}: give one of each per game, and at least one"
            )
        shapes = [(len(self.ks), n, params_b.config.width, params_a.config.width) for n in (len(self.js), 1)]
        if maps is not None and maps.shape not in shapes:
            raise ValueError(f"maps is {maps.shape}: give one W per (k, j), {shapes[0]}, or one per k, {shapes[1]}")
        if sampling is not None:
            check_keys(keys, len(tokens_b), "game")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: it must be at least 1")

        self.stop_tokens = jnp.asarray(np.unique(np.asarray(stop_tokens, np.int32)))
        self.sampling, self.keys = sampling, keys
        self.answers = None if answers is None else self._targets(np.asarray(answers))
        if answers is not None:
            check_texts(params_b, answers, "answers")
        self.new = max_new_tokens if self.answers is None else self.answers[0].shape[1]
        check_prompts(params_a, tokens_a, mask_a)
        check_prompts(params_b, tokens_b, mask_b)
        check_room(params_a, tokens_a)
        check_room(params_b, tokens_b, self.new)
        whole = lambda tokens, mask: np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
        self.prompts = [(np.asarray(t), whole(t, m)) for t, m in ((tokens_a, mask_a), (tokens_b, mask_b))]

        every = itertools.product(*(range(len(values)) for values in (self.grafts, self.ks, self.js)))
        self.cells = np.array(sorted(every, key=lambda cell: self.js[cell[2]]), np.int32)
        # On the host: a chunk takes one W at a time.
        self.maps = None if maps is None else np.broadcast_to(maps, (len(self.ks), len(self.js), *maps.shape[2:]))
        mesh = mesh or mesh_of(params_b) or all_devices()
        self.sizes = sizes or self._fit(params_a, params_b, mesh, memory)
        self.mesh = None if mesh is None else grid(mesh, self.sizes.games)
        place = lambda params: move(params, self.mesh) if self.mesh and mesh_of(params) else put(self.mesh, params)
        self.params_b = place(params_b)
        home = mesh_of(params_a)
        self.apart = home is not None and (mesh is None or {*home.devices.flat} != {*mesh.devices.flat})
        if params_a is params_b:
            self.params_a = self.params_b
        else:  # a sender on devices of its own stays there; what it sends is brought here
            self.params_a = params_a if self.apart else place(params_a)
        self.chunks = tuple(Chunk(range(self.games), range(len(self.cells))).cut(self.sizes))
        self._prompts_read: tuple[range, Any] | None = None

    def _targets(self, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [G, T] (-1: none) and ends [G, T]: a column for the end follows if there are stop tokens."""
        if answers.ndim != 2 or len(answers) != self.games:
            raise ValueError(f"{len(answers)} answers for {self.games} games: give one row of tokens per game")
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

    def need(self, params_a: Params, params_b: Params, mesh: Mesh | None, sizes: Sizes) -> int:
        """`peak_bytes` of a chunk of these sizes, per device."""
        shape = {"games": 1, "cells": 1} if mesh is None else grid(mesh, sizes.games).shape
        return peak_bytes(
            params_a.config,
            params_b.config,
            params_b.dtype.itemsize,
            sizes=sizes,
            columns_a=self.prompts[0][0].shape[1],
            columns=self.prompts[1][0].shape[1],
            new=self.new,
            decoding=self.answers is None,
            sampling=self.sampling is not None,
            mapped=self.maps is not None,
            devices=(shape["games"], shape["cells"]),
        )

    def _fit(self, params_a: Params, params_b: Params, mesh: Mesh | None, memory: int | None) -> Sizes:
        devices = params_b.embed.devices() if mesh is None else mesh.devices.flat
        budget = min(map(device_memory, devices)) if memory is None else memory
        rows, refills = (FULL_ROWS, REFILLS) if self.answers is None else (SCORED_ROWS // self.new, 1)
        rows *= 1 if mesh is None else grid(mesh, 1).shape["cells"]
        need = functools.partial(self.need, params_a, params_b, mesh)
        return fit_sizes(self.games, len(self.cells), budget, need, rows, refills)

    def _read(self, games: range):
        """What all cells of these games share. Read once: chunks of the same games follow each other."""
        if self._prompts_read is None or self._prompts_read[0] != games:
            self._prompts_read = None  # frees the last games' first
            rows = np.minimum(np.arange(games.start, games.start + self.sizes.games), self.games - 1)
            place = lambda a: put(self.mesh, jnp.asarray(a[rows]), "games")
            prompt_a, (tokens_b, mask_b) = self.prompts[0], map(place, self.prompts[1])
            there = lambda a: by_rows(self.params_a, jnp.asarray(a[rows])) if self.apart else place(a)
            tokens_a, mask_a = map(there, prompt_a)
            states = hidden_states(self.params_a, tokens_a, mask=mask_a, last=True)
            prompt = read_prompt(self.params_b, tokens_b, mask=mask_b)
            keys = None if self.keys is None else place(self.keys)
            answers = None
            if self.answers is not None:
                targets, ends = map(place, self.answers)
                answers = targets, ends, _read_answers(self.params_b, prompt, jnp.maximum(targets[:, :-1], 0))
            sent = put(self.mesh, states[np.array(self.ks)], None, "games")
            own = prompt.states[np.array(self.js)]
            self._prompts_read = games, (sent, own, prompt, tokens_b[:, -1], keys, answers)
        return self._prompts_read[1]

    def run(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """tokens, logprobs [cells, games, T] and forwarded, or exact [cells, games] and logprobs; on the host."""
        sent, own, prompt, last, keys, answers = self._read(chunk.games)
        rows = np.minimum(np.arange(chunk.cells.start, chunk.cells.start + self.sizes.cells), chunk.cells.stop - 1)
        cells = self.cells[rows]
        if (maps := self.maps) is None:
            sent = sent[cells[:, 1]]
        else:
            width = self.params_b.config.width
            through = lambda k, j: _carry(sent[k], put(self.mesh, jnp.asarray(maps[k, j])), width=width)
            sent = jnp.stack([through(k, j).block_until_ready() for _, k, j in cells])  # one W at a time
        edits = _edits(sent, own, jnp.asarray(cells), grafts=self.grafts)
        layers = jnp.asarray(np.array(self.js, np.int32)[cells[:, 2]])
        if answers is None:
            count = np.where(np.arange(self.sizes.games) < len(chunk.games), len(chunk.cells), 0).astype(np.int32)
            tokens, logprobs, steps = _decode(
                self.params_b, prompt, last, edits, layers, put(self.mesh, jnp.asarray(count), "games"), self.stop_tokens,
                self.sampling, keys, slots=self.sizes.slots, max_new_tokens=self.new, mesh=self.mesh,
            )  # fmt: skip
            out = {"tokens": tokens, "logprobs": logprobs}
        else:
            targets, ends, states = answers
            exact, logprobs = _score(
                self.params_b, prompt, states, edits, layers, targets, ends, self.stop_tokens, mesh=self.mesh
            )
            steps, out = None, {"exact": exact, "logprobs": logprobs}
        trim = lambda a: np.swapaxes(np.asarray(a), 0, 1)[: len(chunk.cells), : len(chunk.games)]
        host = {name: trim(a) for name, a in jax.device_get(out).items()}
        if steps is not None:
            host["forwarded"] = np.asarray(np.int64(steps) * self.sizes.games * self.sizes.slots)
        return host

    def work(self, chunk: Chunk) -> int:
        """Token-layers a chunk may take: tokens of all cells times the blocks each goes through."""
        layers = np.array(self.js)[self.cells[chunk.cells.start : chunk.cells.stop, 2]]
        blocks = self.params_b.config.layers - (0 if self.answers is None else layers.min())
        return int(self.sizes.games * self.sizes.cells * self.new * max(blocks, 1))

    def gather(self, results: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The chunks' results, in the order of `chunks`, as arrays [grafts, ks, js, games, ..]."""
        out: dict[str, np.ndarray] = {}
        for chunk, result in zip(self.chunks, results, strict=True):
            g, k, j = self.cells[chunk.cells.start : chunk.cells.stop].T
            for name, value in result.items():
                if value.ndim == 0:
                    out[name] = out.get(name, np.int64(0)) + value
                    continue
                shape = (len(self.grafts), len(self.ks), len(self.js), self.games, *value.shape[2:])
                whole = out.setdefault(name, np.zeros(shape, value.dtype))
                whole[g, k, j, chunk.games.start : chunk.games.stop] = value
        return out


def sweep(
    params_a: Params,
    params_b: Params,
    tokens_a: Int[AnyArray, "_ PA"],
    tokens_b: Int[AnyArray, "G PB"],
    *,
    ks: Sequence[int],
    js: Sequence[int],
    grafts: Sequence[Graft] = ("replace",),
    maps: Float[AnyArray, "_ _ _ _"] | None = None,
    mask_a: Bool[AnyArray, "_ PA"] | None = None,
    mask_b: Bool[AnyArray, "G PB"] | None = None,
    max_new_tokens: int = 16,
    sampling: Sampling | None = None,
    keys: Key[Array, "G"] | None = None,
    stop_tokens: Sequence[int] | AnyArray = (),
    memory: int | None = None,
    mesh: Mesh | None = None,
) -> Sweep:
    """What B says after its prompt in every cell: `communicate` at every (graft, k, j), for every game (the search of
    Ramesh & Li 2025, section 4.1 and Figure 2).

    maps: W for every k and j, [len(ks), len(js), D_B, D_A], or for every k, [len(ks), 1, D_B, D_A]. keys: one per game,
    the same for all cells. memory: bytes a device may use beside the weights (`peak_bytes`); default: nine tenths of
    what is free where the device tells, else `MEMORY`. The tokens do not depend on it.
    mesh: default: the one B's weights are placed on (`sharding.shard`), or all of this process's devices.

    The result lies on the host. ValueError: ks, js or grafts empty, repeated or out of range; unequal numbers of prompts, maps of
    a wrong shape, prompts too long, a budget too small for one cell.
    """
    plan = Plan(
        params_a, params_b, tokens_a, tokens_b, ks=ks, js=js, grafts=grafts, maps=maps, mask_a=mask_a, mask_b=mask_b,
        max_new_tokens=max_new_tokens, sampling=sampling, keys=keys, stop_tokens=stop_tokens, memory=memory, mesh=mesh,
    )  # fmt: skip
    out = plan.gather([plan.run(chunk) for chunk in plan.chunks])
    return Sweep(lengths=(out["tokens"] >= 0).sum(axis=-1), **out)


def sweep_answers(
    params_a: Params,
    params_b: Params,
    tokens_a: Int[AnyArray, "_ PA"],
    tokens_b: Int[AnyArray, "G PB"],
    answers: Int[AnyArray, "_ T"],
    *,
    ks: Sequence[int],
    js: Sequence[int],
    grafts: Sequence[Graft] = ("replace",),
    maps: Float[AnyArray, "_ _ _ _"] | None = None,
    mask_a: Bool[AnyArray, "_ PA"] | None = None,
    mask_b: Bool[AnyArray, "G PB"] | None = None,
    stop_tokens: Sequence[int] | AnyArray = (),
    memory: int | None = None,
    mesh: Mesh | None = None,
) -> AnswerSweep:
    """Whether greedy decoding would give these answers in every cell, and how likely they are, without decoding.

    Greedy decoding writes a given token sequence if and only if, read with the sequence in place, every token of it is
    the argmax. answers [G, T]: -1 after the end of one. With `stop_tokens` a stop token has to follow, whichever.
    Answers of about one length are scored together (`by_length`), by a program of their own.
    This is about tokens: where the same string has another spelling in tokens, decoding may give the string and not these.
    The other arguments and errors are `sweep`'s.
    """
    answers = np.asarray(answers)
    cut = lambda mask, rows: None if mask is None else np.asarray(mask)[rows]
    found: dict[str, np.ndarray] = {}
    alike = {len(x) for x in (answers, tokens_a, tokens_b, mask_a, mask_b) if x is not None}
    for rows in by_length(answers) if len(alike) == 1 else [slice(None)]:  # which is refused
        plan = Plan(
            params_a, params_b, tokens_a[rows], tokens_b[rows], ks=ks, js=js, grafts=grafts, maps=maps,
            mask_a=cut(mask_a, rows), mask_b=cut(mask_b, rows), answers=shortened(answers[rows]),
            stop_tokens=stop_tokens, memory=memory, mesh=mesh,
        )  # fmt: skip
        ends = len(plan.stop_tokens) > 0
        for name, part in plan.gather([plan.run(chunk) for chunk in plan.chunks]).items():
            longest = (answers.shape[1] + ends,) if name == "logprobs" else ()
            whole = found.setdefault(name, np.zeros((*part.shape[:3], len(answers), *longest), part.dtype))
            whole[(slice(None),) * 3 + (rows,) + ((slice(part.shape[-1]),) if longest else ())] = part
    return AnswerSweep(**found)


def by_length(answers: Int[AnyArray, "G T"]) -> list[np.ndarray]:
    """Games whose answers (-1 after the end of one) have about as many tokens, as indices: short answers need not take as long as
    the longest. Few groups, since each has a program of its own."""
    lengths = np.maximum((np.asarray(answers) >= 0).sum(axis=1), 1)
    classes = np.where(lengths <= 4, lengths, 2 ** np.ceil(np.log2(lengths)).astype(int))
    groups, held = [], np.array([], int)
    for size in np.unique(classes):
        held = np.concatenate([held, np.flatnonzero(classes == size)])
        if len(held) >= max(4, len(lengths) // 8):
            groups, held = [*groups, np.sort(held)], held[:0]
    if len(held):  # too few of the longest: with those before them
        groups[-1:] = [np.sort(np.concatenate([*groups[-1:], held]))]
    return groups


def shortened(answers: np.ndarray) -> np.ndarray:
    """Answers without columns in which none has a token."""
    used = np.flatnonzero((answers >= 0).any(axis=0))
    return answers[:, : used[-1] + 1] if len(used) else answers
