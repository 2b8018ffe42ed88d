"""What keeping compiled programs saves: `jaxcomm demo` in a new process with none kept, and again with those of the first.

python benchmarks/demo.py [--rounds 2]           two CPU threads, about four minutes
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax


def seconds(folder: Path, programs: str) -> float:
    command = [sys.executable, "-m", "jaxcomm.evals", "demo", "--out", str(folder)]
    start = time.perf_counter()
    subprocess.run(command, env=os.environ | {"JAXCOMM_PROGRAMS": programs}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    print(
        f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores; seconds of jaxcomm demo, imports included"
    )
    for _ in range(parser.parse_args().rounds):
        with tempfile.TemporaryDirectory() as home:
            folder, programs = Path(home), f"{home}/programs"
            off = seconds(folder / "off", "off")
            first, second = (seconds(folder / name, programs) for name in ("first", "second"))
            same = (folder / "first" / "items.jsonl").read_bytes() == (folder / "second" / "items.jsonl").read_bytes()
            size = sum(file.stat().st_size for file in Path(programs).rglob("*") if file.is_file())
        print(
            f"nothing kept {off:.1f}, first {first:.1f}, second {second:.1f}: {second / first:.0%} of the first; "
            f"{size / 2**20:.0f} MiB kept; the same items: {same}"
        )


if __name__ == "__main__":
    main()
