"""The compiled programs of a sweep: read the prompts once for all cells, then decode cells or score answers.

All cells continue from one reading of B's prompts. A row is a game. Its cells are branches of the row
(`attention.Segment`): they all attend to the same keys and values of the prompt, without copies.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcomm.cache import Attended, KVCache
from jaxcomm.communication import ReadPrompt, read_in_two
from jaxcomm.decoding import Sampling, choose, top_and_total
from jaxcomm.edits import Read, apply_graft, hook_of, through_map
from jaxcomm.language_model import positions_of
from jaxcomm.layers import Hook
from jaxcomm.model import enter, run_blocks, unembed
from jaxcomm.prompts import Prompts
from jaxcomm.sharding import constrain
from jaxcomm.sites import Site


class _Slots(struct.PyTreeNode):
    step: Int[Array, ""]
    cell: Int[Array, "G R"]
    """[G, R] the cell that each slot works on. An index past the last cell means idle."""
    t: Int[Array, "G R"]
    """[G, R] number of tokens that the slot has written for this cell."""
    token: Int[Array, "G R"]
    following: Int[Array, "G"]
    """[G] the next cell that no slot has begun."""
    tokens: Int[Array, "G C T"]
    logprobs: Float[Array, "G C T"]
    cache: KVCache


class Cells(struct.PyTreeNode):
    """The edits of every cell.

    Attributes:
        edits: [G, C, n, ...], the new states.
        columns: [G, C, n], their columns in the tail (U: no column); None: n is 1, and it is the first column.
        layers: [C], the layer of each cell's edit.
    """

    edits: Float[Array, "G C n *_"]
    columns: Int[Array, "G C n"] | None
    layers: Int[Array, "C"]

    def write(self, x: Any, active: Any) -> Any:
        """x [G, C, U, ...] with the edits of the active cells [C]."""
        if self.columns is None:
            new = x.at[:, :, 0].set(self.edits[:, :, 0])
        else:
            (G, C), at = x.shape[:2], self.columns
            new = x.at[jnp.arange(G)[:, None, None], jnp.arange(C)[:, None], at].set(self.edits, mode="drop")
        return jnp.where(active.reshape(-1, *(1,) * (x.ndim - 2)), new, x)


class Drawing(struct.PyTreeNode):
    """How to choose tokens: greedily without `sampling`, else with a key [G] for every item. stops [S]: stop tokens."""

    stops: Int[Array, "S"]
    sampling: Sampling | None = None
    keys: Key[Array, "G"] | None = None

    def draw(self, logits: Any, t: Any) -> Any:
        """Choose tokens [G, R] from logits [G, R, V]. t: index of each token in its text."""
        drawn = None
        if self.keys is not None:
            drawn = jax.vmap(lambda key, t: jax.vmap(lambda t: jax.random.fold_in(key, t))(t))(self.keys, t)
        return jax.vmap(lambda logits, drawn: choose(logits, self.sampling, drawn))(logits, drawn)


@functools.partial(jax.jit, static_argnames=("slots", "max_new_tokens", "mesh"))
def decode_cells(params, prompt: ReadPrompt, cells: Cells, count, drawing: Drawing, *, slots, max_new_tokens, mesh):
    """tokens, logprobs [G, C, T] of the first `count` [G] cells of every item, and the number of steps."""
    (G, C), T = cells.edits.shape[:2], max_new_tokens
    end = prompt.last.positions
    split = functools.partial(constrain, mesh)

    def step(s: _Slots) -> _Slots:
        active = s.cell < count[:, None]
        fresh = active & (s.t == 0)
        cell = jnp.minimum(s.cell, C - 1)
        edit = jnp.take_along_axis(cells.edits[:, :, 0], cell[..., None], axis=1)
        at = jnp.where(fresh, cells.layers[cell], -1)

        def graft(site, i, h, state):
            return split(jnp.where((at == i)[..., None], edit, h), "games", "cells"), state

        # A cell begins with the prompt's last token. It is read again from its embedding, and edited at the cell's layer.
        ids = jnp.where(fresh, prompt.token[:, None], s.token)
        positions, column = jnp.where(active, end + s.t, -1), s.step % T
        cleared = jnp.where(fresh[..., None], -1, s.cache.positions)
        cache = s.cache.replace(positions=cleared).announce(positions, column)
        h, hook = enter(params, ids, positions, Hook(graft, (), frozenset(["resid_post"])))
        attended = Attended((prompt.earlier,), cache, column)
        h, cache, _ = run_blocks(params, h, positions, attended=attended, hook=hook)
        logits = unembed(params, h)

        token = drawing.draw(logits, s.t)
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        logprob = chosen - top_and_total(logits)[1]
        write = jax.vmap(lambda out, cell, t, new: out.at[cell, t].set(new, mode="drop"))
        ended = active & (jnp.isin(token, drawing.stops) | (s.t + 1 == T))
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

    start = _start_slots(params, (G, C), T, slots, split)
    done = jax.lax.while_loop(lambda s: jnp.any(s.cell < count[:, None]), step, start)
    return done.tokens, done.logprobs, done.step


def _start_slots(params, shape: tuple[int, int], T: int, slots: int, split) -> _Slots:
    """Initial slots: each has its own cell, and no token is written."""
    G, C = shape
    empty = params.empty_cache(G, T, slots)
    lead = () if params.unrolled else (None,)
    by_row = lambda a: split(a, *lead, "games", jax.sharding.PartitionSpec.UNCONSTRAINED, "cells")
    return _Slots(
        step=jnp.int32(0),
        cell=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (G, slots)),
        t=jnp.zeros((G, slots), jnp.int32),
        token=jnp.zeros((G, slots), jnp.int32),
        following=jnp.full(G, slots, jnp.int32),
        tokens=jnp.full((G, C, T), -1, jnp.int32),
        logprobs=jnp.zeros((G, C, T), jnp.float32),
        cache=empty.replace(k=jax.tree.map(by_row, empty.k), v=jax.tree.map(by_row, empty.v)),
    )


class Tail(struct.PyTreeNode):
    """The end of B's prompts and the answers, read once without edits: U tokens, from the first token that any cell edits.

    Attributes:
        states: [L + 1, G, U, D], their streams h[0] .. h[L].
        earlier: Keys and values of the tokens before them.
        positions: [G, U].
    """

    states: Float[Array, "_ G U D"]
    earlier: KVCache
    positions: Int[Array, "G U"]


class Targets(struct.PyTreeNode):
    """Answers [G, T] (-1: no token), `ends` [G, T] (True where a stop token must follow), and the stop tokens [S]."""

    tokens: Int[Array, "G T"]
    ends: Bool[Array, "G T"]
    stops: Int[Array, "S"]


@functools.partial(jax.jit, static_argnames=("site", "mesh"))
def score_cells(params, tail: Tail, cells: Cells, targets: Targets, *, site: str = "resid_post", mesh=None):
    """exact [G, C] and logprobs [G, C, T] of answers after B's prompts, edited at a site."""
    (G, C), (U, D) = cells.edits.shape[:2], tail.states.shape[2:]
    positions = jnp.broadcast_to(tail.positions[:, None], (G, C, U)).reshape(G, C * U)
    entry = cells.layers - int(site != "resid_post")

    def at(name, i, x, state):
        """At the layer that a cell edits, load its unedited stream: everything below the edit is the same without it."""

        def change(x):
            x = x.reshape(G, C, U, *x.shape[2:])
            if name == "resid_post":
                known = jax.lax.dynamic_index_in_dim(tail.states, i, keepdims=False)[:, None]
                x = jnp.where((entry == i)[:, None, None], jnp.broadcast_to(known, (G, C, U, D)), x)
            x = cells.write(x, cells.layers == i) if name == site else x
            return x.reshape(G, C * U, *x.shape[3:])

        x = jax.lax.cond(jnp.any((entry if name == "resid_post" else cells.layers) == i), change, lambda x: x, x)
        if name == "resid_post":
            x = constrain(mesh, x.reshape(G, C, U, D), "games", "cells").reshape(G, C * U, D)
        return x, state

    first = jnp.min(entry)
    hook = Hook(at, (), frozenset(["resid_post", site]))
    h, hook = hook("resid_post", first, jnp.zeros((G, C * U, D), tail.states.dtype))
    attended = Attended((tail.earlier,), branches=C)
    h, *_ = run_blocks(params, h, positions, (first, None), attended=attended, hook=hook)
    T = targets.tokens.shape[1]
    return _judge(params, h.reshape(G, C, U, D)[:, :, U - T :], targets)


def _judge(params, h, targets: Targets):
    """Score the answers' tokens from the streams h[L] [G, C, T, D] before them: exact [G, C], logprobs [G, C, T]."""

    def column(t):
        # Column by column, so that no second array of the logits' size is needed.
        logits = unembed(params, h[:, :, t])
        most, everything = top_and_total(logits)
        answer, end = targets.tokens[:, t, None], targets.ends[:, t, None]
        token = jnp.take_along_axis(logits, jnp.maximum(answer, 0)[..., None], axis=-1)[..., 0]
        hit, found = token >= most, token
        if targets.stops.size:
            stops = logits[..., targets.stops]
            hit = jnp.where(end, jnp.max(stops, axis=-1) >= most, hit)
            found = jnp.where(end, jax.nn.logsumexp(stops, axis=-1), found)
        asked = end | (answer >= 0)
        return hit | ~asked, jnp.where(asked, found - everything, 0.0)

    hits, logprobs = jax.lax.map(column, jnp.arange(h.shape[2]))
    return jnp.all(hits, axis=0), jnp.moveaxis(logprobs, 0, -1)


@functools.partial(jax.jit, static_argnames="grafts")
def edit_states(sent, own, cells, *, grafts):
    """f(a, b) of every cell, [G, C, D]: sent [C, G, _], own [J, G, D], cells [C, 3] (graft, k, j as indices)."""
    functions = [functools.partial(apply_graft, f) for f in grafts]
    one = lambda x: jax.lax.switch(x[1][0], functions, x[0], own[x[1][2]])
    return jnp.swapaxes(jax.lax.map(one, (sent, cells)), 0, 1)


map_states = jax.jit(through_map, static_argnames="width")


@jax.jit
def read_answers(params, prompt: ReadPrompt, answers) -> Tail:
    """Read the last prompt token and the answers [G, T] after it, without edits."""
    tokens = jnp.maximum(answers[:, :-1], 0)
    positions = prompt.last.positions + jnp.arange(answers.shape[1])
    states = prompt.states[:, :, None]
    if tokens.shape[1]:
        read = Read(Site("resid_post", 0), tuple(range(params.config.layers + 1)))
        h, hook = enter(params, tokens, positions[:, 1:], hook_of(params, positions[:, 1:], reads=[read]))
        attended = Attended((prompt.earlier, prompt.last))
        (more,) = run_blocks(params, h, positions[:, 1:], attended=attended, hook=hook)[2]
        states = jnp.concatenate([states, more], axis=2)
    return Tail(states, prompt.earlier, positions)


@functools.partial(jax.jit, static_argnames=("site", "length"))
def read_tail(params, prompts: Prompts, answers, *, site: str, length: int):
    """Read B's prompts and the answers after them, without edits. Cells edit the last `length` prompt tokens. Returns the
    tail, and the site's activations at every layer [L', G, P, ...]."""
    tokens = jnp.concatenate([prompts.tokens, jnp.maximum(answers[:, :-1], 0)], axis=1)
    places = positions_of(prompts)
    following = places[:, -1:] + 1 + jnp.arange(answers.shape[1] - 1, dtype=jnp.int32)
    positions = jnp.concatenate([places, following], axis=1)
    reads = [Read(Site("resid_post", 0), tuple(range(params.config.layers + 1))), layers_of(site, params.config.layers)]
    begin = prompts.shape[1] - length
    (states, own), earlier, _ = read_in_two(params, tokens, positions, reads, tail=tokens.shape[1] - begin)
    return Tail(states[:, :, begin:], earlier, positions[:, begin:]), own[:, :, : prompts.shape[1]]


def layers_of(site: str, layers: int) -> Read:
    """The `Read` of a site at every layer."""
    return Read(Site(site, 1), tuple(range(int(site != "resid_post"), layers + 1)))
