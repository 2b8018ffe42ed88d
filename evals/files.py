"""Files that are written whole, and where they may be written to."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..converters.hf import check_local


def check_folder(path: Path) -> None:
    """OSError before the work, not after it, if it is a file. ValueError: `check_local`'s."""
    check_local(path)
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file: name a folder")


def check_new(path: Path) -> None:
    """FileExistsError before the work, not after it. ValueError: `check_local`'s."""
    check_local(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another folder, or remove it first")


def check_file(path: Path | None) -> None:
    """OSError before the work, not after it, if results cannot be written there. ValueError: `check_local`'s."""
    if path is None:
        return
    check_local(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")


def read_text(path: Path) -> str:
    """A file of text. ValueError: it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on every line that is not empty, and where it stands. (A line ends at a line feed: JSON lets the other marks that
    end lines stand within texts.) ValueError: a line is none; FileNotFoundError."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a JSON object: {line[:40]!r}")
        if re.search(r"[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
            raise ValueError(f"{where} has half a character (a lone surrogate, \\ud800 to \\udfff): write it whole")
        yield where, record


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole, or as it was before. ValueError: `check_local`'s."""
    check_local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
