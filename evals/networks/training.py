"""Resumable training: the loop, its checkpoints, its metrics.

    run.json           the command, settings, seeds, versions, fingerprints (`evals.runs`)
    checkpoints/STEP/  model (trained weights), optimizer, data (number of texts read)
    metrics.jsonl      loss and norm of the gradient, step by step
    tensorboard/       the same, and tokens per second

Orbax writes a checkpoint to a temporary folder and renames it. So an existing checkpoint is complete. A resumed run gives
the same numbers as a run that was never stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax.sharding import Mesh

from jaxcomm.model import Params
from jaxcomm.sharding import fsdp_shardings, local_mesh
from jaxcomm.training import Batch, State, begin, make_optimizer, make_step, pack

from ..files import write_whole
from .settings import Recipe
from .texts import Source

KEPT = 2
"""Number of checkpoints to keep, the newest ones."""


def batches(source: Source, recipe: Recipe, start: int = 0) -> Iterator[tuple[Batch, int]]:
    """Packs texts into batches.

    Args:
        source: The texts (`texts.source`).
        recipe: Rows, columns and accumulation of a batch.
        start: Number of the first text.

    Yields:
        A batch with arrays [A, B, T] (A accumulated parts of B rows with T tokens), and the number of texts read so far.
    """
    rows = recipe.rows * recipe.accumulate
    for batch, count in pack(source(start), rows, recipe.columns):
        yield jax.tree.map(lambda a: a.reshape(recipe.accumulate, recipe.rows, -1), batch), start + count


def train(
    trained: Any,
    frozen: Any,
    source: Source,
    recipe: Recipe,
    folder: Path | None = None,
    title: str = "",
    losses: list | None = None,
    unroll: bool = False,
) -> State:
    """Trains, starting from the newest checkpoint if the folder has one.

    Args:
        trained: The trained weights, as in `jaxcomm.training`. They are not modified.
        frozen: The frozen weights.
        source: A function of n that yields the texts from the n-th on. For an iterable:
            lambda n: itertools.islice(texts, n, None).
        recipe: Steps, batches and optimizer.
        folder: Folder for checkpoints and metrics. None: nothing is saved.
        title: Title of the progress bar.
        losses: A list to which the loss of each step is appended, in nats per token.
        unroll: Whether to unroll stacked layers during training (`Params.unroll`). Checkpoints and the result are still
            stacked. Not for `LoRA`, whose factors have the layout of their model.

    Returns:
        The state after all steps.

    Raises:
        ValueError: Training is impossible (`check`), a checkpoint belongs to another model, or the texts end too early.
        FloatingPointError: The loss or the gradient is not a finite number. The last checkpoint is kept.
    """
    mesh = check(recipe, trained, trained.join(frozen).config.max_positions)
    optimizer = make_optimizer(
        recipe.learning_rate, recipe.steps, warmup=recipe.warmup, weight_decay=recipe.weight_decay, clip=recipe.clip
    )
    start, place = lambda trained: begin(jax.tree.map(jnp.copy, trained), optimizer), None
    if mesh is not None:  # no device ever holds the whole state
        trained, frozen = (jax.device_put(tree, fsdp_shardings(tree, mesh)) for tree in (trained, frozen))
        place = fsdp_shardings(jax.eval_shape(start, trained), mesh)
    state = jax.jit(start, out_shardings=place)(trained)
    make = make_step(optimizer, remat=recipe.remat, dtype=getattr(jnp, recipe.dtype), mesh=mesh)
    step = jax.jit(make, donate_argnums=0)
    with Records(folder) as records, _progress() as bar:
        state, begun = records.latest(state)
        if unroll:
            state, frozen = laid_out(Params.unroll, (state, frozen))
        kept = functools.partial(laid_out, Params.stack) if unroll else lambda state: state
        done, task = int(state.step), bar.add_task(title, total=recipe.steps, completed=int(state.step), loss=math.nan)
        clock, pending = time.perf_counter(), []
        for n, (batch, read) in zip(range(done + 1, recipe.steps + 1), batches(source, recipe, begun), strict=False):
            state, metrics = step(state, frozen, batch)
            pending.append((n, metrics, int(np.sum(batch.documents >= 0))))
            # Check a step's numbers while the next step runs. But before a checkpoint, wait and check them first.
            keep = n % recipe.every == 0 or n == recipe.steps
            while len(pending) > (0 if keep else 1):
                at, metrics, tokens = pending.pop(0)
                loss = records.note(at, jax.device_get(metrics), tokens / (time.perf_counter() - clock))
                clock = time.perf_counter()
                bar.update(task, completed=at, loss=loss)
                if losses is not None:
                    losses.append(loss)
            if keep:
                records.keep(n, kept(state), read)
    if int(state.step) < recipe.steps:
        raise ValueError(f"the texts end after {int(state.step)} of {recipe.steps} steps: name more of them")
    return kept(state)


def laid_out(layout: Callable[[Params], Params], tree: Any) -> Any:
    """Changes the layout of every model in a tree.

    Args:
        layout: The change, such as `Params.unroll`.
        tree: A pytree that may hold models.

    Returns:
        The tree with the changed models.
    """
    is_model = lambda x: isinstance(x, Params)
    return jax.tree.map(lambda x: layout(x) if is_model(x) else x, tree, is_leaf=is_model)


def check(recipe: Recipe, trained: Any, positions: int) -> Mesh | None:
    """Checks that training is possible, and chooses its devices.

    Args:
        recipe: The recipe.
        trained: The trained weights.
        positions: Largest number of tokens that the model can read.

    Returns:
        The devices as a mesh. None: there is only one device.

    Raises:
        ValueError: There is nothing to train; rows are longer than `positions`; rows cannot be distributed over the
            devices.
    """
    mesh = local_mesh(recipe.fsdp)
    mesh = mesh if mesh.size > 1 else None
    if not jax.tree.leaves(trained):
        raise ValueError("there is nothing to train on the edges: choose other widths or edges, or train all")
    if recipe.columns > positions:
        raise ValueError(
            f"rows of {recipe.columns} tokens are longer than the model's {positions} positions: shorten them"
        )
    if mesh is not None and recipe.rows % mesh.size:
        raise ValueError(f"{recipe.rows} rows cannot be spread over {mesh.size} devices: take a multiple")
    return mesh


def _progress() -> rich.progress.Progress:
    text = rich.progress.TextColumn
    return rich.progress.Progress(
        text("{task.description}"), rich.progress.BarColumn(), text("step {task.completed} of {task.total}"),
        text("loss {task.fields[loss]:.3f}"), rich.progress.TimeRemainingColumn(),
    )  # fmt: skip


class Records(contextlib.ExitStack):
    """Checkpoints and metrics of a training. It is a context manager.

    Args:
        folder: The run folder. None: nothing is saved.
    """

    def __init__(self, folder: Path | None):
        super().__init__()
        self.folder = folder
        if folder is not None:
            self.manager = manager(folder)
            self.callback(self.manager.close)
            self.callback(self.manager.wait_until_finished)

    def latest(self, state: State) -> tuple[State, int]:
        """Reads the newest checkpoint, and opens the files of metrics.

        Args:
            state: The initial state, if there is no checkpoint.

        Returns:
            The state, and the number of texts read until then.

        Raises:
            ValueError: The checkpoint is damaged or belongs to another model.
        """
        if self.folder is None:
            return state, 0
        import tensorboardX

        read, newest = 0, self.manager.latest_step()
        if newest is not None:
            state, read = restore(self.folder, self.manager, newest, state)
        path, begin = self.folder / "metrics.jsonl", int(state.step)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        write_whole(path, "".join(lines[:begin]).encode())
        self.file = self.enter_context(path.open("a"))
        self.board = self.enter_context(
            tensorboardX.SummaryWriter(str(self.folder / "tensorboard"), purge_step=begin + 1)
        )
        return state, read

    def note(self, step: int, metrics: dict[str, np.ndarray], speed: float) -> float:
        """Writes the metrics of a step.

        Args:
            step: Number of the step.
            metrics: Loss and norm of the gradient, and further numbers.
            speed: Tokens per second.

        Returns:
            The loss.

        Raises:
            FloatingPointError: A number is not finite.
        """
        values = {name: float(value) for name, value in sorted(metrics.items())}
        if not all(map(math.isfinite, values.values())):
            kept = None if self.folder is None else self.manager.latest_step()
            where = "nothing was kept" if kept is None else f"{self.folder} keeps step {kept}"
            raise FloatingPointError(
                f"the loss is {values['loss']}, the gradient's norm {values['norm']} at step {step}: {where}; lower the learning rate"
            )
        if self.folder is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
            for name, value in {**values, "tokens_per_second": speed}.items():
                self.board.add_scalar(name, value, step)
        return values["loss"]

    def keep(self, step: int, state: State, read: int) -> None:
        """Writes a checkpoint.

        Args:
            step: Number of the step.
            state: The state after it.
            read: Number of texts that have been read.
        """
        if self.folder is None:
            return
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.trained),
            optimizer=ocp.args.StandardSave({"step": state.step, "moments": state.moments}),
            data=ocp.args.JsonSave({"texts": read}),
        )
        self.manager.save(step, args=items)


def manager(folder: Path, *, clean: bool = True):
    """Opens the checkpoints of a run folder with Orbax. It keeps the newest two.

    Args:
        folder: The run folder.
        clean: Whether to remove incomplete checkpoints. Do not do this while a run may still be writing one.

    Returns:
        Orbax' checkpoint manager.
    """
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=clean)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def restore(folder: Path, manager, step: int, state: State) -> tuple[State, int]:
    """Reads a checkpoint.

    Args:
        folder: The run folder, for messages.
        manager: Its checkpoint manager.
        step: Number of the step.
        state: A state of the same structure. The result is placed on the same devices.

    Returns:
        The state, and the number of texts that had been read by then.

    Raises:
        ValueError: The checkpoint is damaged or belongs to another model.
    """
    import orbax.checkpoint as ocp

    rest = {"step": state.step, "moments": state.moments}
    like = lambda tree: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
    with damaged(folder, step):
        got = manager.restore(
            step, args=ocp.args.Composite(model=like(state.trained), optimizer=like(rest), data=ocp.args.JsonRestore())
        )
    return State(got["optimizer"]["step"], got["model"], got["optimizer"]["moments"]), got["data"]["texts"]


def newest(folder: Path, trained: Any) -> Any:
    """Reads the trained weights, with the structure of `trained`, from a run folder's newest checkpoint.

    Raises:
        ValueError: There is no finished checkpoint; it is damaged or belongs to another model.
    """
    import orbax.checkpoint as ocp

    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained)
    with manager(folder, clean=False) as checkpoints:
        if (step := checkpoints.latest_step()) is None:
            raise ValueError(f"{folder} holds no finished checkpoint: go on with its training, with --resume")
        with damaged(folder, step):
            return checkpoints.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(like)))["model"]


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory in the process. Without glibc it does nothing.

    On CPU, XLA allocates a program's temporary arrays again at every call; in training these are gigabytes. The kernel may
    spend as much time on their pages as the step spends on its matrix products.

    Call it before the first computation, because threads that already have their own heap keep it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD (never)
            mallopt(option, value)


class damaged:
    """A context manager that turns Orbax' errors about a checkpoint into a ValueError of one line.

    Args:
        folder: The run folder.
        step: The step of the checkpoint.
    """

    def __init__(self, folder: Path, step: int):
        self.line = f"{folder}/checkpoints/{step} is damaged or of another network"

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, Exception):
            first = str(error).strip().split("\n")[0].split(". ")[0][:160]
            raise ValueError(
                f"{self.line} ({kind.__name__}: {first}): remove it, and the one before it is taken"
            ) from error
