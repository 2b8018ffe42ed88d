"""Read a checkpoint's config.json or .gguf file: its family, its architecture, its dtype.

Reading is strict. If an unsupported key or value would change the model's results, it raises an error that names it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcomm.config import ModelConfig, Rope

from . import gguf
from .families import FAMILIES, Family
from .tensors import DTYPES, find_tensors
from .values import CARRIES_NO_ARCHITECTURE, SAYS_NOTHING, Values

MOST = 10_000
"""Largest number of layers, or heads, in a config."""

DType = Any
"""A dtype as NumPy and JAX accept it, or "auto". "auto" is the checkpoint's own dtype (`stored_dtype`); on CPU it is
float32, because XLA is many times slower there with 16-bit types."""


def raw_config(folder: Path) -> dict[str, Any]:
    """Reads config.json, or the same keys from a .gguf file.

    Args:
        folder: A Hugging Face folder, or a .gguf file.

    Returns:
        The keys and values.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: config.json is not a JSON object; the .gguf file is damaged or not supported.
    """
    if gguf.is_gguf(folder):
        return gguf.config(folder)
    path = _config_file(folder)
    if not path.is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        told = f"name one of its files, such as {folder / files[0]}" if files else "it has no config.json"
        raise FileNotFoundError(f"{folder} is not a checkpoint folder: {told}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw.keys()
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    return raw


def _config_file(path: Path) -> Path:
    """The file that describes a checkpoint's architecture."""
    return path if gguf.is_gguf(path) else path / "config.json"


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Reads the family and the architecture of a checkpoint. A warning lists the config keys that no code reads.

    Args:
        folder: A Hugging Face folder, or a .gguf file.

    Returns:
        The family and the architecture.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The architecture is unknown; an unsupported key or value would change the results.
    """
    family, config, ignored = parse_config(folder)
    if ignored:
        warnings.warn(
            f"{_config_file(folder)}: config keys {', '.join(ignored)} are not read, as in transformers; only code of the repository's own could",
            stacklevel=2,
        )
    return family, config


def parse_config(folder: Path) -> tuple[Family, ModelConfig, list[str]]:
    """Reads the family and the architecture of a checkpoint like `read_config`, without a warning.

    Args:
        folder: A Hugging Face folder, or a .gguf file.

    Returns:
        The family, the architecture, and the config keys that no code reads.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The architecture is unknown; a key or value changes what is computed and is not supported.
    """
    raw, path = raw_config(folder), _config_file(folder)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: architecture {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    for values in (raw, raw.get("text_config")):
        for key in ("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"):
            count = values.get(key, 1) if isinstance(values, dict) else 1
            # Config classes make lists with one entry per layer, and divide by the number of heads.
            if not isinstance(count, int) or not 0 < count <= MOST:
                raise ValueError(f"{path}: config key {key} = {count!r}: it must be a whole number from 1 to {MOST}")
    import transformers  # slow to import, so only when a checkpoint is loaded

    try:
        # Checkpoints omit values that equal the class's defaults, and write rope settings in two ways.
        values = Values(transformers.AutoConfig.for_model(kind, **_arguments(kind, raw)), raw)
        family = FAMILIES[kind]
        result = family.read(values)
        values.finish(result)
    except Exception as error:  # transformers' strict dataclasses raise their own error types
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return family, result, sorted(values.ignored)


def _arguments(kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for transformers' config class. Drops keys without effect (the class may refuse their types), and unknown
    keys whose value means nothing. Renames old values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    has = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    values = {key: copy.deepcopy(value) for key, value in raw.items() if key in has or value not in SAYS_NOTHING}
    values.pop("model_type")
    configs = [config for config in (values, values.get("text_config")) if isinstance(config, dict)]
    for config, key in itertools.product(configs, CARRIES_NO_ARCHITECTURE - {"model_type"}):
        config.pop(key, None)
    rope = values.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":  # Phi-3's first name for it
        rope["type"] = "longrope"
    return values


def stored_dtype(folder: Path) -> np.dtype:
    """Finds the dtype of a checkpoint's weights: the config's dtype, or else the first tensor's.

    Args:
        folder: A Hugging Face folder, or a .gguf file.

    Returns:
        The dtype. float64 becomes float32, since JAX has no float64 by default.
    """
    raw = raw_config(folder)
    configs = [values for values in (raw, raw.get("text_config")) if isinstance(values, dict)]
    named = [str(values.get(key)).removeprefix("torch.") for values in configs for key in ("dtype", "torch_dtype")]
    known = {np.dtype(kind).name: np.dtype(kind) for kind in DTYPES.values()}
    found = next((known[name] for name in named if name in known), None)
    if found is None:
        tensors = gguf.tensors(folder)[1] if gguf.is_gguf(folder) else find_tensors(folder)
        first = next(iter(tensors.values()))
        found = np.dtype(DTYPES.get(first.dtype, np.float32))
    return np.dtype(np.float32) if found == np.float64 else found


def chosen_dtype(dtype: DType, stored: np.dtype) -> np.dtype:
    """Decides the dtype of the loaded weights.

    Args:
        dtype: The requested dtype, or "auto".
        stored: The dtype of the checkpoint.

    Returns:
        The requested dtype. For "auto": float32 on CPU, `stored` elsewhere.
    """
    if not (isinstance(dtype, str) and dtype == "auto"):
        return np.dtype(dtype)
    return np.dtype(np.float32) if jax.default_backend() == "cpu" else stored


def reaching(config: ModelConfig, positions: int) -> ModelConfig:
    """Sets the number of positions of an architecture.

    Args:
        config: Architecture of the model.
        positions: Wanted number of positions.

    Returns:
        The architecture with `max_positions` set to it.

    Raises:
        ValueError: It is below 1 or above the checkpoint's; with learned positions, any other number than the checkpoint's.
    """
    # With linear scaling, configs may still give the old number of positions (Vicuna 16k).
    most = max(config.max_positions, *(rope.reach for rope in config.ropes))
    if isinstance(config.rope, Rope) and config.rope.kind == "linear":
        most = round(config.rope.factor * most)
    if not 0 < positions <= most or (config.learned_positions and positions != most):
        possible = most if config.learned_positions else f"1 to {most}"
        raise ValueError(f"max_positions = {positions}: the checkpoint has {most}, give {possible}")
    return dataclasses.replace(config, max_positions=positions)


def family_of(config: ModelConfig, model_type: str | None = None) -> Family:
    """Finds a family whose config can describe an architecture.

    Args:
        config: Architecture of the model.
        model_type: The family to use (transformers' model_type). Default: the first that fits.

    Returns:
        The family.

    Raises:
        ValueError: No family fits, or the wanted one does not.
    """
    import transformers

    for family in FAMILIES.values():
        if family.write is None or model_type not in (None, family.model_type):
            continue
        try:
            values = transformers.AutoConfig.for_model(family.model_type, **family.write(config))
            if reaching(family.read(Values(values)), config.max_positions) == config:
                return family
        except Exception:  # this family cannot describe it; transformers' strict configs raise their own error types
            continue
    who = "no supported family can" if model_type is None else f"{model_type} cannot"
    raise ValueError(f"{who} describe this architecture: {config}")
