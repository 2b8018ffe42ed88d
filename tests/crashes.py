"""Crashes at chosen points: what is on disk then is what a kill there would leave. And processes that are really killed."""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import QUICK


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


BEGIN = """
import os, signal, sys, time
from pathlib import Path

home = Path(sys.argv[1])

def begin(work, *args):
    pid = os.fork()  # no backend is there yet: children share the imports, which take longest
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(*args)
        os._exit(0)
    return pid

def in_peace(work, *args):
    assert os.waitpid(begin(work, *args), 0)[1] == 0

def killed(reached, work, *args):
    pid = begin(work, *args)
    while not reached():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before it was killed"
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def kills(code: str, home: Path) -> list[str]:
    """Runs code in a process of its own, after `BEGIN`, whose children it may let work `in_peace` or have `killed` once something is
    `reached`; the words it prints."""
    env = {**os.environ, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code, str(home)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()
