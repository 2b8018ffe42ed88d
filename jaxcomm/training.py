"""Training with next-token cross-entropy and AdamW, for any split of a model into trained and frozen weights.

The trained weights are a pytree with a method `join(frozen)`, which returns the model: `lmnet.Wires` (a network's edges),
`lora.LoRA` (one model's adapters), `bridges.C2C` and `bridges.Gated` (between two models), `Everything`. Pure functions of arrays; data, checkpoints and the loop are
`jaxcomm.evals.networks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from jaxcomm.config import AnyArray, Remat
from jaxcomm.language_model import LanguageModel, Training
from jaxcomm.sharding import constrain

CHUNK = 128
"""Number of columns of a batch whose logits are in memory at once."""

Document = tuple[Sequence[Any], ...]
"""Token ids, and the weight of each in the loss. If there is another model, also the token ids that it reads. If these are
other tokens of the same text, also, for each token, the index of the corresponding one, negative if there is none."""


class Everything(struct.PyTreeNode):
    """Trains the whole model; nothing is frozen.

    Attributes:
        model: The model, or a network.
    """

    model: LanguageModel

    def join(self, frozen: None) -> Any:
        """Makes the model from trained and frozen weights.

        Args:
            frozen: None, since nothing is frozen.

        Returns:
            The model.
        """
        return self.model


class Told(struct.PyTreeNode):
    """The tokens that another model reads, one row for each row of the batch.

    Attributes:
        tokens: Token ids [.., B, S].
        documents: Number of the text that each token belongs to, numbered as in the batch's row; -1 on padding. [.., B, S].
        columns: For each token of the batch, the column of the corresponding token here, [.., B, T]; -1 if there is none.
            None: the texts are not the same.
    """

    tokens: Int[AnyArray, "*A B S"]
    documents: Int[AnyArray, "*A B S"]
    columns: Int[AnyArray, "*A B T"] | None = None


class Batch(struct.PyTreeNode):
    """Texts packed into rows.

    Attributes:
        tokens: Token ids [.., B, T].
        documents: Number of the text that each token belongs to, counted from 0 in each row; -1 on padding. [.., B, T].
        weights: Weight of each token in the loss, [.., B, T]. It is 0 on padding and on the first token of a text,
            because no token predicts it.
        told: The tokens that another model reads, for a bridge from that model. None: the same tokens, or no other model.
    """

    tokens: Int[AnyArray, "*A B T"]
    documents: Int[AnyArray, "*A B T"]
    weights: Float[AnyArray, "*A B T"]
    told: Told | None = None


class State(struct.PyTreeNode):
    """State of training between two steps.

    Attributes:
        step: Number of completed steps.
        trained: The trained weights, float32: `Everything`, `lora.LoRA`, `lmnet.Wires`, `bridges.C2C` or `bridges.Gated`.
        moments: State of the optimizer.
    """

    step: Int[Array, ""]
    trained: PyTree[Float[Array, "..."]]
    moments: PyTree


def pack(documents: Iterable[Document], rows: int, columns: int) -> Iterator[tuple[Batch, int]]:
    """Packs texts into batches of rows.

    Each text goes whole into the first row that has room. A batch ends at the first text that fits into no row. That
    text begins the next batch.

    Args:
        documents: Texts: the token ids of each, and the weight of each token in the loss. If another model reads tokens
            too, these are packed into separate rows of the same length.
        rows: Rows of a batch, B.
        columns: Columns of a batch, T.

    Yields:
        A batch with arrays [B, T], and the number of texts in all batches so far. To resume, skip this number of texts.

    Raises:
        ValueError: A text has fewer than two tokens, or more than `columns`; another model reads no token of it, or more
            than `columns`.

    Example:
        >>> from jaxcomm.training import pack
        >>> batch, texts = next(pack([([5, 6, 7], [1.0, 1.0, 1.0]), ([8, 9], [1.0, 1.0])], rows=1, columns=6))
        >>> batch.documents
        array([[ 0,  0,  0,  1,  1, -1]], dtype=int32)
    """
    batch, room, count = None, np.zeros(0), 0
    for ids, weights, *told in documents:
        needed = np.array([len(ids), *map(len, told[:1])])
        if not 2 <= needed[0] <= columns:
            raise ValueError(
                f"text {count} has {len(ids)} tokens: rows hold 2 to {columns}; cut it, or make rows longer"
            )
        if told and not 1 <= needed[1] <= columns:
            raise ValueError(
                f"of text {count} another model reads {needed[1]} tokens: rows hold 1 to {columns}; cut it, or make rows longer"
            )
        free = np.zeros(0, int) if batch is None else np.flatnonzero((room >= needed).all(axis=1))
        if batch is None or not len(free):
            if batch is not None:
                yield batch, count
            batch, room, free = (
                _blank(rows, columns, len(told)),
                np.full((rows, len(needed)), columns),
                np.zeros(1, int),
            )
        row = int(free[0])
        number, begun = batch.documents[row].max() + 1, columns - room[row]
        at = slice(begun[0], begun[0] + needed[0])
        batch.documents[row, at] = number
        batch.tokens[row, at], batch.weights[row, at] = ids, [0.0, *weights[1:]]
        if batch.told is not None:
            at = slice(begun[1], begun[1] + needed[1])
            batch.told.documents[row, at], batch.told.tokens[row, at] = number, told[0]
            if batch.told.columns is not None:
                alike = np.asarray(told[1])
                batch.told.columns[row, begun[0] : begun[0] + needed[0]] = np.where(alike < 0, -1, alike + begun[1])
        room[row] -= needed
        count += 1
    if batch is not None:
        yield batch, count


def _blank(rows: int, columns: int, told: int) -> Batch:
    """An empty batch. told: 0 without another model, 1 with its tokens, 2 with its tokens and their alignment."""
    shape = rows, columns
    none = lambda: np.full(shape, -1, np.int32)
    blank = lambda: (np.zeros(shape, np.int32), none())
    other = Told(*blank(), none() if told > 1 else None) if told else None
    return Batch(*blank(), np.zeros(shape, np.float32), other)


def positions_in(documents: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """Computes the positions of packed tokens.

    Args:
        documents: Number of the text of each token, [B, T]; -1 on padding (`Batch`).

    Returns:
        Positions [B, T]: 0, 1, 2, ... within each text, -1 on padding.
    """
    column = jnp.arange(documents.shape[1], dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones_like(documents[:, :1], bool), documents[:, 1:] != documents[:, :-1]], axis=1)
    begin = jax.lax.cummax(jnp.where(new, column, 0), axis=1)
    return jnp.where(documents < 0, -1, column - begin)


def losses(
    model: LanguageModel,
    batch: Batch,
    remat: Remat = "off",
    mesh: Mesh | None = None,
    step: Int[Array, "2"] | None = None,
) -> Float[Array, "B T"]:
    """Computes the next-token cross-entropy of packed texts.

    Args:
        model: The model, or a network.
        batch: Texts, with arrays [B, T].
        remat: What the backward pass recomputes instead of storing (`config.Remat`).
        mesh: Devices to distribute the rows over, or None.
        step: Number of the step and of its part, for a model with random numbers in training. None: no random numbers.

    Returns:
        Weighted losses [B, T] in nats. Column t holds the loss of the token in column t + 1, given the tokens before it
        in its text, times that token's weight. The last column is 0.
    """
    learned = jnp.asarray(batch.weights) > 0
    training = Training(jnp.asarray(batch.documents), remat, mesh, learned, batch.told, step)
    h, _ = model.read(batch.tokens, positions_in(batch.documents), training=training)
    after = lambda a: jnp.concatenate([jnp.asarray(a)[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)

    @jax.checkpoint
    def column(x):
        h, targets = x
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(h[:, None])[:, 0], targets)

    every = jax.lax.map(column, (h.swapaxes(0, 1), after(batch.tokens).T), batch_size=CHUNK)
    return every.T * after(batch.weights)


def make_optimizer(
    learning_rate: float, steps: int, *, warmup: float = 0.03, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov & Hutter 2019) with warm-up, cosine decay and gradient clipping.

    Adam's betas are 0.9 and 0.95. Weight decay applies to matrices only, not to norms, biases and scales.

    Args:
        learning_rate: Largest learning rate.
        steps: Number of steps. At the last step the rate is a tenth of the largest.
        warmup: Share of the steps over which the rate rises from 0. The rise takes at least one step.
        weight_decay: AdamW's decay.
        clip: Largest global norm of the gradient. Larger gradients are scaled down to it.

    Returns:
        The optimizer.
    """
    risen = max(1, round(warmup * steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, risen, max(steps, risen + 1), learning_rate / 10)
    adam = optax.adamw(
        lambda n: rate(n + 1), b1=0.9, b2=0.95, weight_decay=weight_decay, mask=_matrices
    )  # n counts from 0
    return optax.chain(optax.clip_by_global_norm(clip), adam)


def _matrices(tree: Any) -> Any:
    def is_matrix(path, _):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return names[-1] not in ("bias", "scale") and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, tree)


def begin(trained: Any, optimizer: optax.GradientTransformation) -> State:
    """Makes the state before the first step.

    Args:
        trained: The trained weights, as in `State`, with float32 leaves.
        optimizer: The optimizer, such as `make_optimizer`'s.

    Returns:
        State with step 0.
    """
    with jax.numpy_dtype_promotion("standard"):
        return State(jnp.int32(0), trained, optimizer.init(trained))


def make_step(
    optimizer: optax.GradientTransformation, *, remat: Remat = "off", dtype: Any = None, mesh: Mesh | None = None
) -> Callable[[State, Any, Batch], tuple[State, dict[str, Array]]]:
    """Makes the function that computes one training step. Put it under `jax.jit`.

    Args:
        optimizer: The optimizer.
        remat: What the backward pass recomputes instead of storing (`config.Remat`).
        dtype: Dtype of the computation. Default: the dtype of the weights.
        mesh: Devices to distribute the rows over. Place the state and the frozen weights with
            `sharding.fsdp_shardings`.

    Returns:
        step(state, frozen, batch) -> (state, metrics). `frozen` is the part that is not trained, the argument of
        `state.trained.join` (None for `Everything`). `batch` has arrays [A, B, T]: the step processes the A parts one
        after the other and adds up their gradients. `metrics` holds "loss", the mean loss in nats with the batch's
        weights, and "norm", the global norm of the gradient.

    Example:
        >>> from jaxcomm.training import Everything, begin, make_optimizer, make_step, pack
        >>> batch, _ = next(pack([([5, 6, 7], [1.0, 1.0, 1.0])], rows=1, columns=4))
        >>> parts = jax.tree.map(lambda a: a[None], batch)
        >>> optimizer = make_optimizer(1e-3, steps=10)
        >>> step = jax.jit(make_step(optimizer))
        >>> state, metrics = step(begin(Everything(params), optimizer), None, parts)
        >>> int(state.step), sorted(metrics)
        (1, ['loss', 'norm'])
    """

    def step(state: State, frozen: Any, batch: Batch):
        weight = jnp.maximum(jnp.sum(batch.weights), 1e-9)

        def add(carry, given):
            part, number = given
            part = jax.tree.map(lambda a: constrain(mesh, jnp.asarray(a), mesh and mesh.axis_names), part)

            def total(trained):
                model: Any = trained.join(frozen)
                if dtype is not None:
                    model = jax.tree.map(
                        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, model
                    )
                return jnp.sum(losses(model, part, remat, mesh, jnp.stack([state.step, number]))) / weight

            return jax.tree.map(jnp.add, carry, jax.value_and_grad(total)(state.trained)), None

        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained)
        parts = jnp.arange(len(batch.weights), dtype=jnp.int32)
        (loss, gradient), _ = jax.lax.scan(add, zero, (batch, parts))
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradient, state.moments, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            norm = optax.tree.norm(gradient)
        return State(state.step + 1, trained, moments), {"loss": loss, "norm": norm}

    return step
