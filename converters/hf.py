"""Hugging Face checkpoint <-> `Params`, both ways, without torch.

Strict: an unknown config key, a missing, unknown, misshapen or non-finite tensor is an error that names it.
Streaming: a leaf of the model is filled tensor by tensor from memory-mapped safetensors and handed to JAX before the
next one is read, so the host never holds more than one leaf besides the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxcomm.config import ModelConfig
from jaxcomm.converters.families import FAMILIES, Family, Values
from jaxcomm.model import Params, init

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def locate(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint; an id such as "org/name" is downloaded (safetensors, configs and tokenizer only).

    FileNotFoundError or ConnectionError with what to do.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name} is not a checkpoint folder: give a folder with config.json and {WEIGHTS}, or a hub id such as org/name"
        )
    import huggingface_hub  # heavy, and needed only to download

    def download(*patterns: str) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
        except Exception as error:  # of many kinds: no network, no such repository, no access, disk full
            raise ConnectionError(
                f"cannot download {name} ({type(error).__name__}): check the id, the network and your access, or give a local folder"
            ) from error

    read_config(download("config.json"))  # refuses what is not supported before the weights are fetched
    return download("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and architecture a config.json describes. ValueError: unknown architecture, key or value."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint folder: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if kind not in FAMILIES:
        raise ValueError(f"{path}: architecture {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    import transformers  # heavy: imported by whoever loads a checkpoint, not by `import jaxcomm`

    try:
        # Checkpoints leave out values equal to the class's defaults, and spell rope settings in two ways.
        config = transformers.AutoConfig.from_pretrained(folder)
        values = Values(config.to_dict())
        family = FAMILIES[kind]
        result = family.read(values)
        values.finish()
    except Exception as error:  # transformers' strict dataclasses have error types of their own
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return family, result


class _Tensors:
    """Named tensors of a folder's safetensors files, all of which must be sound."""

    def __init__(self, folder: Path, files: contextlib.ExitStack):
        self._files: dict[str, Path] = {}
        index = folder / INDEX
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is not a weight index: {error!r}") from error
        elif (folder / WEIGHTS).is_file():
            shards = [WEIGHTS]
        else:
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            if pickles:
                raise ValueError(
                    f"{folder} has only pickle files ({pickles[0]}), which can run code when they are loaded: convert them to safetensors first"
                )
            raise FileNotFoundError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")
        for shard in shards:
            path = folder / shard
            if not path.is_file():
                raise FileNotFoundError(f"shard {shard} is missing from {folder}, {INDEX} names it: download it again")
            try:
                with safe_open(path, framework="np") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or corrupt ({error}): download it again") from error
        self._bar = files.enter_context(
            tqdm.tqdm(total=len(self._files), desc=f"loading {folder.name}", unit="tensor", delay=2, leave=False)
        )

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._files:
            raise ValueError(f"tensor {name} is missing from the checkpoint")
        # Opened for one tensor and closed again: pages of a mapped file count as memory for as long as it is open.
        with safe_open(self._files[name], framework="np") as file:
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"tensor {name} has shape {found}, the config asks for {shape}")
            tensor = file.get_tensor(name)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"tensor {name} is {tensor.dtype}: quantised checkpoints are not supported")
        if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
            raise ValueError(f"tensor {name} holds NaN or infinite values: the checkpoint is damaged")
        self._bar.update()
        return tensor


def _names(family: Family, path: tuple) -> tuple[str, bool]:
    """The name on disk of the leaf at `path` of Params, and whether it is one of every layer ("{i}" in the name)."""
    keys = tuple(str(getattr(p, "name", getattr(p, "key", ""))) for p in path)
    if keys[0] == "blocks":
        return f"model.layers.{{i}}.{family.block[keys[1:]]}", True
    return getattr(family, keys[0]), False


@functools.cache
def _abstract(config: ModelConfig) -> Params:
    """Shapes of a stacked model, without making one."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def from_hf(path_or_hub_id: str | Path, dtype=jnp.float32, *, unroll: bool = False) -> Params:
    """A checkpoint folder (or hub id, downloaded) as `Params` of `dtype`.

    `unroll`: a tuple of layers instead of one stack (see `jaxcomm.model`). FileNotFoundError, ConnectionError and
    ValueError say what is wrong with the checkpoint, and where.
    """
    folder = locate(path_or_hub_id)
    family, config = read_config(folder)
    with contextlib.ExitStack() as files:
        tensors = _Tensors(folder, files)
        unused = tensors.names()

        def place(array: np.ndarray) -> jax.Array:
            # Waits: tensors whose copies are still under way would pile up on the host.
            return jnp.asarray(array.astype(dtype, copy=False)).block_until_ready()

        def load(path, leaf):
            name, per_layer = _names(family, path)
            if not per_layer:
                unused.discard(name)
                return place(tensors.read(name, leaf.shape))
            names = [name.format(i=i) for i in range(config.layers)]
            unused.difference_update(names)
            if unroll:
                return [place(tensors.read(n, leaf.shape[1:])) for n in names]
            stack = np.empty(leaf.shape, dtype)
            for i, n in enumerate(names):
                stack[i] = tensors.read(n, leaf.shape[1:])
            return place(stack)

        params = jax.tree_util.tree_map_with_path(load, _abstract(config))
    if config.tied_head:
        unused.discard(family.head)
    unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq")}
    if unused:
        raise ValueError(
            f"{folder} has tensors this architecture has no place for: {', '.join(sorted(unused)[:5])} ({len(unused)} in all)"
        )
    if unroll:
        is_list = lambda x: isinstance(x, list)
        layers = [jax.tree.map(lambda x, i=i: x[i], params.blocks, is_leaf=is_list) for i in range(config.layers)]
        params = params.replace(blocks=tuple(layers))
    return params


def family_of(config: ModelConfig) -> Family:
    """The family whose config can say all of this. ValueError if none can."""
    import transformers

    for family in FAMILIES.values():
        try:
            values = transformers.AutoConfig.for_model(family.model_type, **family.write(config)).to_dict()
            if family.read(Values(values)) == config:
                return family
        except Exception:  # a family that cannot say it; transformers' strict configs have error types of their own
            continue
    raise ValueError(f"no supported family has this architecture: {config}")


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that appears at `out` whole, or not at all. FileExistsError if something is there already."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        for file in unfinished.iterdir():
            file.chmod(0o644)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _leaves(params: Params, family: Family) -> Iterator[tuple[str, jax.Array]]:
    """Every tensor by its name on disk, layer by layer."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params.replace(blocks=None)):
        yield _names(family, path)[0], leaf
    for i in range(params.config.layers):
        layer = params.blocks[i] if params.unrolled else jax.tree.map(operator.itemgetter(i), params.blocks)
        for path, leaf in jax.tree_util.tree_leaves_with_path({"blocks": layer}):
            yield _names(family, path)[0].format(i=i), leaf


def _shard_name(n: int) -> str:
    return f"model-{n + 1:05d}.safetensors"


def _write_shard(shard: dict[str, np.ndarray], folder: Path, n: int) -> list[str]:
    save_file(shard, folder / _shard_name(n), metadata={"format": "pt"})
    return list(shard)


def to_hf(
    params: Params,
    out: str | Path,
    *,
    tokenizer: Any = None,
    stop_tokens: Sequence[int] = (),
    dtype=None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes `params` as a checkpoint folder that transformers and `from_hf` load; `tokenizer` (a transformers one) too.

    The family is the one whose config describes the architecture; `dtype` defaults to the weights'; `stop_tokens` to the
    tokenizer's end of sequence. FileExistsError if `out` exists, ValueError if a weight is not finite in `dtype`;
    whatever fails, no half-written folder is left.
    """
    import transformers

    config, family = params.config, family_of(params.config)
    dtype = np.dtype(params.dtype if dtype is None else dtype)
    eos = list(stop_tokens) or (None if tokenizer is None else tokenizer.eos_token_id)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    with new_folder(out) as folder:
        hf = transformers.AutoConfig.for_model(
            family.model_type, **family.write(config), eos_token_id=eos, bos_token_id=bos
        )
        hf.architectures = [transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]]
        hf.dtype = dtype.name
        hf.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shard: dict[str, np.ndarray] = {}
        shards: list[list[str]] = []
        for name, leaf in _leaves(params, family):
            with np.errstate(over="ignore"):
                tensor = np.ascontiguousarray(np.asarray(leaf).astype(dtype, copy=False))
            if not np.isfinite(tensor.astype(np.float32, copy=False)).all():
                raise ValueError(f"tensor {name} is not finite as {dtype}: write it as another dtype")
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
                shards.append(_write_shard(shard, folder, len(shards)))
                shard = {}
            shard[name] = tensor
        shards.append(_write_shard(shard, folder, len(shards)))
        if len(shards) == 1:
            (folder / _shard_name(0)).rename(folder / WEIGHTS)
        else:
            where = {name: _shard_name(n) for n, names in enumerate(shards) for name in names}
            size = dtype.itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
            index = {"metadata": {"total_size": size}, "weight_map": where}
            (folder / INDEX).write_text(json.dumps(index, indent=1))
    return Path(out)
