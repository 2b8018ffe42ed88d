"""Read tensors from safetensors and GGUF files (`converters.gguf`): memory-mapped, piece by piece."""

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
"""Number of bytes to read from disk at a time."""


class Tensor(NamedTuple):
    """Where a tensor is on disk, and how it is stored.

    Attributes:
        file: The file.
        dtype: The dtype as the file calls it: a key of `DTYPES`, or one of GGUF's quantised types.
        shape: The shape.
        begin: Where the tensor begins in the file, in bytes.
        decode: Turns the bytes of a quantised tensor [.., bytes of a row] into numbers [.., columns]. None: the tensor
            is stored as numbers.
        row_bytes: Bytes of a row of a quantised tensor.
        scales: Location of the scales of a quantised tensor, if they are a separate tensor. `decode` then takes the bytes
            of both.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    decode: Callable[..., np.ndarray] | None = None
    row_bytes: int = 0
    scales: Tensor | None = None


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Finds every tensor in a folder's safetensors files. Only headers are read.

    Args:
        folder: A Hugging Face folder.

    Returns:
        The tensors by name.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        ValueError: A file or the index is damaged, or there are only pickle files.
    """
    named: dict[str, str] | None = None
    if (folder / WEIGHTS).is_file():  # like transformers, prefer it to an index, which may be a leftover
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
"""Prefixes that torch.compile and DistributedDataParallel add to the names of a model's tensors."""


def read_index(folder: Path) -> dict[str, str]:
    """Reads the index of a checkpoint in several files.

    Args:
        folder: A Hugging Face folder.

    Returns:
        For each tensor the name of the file that holds it.

    Raises:
        ValueError: The index is damaged.
    """
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
        with safe_open(path, framework="np"):  # safetensors checks sizes, offsets, overlaps and holes
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


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""The positive numbers of four bits (E2M1). The fourth bit is the sign."""
MXFP4 = re.compile(r"_(blocks|scales)$")


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins the blocks and the scales of weights in MXFP4.

    Args:
        tensors: Tensors by name. A packed weight consists of `NAME_blocks` [.., rows, groups, 16] and `NAME_scales`
            [.., rows, groups], both bytes.

    Returns:
        The tensors by name, with one quantised tensor NAME [.., rows, 32 groups] instead of the two.

    Raises:
        ValueError: One of the two is missing, or they do not fit each other.
    """
    found = {name: tensor for name, tensor in tensors.items() if not MXFP4.search(name)}
    for name in sorted({MXFP4.sub("", name) for name in tensors.keys() - found.keys()}):
        blocks, scales = (tensors.get(f"{name}_{part}") for part in ("blocks", "scales"))
        if blocks is None or scales is None or blocks.shape != (*scales.shape, 16):
            shapes = " and ".join("nothing" if x is None else str(x.shape) for x in (blocks, scales))
            raise ValueError(f"tensor {name} is packed in {shapes}, and not in blocks of 16 bytes with a scale each")
        if (blocks.dtype, scales.dtype) != ("U8", "U8"):
            raise ValueError(f"tensor {name} is packed in {blocks.dtype} and {scales.dtype}, only U8 is supported")
        *rows, groups = scales.shape
        apart = scales._replace(decode=lambda x: x, row_bytes=groups)
        found[name] = blocks._replace(
            dtype="MXFP4", shape=(*rows, 32 * groups), decode=decode_mxfp4, row_bytes=16 * groups, scales=apart
        )
    return found


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decodes weights in MXFP4 (Open Compute Project's Microscaling Formats). Each byte holds two 4-bit numbers, the lower
    bits first. Each group of 32 numbers is multiplied by 2^(scale - 127).

    Args:
        blocks: Bytes [.., 16 groups].
        scales: Bytes [.., groups].

    Returns:
        Numbers [.., 32 groups], float32.
    """
    both = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    numbers = np.concatenate([FP4, -FP4])[both]
    return np.ldexp(numbers, scales[..., None].astype(np.int32) - 127).reshape(*blocks.shape[:-1], -1)


def check(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Checks that a tensor fits the architecture.

    Args:
        name: Name of the tensor, for messages.
        tensor: The tensor. None: the checkpoint does not have it.
        shape: The shape that it should have.

    Returns:
        The tensor.

    Raises:
        ValueError: The tensor is missing, has another shape, or does not hold floating-point numbers.
    """
    if tensor is None:
        raise ValueError(f"tensor {name} is missing from the checkpoint")
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} has shape {tensor.shape}, the config asks for {shape}")
    if tensor.dtype not in DTYPES and tensor.decode is None:
        raise ValueError(
            f"tensor {name} is {tensor.dtype}: quantised checkpoints are not supported, except .gguf files and MXFP4"
        )
    return tensor


def mapped(tensor: Tensor) -> np.ndarray:
    """Maps a tensor into memory, without reading it.

    The pages of a mapped file count as memory of this process as long as the array exists. So map the file again for each
    piece.

    Args:
        tensor: The tensor.

    Returns:
        Its numbers. For a quantised tensor: the bytes of each row.
    """
    if tensor.decode is None:
        return np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.begin, tensor.shape)
    return np.memmap(tensor.file, np.uint8, "r", tensor.begin, (*tensor.shape[:-1], tensor.row_bytes))


def same(a: Tensor, b: Tensor) -> bool:
    """Tests whether two tensors hold the same bytes.

    Args:
        a: One tensor.
        b: The other.

    Returns:
        Whether dtype, shape and bytes are the same.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = range(0, a.shape[0], max(1, PIECE * a.shape[0] // mapped(a).nbytes))
    cut = lambda tensor, begin: mapped(tensor)[begin : begin + rows.step].view(np.uint8)
    return all(np.array_equal(cut(a, begin), cut(b, begin)) for begin in rows)


class Part(NamedTuple):
    """A part of an array, and the part of a weight that fills it.

    An array may hold several tensors, numbered by its first axes. Then the weight has fewer axes than the array.

    Attributes:
        at: Where the part begins in the array, one index for each of the array's axes.
        cut: Rows, columns and so on of the weight.
        name: Name of the tensor.
        read: Reads such a cut of the weight.
    """

    at: tuple[int, ...]
    cut: tuple[range, ...]
    name: str
    read: Callable[[tuple[range, ...]], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(map(len, self.cut))

    @property
    def where(self) -> tuple[int | slice, ...]:
        """The index of the part in the array: array[where]."""
        numbered = len(self.at) - len(self.cut)
        rest = zip(self.at[numbered:], self.shape, strict=True)
        return (*self.at[:numbered], *(slice(i, i + n) for i, n in rest))


def fill(shape: tuple[int, ...], dtype: Any, device: Any, parts: Iterable[Part]) -> jax.Array:
    """Makes an array from parts.

    On CPU the parts are written directly into the result. On other devices each piece is copied into a buffer on the
    device, which is donated at every step. Besides the result, the host holds only single pieces.

    Args:
        shape: Shape of the array.
        dtype: Dtype of the array. The parts are cast to it.
        device: Device of the array. None: the default device, without committing the array to it.
        parts: The parts.

    Returns:
        The array.

    Raises:
        ValueError: A part is not finite in `dtype`.
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
    """Threads that read tensors, one for each core. NumPy releases the interpreter's lock while it copies."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "reader")


def write(out: np.ndarray, piece: Part) -> None:
    """Reads a piece and writes it into an array, cast to the array's dtype.

    Args:
        out: The array to write to.
        piece: The piece.

    Raises:
        ValueError: A number is not finite in that dtype.
    """
    with np.errstate(over="ignore"):
        np.copyto(out, piece.read(piece.cut).reshape(out.shape), casting="unsafe")
    if not finite(out):
        raise ValueError(
            f"tensor {piece.name} holds NaN, infinite values, or some too large for {out.dtype}: another file or dtype is needed"
        )


def finite(array: np.ndarray) -> bool:
    """Tests whether all numbers of an array are finite, by their bits.

    As signed integers, the bits of every finite number are below those of +infinity; as unsigned integers, below those
    of -infinity. The test needs no temporary arrays. For 16-bit numbers it is twenty times as fast as ml_dtypes'
    isfinite.

    Args:
        array: The array.

    Returns:
        Whether all numbers are finite.

    Example:
        >>> finite(np.array([1.0, -2.0])), finite(np.array([1.0, -np.inf]))
        (True, False)
    """
    signed, unsigned = (np.dtype(f"{kind}{array.dtype.itemsize}") for kind in "iu")
    infinity = np.array([np.inf, -np.inf], array.dtype)
    return bool(
        array.view(signed).max() < infinity.view(signed)[0] and array.view(unsigned).max() < infinity.view(unsigned)[1]
    )


def pieces(part: Part, itemsize: int) -> Iterator[Part]:
    """Cuts a part into pieces of at most `PIECE` bytes each.

    A piece holds at least one whole row (the last axis). It is larger than `PIECE` if one row is.

    Args:
        part: The part.
        itemsize: Bytes of a number in the array.

    Yields:
        The pieces.
    """
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
    """Makes an empty array that XLA on CPU can use without a copy: it begins at a multiple of 64 bytes.

    Args:
        shape: Shape of the array.
        dtype: Dtype of the array.

    Returns:
        The array.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


store = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)
"""Writes a piece into the array. The old array is donated, so nothing is copied."""
