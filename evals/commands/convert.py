"""`jaxcomm convert`: write a checkpoint in another format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Convert:
    """Read a checkpoint, check every tensor, and write it as an Orbax checkpoint, which every command takes, or as a
    Hugging Face folder.

    Example: jaxcomm convert meta-llama/Llama-3.2-3B-Instruct --out llama
    """

    typed: ClassVar = "convert"

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint folder in either form, a .gguf file, real:smollm2, a hub id (also id@revision), or pair:a / pair:b for the embedded pair."""
    out: Path
    """New folder; it must not exist."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's own."""
    to: Literal["orbax", "hf"] = "orbax"
    """orbax: read in parallel, straight onto the devices; hf: safetensors, for transformers."""
    max_positions: int | None = None
    """Longest text in tokens; default: the config's value; for longrope, the length that its short factors cover."""
    tokenizer: str | None = None
    """A folder or hub id. Its tokenizer is written instead of the checkpoint's own."""

    def run(self) -> None:
        """Reads the checkpoint and writes it in the other form.

        Raises:
            ValueError: The checkpoint is not supported or is damaged.
            OSError: The checkpoint does not exist, or the new folder exists or cannot be written.
        """
        import rich

        from ...converters import load_agent, save, to_hf
        from ...converters.agents import stored_dtype
        from .. import pair
        from ..files import check_new

        check_new(self.out)
        how: dict[str, Any] = dict(unroll=False, max_positions=self.max_positions, tokenizer=self.tokenizer)
        source = pair.checkpoint(self.source)
        agent = load_agent(source, stored_dtype(source) if self.dtype == "auto" else self.dtype, **how)
        write = save if self.to == "orbax" else to_hf
        write(agent.single, self.out, tokenizer=agent.tokenizer, stop_tokens=agent.stop_tokens)
        rich.print(f"{self.source} -> {self.out}, {agent.params.dtype.name}: {agent.params.config}")
