"""`jaxcomm convert`: a checkpoint in another form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Convert:
    """Read a checkpoint, check every tensor, and write it again: as JAX keeps models (Orbax), which every command takes, or as a
    Hugging Face folder.

    Example: jaxcomm convert meta-llama/Llama-3.2-3B-Instruct --out llama
    """

    typed: ClassVar = "convert"

    source: Annotated[str, tyro.conf.Positional]
    """A checkpoint folder in either form, a .gguf file, real:smollm2, a hub id (also id@revision), or pair:a / pair:b for the embedded pair."""
    out: Path
    """New folder; it must not exist."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: what the checkpoint has."""
    to: Literal["orbax", "hf"] = "orbax"
    """orbax: read in parallel, straight to where it stays; hf: safetensors, for transformers."""
    max_positions: int | None = None
    """How long texts may be; default: as long as the config says, with longrope as its short numbers serve."""
    tokenizer: str | None = None
    """A folder or hub id whose tokenizer is written instead of the checkpoint's own."""

    def run(self) -> None:
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
        write(agent.params, self.out, tokenizer=agent.tokenizer, stop_tokens=agent.stop_tokens)
        rich.print(f"{self.source} -> {self.out}, {agent.params.dtype.name}: {agent.params.config}")
