"""A whole agent from a checkpoint, in either form: weights, tokenizer, and the tokens it stops at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcomm.agent import Agent
from jaxcomm.config import ModelConfig

from . import checkpoints, gguf, hf
from .hf import DType, commit_of, from_hf, locate, read_config


class WeightOptions(TypedDict, total=False):
    """How weights are read.

    Attributes:
        unroll: The layout of the layers (see `jaxcomm.model`); default: unrolled on CPU, which decodes faster and compiles
            longer.
        max_positions, mesh, int8: As `from_hf`'s.
    """

    unroll: bool | None
    max_positions: int | None
    mesh: Mesh | None
    int8: bool


def load_agent(
    path_or_hub_id: str | Path,
    dtype: DType = "auto",
    *,
    revision: str | None = None,
    chat: bool = False,
    chat_args: Mapping[str, Any] | None = None,
    name: str | None = None,
    tokenizer: str | Path | None = None,
    **weights: Unpack[WeightOptions],
) -> Agent:
    """A model and its tokenizer, out of a checkpoint in any form. No code of the checkpoint's is run.

    It stops at every end of sequence that generation_config.json, config.json and the tokenizer name; of a .gguf file, that
    it names itself, and at ends of turns known by their names (`converters.gguf`).

    Args:
        path_or_hub_id: A Hugging Face folder, a .gguf file, a hub id or a real model's name (`from_hf`), or a folder that
            `jaxcomm convert` has written (`checkpoints.load`).
        dtype: Of the weights; "auto": the checkpoint's own, on CPU, where XLA is slow in two bytes, float32.
        revision: Of the hub's repository.
        chat: Prompts go through the tokenizer's chat template.
        chat_args: What the template is given besides the conversation, such as {"enable_thinking": False}.
        name: Of the agent; default: the folder's, or the hub id without its namespace.
        tokenizer: A folder or hub id whose tokenizer and ends are taken instead of the checkpoint's own.
        **weights: `WeightOptions`.

    Returns:
        The agent.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: As theirs; or there is no usable tokenizer.
    """
    if weights.get("unroll") is None:
        weights["unroll"] = jax.default_backend() == "cpu"
    path = locate(path_or_hub_id, revision)
    saved = checkpoints.is_saved(path)
    if not saved:
        hf.parse_config(path)  # what is no checkpoint has no tokenizer either
    speaking = path if tokenizer is None else locate(tokenizer)
    words = load_tokenizer(speaking)
    stops = tuple(checkpoints.read_record(path)["stop_tokens"]) if saved else _stop_tokens(speaking, words)
    read: Any = checkpoints.load if saved else from_hf
    name = name or Path(path_or_hub_id).name
    params = read(path, dtype, **weights)
    return Agent(params, words, stops, name, chat, chat_args=chat_args or {}, revision=commit_of(path))


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a checkpoint folder or a .gguf file. ValueError: there is none that works without code of the
    checkpoint's."""
    if gguf.is_gguf(folder):
        return gguf.tokenizer(folder)
    import transformers

    as_it_stands = transformers.PreTrainedTokenizerFast
    try:
        try:
            made = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # Of a folder that names no class of its own, it may all the same make one by the model's family, and lose what
            # tokenizer.json says.
            return (
                made
                if type(made) is as_it_stands or not _names_no_class(folder)
                else as_it_stands.from_pretrained(folder)
            )
        except Exception:
            if not (folder / "tokenizer.json").is_file():
                raise
            # Its class is code of the checkpoint's, which is not run; what it does is in the file, too.
            return as_it_stands.from_pretrained(folder)
    except Exception as error:  # its errors are of many kinds, and long
        raise ValueError(
            f"{folder} has no usable tokenizer ({type(error).__name__}): it needs tokenizer.json"
        ) from error


def _names_no_class(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer is what its tokenizer.json says and nothing else."""
    path = folder / "tokenizer_config.json"
    if not (path.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    kind = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return kind in ("TokenizersBackend", "PreTrainedTokenizerFast")


def architecture(path_or_hub_id: str | Path, revision: str | None = None) -> ModelConfig:
    """Of a checkpoint in any form; its weights are not read."""
    folder = locate(path_or_hub_id, revision)
    if checkpoints.is_saved(folder):
        return checkpoints.config_of(checkpoints.read_record(folder), folder)
    return read_config(folder)[1]


def stored_dtype(path_or_hub_id: str | Path, revision: str | None = None) -> np.dtype:
    """Of a checkpoint's weights, in any form."""
    folder = locate(path_or_hub_id, revision)
    if checkpoints.is_saved(folder):
        return np.dtype(checkpoints.read_record(folder)["dtype"])
    return hf.stored_dtype(folder)


def _stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every end of sequence, those of generation_config.json (of instruct checkpoints the most particular) first."""
    if gguf.is_gguf(folder):
        return gguf.stop_tokens(folder)
    ends: list[Any] = []
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            ends += [values.get("eos_token_id"), (values.get("text_config") or {}).get("eos_token_id")]
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is not a JSON object: {error}") from error
    ends.append(tokenizer.eos_token_id)
    every = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    return tuple(dict.fromkeys(token for token in every if token is not None))
