"""A whole agent from a checkpoint folder or hub id: weights, tokenizer, and the tokens it stops at."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxcomm.agent import Agent
from jaxcomm.converters.hf import from_hf, locate


def agent_from_hf(
    path_or_hub_id: str | Path,
    dtype=jnp.float32,
    *,
    chat: bool = False,
    name: str | None = None,
    unroll: bool | None = None,
    max_positions: int | None = None,
) -> Agent:
    """Stop tokens come from generation_config.json (where instruct checkpoints list several), else config.json, else
    the tokenizer. `unroll` is the layout of the layers (see `jaxcomm.model`); by default they are unrolled on CPU, which
    decodes faster and compiles longer. `max_positions`: as `from_hf`'s.

    FileNotFoundError, ConnectionError, ValueError: as `from_hf`, or no usable tokenizer, or one that does not fit.
    """
    folder = locate(path_or_hub_id)
    unroll = jax.default_backend() == "cpu" if unroll is None else unroll
    params = from_hf(folder, dtype, unroll=unroll, max_positions=max_positions)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # its errors are of many kinds, and long
        raise ValueError(
            f"{folder} has no usable tokenizer ({type(error).__name__}): it needs tokenizer.json"
        ) from error
    return Agent(params, tokenizer, _stop_tokens(folder, tokenizer), name or Path(path_or_hub_id).name, chat)


def _stop_tokens(folder: Path, tokenizer) -> tuple[int, ...]:
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is not a JSON object: {error}") from error
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
