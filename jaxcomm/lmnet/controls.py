"""Controls in networks: the messages are the states on edges, and a control replaces them.

A layer of vertices reads only the edges into it. So these edges carry all the information that later layers get. With
another item's messages on all of them, at all positions, the network behaves as if it had read the other item.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcomm.cache import Attended
from jaxcomm.compiled import check_texts, check_tokens
from jaxcomm.config import AnyArray, NetworkConfig
from jaxcomm.controls import Drawn, derange, stand_in
from jaxcomm.decoding import score_with
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.lmnet.network import Network
from jaxcomm.messages import Message
from jaxcomm.prompts import Prompts, as_prompts


def edge_sets(config: NetworkConfig) -> dict[str, dict[str, np.ndarray]]:
    """Lists the sets of edges that a control can replace.

    Args:
        config: Architecture of the network.

    Returns:
        Sets by name: "no edges", "all edges", "edges into layer 1" and so on, and every single edge, such as
        "edge 0.0 -> 1.1". Vertices are numbered within their layer, from 0. A set is a dict with a mask, bool [I, J], for
        every stack of edges (`NetworkConfig.stacks`).

    Example:
        >>> from jaxcomm.lmnet import edge_sets, init_network
        >>> network = init_network(jax.random.key(0), params, widths=(1, 1, 1), edge="linear")
        >>> list(edge_sets(network.config))[1:]
        ['all edges', 'edges into layer 1', 'edges into layer 2', 'edge 0.0 -> 1.0', 'edge 1.0 -> 2.0']
    """
    stacks = config.stacks.items()
    into = lambda *layers: {name: np.full((x.copies, y.copies), y.layer in layers) for name, (x, y) in stacks}
    layers = range(1, len(config.layers))
    sets = {"no edges": into(), "all edges": into(*layers)} | {f"edges into layer {n}": into(n) for n in layers}
    for name, (x, y) in stacks:
        for i, j in np.ndindex(x.copies, y.copies):
            alone = f"edge {x.layer}.{config.first(x) + i} -> {y.layer}.{config.first(y) + j}"
            sets[alone] = into()
            sets[alone][name][i, j] = True
    return sets


def control_edges(
    network: Network,
    prompts: Prompts | AnyArray,
    answers: Int[AnyArray, "B C T"],
    control: Drawn,
    *,
    edges: Sequence[str] | None = None,
    right: Sequence[Any] | None = None,
    seed: int = 0,
) -> dict[str, Float[Array, "B C T"]]:
    """Scores given answers with a control on some of a network's edges.

    Edges carry states at every position of a prompt and of the answer after it. Prompts are aligned at their ends. In the
    columns before a prompt, its first state is repeated, so that a longer prompt gets a state at every position. At an
    answer's positions, "other" uses another item's prompt followed by the same answer. Such messages differ only in
    the prompt, and still carry the tokens of the answer. The other controls are computed there from each item's own
    n-th answer; after the end of an answer, its last state is repeated.

    Args:
        network: The network.
        prompts: Its prompts, one for each item.
        answers: Token ids of C answers to each prompt; -1 after the end of an answer.
        control: Stand-in for the states on the edges, as in `stand_in`: "other", "mean", "moments", "noise", "zero".
        edges: Names of sets of edges (`edge_sets`). Each set is controlled separately. Default: all edges, and the edges
            into each layer. Edges outside the set carry the states that the network computes from the replaced ones.
        right: The right answer of each item, for "other". None: all differ.
        seed: Seed of "other", "moments" and "noise".

    Returns:
        For each set of edges, the log-probability of each answer's tokens in nats; 0 after its end, NaN without tokens.

    Raises:
        ValueError: It is not a network, or has no edges; there is no such control or set of edges; all controls but
            "noise" and "zero" need at least two items; prompts or answers are invalid.

    Example:
        >>> from jaxcomm.lmnet import control_edges, init_network
        >>> network = init_network(jax.random.key(0), params, widths=(1, 2, 1), edge="linear")
        >>> found = control_edges(network, prompts, np.array([[[7], [8]], [[9], [8]]]), "other")
        >>> {name: x.shape for name, x in found.items()}
        {'all edges': (2, 2, 1), 'edges into layer 1': (2, 2, 1), 'edges into layer 2': (2, 2, 1)}
    """
    if not isinstance(network, Network) or len(network.config.layers) < 2:
        raise ValueError(
            "controls replace states on a network's edges, this model has none: give a network (init_network)"
        )
    sets, layers = edge_sets(network.config), range(1, len(network.config.layers))
    names = ["all edges", *(f"edges into layer {n}" for n in layers)] if edges is None else list(edges)
    if unknown := [name for name in names if name not in sets]:
        raise ValueError(f"this network has no {unknown[0]!r}: choose from {', '.join(sets)}")
    prompts, answers = as_prompts(prompts), np.asarray(answers)
    check_tokens(network, prompts)
    check_texts(network, answers, "answers")
    check_room(network, prompts, answers.shape[-1] - 1)
    states = _stand_ins(network, prompts, answers, control, right, seed)
    return {name: _score(network, prompts, answers, sets[name], states)[0] for name in names}


def _stand_ins(
    network: Network, prompts: Prompts, answers: np.ndarray, control: Drawn, right: Sequence[Any] | None, seed: int
) -> dict[str, Float[Array, "I J B N D"]]:
    """The control's states for all edges, at the positions of the prompts and of the answers."""
    given, config = answers, network.config
    if control == "other":  # put after each prompt the answers of the example that gets its messages
        given = answers[np.argsort(derange(range(len(prompts)) if right is None else right, seed))]
    columns = _columns(prompts, given)
    nothing = {
        name: jnp.zeros((x.copies, y.copies, *columns.shape, config.models[y.model].width), network.dtype)
        for name, (x, y) in config.stacks.items()
    }
    _, carried = _score(network, prompts, given, edge_sets(config)["no edges"], nothing)
    states = {}
    for n, (name, x) in enumerate(carried.items()):
        rows = jnp.take_along_axis(jnp.moveaxis(x, (2, 3), (0, 1)), columns[..., None, None, None], axis=1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), n), len(prompts))
        made = stand_in(Message(rows), control, answers=right, keys=keys, seed=seed)
        states[name] = jnp.moveaxis(jnp.asarray(made.state_array()), (0, 1), (2, 3))
    return states


def _columns(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
    """The column whose state is used in each column, [B, P + C (T - 1)]: itself, or the nearest one that has a token."""
    (B, C, T), P = answers.shape, prompts.shape[1]
    assert prompts.real is not None
    told = np.maximum(np.arange(P), np.argmax(prompts.real, axis=1)[:, None])
    within = np.minimum(np.arange(T - 1), np.sum(answers >= 0, axis=-1, keepdims=True) - 2)
    begin = P + (T - 1) * np.arange(C)[:, None]
    return np.concatenate([told, np.where(within < 0, P - 1, begin + within).reshape(B, -1)], axis=1)


@jax.jit
def _score(
    network: Network,
    prompts: Prompts,
    answers: Int[AnyArray, "B C T"],
    inside: dict[str, Bool[AnyArray, "I J"]],
    states: dict[str, Float[Array, "I J B N D"]],
) -> tuple[Float[Array, "B C T"], dict[str, Float[Array, "I J B N D"]]]:
    """Log-probabilities with `states` on the edges `inside`. Also the states that all edges computed themselves."""
    seen = {name: [] for name in inside}

    def wire(begin: int, name: str, x: Array) -> Array:
        if name not in seen:
            return x
        seen[name].append(x)
        put = states[name][..., begin : begin + x.shape[-2], :]
        return jnp.where(jnp.asarray(inside[name])[..., None, None, None], put, x)

    positions = positions_of(prompts)
    attended = Attended(cache=network.empty_cache(*prompts.shape))
    told = functools.partial(wire, 0)
    h, cache = network.read(prompts.tokens, positions, attended=attended, last=True, wire=told)
    read = functools.partial(network.read, wire=functools.partial(wire, prompts.shape[1]))
    logits = network.logits(h)[:, 0]
    logprobs, _ = score_with(read, network.logits, logits, cache.replace(positions=positions), jnp.asarray(answers))
    return logprobs, {name: jnp.concatenate(parts, axis=-2) for name, parts in seen.items()}
