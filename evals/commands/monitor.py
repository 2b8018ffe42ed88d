"""`jaxcomm monitor`: probes for messages with a hidden instruction."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from .. import options


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Fit linear probes that separate A's messages with a hidden instruction from neutral ones of equal norm, and print their
    accuracy on new statements and new instructions, with controls.

    Example: jaxcomm monitor --a real:smollm2 --k 8 15 22 30 --out monitors/smollm2
    """

    typed: ClassVar = "monitor"

    a: options.LayeredSender
    k: tuple[int, ...]
    """A's layers, 0 (embedding) to its number of layers; there is a probe for each."""
    n: int = 200
    """Number of statements, each with and without a hidden instruction; half of them are for training."""
    seed: int = 0
    """Seed of the statements, of the templates that are trained on, and of the intervals."""
    place: Literal["before", "after"] = "before"
    """Where the instruction stands: before the statement, so that the last token is the same word, or after it."""
    chat: bool = False
    """Put texts through the tokenizer's chat template instead of reading them raw."""
    dtype: options.Dtype = "auto"
    out: Path | None = None
    """Folder for report.md, report.html, results.jsonl, and a probe-K.safetensors for each layer K."""

    def run(self) -> None:
        """Fits the probes, prints the tables, and writes the requested files.

        Raises:
            ValueError: An option, the agent or a layer is invalid.
            OSError: The checkpoint does not exist, or a file cannot be written.
        """
        from .. import monitors
        from ..agents import load_agents
        from ..documents import Code, Heading, console, markdown, page, show
        from ..files import check_folder, write_lines, write_whole
        from ..injections import draw_texts

        if self.out is not None:
            check_folder(self.out)
        if not self.k:
            raise ValueError("--k names no layer: name at least one")
        texts = draw_texts(self.n, self.seed, self.place)
        (a,) = load_agents(self.a, dtype=self.dtype, chat=self.chat, layers=True)
        found = monitors.measure(a, texts, self.k, self.seed)
        blocks = monitors.blocks(a, texts, [each for _, each in found], self.place)
        show(blocks, console(150))
        if self.out is not None:
            blocks = [*blocks, Heading(2, "Command"), Code(options.command_line(self))]
            write_whole(self.out / "report.md", markdown(blocks).encode())
            write_whole(self.out / "report.html", page(f"Monitors of {a.name}", blocks).encode())
            write_lines(self.out / "results.jsonl", ({"a": self.a, **each.record()} for _, each in found))
            for monitor, each in found:
                monitor.save(self.out / f"probe-{each.k}.safetensors")
