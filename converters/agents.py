"""A whole agent from a checkpoint, in either form: weights, tokenizer, and the tokens it stops at."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcomm.agent import Agent
from jaxcomm.config import ModelConfig
from jaxcomm.int8 import quantise

from . import checkpoints
from .hf import from_hf, locate, read_config


def load_agent(
    path_or_hub_id: str | Path,
    dtype=jnp.float32,
    *,
    chat: bool = False,
    name: str | None = None,
    unroll: bool | None = None,
    max_positions: int | None = None,
    mesh: Mesh | None = None,
    int8: bool = False,
) -> Agent:
    """Of a Hugging Face folder or hub id (`from_hf`), or of a folder that `jaxcomm convert` has written (`checkpoints.load`).

    Stop tokens come from generation_config.json (where instruct checkpoints list several), else config.json, else
    the tokenizer. `unroll` is the layout of the layers (see `jaxcomm.model`); by default they are unrolled on CPU, which
    decodes faster and compiles longer. `max_positions`, `mesh`: as `from_hf`'s. `int8`: matrices are quantised once they are
    read (`jaxcomm.int8`).

    FileNotFoundError, ConnectionError, ValueError: as theirs, or no usable tokenizer, or one that does not fit.
    """
    unroll = jax.default_backend() == "cpu" if unroll is None else unroll
    saved = checkpoints.is_saved(path_or_hub_id)
    folder = Path(path_or_hub_id) if saved else locate(path_or_hub_id)
    read = checkpoints.load if saved else from_hf
    params = read(folder, dtype, unroll=unroll, max_positions=max_positions, mesh=mesh)
    if int8:
        params = quantise(params)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # its errors are of many kinds, and long
        raise ValueError(
            f"{folder} has no usable tokenizer ({type(error).__name__}): it needs tokenizer.json"
        ) from error
    stops = tuple(checkpoints.read_record(folder)["stop_tokens"]) if saved else _stop_tokens(folder, tokenizer)
    return Agent(params, tokenizer, stops, name or Path(path_or_hub_id).name, chat)


def architecture(path_or_hub_id: str | Path) -> ModelConfig:
    """Of a checkpoint in either form; its weights are not read."""
    if checkpoints.is_saved(path_or_hub_id):
        return checkpoints.config_of(checkpoints.read_record(Path(path_or_hub_id)), Path(path_or_hub_id))
    return read_config(locate(path_or_hub_id))[1]


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
