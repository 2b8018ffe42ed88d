"""Linear maps W from A's activation space to B's: in closed form, and by gradient descent as published.

Ramesh & Li (section 3.1) learn one W per (k, j) by gradient descent on ||W h_A[k] - h_B[j]||^2 over final tokens of the
same sentences: `train_maps`. The closed form needs only sums over sentences. So `fit_maps` solves every (k, j) after one
pass over the text, and stores no activations beyond a batch. `similarity` uses such sums to measure how alike the two
spaces are. All three accept the same batches. Both fits report the error on the same held-out sentences.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxcomm.compiled import check_layer
from jaxcomm.config import AnyArray
from jaxcomm.model import Params
from jaxcomm.prompts import Prompts
from jaxcomm.reading import hidden_states
from jaxcomm.ridge import HELD_OUT, RIDGES, Moments, add, regress_each

Batches = Iterable[tuple[Prompts, Prompts]]
"""The same n sentences in A's and in B's tokens, [n, P] each."""


_pick = jax.jit(operator.getitem)
"""Compiled, because an index outside jit runs a dozen small programs."""


def _final_states(
    params_a: Params, params_b: Params, batches: Batches, ks: Sequence[int], js: Sequence[int]
) -> Iterator[tuple[Float[Array, "K n DA"], Float[Array, "J n DB"], Bool[np.ndarray, " n"]]]:
    """h_A[ks] and h_B[js] at the last token of each batch's n sentences, and which sentences are held out.

    ValueError: a layer out of range, batches of unequal numbers of sentences, at the end: fewer than ten.
    """
    if not len(ks) or not len(js):
        raise ValueError("ks and js need at least one layer each")
    for k in ks:
        check_layer(params_a, k)
    for j in js:
        check_layer(params_b, j, "j")
    seen = 0
    for prompts_a, prompts_b in batches:
        n = len(prompts_a)
        if n != len(prompts_b):
            raise ValueError(f"a batch has {n} sentences for A and {len(prompts_b)} for B: give both the same")
        a, b = hidden_states(params_a, prompts_a, last=True), hidden_states(params_b, prompts_b, last=True)
        yield _pick(a, np.array(ks)), _pick(b, np.array(js)), (seen + np.arange(n)) % HELD_OUT == HELD_OUT - 1
        seen += n
    if seen < HELD_OUT:
        raise ValueError(f"{seen} sentences: two models are matched on at least {HELD_OUT}, one of them held out")


# In closed form -----------------------------------------------------------------------------------------------------


class Maps(struct.PyTreeNode):
    """Linear maps from layers of A to layers of B. K is the length of `ks`, J the length of `js`.

    Attributes:
        W: The maps [K, J, D_B, D_A], one matrix for each pair of layers (k, j). They are fitted on all sentences.
        error: Error [K, J] on the held-out sentences: the mean square of W h_A[k] - h_B[j], divided by the mean square
            of h_B[j]. It has no unit. It is measured on a separate fit that did not use the held-out sentences.

    Example:
        >>> sentences = jc.left_pad([[n, n + 1] for n in range(20)])
        >>> maps = jc.train_maps(params, params, [(sentences, sentences)], ks=[2], js=[3], key=jax.random.key(0))
        >>> maps.error.shape
        (1, 1)
    """

    W: Float[Array, "K J DB DA"]
    error: Float[Array, "K J"]


class RidgeMaps(Maps):
    """Closed-form maps, the result of `fit_maps`.

    Attributes:
        W: As in `Maps`.
        error: As in `Maps`. The ridge is chosen on the same held-out sentences, so on average the error is slightly too
            low.
        ridge: The chosen ridge [K, J]. It has no unit (`fit_maps`).

    Example:
        >>> sentences = jc.left_pad([[n, n + 1] for n in range(20)])
        >>> jc.fit_maps(params, params, [(sentences, sentences)], ks=[2], js=[3], ridges=[0.25]).ridge
        Array([[0.25]], dtype=float32)
    """

    ridge: Float[Array, "K J"]


@jax.jit
def _solve(fit: Moments, held: Moments, ridges) -> RidgeMaps:
    with jax.default_matmul_precision("highest"):
        return RidgeMaps(*regress_each(fit, held, ridges))


def fit_maps(
    params_a: Params,
    params_b: Params,
    batches: Batches,
    *,
    ks: Sequence[int],
    js: Sequence[int],
    ridges: Sequence[float] = RIDGES,
) -> RidgeMaps:
    """Fits W for every pair of layers (k, j) in closed form, by ridge regression, in one pass over the text.

    W[k, j] minimises sum_n ||W a_n - b_n||^2 + r ||W||^2, where a_n is h_A[k] and b_n is h_B[j] at the last token of
    sentence n. Ramesh & Li (2025, section 3.1) minimise the first term by gradient descent (`train_maps`).

    The penalty is r = ridge x n x (mean square of A's states per dimension), so the ridge has no unit. Every tenth
    sentence is held out. For each (k, j) the ridge with the smallest error on the held-out sentences is chosen. W is
    then fitted on all sentences.

    Memory: the states of one batch, plus 5 (K D_A^2 + K J D_A D_B) float32 numbers. For large models, fit a few layers
    at a time.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        batches: Pairs of prompts: the same n sentences in A's tokens and in B's tokens, [n, P] each.
        ks: Layers of A, 0 .. L_A each.
        js: Layers of B, 0 .. L_B each.
        ridges: Values of the ridge to choose from.

    Returns:
        The maps, their errors and their ridges.

    Raises:
        ValueError: A layer is out of range; `ks`, `js` or `ridges` is empty; there are fewer than ten sentences; a
            batch has different numbers of sentences for A and B.

    Example:
        >>> sentences = jc.left_pad([[n, n + 1] for n in range(20)])
        >>> maps = jc.fit_maps(params, params, [(sentences, sentences)], ks=[2], js=[2, 3])
        >>> maps.W.shape, maps.error.shape
        ((1, 2, 128, 128), (1, 2))
    """
    if not len(ridges):
        raise ValueError("ridges needs at least one value")
    sums = None
    for a, b, held in _final_states(params_a, params_b, batches, ks, js):
        sums = add(sums, a, b, held)
    assert sums is not None  # without sentences, `_final_states` raised
    return _solve(*sums, jnp.asarray(ridges, jnp.float32))


# By gradient descent ------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("epochs", "batch"))
def _train(
    a: Float[AnyArray, "n DA"], b: Float[AnyArray, "J n DB"], keys, learning_rate, *, epochs: int, batch: int
) -> Float[Array, "J DB DA"]:
    """Train the maps of one j after the other. keys [J]: for the initial W and the order of the sentences."""
    n, optimizer = len(a), optax.adam(learning_rate)
    xavier = jax.nn.initializers.xavier_uniform(in_axis=-1, out_axis=-2)
    steps = -(-n // batch)

    def train(b, key):
        init_key, order_key = jax.random.split(key)

        def loss(W, rows):
            # The last batch is padded with -1. Only its real rows count in the mean.
            return jnp.mean((a[rows] @ W.T - b[rows]) ** 2, where=(rows >= 0)[:, None])

        def step(carry, rows):
            W, state = carry
            gradient = jax.grad(loss)(W, rows)
            with jax.numpy_dtype_promotion("standard"):  # Adam raises floats to the power of its int step
                updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(W, updates), state), None

        def epoch(carry, key):
            order = jnp.full(steps * batch, -1).at[:n].set(jax.random.permutation(key, n))
            return jax.lax.scan(step, carry, order.reshape(steps, batch))[0], None

        W = xavier(init_key, (b.shape[1], a.shape[1]), jnp.float32)
        return jax.lax.scan(epoch, (W, optimizer.init(W)), jax.random.split(order_key, epochs))[0][0]

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda at: train(*at), (b, keys))


@jax.jit
def _errors(
    W: Float[Array, "K J DB DA"], a: Float[AnyArray, "K n DA"], b: Float[AnyArray, "J n DB"]
) -> Float[Array, "K J"]:
    """Mean square of W a - b, divided by the mean square of b."""
    square = lambda x: jnp.sum(x**2, axis=(1, 2))
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda at: square(jnp.einsum("jed,nd->jne", *at) - b) / square(b), (W, a))


class Recipe(NamedTuple):
    """Settings of `train_maps`.

    Attributes:
        epochs: Number of passes over the sentences.
        batch: Number of sentences per step.
        learning_rate: Adam's learning rate.
    """

    epochs: int = 10
    batch: int = 32
    learning_rate: float = 1e-3


def train_maps(
    params_a: Params,
    params_b: Params,
    batches: Batches,
    *,
    ks: Sequence[int],
    js: Sequence[int],
    key: Array,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Maps:
    """Trains W for every pair of layers (k, j) by gradient descent, with the recipe of Ramesh & Li (2025, section 3.1).

    W begins with Xavier initialisation (uniform). Adam minimises the mean squared error between W h_A[k] and h_B[j] at
    the last token of the same sentences. Each epoch shuffles the sentences; its last batch may be smaller.
    A map depends only on `key` and on its own (k, j), not on the other layers in `ks` and `js`. `epochs=0` returns the
    initialisation.

    Memory: all states, K n D_A + J n D_B float32 numbers, on the host and on the device. The device also holds the
    result and about five matrices of the size of one W.

    Args:
        params_a: The sender A.
        params_b: The receiver B.
        batches: Pairs of prompts: the same n sentences in A's tokens and in B's tokens, [n, P] each.
        ks: Layers of A, 0 .. L_A each.
        js: Layers of B, 0 .. L_B each.
        key: Random key for the initialisation and the order of the sentences.
        recipe: Epochs, batch size and learning rate. Default: `Recipe()`.
        progress: Called as progress(done, all) after the maps of each k. It counts trained maps. Each map is trained
            twice: with all sentences, and without the held-out ones, to measure its error.

    Returns:
        The maps and their errors.

    Raises:
        ValueError: As for `fit_maps`; `epochs` is below 0 or `batch` is below 1.

    Example:
        >>> sentences = jc.left_pad([[n, n + 1] for n in range(20)])
        >>> maps = jc.train_maps(params, params, [(sentences, sentences)], ks=[2], js=[3], key=jax.random.key(0))
        >>> maps.W.shape
        (1, 1, 128, 128)
    """
    epochs, batch, learning_rate = recipe or Recipe()
    if epochs < 0 or batch < 1:
        raise ValueError(f"epochs = {epochs}, batch = {batch}: give at least 0 epochs, of batches of at least 1")
    on_host = lambda states: np.asarray(states).astype(np.float32)
    found = ((on_host(a), on_host(b), held) for a, b, held in _final_states(params_a, params_b, batches, ks, js))
    a, b, held = zip(*found, strict=True)
    a, b, held = np.concatenate(a, axis=1), np.concatenate(b, axis=1), np.concatenate(held)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, np.array(ks)), np.array(js))

    def train(a: np.ndarray, b: np.ndarray, done: int) -> Array:
        W = np.empty((len(a), len(b), b.shape[-1], a.shape[-1]), np.float32)
        for k in range(len(a)):
            W[k] = _train(a[k], b, keys[k], learning_rate, epochs=epochs, batch=batch)
            if progress is not None:
                progress(done + (k + 1) * len(b), 2 * len(a) * len(b))
        return jnp.asarray(W)

    error = _errors(train(a[:, ~held], b[:, ~held], 0), a[:, held], b[:, held])
    return Maps(train(a, b, len(a) * len(b)), error)


# How alike the spaces are -------------------------------------------------------------------------------------------


class Similarity(struct.PyTreeNode):
    """How alike the activations of A and B are, for every pair of layers (k, j).

    X [n, D_A] holds h_A[k] and Y [n, D_B] holds h_B[j] at the last token of n sentences. Both measures lie between 0
    and 1. Neither changes when one space is rotated or scaled.

    Attributes:
        activation: Similarity [K, J] of Ramesh & Li (2025, appendix B.4): ||Y^T X||_F^2 / (||X||_F^2 ||Y||_F^2). It is
            1 for X = Y only if all sentences point in one direction. A large common mean raises it.
        cka: Linear centred kernel alignment [K, J] (Kornblith et al. 2019): ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F),
            after the mean over the sentences is subtracted from X and from Y. It is 1 for X = Y. It is NaN where a
            state is the same for all sentences.

    Example:
        >>> sentences = jc.left_pad([[n, n + 1] for n in range(20)])
        >>> jc.similarity(params, params, [(sentences, sentences)], ks=[2], js=[1, 2, 3]).activation.shape
        (1, 3)
    """

    activation: Float[Array, "K J"]
    cka: Float[Array, "K J"]


class Centred(struct.PyTreeNode):
    """Means over n sentences, and sums of products of the states without these means.

    With large means, float32 could not recover these products from sums of raw products.

    Attributes:
        n: Number of sentences.
        means: Means of a [K, D_A] and of b [J, D_B].
        products: Sums of the centred products: aa [K, D_A, D_A], ab [K, J, D_A, D_B] and bb [J, D_B, D_B].
    """

    n: Float[Array, ""]
    means: tuple[Array, Array]
    products: tuple[Array, Array, Array]

    @classmethod
    def of(cls, a: Float[Array, "K n DA"], b: Float[Array, "J n DB"]) -> Centred:
        """Computes the means and products of one batch.

        Args:
            a: States of A, [K, n, D_A].
            b: States of B for the same sentences, [J, n, D_B].

        Returns:
            The means and products of the n sentences.
        """
        means = a.mean(axis=1), b.mean(axis=1)
        return cls(jnp.float32(a.shape[1]), means, _products(a - means[0][:, None], b - means[1][:, None]))

    def join(self, other: Centred) -> Centred:
        """Combines two sets of sentences (Chan, Golub & LeVeque 1979).

        Args:
            other: Means and products of other sentences, for the same layers.

        Returns:
            Means and products of all sentences together.
        """
        n = self.n + other.n
        off = jax.tree.map(jnp.subtract, other.means, self.means)
        between = _products(off[0][:, None], off[1][:, None])
        return Centred(
            n,
            jax.tree.map(lambda mean, off: mean + other.n / n * off, self.means, off),
            jax.tree.map(lambda x, y, z: x + y + self.n * other.n / n * z, self.products, other.products, between),
        )


def _products(a: Float[Array, "K n DA"], b: Float[Array, "J n DB"]) -> tuple[Array, Array, Array]:
    """Sums over n: aa [K, D_A, D_A], ab [K, J, D_A, D_B], bb [J, D_B, D_B]."""
    return jnp.einsum("knd,kne->kde", a, a), jnp.einsum("knd,jne->kjde", a, b), jnp.einsum("jnd,jne->jde", b, b)


@functools.partial(jax.jit, donate_argnums=0)
def _join(sums: Centred | None, a, b) -> Centred:
    with jax.default_matmul_precision("highest"):
        new = Centred.of(a.astype(jnp.float32), b.astype(jnp.float32))
        return new if sums is None else sums.join(new)


@jax.jit
def _compare(sums: Centred) -> Similarity:
    (a, b), (aa, ab, bb) = sums.means, sums.products
    trace = lambda x: jnp.trace(x, axis1=1, axis2=2)
    own_a, own_b = trace(aa), trace(bb)
    mean_a, mean_b = (sums.n * jnp.sum(x**2, axis=1) for x in (a, b))

    def share(ab, square_a, square_b):
        """||ab||_F^2 over both squares. Divides before squaring, because states of 1e4 would overflow."""
        return jnp.sum((ab / jnp.sqrt(square_a[:, None] * square_b)[..., None, None]) ** 2, axis=(2, 3))

    raw = ab + sums.n * a[:, None, :, None] * b[None, :, None, :]
    norm = lambda x, own: jnp.sqrt(jnp.sum((x / own[:, None, None]) ** 2, axis=(1, 2)))
    cka = share(ab, own_a, own_b) / (norm(aa, own_a)[:, None] * norm(bb, own_b))
    # Variation below this cannot be told from zero in float32.
    vary = (own_a > 1e-12 * mean_a)[:, None] & (own_b > 1e-12 * mean_b)
    return Similarity(share(raw, own_a + mean_a, own_b + mean_b), jnp.where(vary, cka, jnp.nan))


def similarity(
    params_a: Params, params_b: Params, batches: Batches, *, ks: Sequence[int], js: Sequence[int]
) -> Similarity:
    """Measures how alike h_A[k] and h_B[j] are, for every pair of layers (k, j), in one pass over the text.

    Memory: the states of one batch, plus 3 (K D_A^2 + K J D_A D_B + J D_B^2) float32 numbers.

    Args:
        params_a: The model A.
        params_b: The model B.
        batches: Pairs of prompts: the same n sentences in A's tokens and in B's tokens, [n, P] each.
        ks: Layers of A, 0 .. L_A each.
        js: Layers of B, 0 .. L_B each.

    Returns:
        The similarity of Ramesh & Li (2025, appendix B.4) and linear CKA (Kornblith et al. 2019), [K, J] each.

    Raises:
        ValueError: A layer is out of range; `ks` or `js` is empty; there are fewer than ten sentences; a batch has
            different numbers of sentences for A and B.

    Example:
        >>> sentences = jc.left_pad([[n, n + 1] for n in range(20)])
        >>> alike = jc.similarity(params, params, [(sentences, sentences)], ks=[2], js=[2])
        >>> round(float(alike.cka[0, 0]), 3)
        1.0
    """
    sums = None
    for a, b, _ in _final_states(params_a, params_b, batches, ks, js):
        sums = _join(sums, a, b)
    assert sums is not None  # without sentences, `_final_states` raised
    return _compare(sums)
