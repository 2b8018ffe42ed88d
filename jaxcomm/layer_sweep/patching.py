"""Activation patching: replace B's activation by A's, at every site, layer and position.

The cells of a map differ only in the layers above the edit, from the first edited token on. So A's and B's prompts are
read once. Every cell starts at the layer and column that it edits, all in parallel (`programs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxcomm.communication import check_games
from jaxcomm.compiled import check_texts, check_tokens
from jaxcomm.config import AnyArray
from jaxcomm.edits import Change, Context, hook_of, replace
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.layer_sweep.programs import Cells, Targets, layers_of, read_tail, score_cells
from jaxcomm.layer_sweep.sizes import SCORED_ROWS
from jaxcomm.model import Params, enter, run_blocks
from jaxcomm.prompts import Prompts, as_prompts
from jaxcomm.sites import SITES, Positions, Site, check_positions, check_site, columns_of, differs


class PatchOptions(TypedDict, total=False):
    """Options of `patch`: the cells of a map.

    Attributes:
        sites: Names of sites with layers. Default: resid_post.
        layers: Numbers of layers. Default: all layers of each site.
        positions: Positions, as a `Site` takes them, for A's prompts and for B's, aligned at their ends. Default: every
            token that all prompts have, counted from their ends.
        change: How A's activation changes B's (`edits.Change`). Default: replace.
        sent: Function of A's activations at all of its tokens, [layers, G, P, ...], applied before they go to B; for
            example, differences between tokens. Default: no change.
        progress: Called after every chunk as progress(done, all), which counts cells of items.
    """

    sites: Sequence[str]
    layers: Sequence[int]
    positions: Sequence[Positions]
    change: Change
    sent: Callable[[jax.Array], jax.Array]
    progress: Callable[[int, int], None]


class Patching(struct.PyTreeNode):
    """Scores of given answers in every cell of a patching map.

    Attributes:
        logprobs: Log-probability of each token of the answers in nats, [sites, layers, positions, G, T]. 0 after the
            end of an answer. NaN where a site has no such layer.
        exact: Whether greedy decoding gives the answer, [sites, layers, positions, G].
        layers: Numbers of the layers on the second axis.
        positions: Positions on the third axis.

    Example:
        >>> jc.patch(params, params, prompts, prompts, np.array([[5], [6]]), layers=[2, 3]).layers
        (2, 3)
    """

    logprobs: Float[np.ndarray, "sites layers positions G T"]
    exact: Bool[np.ndarray, "sites layers positions G"]
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    positions: tuple[Positions, ...] = struct.field(pytree_node=False)


def patch(
    params_a: Params,
    params_b: Params,
    prompts_a: Prompts | AnyArray,
    prompts_b: Prompts | AnyArray,
    answers: Int[AnyArray, "G T"],
    **options: Unpack[PatchOptions],
) -> Patching:
    """Scores B's answers with A's activation instead of B's own (activation patching).

    There is one score for each site, layer and position.

    Args:
        params_a: The model that the activations come from, usually the same model.
        params_b: The model that they go to. It has the same width and number of layers.
        prompts_a: A's prompts (the clean run), one for each item.
        prompts_b: B's prompts (the corrupted run), one for each item.
        answers: Token ids [G, T]; -1 after the end of an answer.
        **options: Options of `PatchOptions`.

    Returns:
        The map, on the host.

    Raises:
        ValueError: A site cannot be edited; a layer or position is out of range; the models have other shapes; there is
            not one answer for each prompt.

    Example:
        >>> found = jc.patch(params, params, prompts, prompts, np.array([[5], [6]]), sites=["resid_post", "mlp_out"])
        >>> found.logprobs.shape
        (2, 5, 2, 2, 1)
    """
    both, answers = (as_prompts(prompts_a), as_prompts(prompts_b)), np.asarray(answers)
    check_games(*both)
    sites, layers, positions = _grid(options, params_b, both)
    _check(params_a, params_b, both, answers, (sites, layers, positions))
    columns = _columns(positions, both)
    begin, length = int(columns[1].min()), both[1].shape[1] - int(columns[1].min())
    targets = Targets(jnp.asarray(answers), jnp.zeros(answers.shape, bool), jnp.zeros(0, jnp.int32))
    size = max(1, SCORED_ROWS // (len(answers) * (length + answers.shape[1] - 1)))
    chunks = [_chunks(site, layers, len(positions), size) for site in sites]
    shape = (len(sites), len(layers), len(positions), len(answers))
    count = lambda cells: len(np.unique(cells, axis=0)) * len(answers)
    done, every = 0, sum(count(cells) for own in chunks for cells in own)
    logprobs, exact = np.full((*shape, answers.shape[1]), np.nan, np.float32), np.zeros(shape, bool)
    for s, site in enumerate(sites):
        sent = options.get("sent", lambda states: states)(_activations(params_a, both[0], site))
        read = (sent, *read_tail(params_b, _masked(both[1]), targets.tokens, site=site, length=length))
        for cells in chunks[s]:
            at, where = np.array(layers, np.int32)[cells[:, 0]], [jnp.asarray(x[:, cells[:, 1]]) for x in columns]
            change = options.get("change", replace)
            found = _patch_cells(params_b, read, at, where, targets, begin=begin, site=site, change=change)
            exact[s, *cells.T], logprobs[s, *cells.T] = (np.swapaxes(np.asarray(x), 0, 1) for x in found)
            done += count(cells)
            options.get("progress", lambda done, all: None)(done, every)
    return Patching(logprobs, exact, layers, positions)


def _grid(options: PatchOptions, params: Params, both: Sequence[Prompts]) -> tuple[tuple, tuple, tuple]:
    """The requested sites, layers and positions, or all that exist."""
    sites = tuple(options.get("sites", ("resid_post",)))
    layers = tuple(options.get("layers", range(int("resid_post" not in sites), params.config.layers + 1)))
    shortest = min(int(_mask(p).sum(axis=1).min()) for p in both)
    return sites, layers, tuple(options.get("positions", range(-shortest, 0)))


def _chunks(site: str, layers: Sequence[int], positions: int, size: int) -> list[np.ndarray]:
    """A site's cells as indices of layer and position, in chunks of `size`. The last chunk repeats its last cell."""
    has = [i for i, layer in enumerate(layers) if layer or site == "resid_post"]
    cells = np.array([(i, p) for i in has for p in range(positions)])
    rows = np.minimum(np.arange(-(-len(cells) // size) * size), len(cells) - 1)
    return list(cells[rows].reshape(-1, size, 2))


@functools.partial(jax.jit, static_argnames=("begin", "site", "change"))
def _patch_cells(params, read, layers, where, targets: Targets, *, begin: int, site: str, change: Change):
    """Compute a chunk: the cells' new states, and the scores of the answers. where: columns [G, C, n] of A's prompts and of
    B's, and B's positions (`_columns`)."""
    (sent, tail, own), (columns_a, columns_b, places) = read, where
    index = layers - int(site != "resid_post")

    def at(states, columns):
        """[L', G, P, ...] at every cell's layer and columns: [G, C, n, ...]."""
        games = jnp.arange(columns.shape[0])[:, None, None]
        return states[index[None, :, None], games, jnp.minimum(columns, states.shape[2] - 1)]

    message, state = at(sent, columns_a), at(own, columns_b)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    new = change(flat(state), flat(message), Context(site, jnp.tile(layers, len(state)), flat(places))).reshape(
        state.shape
    )
    there = jnp.where((columns_a < sent.shape[2]) & (columns_b < own.shape[2]), columns_b - begin, tail.states.shape[2])
    return score_cells(params, tail, Cells(new.astype(state.dtype), there, layers), targets, site=site)


@functools.partial(jax.jit, static_argnames="site")
def _activations(params, prompts: Prompts, site: str):
    """A site's activations at every layer, [L', G, P, ...]."""
    positions = positions_of(prompts)
    h, hook = enter(
        params, prompts.tokens, positions, hook_of(params, positions, reads=[layers_of(site, params.config.layers)])
    )
    return run_blocks(params, h, positions, hook=hook)[2][0]


def _mask(prompts: Prompts) -> np.ndarray:
    """Which columns hold a token."""
    return np.ones(prompts.shape, bool) if prompts.mask is None else np.asarray(prompts.mask)


def _masked(prompts: Prompts) -> Prompts:
    return Prompts(jnp.asarray(prompts.tokens), jnp.asarray(_mask(prompts)))


def _columns(positions: Sequence[Any], both: Sequence[Prompts]) -> list[np.ndarray]:
    """Columns [G, positions, n] of A's prompts and of B's, aligned at their ends, and B's positions there. A missing column is
    the prompts' width, and its position -1."""
    found = [[_chosen(at, prompts) for at in positions] for prompts in both]
    most = max(row.shape[1] for rows in found for row in rows)
    widths = [prompts.shape[1] for prompts in both]
    pad = lambda row, width: np.pad(row, ((0, 0), (most - row.shape[1], 0)), constant_values=width)
    whole = [np.stack([pad(row, width) for row in rows], axis=1) for rows, width in zip(found, widths, strict=True)]
    used = (whole[0] < widths[0]).any(axis=(0, 1)) & (whole[1] < widths[1]).any(axis=(0, 1))
    rows = np.pad(np.asarray(positions_of(both[1])), ((0, 0), (0, 1)), constant_values=-1)
    return [x[..., used] for x in (*whole, np.take_along_axis(rows[:, None], whole[1], axis=2))]


def _chosen(positions: Any, prompts: Prompts) -> np.ndarray:
    index, valid = columns_of(positions, positions_of(prompts))
    index = np.broadcast_to(np.arange(prompts.shape[1]), prompts.shape) if index is None else np.asarray(index)
    return index if valid is None else np.where(valid, index, prompts.shape[1])


def _check(params_a: Params, params_b: Params, both: Sequence[Prompts], answers: np.ndarray, grid: tuple) -> None:
    """Raises ValueError for a map that cannot be computed."""
    a, b, (sites, layers, positions) = params_a.config, params_b.config, grid
    shape = lambda c: (c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.layer_heads)
    if shape(a) != shape(b):
        raise ValueError(
            f"patching needs two models of one shape, got layers, width, heads .. {shape(a)} and {shape(b)}: use sweep for others"
        )
    if answers.ndim != 2 or len(answers) != len(both[1]) or not (answers[:, :1] >= 0).all():
        raise ValueError(f"answers are {answers.shape} for {len(both[1])} items: give one row of tokens per item")
    for name, values in (("sites", sites), ("layers", layers), ("positions", positions)):
        if not values:
            raise ValueError(f"{name} is empty: a map needs at least one")
    for site in sites:
        if site not in SITES or not (SITES[site].layered and SITES[site].writable):
            raise ValueError(
                f"{site!r} is no site of a layer that can be edited: choose from {', '.join(s for s, x in SITES.items() if x.layered and x.writable)}"
            )
        if differs(b, site):
            raise ValueError(
                f"{site} is not the same in all layers of this model: patch a site of the stream, such as attn_out"
            )
        for layer in layers:
            check_site(b, Site(site, max(layer, int(site != "resid_post"))))
    check_texts(params_b, answers, "answers")
    for params, prompts in zip((params_a, params_b), both, strict=True):
        check_tokens(params, prompts)
        check_room(params, prompts, answers.shape[1])
        for at in positions:
            check_positions(Site("resid_post", 0, at), prompts)
