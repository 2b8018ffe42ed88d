"""The file format: metadata, and locations of tensors."""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..tensors import DTYPES, Tensor

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
STRING, ARRAY, FLOAT32 = 8, 9, 6
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kind of a metadata value -> its format in `struct`."""
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class File(NamedTuple):
    """The contents of a .gguf file before its weights.

    Attributes:
        metadata: The metadata by key.
        tensors: The tensors by name.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a .gguf file, by its name or by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == MAGIC


def all_files(name: str) -> str:
    """Makes a pattern of all files of a model.

    Args:
        name: Name of one of the files.

    Returns:
        A glob pattern. For a model in one file it is the name.

    Example:
        >>> all_files("llama-00001-of-00003.gguf"), all_files("llama.gguf")
        ('llama-?????-of-00003.gguf', 'llama.gguf')
    """
    return SPLIT.sub(r"-?????-of-\2.gguf", name)


def read(path: str | Path) -> File:
    """Reads metadata and tensors, without the weights. For a model in several files, all files are read.

    Args:
        path: The file, or one of several.

    Returns:
        The metadata of the first file, and the tensors of all files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is not a .gguf file; it is of another version, big-endian, or cut short; a tensor is of an
            unknown type.
    """
    path = Path(path)
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _read(path: Path, changed: int, size: int) -> File:
    first = _parse(path)
    count = first.metadata.get("split.count", 0)
    if count < 2:
        return first
    found = SPLIT.search(path.name)
    if found is None or int(found[2]) != count:
        raise ValueError(
            f"{path} is one of {count} files: give them back their names, which end in -00001-of-{count:05d}.gguf"
        )
    tensors: dict[str, Tensor] = {}
    for n in range(count):
        part = path.with_name(SPLIT.sub(f"-{n + 1:05d}-of-{found[2]}.gguf", path.name))
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing, {path.name} is one of {count} files: download it again")
        file = _parse(part)
        tensors |= file.tensors
        if n == 0:
            first = file
    return File(first.metadata, tensors)


def _parse(path: Path) -> File:
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            raise ValueError(f"{path} is empty: download it again") from None
    with data:
        if data[:4] != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it begins with {data[:4]!r} instead of {MAGIC!r}")
        version = int.from_bytes(data[4:8], "little")
        if version not in VERSIONS:
            if int.from_bytes(data[4:8], "big") in VERSIONS:
                raise ValueError(f"{path} is a big-endian GGUF file: convert it to little-endian (gguf-convert-endian)")
            raise ValueError(
                f"{path} is of GGUF version {version}, only {VERSIONS[0]} and {VERSIONS[1]} are supported: convert it again"
            )
        try:
            return _Reader(path, data).file()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError, RecursionError) as error:
            raise ValueError(f"{path} is truncated or corrupt ({type(error).__name__}): download it again") from error


class _Reader:
    """Reads the head of a file sequentially."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 8

    def numbers(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.numbers("Q")
        if length > len(self.data) - self.at:
            raise IndexError
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """Read many strings: fast, because there may be hundreds of thousands."""
        data, at, length, found = self.data, self.at, struct.Struct("<Q"), []
        for _ in range(count):
            (size,) = length.unpack_from(data, at)
            if size > len(data) - at - 8:
                raise IndexError
            found.append(data[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.numbers("IQ")
            if count > len(self.data) - self.at:
                raise IndexError
            if kind in NUMBERS:
                return list(self.numbers(f"{count}{NUMBERS[kind]}"))
            return self.strings(count) if kind == STRING else [self.value(kind) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(
                f"{self.path} has metadata of an unknown kind ({kind}): download it again, or convert it again"
            )
        (value,) = self.numbers(NUMBERS[kind])
        # 1e-5 is stored as 9.99999974e-06 in float32. Recover the decimal.
        return float(str(np.float32(value))) if kind == FLOAT32 else value

    def file(self) -> File:
        count, pairs = self.numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            (kind,) = self.numbers("I")
            metadata[key] = self.value(kind)
        entries = []
        for _ in range(count):
            name = self.string()
            (axes,) = self.numbers("I")
            shape = self.numbers(f"{axes}Q")[::-1]
            entries.append((name, shape, *self.numbers("IQ")))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(
                f"{self.path}: general.alignment = {alignment!r} is not a number of bytes: convert it again"
            )
        begin = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, shape, kind, begin + offset) for name, shape, kind, offset in entries}
        if len(tensors) < count:
            raise ValueError(f"{self.path} has two tensors of one name: convert it again")
        return File(metadata, tensors)

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> Tensor:
        import gguf

        try:
            form = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(
                f"{self.path}: tensor {name} is of an unknown type ({kind}): update the package gguf, or quantise the model again"
            ) from None
        if form.name in DTYPES:
            tensor, row_bytes = (
                Tensor(self.path, form.name, shape, begin),
                shape[-1] * np.dtype(DTYPES[form.name]).itemsize,
            )
        else:
            columns, size = gguf.GGML_QUANT_SIZES[form]
            if shape[-1] % columns:
                raise ValueError(
                    f"{self.path}: tensor {name} has rows of {shape[-1]}, which {form.name} cannot hold: convert it again"
                )
            row_bytes = shape[-1] // columns * size
            tensor = Tensor(self.path, form.name, shape, begin, _decoder(form.name), row_bytes)
        end = begin + math.prod(shape[:-1]) * row_bytes
        if end > len(self.data):
            raise ValueError(
                f"{self.path} is cut short: it has {len(self.data)} bytes, tensor {name} ends at {end}: download it again"
            )
        return tensor


@functools.cache
def _decoder(name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """The decoder of a quantised type. None: the package gguf has none."""
    import gguf
    from gguf import quants

    form = gguf.GGMLQuantizationType[name]
    columns, size = gguf.GGML_QUANT_SIZES[form]

    def decode(rows: np.ndarray) -> np.ndarray:
        # Decode as one row: the package processes sixteen rows at a time, and holds the interpreter's lock most of the time.
        numbers = quants.dequantize(np.ascontiguousarray(rows).reshape(1, -1), form)
        return numbers.reshape(*rows.shape[:-1], rows.shape[-1] // size * columns)

    try:
        decode(np.zeros((1, size), np.uint8))
    except NotImplementedError:
        return None
    return decode
