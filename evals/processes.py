"""Several processes, on one host or many: each does its share with its own devices, and the first one tells.

A model has to fit the devices of one process; what is shared out are questions and cells, which need nothing of each other.
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
    """Makes this process one of several. Call it before anything is computed.

    Args:
        cluster: "auto": the surroundings say which process this is (TPU pods, Slurm, Open MPI, Kubernetes).
            "HOST:PORT,COUNT,INDEX": address of the first process, number of processes, and index of this one. None: it
            is the only one.

    Raises:
        ValueError: `cluster` is none of these.
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
    """Whether this is the first process. Only the first one prints, and writes what is written once."""
    return jax.process_index() == 0


def mine(everything: Sequence[Any]) -> Sequence[Any]:
    """Selects this process' share: every n-th element, where n is the number of processes.

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
    """Does some work in every process, and waits until all have done it.

    If it fails in one process, it fails in all. So no process waits for one that has ended.

    Args:
        work: The work.

    Returns:
        What the work returned in this process.

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
        share: This process' share.

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
