"""Crashes at chosen points: what is on disk then is what a kill there would leave."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Crash(BaseException):
    """The process is gone."""


FILES = ((os, "fsync"), (os, "replace"), (os, "unlink"))
"""Every step after which something else is on disk when a file is written whole, or tidied up."""


@contextlib.contextmanager
def crash_at(n: int, watched=FILES) -> Iterator[None]:
    """Raises in place of the n-th of the watched calls and of every one after it, so nothing is tidied up either."""
    calls = itertools.count(1)

    def dying(call):
        def made(*args, **how):
            if next(calls) >= n:
                raise Crash
            return call(*args, **how)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for where, name in watched:
            patch.setattr(where, name, dying(getattr(where, name)))
        yield


def crash_everywhere(run: Callable[[], None], check: Callable[[], None], watched=FILES) -> int:
    """Runs again and again, on what the crash before left, each time one call further, until a run ends; how many crashed."""
    for n in itertools.count(1):
        with crash_at(n, watched), contextlib.suppress(Crash):
            run()
            return n - 1
        check()
    raise AssertionError


def there(folder: Path) -> dict[str, bytes]:
    """What a run has finished, but for the folder's own name in it."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes().replace(str(folder).encode(), b"OUT") for p in files}
