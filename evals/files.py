"""Write files atomically, and check output paths."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..converters.folders import check_local


def check_folder(path: Path) -> None:
    """Checks, before any work is done, that results can be written to a folder.

    Args:
        path: The folder. It need not exist.

    Raises:
        NotADirectoryError: It is a file.
        ValueError: It is not a local path (`check_local`).
    """
    check_local(path)
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file: name a folder")


def check_new(path: Path) -> None:
    """Checks, before any work is done, that nothing exists at a path.

    Args:
        path: The path.

    Raises:
        FileExistsError: Something exists there.
        ValueError: It is not a local path (`check_local`).
    """
    check_local(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another folder, or remove it first")


def check_file(path: Path | None) -> None:
    """Checks, before any work is done, that results can be written to a file.

    Args:
        path: The file. It need not exist. None: nothing is checked.

    Raises:
        IsADirectoryError: It is a folder.
        ValueError: It is not a local path (`check_local`).
    """
    if path is None:
        return
    check_local(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8.

    Args:
        path: The file.

    Returns:
        The text.

    Raises:
        ValueError: The file is not UTF-8.
        OSError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a file with a JSON object on each line. Empty lines are skipped.

    Only a line feed ends a line, because JSON strings may contain the other line-end characters.

    Args:
        path: The file.

    Yields:
        The line's location ("FILE, line N"), and its object.

    Raises:
        ValueError: A line is not a JSON object, or has a lone surrogate.
        FileNotFoundError: There is no such file.
    """
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
    """Writes objects as JSON, one per line. The file is replaced atomically.

    Args:
        path: The file.
        lines: The objects.

    Raises:
        ValueError: The path is not local (`check_local`).
        OSError: The file cannot be written.
    """
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file atomically. Missing folders are created.

    Args:
        path: The file.
        data: Its bytes.

    Raises:
        ValueError: The path is not local (`check_local`).
        OSError: The file cannot be written.
    """
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
