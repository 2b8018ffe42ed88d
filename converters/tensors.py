"""Tensors on disk, mapped into memory and read piece by piece: of safetensors files, and of GGUF files (`converters.gguf`)."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PIECE = 4 * 2**20
"""Bytes that are read from disk at a time."""


class Tensor(NamedTuple):
    file: Path
    dtype: str
    """As its file calls it: a key of DTYPES, or one of GGUF's quantised types."""
    shape: tuple[int, ...]
    begin: int
    """In bytes, from the file's beginning."""
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    """Of a quantised tensor: bytes [.., bytes of a row] to its numbers [.., columns]. None: it lies there as numbers."""
    row_bytes: int = 0
    """Of a quantised tensor."""


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by name; nothing but their headers is read.

    FileNotFoundError: no weights, a missing shard. ValueError: files or index damaged, or only pickle files.
    """
    named: dict[str, str] | None = None
    if (folder / WEIGHTS).is_file():  # transformers prefers it, too, to an index that may have been left there
        shards = [WEIGHTS]
    elif (folder / INDEX).is_file():
        named = read_index(folder)
        shards = sorted(set(named.values()))
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{folder} has only pickle files ({pickles[0]}), which can run code when they are loaded: convert them to safetensors first"
            )
        raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"shard {shard} is missing from {folder}, {INDEX} names it: download it again")
        tensors |= _read_header(path)
    if named is not None and (lost := sorted(name for name in named if name not in tensors)):
        raise ValueError(f"{INDEX} names tensor {lost[0]}, {named[lost[0]]} does not hold it: download both again")
    plain = {_WRAPPERS.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(f"{folder} has tensors whose names differ only in _orig_mod or module: keep one of each")
    return plain


_WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|module)\.)+")
"""What torch.compile and DistributedDataParallel put into the names of a model's tensors."""


def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> the file that holds it. ValueError: the index is damaged."""
    index = folder / INDEX
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in named.values()):
            raise ValueError("weight_map must name files of this folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{index} is not a weight index ({' '.join(str(error).split())}): download it again"
        ) from error
    return named


def _read_header(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="np"):  # the library's own checks: sizes, offsets, overlaps, holes
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({' '.join(str(error).split())}): download it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def check(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """ValueError unless the tensor is there, of this shape and of floating-point numbers."""
    if tensor is None:
        raise ValueError(f"tensor {name} is missing from the checkpoint")
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} has shape {tensor.shape}, the config asks for {shape}")
    if tensor.dtype not in DTYPES and tensor.decode is None:
        raise ValueError(
            f"tensor {name} is {tensor.dtype}: quantised checkpoints are not supported, but for .gguf files"
        )
    return tensor


def mapped(tensor: Tensor) -> np.ndarray:
    """The tensor where it lies on disk; of a quantised one the bytes of each row. Pages of a mapped file count as this process'
    memory for as long as the array is there, so it is made anew for every piece."""
    if tensor.decode is None:
        return np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.begin, tensor.shape)
    return np.memmap(tensor.file, np.uint8, "r", tensor.begin, (*tensor.shape[:-1], tensor.row_bytes))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = range(0, a.shape[0], max(1, PIECE * a.shape[0] // mapped(a).nbytes))
    cut = lambda tensor, begin: mapped(tensor)[begin : begin + rows.step].view(np.uint8)
    return all(np.array_equal(cut(a, begin), cut(b, begin)) for begin in rows)


class Part(NamedTuple):
    """What fills an array from `at` on: part of a weight, and the name of the tensor it comes from. The weight has fewer axes
    than the array where the array's first ones are numbers of tensors."""

    at: tuple[int, ...]
    cut: tuple[range, ...]
    """Which rows, columns .. of the weight."""
    name: str
    read: Callable[[tuple[range, ...]], np.ndarray]
    """These of the weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.cut))

    @property
    def where(self) -> tuple[int | slice, ...]:
        """It is array[where]."""
        numbered = len(self.at) - len(self.cut)
        rest = zip(self.at[numbered:], self.shape, strict=True)
        return (*self.at[:numbered], *(slice(i, i + n) for i, n in rest))


def fill(shape: tuple[int, ...], dtype: Any, device: Any, parts: Iterable[Part]) -> jax.Array:
    """An array made of parts, cast to dtype, on a device (None: the default one, and free to be moved).

    On CPU the parts are written where they stay; elsewhere they go to the device one piece at a time, into a buffer that is
    given up and taken over at every step. Either way the host holds a piece besides the result.
    ValueError: a part is not finite in dtype.
    """
    backend = jax.default_backend() if device is None else device.platform
    if backend == "cpu" or math.prod(shape) * dtype.itemsize <= PIECE:
        whole = aligned(shape, dtype)
        every = [piece for part in parts for piece in pieces(part, dtype.itemsize)]
        list(readers().map(lambda piece: write(whole[piece.where], piece), every))
        return jax.device_put(whole, device)
    out = jnp.zeros(shape, dtype, device=device)
    for part in parts:
        for piece in pieces(part, dtype.itemsize):
            host = np.empty(piece.shape, dtype)
            write(host, piece)
            host = host.reshape((1,) * (len(shape) - host.ndim) + host.shape)
            out = store(out, host, piece.at)
    return out.block_until_ready()


@functools.cache
def readers() -> concurrent.futures.Executor:
    """A thread for each core; numpy copies without the interpreter's lock."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "reader")


def write(out: np.ndarray, piece: Part) -> None:
    """The piece, cast, into `out`."""
    with np.errstate(over="ignore"):
        np.copyto(out, piece.read(piece.cut).reshape(out.shape), casting="unsafe")
    if not finite(out):
        raise ValueError(f"tensor {piece.name} holds NaN, infinite values, or some too large for {out.dtype}")


def finite(array: np.ndarray) -> bool:
    """By its bits: as signed integers, no number reaches +infinity's, as unsigned ones, none -infinity's. (No temporaries, and
    in two bytes twenty times as fast as ml_dtypes' isfinite.)"""
    signed, unsigned = (np.dtype(f"{kind}{array.dtype.itemsize}") for kind in "iu")
    infinity = np.array([np.inf, -np.inf], array.dtype)
    return bool(
        array.view(signed).max() < infinity.view(signed)[0] and array.view(unsigned).max() < infinity.view(unsigned)[1]
    )


def pieces(part: Part, itemsize: int) -> Iterator[Part]:
    """The part, cut into some of at most PIECE bytes each, if a row of its last but one axis is not more."""
    shape, numbered = part.shape, len(part.at) - len(part.cut)
    axis = next(
        (a for a in range(len(shape) - 1) if math.prod(shape[a + 1 :]) * itemsize <= PIECE), max(0, len(shape) - 2)
    )
    rows = max(1, PIECE // (math.prod(shape[axis + 1 :]) * itemsize))
    steps = [1] * axis + [rows] + list(shape[axis + 1 :])
    for begins in itertools.product(*(range(0, n, max(1, step)) for n, step in zip(shape, steps, strict=True))):
        cut = tuple(r[i : i + step] for r, i, step in zip(part.cut, begins, steps, strict=True))
        at = tuple(a + i for a, i in zip(part.at[numbered:], begins, strict=True))
        yield Part((*part.at[:numbered], *at), cut, part.name, part.read)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA on CPU takes over as it lies."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


store = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)
"""A piece in its place. The old array is given up: nothing is copied."""
