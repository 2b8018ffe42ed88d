"""`jaxcomm report` and `jaxcomm cost`: reports of runs, and costs of protocols."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import tyro


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare finished runs with each other and with published numbers. Write Markdown, HTML, CSV, and pictures of accuracy against compute.

    Example: jaxcomm report runs/table-3 runs/table-3-w --out reports/table-3
    """

    typed: ClassVar = "report"

    out: Path
    """Folder for report.md, report.html, report.csv and the pictures."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders of jaxcomm eval and jaxcomm sweep. A sweep's own report is included."""

    def run(self) -> None:
        """Writes and prints the report.

        Raises:
            ValueError: A folder is not a finished run, or is damaged.
            OSError: A folder does not exist, or the report cannot be written.
        """
        from ..documents import console
        from ..report import report

        report(self.runs, self.out, console(180))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Count the FLOPs of every protocol: by the paper's formulas, exactly with a KV cache, and by XLA.

    Example: jaxcomm cost --a llama-3.2-3b --b llama-3.1-8b --k 26 --j 26
    """

    typed: ClassVar = "cost"

    a: str = "llama-3.2-3b"
    """Sender: llama-3.2-3b, llama-3.1-8b, pair:a, pair:b, or a checkpoint's folder, .gguf file or hub id."""
    b: str = "llama-3.1-8b"
    """Receiver, named in the same way."""
    k: int = 26
    """Layer of A that is sent."""
    j: int = 26
    """Layer of B after which it is grafted in."""
    tokens: tuple[int, int, int] | None = None
    """Number of tokens of the prompt, of a message, and of the answer; default: four settings."""

    def run(self) -> None:
        """Prints a table for every setting.

        Raises:
            ValueError: A model is unknown, or a layer or number of tokens is out of range.
            FileNotFoundError: There is no such checkpoint.
        """
        from .. import cost
        from ..documents import console

        a, b = (cost.shape(name) for name in (self.a, self.b))
        out = console(112)
        for P, M, T in [self.tokens] if self.tokens else cost.SETTINGS:
            title = (
                f"{self.a} -> {self.b}, GFLOPs: {P} prompt, {M} message, {T} answer tokens, k = {self.k}, j = {self.j}"
            )
            out.print(cost.table(title, list(cost.counts(a, b, P, M, T, self.k, self.j, compiled=True))))
