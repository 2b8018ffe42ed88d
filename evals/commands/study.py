"""`jaxcomm study`: do activations carry content between two models?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from .. import options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Test whether activations carry content from A to B, and whether it helps B. Games are played in every set-up (raw and
    chat, what A reads, worked examples) at every layer pair. Layers are chosen on one half of the items and reported on the
    other, with controls and registered tests. Writes a report.

    Example: jaxcomm study --out runs/study
    """

    typed: ClassVar = "study"

    a: options.LayeredSender = "real:smollm2"
    b: options.Receiver = "real:smollm2"
    out: Path
    """Run folder: every finished piece, report.html, report.md, pictures, results.csv."""
    resume: options.Resume = False
    size: Literal["quick", "full"] = "quick"
    """quick: Countries, six layers of each model, 11 minutes for SmolLM2 on two busy cores. full: both games, all layers, every graft, map, site, control and channel: hours."""
    games: tuple[str, ...] = ()
    """countries, tip_sheets, files of your own (as jaxcomm play's --game); default: by --size."""
    items: int | None = None
    """Number of items in each half; default: by --size."""
    layers: int | None = None
    """Number of layers of each model, evenly spaced; default: by --size."""
    prompts: tuple[Literal["raw", "chat"], ...] = ("raw", "chat")
    """Set-ups to play: raw prompts, prompts through the chat templates, or both. With --resume, further ones are added to a run."""
    text: str | None = None
    """Also graft through maps W that are fitted on this text (as jaxcomm fit-map --text; statements: the game's own, which --size full always fits)."""
    seed: int = 2026
    """Seed of the items and of all random draws. The default is the registered one."""
    chat_args: options.ChatArgs = ()
    dtype: options.Dtype = "auto"

    def run(self) -> None:
        """Runs the study, and writes and prints the report.

        Raises:
            ValueError: An option, an agent or a game is invalid, or the folder holds another run.
            OSError: A file or checkpoint does not exist, or the folder cannot be written.
        """
        from ..agents import load_agents, template_args
        from ..study import run
        from ..study.design import SIZES
        from ..study.report import report

        own = {name: value for name in ("games", "items", "layers") if (value := getattr(self, name))}
        size = dataclasses.replace(SIZES[self.size], **own)
        for name in ("items", "layers"):
            if (value := getattr(self, name)) is not None and value < (least := {"items": 4, "layers": 1}[name]):
                raise ValueError(f"--{name} {value}: it must be at least {least}")
        settings = run.Settings(size, self.seed, self.text)
        if not self.prompts:
            raise ValueError("--prompts is empty: name raw, chat or both")
        told = template_args(self.chat_args)
        a, b = load_agents(self.a, self.b, dtype=self.dtype, chat_args=told, layers=True)
        command = options.command_line(self)
        with run.opened(settings, a, b, self.out, command=command, resume=self.resume) as folder:
            say = lambda name: print(f"... {name}", flush=True)
            study = run.Study(settings, a, b, folder, say, prompts=self.prompts)
            report(study, list(study.blocks()), command)
