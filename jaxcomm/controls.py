"""Controls: stand-ins that a receiver gets instead of the message that was sent to it.

The main control is another item's real message. It splits B's gain in two. Content is the gain from B's own message
over another item's. Presence is the gain from another item's message over no message (Zhang & Emu 2026, arXiv
2607.26773; Cheng et al. 2026, arXiv 2608.04893). The other controls show which property of a message matters: the mean
message, noise with the messages' mean and covariance, noise of the same norm, zeros, and the worst message of the same
norm.

A control is a function of messages with any contents: states at a site, embeddings, keys and values. Controls for text
are in `jaxcomm.protocols.controls`, together with those that need the sender or the receiver.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcomm.cache import KVCache
from jaxcomm.communication import answer_logits, read_prompt, resume
from jaxcomm.compiled import check_texts
from jaxcomm.config import AnyArray
from jaxcomm.decoding import score
from jaxcomm.edits import Edit, as_graft, is_number
from jaxcomm.messages import Message
from jaxcomm.prompts import Prompts, as_prompts
from jaxcomm.sites import as_site

Drawn = Literal["other", "mean", "moments", "noise", "zero"]
"""Controls that need only the messages, not the agents."""
RATE = 0.5
"""Step size of `adversary`, as a fraction of the message's norm."""


def derange(answers: Sequence[Any], seed: int = 0) -> np.ndarray:
    """Assigns to each item the message of another item with a different answer, at random.

    If more than half of the items share an answer, this is impossible. Then as few items as possible get a message
    with their own answer. `overlap` computes their share.

    Args:
        answers: The right answer of each item. Case is ignored in texts.
        seed: Random seed.

    Returns:
        For each item, the index of another item. Every index occurs once.

    Raises:
        ValueError: There are fewer than two items.

    Example:
        >>> order = jc.derange(["Peru", "Peru", "Chile", "Cuba"])
        >>> sorted(order.tolist()), jc.overlap(["Peru", "Peru", "Chile", "Cuba"], order)
        ([0, 1, 2, 3], 0.0)
    """
    if len(answers) < 2:
        raise ValueError("the control other needs at least two items: one gets another's message")
    same = [x.casefold().strip() if isinstance(x, str) else x for x in answers]
    rng = np.random.default_rng([seed, 9])
    groups: dict[Any, list[int]] = {}
    for i in rng.permutation(len(same)).tolist():
        groups.setdefault(same[i], []).append(i)
    # Arrange the groups in a circle, the largest first. A step of the largest group's size then leaves every group.
    circle = np.concatenate([groups[x] for x in sorted(groups, key=lambda x: -len(groups[x]))]).astype(int)
    step = max(map(len, groups.values())) % len(same) or 1
    order = np.empty(len(same), int)
    order[circle] = np.roll(circle, -step)
    return order


def overlap(answers: Sequence[Any], order: Sequence[int] | np.ndarray) -> float:
    """Computes the share of items that get a message with their own answer.

    Args:
        answers: The right answer of each item.
        order: For each item, the index of the item whose message it gets (`derange`).

    Returns:
        The share, 0 to 1.

    Example:
        >>> jc.overlap(["yes", "yes", "yes", "no"], jc.derange(["yes", "yes", "yes", "no"]))
        0.5
    """
    same = [x.casefold().strip() if isinstance(x, str) else x for x in answers]
    return float(np.mean([same[i] == same[j] for i, j in enumerate(order)]))


def stand_in(
    message: Message,
    control: Drawn,
    *,
    answers: Sequence[Any] | None = None,
    keys: Key[Array, "B"] | None = None,
    seed: int = 0,
) -> Message:
    """Makes stand-ins for the messages of several items.

    Means and covariances are computed from the other items' messages, so no part of an item's own message reaches
    it. If messages hold several tokens, statistics are computed for each token, aligned at the messages' ends. For keys
    and values they are computed for each layer and head, as stored (keys are rotated). The state of a layer with linear
    attention counts as one token.

    Args:
        message: The messages of B items.
        control: "other": the message of another item (`derange`). "mean": the mean of the others. "moments": Gaussian
            noise with the mean and the covariance of the others. "noise": Gaussian noise of the same norm, state by
            state (head by head, where there are heads; row by row of a matrix of linear attention). "zero": zeros.
        answers: The right answer of each item, for "other". None: all differ.
        keys: A random key for each item. Default: split from `seed`.
        seed: Seed of "other", "moments" and "noise".

    Returns:
        A message of the same shape. It has no sender if no model produced its states.

    Raises:
        ValueError: There is no such control; all but "noise" and "zero" need at least two items; the message holds
            only text.

    Example:
        >>> message = jc.send(params, prompts, 3)
        >>> jc.stand_in(message, "mean").states.shape
        (2, 128)
    """
    if control not in get_args(Drawn):
        raise ValueError(f"unknown control {control!r}: choose one of {', '.join(get_args(Drawn))}")
    if control in ("other", "mean", "moments") and len(message) < 2:
        raise ValueError(f"the control {control} needs at least two items: it is made of the others' messages")
    if control == "other":
        return message.take(derange(range(len(message)) if answers is None else answers, seed))
    if message.states is None:
        raise ValueError(f"the control {control} is made of states, this message holds text: use jaxcomm.protocols")
    keys = jax.random.split(jax.random.key(seed), len(message)) if keys is None else keys
    made = _over(message, {"mean": _mean, "moments": _moments, "noise": _noise, "zero": _zero}[control], keys)
    return message.replace(states=made, sender=None, text=None)


def _over(message: Message, make: Any, keys: Key[Array, "B"]) -> Any:
    """Apply make(x [B, n, ...], valid [B, n], keys) to the arrays in a message."""
    states = message.states
    if isinstance(states, KVCache):
        valid = states.positions >= 0

        def each(leaf: Array, n: int) -> Array:
            rows = jnp.moveaxis(leaf, (-4, -2), (0, 1))  # [.., B, K, S, H]: rows and tokens first
            made = make(rows, valid, jax.vmap(lambda key: jax.random.fold_in(key, n))(keys))
            return jnp.moveaxis(made, (0, 1), (-4, -2)).astype(leaf.dtype)

        leaves, tree = jax.tree.flatten((states.k, states.v))
        k, v = jax.tree.unflatten(tree, [each(leaf, n) for n, leaf in enumerate(leaves)])

        def state(leaf: Array, n: int) -> Array:  # the state of a row is like one token
            drawn = jax.vmap(lambda key: jax.random.fold_in(key, len(leaves) + n))(keys)
            return make(leaf[:, None], jnp.ones((len(leaf), 1), bool), drawn)[:, 0].astype(leaf.dtype)

        kept, shape = jax.tree.flatten(states.states)
        return states.replace(k=k, v=v, states=jax.tree.unflatten(shape, [state(a, n) for n, a in enumerate(kept)]))
    x = jnp.asarray(message.state_array())
    rows = x[:, None] if message.single else x
    valid = jnp.ones(rows.shape[:2], bool) if message.valid is None else jnp.asarray(message.valid)
    made = make(rows, valid, keys).astype(x.dtype)
    return made[:, 0] if message.single else made


def _wide(valid: Bool[Array, "B n"], x: Array) -> Array:
    return valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)).astype(jnp.float32)


def _zero(x: Array, valid: Array, keys: Array) -> Array:
    return jnp.zeros_like(x)


def _noise(x: Array, valid: Array, keys: Array) -> Array:
    drawn = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    norm = lambda a: jnp.linalg.norm(a.astype(jnp.float32), axis=-1, keepdims=True)
    return drawn / norm(drawn) * norm(x)


def _mean(x: Array, valid: Array, keys: Array) -> Array:
    wide, there = x.astype(jnp.float32), _wide(valid, x)
    total, count = jnp.sum(wide * there, axis=0), jnp.sum(there, axis=0)
    return (total - wide * there) / jnp.maximum(count - there, 1) * there


def _moments(x: Array, valid: Array, keys: Array) -> Array:
    """Sample as a random combination of the others' deviations from their mean. This has their covariance but needs no
    matrix [D, D]."""
    wide, there, mean = x.astype(jnp.float32), _wide(valid, x), _mean(x, valid, keys)
    weights = jax.vmap(lambda key: jax.random.normal(key, (len(x),)))(keys) * (1 - jnp.eye(len(x)))
    count = jnp.sum(there, axis=0) - there
    drawn = jnp.einsum("ib,b...->i...", weights, wide * there)
    drawn -= mean * jnp.einsum("ib,b...->i...", weights, jnp.broadcast_to(there, wide.shape))
    return (mean + drawn / jnp.sqrt(jnp.maximum(count - 1, 1))) * there


def adversary(
    params: Any,
    prompts: Prompts | AnyArray,
    answers: Int[AnyArray, "B T"],
    message: Message,
    site: Any,
    graft: Any = "replace",
    *,
    past: Sequence[KVCache] = (),
    steps: int = 6,
) -> Message:
    """Finds messages of the same norms that make the right answers as unlikely as possible.

    Each step moves against the gradient of the answer's log-probability by half the norm, and then rescales to the norm
    (projected gradient descent on a sphere). The search starts at the message itself. If the last token's residual stream
    is edited, the prompts are read once, and each step runs only the blocks above, on that token and the answer.

    Args:
        params: The receiver.
        prompts: Its prompts.
        answers: Token ids [B, T] of the right answers; -1 after the end of an answer.
        message: The messages of states that were sent.
        site: Where to put them, as in `receive`.
        graft: How to combine them with the receiver's state, as in `receive`.
        past: Key/value caches of the tokens before the prompts. Only allowed if the last token's stream is edited.
        steps: Number of steps.

    Returns:
        The messages of the step at which the answer was least likely, chosen for each item.

    Raises:
        ValueError: As for `answer_logits`; `past` is given and another site is edited.

    Example:
        >>> message = jc.send(params, prompts, 3)
        >>> worse = jc.adversary(params, prompts, np.array([[7], [8]]), message, 1)
        >>> bool(jnp.allclose(worse.norms, message.norms, rtol=1e-5))
        True
    """
    prompts, answers, site = as_prompts(prompts), jnp.asarray(answers), as_site(site)
    check_texts(params, answers, "answers")
    start = jnp.asarray(message.state_array())
    tail = (1,) * (start.ndim - message.norms.ndim)
    norms = message.norms.reshape(*message.norms.shape, *tail)
    unit = lambda x: x / jnp.maximum(jnp.sqrt(jnp.sum(x**2, axis=tuple(range(-len(tail), 0)), keepdims=True)), 1e-30)
    if message.single and site.name == "resid_post" and site.last and is_number(site.layer):
        prompt = read_prompt(params, prompts, past=past)
        likely = functools.partial(
            _likely_last, params, prompt, answers, tuple(past), as_graft(graft), j=int(site.layer)
        )  # pyright: ignore
    elif past:
        raise ValueError("a past goes with the stream of the last token: give whole prompts")
    else:
        likely = functools.partial(_likely, params, prompts, answers, message.valid, site, as_graft(graft))
    states = best = start.astype(jnp.float32)
    lowest, gradient = likely(states)
    for _ in range(steps):
        states = unit(states - RATE * norms * unit(gradient)) * norms
        found, gradient = likely(states)
        best = jnp.where((found < lowest).reshape(-1, *(1,) * (states.ndim - 1)), states, best)
        lowest = jnp.minimum(found, lowest)
    return message.replace(states=best.astype(start.dtype), sender=None, text=None)


@functools.partial(jax.jit, static_argnames="j")
def _likely_last(params, prompt, answers, past, graft, states, *, j: int) -> tuple[Array, Array]:
    """Log-probability of each answer with these states as messages to the last token's h[j], and its gradient. (j is static,
    because reverse mode needs static loop bounds.)"""

    def each(states: Array) -> tuple[Array, Array]:
        edited = graft(prompt.states[j], states.astype(params.dtype))
        logits, cache = resume(params, prompt, edited, j, past=past)
        found, _ = score(params, logits, cache, answers[:, None], past=(*past, prompt.earlier))
        likely = found[:, 0].sum(axis=-1)
        return likely.sum(), likely

    (_, likely), gradient = jax.value_and_grad(each, has_aux=True)(states)
    return likely, gradient


@jax.jit
def _likely(params, prompts, answers, valid, site, graft, states) -> tuple[Float[Array, "B"], Float[Array, "B *n"]]:
    """Log-probability of each answer with these states as the message, and its gradient."""

    def each(states: Array) -> tuple[Array, Array]:
        edit = Edit(site, graft, Message(states.astype(params.dtype), valid))
        found = jax.nn.log_softmax(answer_logits(params, prompts, answers, edits=[edit]))
        picked = jnp.take_along_axis(found, jnp.maximum(answers, 0)[..., None], axis=-1)[..., 0]
        likely = jnp.sum(jnp.where(answers < 0, 0, picked), axis=1)
        return likely.sum(), likely

    (_, likely), gradient = jax.value_and_grad(each, has_aux=True)(states)
    return likely, gradient
