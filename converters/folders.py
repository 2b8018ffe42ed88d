"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_local(path: str | Path) -> None:
    """Checks that a path is local, not a URL such as gs://bucket/run.

    Args:
        path: The path.

    Raises:
        ValueError: It is a URL.
    """
    if found := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(path)):
        raise ValueError(f"{found[1]}://{found[2]} is not local: name a local folder, and copy it there afterwards")


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Context manager for a folder that appears complete or not at all.

    Args:
        out: Path of the new folder.

    Yields:
        A temporary folder to write into. It is renamed to `out` at the end of the block, or removed after an error.

    Raises:
        FileExistsError: `out` exists.
        ValueError: `out` is a URL.
    """
    check_local(out)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        for file in unfinished.iterdir():
            file.chmod(0o755 if file.is_dir() else 0o644)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
