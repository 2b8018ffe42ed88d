"""One commit beside another, in one run: reading, writing, sweeping, training; and what sites and edits cost.

    make bench-commits OLD=69fd864, or: python benchmarks/commits.py 69fd864 [HEAD]

The works of layouts.py on a random Llama of 12 layers, float32, layers one by one. Each commit runs in a process of its own, which
does nothing while the other works. They take turns; the fastest of each counts. Then, of the newer one alone: every residual
stream read beside a plain forward, and an edit of the prompt beside none.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

TURNS = 9
SITES = ("every residual stream", "forward"), ("write 16, prompt edited", "write 16")


def install(commit: str, folder: Path) -> Path:
    """Puts a commit's packages where Python finds them as they are installed (converters and evals inside jaxcomm)."""
    archive = subprocess.run(
        ["git", "archive", commit, "jaxcomm", "converters", "evals"], capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    for room in ("converters", "evals"):
        (folder / room).rename(folder / "jaxcomm" / room)
    return folder


def site_works(params) -> dict[str, Callable[[], object]]:
    """Reading and editing, beside the same without."""
    import jaxcomm as jc

    tokens = np.random.default_rng(0).integers(3, params.config.vocab, (4, 128)).astype(np.int32)
    prompts = jc.left_pad(tokens.tolist())
    edits = [jc.Edit(jc.Site("resid_post", 5, "last"), jc.add(np.ones(params.config.width, np.float32)))]
    return {
        "forward": lambda: jc.forward(params, prompts),
        "every residual stream": lambda: jc.run_with_cache(params, prompts, sites="resid_post"),
        "write 16": lambda: jc.generate(params, prompts, max_new_tokens=16),
        "write 16, prompt edited": lambda: jc.generate(params, prompts, edits=edits, max_new_tokens=16),
    }


def serve() -> None:
    """Reads names of works from the standard input, and answers with the seconds each took."""
    import jax
    from layouts import LLAMA, seconds, works

    import jaxcomm as jc

    jax.config.update("jax_enable_compilation_cache", False)
    params = getattr(jc, "init_params", None) or jc.init
    params = params(jax.random.key(0), LLAMA).unroll()
    every = works(params) | (site_works(params) if hasattr(jc, "Edit") else {})
    print(json.dumps([*every]), flush=True)
    for line in sys.stdin:
        print(seconds(every[line.strip()]), flush=True)


class Worker:
    """A process that works with one commit's code."""

    def __init__(self, folder: Path):
        path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
        command = [sys.executable, __file__, "--serve"]
        environment = os.environ | {"PYTHONPATH": path}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        self.names = json.loads(self._answer())

    def seconds(self, name: str) -> float:
        """How long a work took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"a worker ended with status {self.process.wait()}")
        return line


def _hash(commit: str) -> str:
    """A commit's short name."""
    command = ["git", "rev-parse", "--short", commit]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    import jax

    with tempfile.TemporaryDirectory() as work:
        sides = [Worker(install(commit, Path(work) / side)) for side, commit in (("old", args.old), ("new", args.new))]
        print(
            f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores, float32; {args.old} and {args.new}"
        )
        for name in sides[0].names:
            for side in sides:
                side.seconds(name)  # compiles
            old, new = np.array([[side.seconds(name) for side in sides] for _ in range(TURNS)]).T
            print(f"{name:24}  old {old.min():6.3f} s, new {new.min():6.3f} s: {turns(new, old)}", flush=True)
        for name, plain in SITES:
            for each in (name, plain):
                sides[1].seconds(each)
            more, less = np.array([[sides[1].seconds(each) for each in (name, plain)] for _ in range(2 * TURNS)]).T
            print(f"{name:24}  {more.min():6.3f} s, {plain} {less.min():6.3f} s: {turns(more, less)}", flush=True)


def turns(one: np.ndarray, other: np.ndarray) -> str:
    """How many times as long, by the fastest of each, and by the median of the turns."""
    return f"{one.min() / other.min():.2f} times (median of {len(one)} turns {np.median(one / other):.2f})"


if __name__ == "__main__":
    main()
