"""What controls cost beside a sweep: every cell again with another question's message, and all controls of the chosen cells.

python benchmarks/controls.py          two CPU threads, about four minutes; needs SmolLM2-135M (make .venv/.real)
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile

import jax

LAYERS = ["3", "6", "9", "12", "15", "18", "21", "24", "27", "30"]
REAL = (
    "--a real:smollm2 --b real:smollm2 --examples 4 --sender-reads statement+question --games countries --seed 1 --n 40"
)
PRESETS = {
    "embedded pair, b -> b, 6 x 6 cells, both games": ["--a", "pair:b", "--b", "pair:b"],
    "SmolLM2-135M, 10 x 10 cells, 40 games of Countries": [*REAL.split(), "--ks", *LAYERS, "--js", *LAYERS],
}


def main() -> None:
    print(f"jax {jax.__version__}, {platform.machine()}, {os.cpu_count()} cores; seconds without compiling")
    for name, words in PRESETS.items():
        with tempfile.TemporaryDirectory() as home:
            command = [sys.executable, "-m", "jaxcomm.evals", "sweep", *words, "--out", f"{home}/run"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("Controls took")]
        print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
