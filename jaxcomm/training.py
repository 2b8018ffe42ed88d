"""Training: next-token cross-entropy, any split of a model into what is trained and what is not, AdamW.

What is trained is a pytree with `join(frozen)`, which makes the model of both: `lmnet.Wires` (a network's edges), `lora.LoRA`
(one model's adapters), `Everything`. Pure functions of arrays; data, checkpoints and the loop are
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
from jaxtyping import Array, Float, Int

from jaxcomm.config import AnyArray, Remat
from jaxcomm.model import LanguageModel, Training
from jaxcomm.sharding import constrain

CHUNK = 128
"""Columns of a batch whose logits exist at once."""

Document = tuple[Sequence[int], Sequence[float]]
"""Token ids, and the weight of each in the loss."""


class Everything(struct.PyTreeNode):
    """The whole model is trained."""

    model: Any

    def join(self, frozen: None) -> Any:
        return self.model


class Batch(struct.PyTreeNode):
    """tokens [.., B, T]; documents [.., B, T]: which text of its row each belongs to, -1 on padding; weights [.., B, T] in the
    loss, 0 on the first token of a text, which nothing predicts."""

    tokens: Any
    documents: Any
    weights: Any


class State(struct.PyTreeNode):
    """step: how many have been made; trained: float32; moments: the optimizer's."""

    step: Any
    trained: Any
    moments: Any


def pack(documents: Iterable[Document], rows: int, columns: int) -> Iterator[tuple[Batch, int]]:
    """Batches [rows, columns], each text whole in the first row that has room, and how many texts are in them so far.

    A batch ends at the first text that does not fit, which begins the next one: who resumes skips so many texts.
    ValueError: a text without two tokens, or longer than a row.
    """
    batch, room, count = _blank(rows, columns), [columns] * rows, 0
    for ids, weights in documents:
        if not 2 <= len(ids) <= columns:
            raise ValueError(
                f"text {count} has {len(ids)} tokens: rows hold 2 to {columns}; cut it, or make rows longer"
            )
        row = next((r for r, free in enumerate(room) if free >= len(ids)), None)
        if row is None:
            yield batch, count
            batch, room, row = _blank(rows, columns), [columns] * rows, 0
        at = slice(columns - room[row], columns - room[row] + len(ids))
        batch.documents[row, at] = batch.documents[row].max() + 1
        batch.tokens[row, at], batch.weights[row, at] = ids, [0.0, *weights[1:]]
        room[row] -= len(ids)
        count += 1
    if min(room) < columns:
        yield batch, count


def _blank(rows: int, columns: int) -> Batch:
    shape = rows, columns
    return Batch(np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.float32))


def positions_in(documents: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... over each text of a row; -1 on padding."""
    column = jnp.arange(documents.shape[1], dtype=jnp.int32)
    new = jnp.concatenate([jnp.ones_like(documents[:, :1], bool), documents[:, 1:] != documents[:, :-1]], axis=1)
    begin = jax.lax.cummax(jnp.where(new, column, 0), axis=1)
    return jnp.where(documents < 0, -1, column - begin)


def losses(model: LanguageModel, batch: Batch, remat: Remat = "off", mesh: Mesh | None = None) -> Float[Array, "B T"]:
    """Weighted cross-entropy, nats, of every token given those before it in its text."""
    training = Training(jnp.asarray(batch.documents), remat, mesh)
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
    """AdamW (0.9, 0.95) after clipping to a global norm; the rate rises over a share `warmup` of the steps (at least one) and
    falls as a cosine to a tenth at the last. Only matrices decay."""
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
    """Before the first step."""
    with jax.numpy_dtype_promotion("standard"):
        return State(jnp.int32(0), trained, optimizer.init(trained))


def make_step(
    optimizer: optax.GradientTransformation, *, remat: Remat = "off", dtype: Any = None, mesh: Mesh | None = None
) -> Callable[[State, Any, Batch], tuple[State, dict[str, Array]]]:
    """step(state, frozen, batch) -> state and {"loss": nats per weight, "norm": of the gradient}; to be jitted.

    batch: [A, B, T], whose A parts are read one after the other and their gradients added up. dtype: of the computation, if
    not of the weights. mesh: rows are spread over all of its devices (place state and frozen by `sharding.fsdp_shardings`).
    """

    def step(state: State, frozen: Any, batch: Batch):
        weight = jnp.maximum(jnp.sum(batch.weights), 1e-9)

        def add(carry, part: Batch):
            part = jax.tree.map(lambda a: constrain(mesh, jnp.asarray(a), mesh and mesh.axis_names), part)

            def total(trained):
                model: Any = trained.join(frozen)
                if dtype is not None:
                    model = jax.tree.map(
                        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, model
                    )
                return jnp.sum(losses(model, part, remat, mesh)) / weight

            return jax.tree.map(jnp.add, carry, jax.value_and_grad(total)(state.trained)), None

        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained)
        (loss, gradient), _ = jax.lax.scan(add, zero, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradient, state.moments, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            norm = optax.tree.norm(gradient)
        return State(state.step + 1, trained, moments), {"loss": loss, "norm": norm}

    return step
