"""Run in several processes, on one host or many. Each does its share on its own devices. The first one prints and writes.

A model must fit on the devices of one process. Questions and cells are distributed, because they are independent.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def join(cluster: str | None) -> None:
    """Connects this process to the others. Call it before any computation.

    Args:
        cluster: "auto": detect the cluster from the environment (TPU pods, Slurm, Open MPI, Kubernetes).
            "HOST:PORT,COUNT,INDEX": address of the first process, number of processes, and index of this one. None: this
            is the only process.

    Raises:
        ValueError: `cluster` has another form.
    """
    if cluster is None:
        return
    if cluster == "auto":
        jax.distributed.initialize()
        return
    try:
        address, processes, process = cluster.split(",")
        count, index = int(processes), int(process)
        if ":" not in address or not 0 <= index < count:
            raise ValueError(cluster)
    except ValueError as error:
        raise ValueError(f"--cluster {cluster}: give auto, or HOST:PORT,COUNT,INDEX with INDEX below COUNT") from error
    jax.distributed.initialize(address, count, index)


def first() -> bool:
    """True on process 0, which prints and writes shared files."""
    return jax.process_index() == 0


def mine(everything: Sequence[Any]) -> Sequence[Any]:
    """Selects this process's share: every n-th element, where n is the number of processes.

    Args:
        everything: The elements.

    Returns:
        The share.

    Example:
        >>> mine(["a", "b", "c"])  # the only process has all
        ['a', 'b', 'c']
    """
    return everything[jax.process_index() :: jax.process_count()]


def agreed(work: Callable[[], T]) -> T:
    """Runs a function in every process, and waits until all have finished.

    If it fails in one process, it fails in all. So no process waits for one that has ended.

    Args:
        work: The work.

    Returns:
        The result of the work in this process.

    Raises:
        ValueError: The work failed in another process; otherwise what the work raises.
    """
    made, error = None, None
    try:
        made = work()
    except (ValueError, OSError, FloatingPointError) as caught:
        error = caught
    lines = together([None if error is None else str(error)])
    if error is not None:
        raise error
    for line in lines:
        if line is not None:
            raise ValueError(line)
    return made  # pyright: ignore[reportReturnType]


def together(share: Sequence[Any]) -> list[Any]:
    """Collects the shares of all processes, in the order of `mine`.

    Args:
        share: This process's share.

    Returns:
        All elements, in every process.
    """
    if jax.process_count() == 1:
        return list(share)
    told = np.frombuffer(pickle.dumps(list(share)), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(told)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(told)] = told
    every = multihost_utils.process_allgather(padded)
    shares = [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]
    whole: list[Any] = [None] * sum(map(len, shares))
    for index, part in enumerate(shares):
        whole[index :: len(shares)] = part
    return whole
