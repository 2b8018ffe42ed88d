"""Load a whole agent from a checkpoint of either format: weights, tokenizer and stop tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from jax.sharding import Mesh

from jaxcomm.agent import Agent
from jaxcomm.config import ModelConfig

from . import checkpoints, configs, gguf
from .configs import DType, read_config
from .hf import from_hf
from .hub import commit_of, locate


class WeightOptions(TypedDict, total=False):
    """Options for loading weights.

    Attributes:
        unroll: Whether to unroll the layers (`jaxcomm.model`). Default: unrolled on CPU, which decodes faster and compiles
            more slowly; stacked on other devices.
        max_positions: As in `from_hf`.
        mesh: As in `from_hf`.
        int8: As in `from_hf`.
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
    """Loads a model and its tokenizer from a checkpoint. No code from the checkpoint is run.

    The agent stops at the end-of-sequence tokens named in generation_config.json, config.json and the tokenizer. For a
    .gguf file it stops at the tokens that the file names, and at known end-of-turn tokens (`converters.gguf`). For a
    folder written by `checkpoints.save` it stops at the saved stop tokens.

    Args:
        path_or_hub_id: A Hugging Face folder, a .gguf file, a hub id, the name of a real model such as "real:smollm2"
            (`hub.locate`), or a folder written by `jaxcomm convert` (`checkpoints.save`).
        dtype: Dtype of the weights. "auto": float32 on CPU, where XLA is slow in 16 bits; elsewhere the checkpoint's
            dtype.
        revision: Branch, tag or commit of the hub's repository.
        chat: Whether prompts go through the tokenizer's chat template.
        chat_args: Further arguments of the template, such as {"enable_thinking": False}.
        name: Name of the agent. Default: the last part of the path or of the hub id.
        tokenizer: Folder or hub id of another tokenizer. Its stop tokens replace the checkpoint's.
        **weights: Options for loading weights (`WeightOptions`).

    Returns:
        The agent.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The checkpoint is not supported or is damaged; it has no usable tokenizer.

    Example:
        >>> from jaxcomm.evals.pair import folder
        >>> agent = jc.load_agent(folder("b"), name="Bob")
        >>> agent.name
        'Bob'
    """
    path = locate(path_or_hub_id, revision)
    saved = checkpoints.is_saved(path)
    if not saved:
        configs.parse_config(path)  # raises if this is not a checkpoint, before the tokenizer is loaded
    speaking = path if tokenizer is None else locate(tokenizer)
    words = load_tokenizer(speaking)
    kept = checkpoints.is_saved(speaking)
    stops = tuple(checkpoints.read_record(speaking)["stop_tokens"]) if kept else _stop_tokens(speaking, words)
    read: Any = checkpoints.load if saved else from_hf
    name = name or Path(path_or_hub_id).name
    params = read(path, dtype, **weights)
    return Agent(params, words, stops, name, chat, chat_args=chat_args or {}, revision=commit_of(path))


def load_tokenizer(folder: Path) -> Any:
    """Loads the transformers tokenizer of a checkpoint. No code from the checkpoint is run.

    Args:
        folder: A Hugging Face folder, or a .gguf file.

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is no tokenizer that works without code from the checkpoint.
    """
    if gguf.is_gguf(folder):
        return gguf.tokenizer(folder)
    import transformers

    as_it_stands = transformers.PreTrainedTokenizerFast
    try:
        try:
            made = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # If the folder names no tokenizer class, transformers may choose one by the model's family, and ignore parts of
            # tokenizer.json.
            return (
                made
                if type(made) is as_it_stands or not _names_no_class(folder)
                else as_it_stands.from_pretrained(folder)
            )
        except Exception:
            if not (folder / "tokenizer.json").is_file():
                raise
            # The tokenizer class is code in the checkpoint, which is not run. tokenizer.json contains the same rules.
            return as_it_stands.from_pretrained(folder)
    except Exception as error:  # transformers raises errors of many types, with long messages
        raise ValueError(
            f"{folder} has no usable tokenizer ({type(error).__name__}): it needs tokenizer.json"
        ) from error


def _names_no_class(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer is fully described by its tokenizer.json."""
    path = folder / "tokenizer_config.json"
    if not (path.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    kind = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    return kind in ("TokenizersBackend", "PreTrainedTokenizerFast")


def architecture(path_or_hub_id: str | Path, revision: str | None = None) -> ModelConfig:
    """Reads the architecture of a checkpoint, without its weights.

    Args:
        path_or_hub_id: A checkpoint, as for `load_agent`.
        revision: Branch, tag or commit of the hub's repository.

    Returns:
        The architecture.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The architecture is not supported.
    """
    folder = locate(path_or_hub_id, revision)
    if checkpoints.is_saved(folder):
        return checkpoints.config_of(checkpoints.read_record(folder), folder)
    return read_config(folder)[1]


def stored_dtype(path_or_hub_id: str | Path, revision: str | None = None) -> np.dtype:
    """Finds the dtype of a checkpoint's weights, without reading them.

    Args:
        path_or_hub_id: A checkpoint, as for `load_agent`.
        revision: Branch, tag or commit of the hub's repository.

    Returns:
        The stored dtype.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The checkpoint is not supported or is damaged.
    """
    folder = locate(path_or_hub_id, revision)
    if checkpoints.is_saved(folder):
        return np.dtype(checkpoints.read_record(folder)["dtype"])
    return configs.stored_dtype(folder)


def _stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """All end-of-sequence tokens. Those of generation_config.json come first: in instruct checkpoints they are the most
    specific."""
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
