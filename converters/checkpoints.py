"""Save and load a model in JAX's own format: Orbax weights, architecture, tokenizer and fingerprint in one folder.

jaxcomm.json    architecture, dtype, stop tokens, fingerprint
weights/        an Orbax checkpoint of stacked layers; it is restored in parallel, directly onto a mesh
tokenizer.json  and the other tokenizer files that transformers writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcomm.config import DeltaRule, Heads, ModelConfig, Rope
from jaxcomm.fingerprint import fingerprint, fingerprint_of, leaf_digest
from jaxcomm.int8 import check_not_int8, in_int8
from jaxcomm.model import Params, layers_apart
from jaxcomm.sharding import shardings

from .configs import DType, chosen_dtype, reaching
from .folders import new_folder
from .hf import abstract_params
from .tensors import finite

RECORD, WEIGHTS = "jaxcomm.json", "weights"
FORMAT = 1


def is_saved(path: str | Path) -> bool:
    """Whether a folder was written by `save`.

    Args:
        path: The folder.
    """
    return (Path(path) / RECORD).is_file()


def save(params: Params, out: str | Path, *, tokenizer: Any = None, stop_tokens: Sequence[int] = ()) -> Path:
    """Writes a model, and its tokenizer, into a new folder. Orbax writes the weights.

    The folder appears complete or not at all. Unrolled layers are stacked first, which needs memory for a second copy, unless
    their shapes differ.

    Args:
        params: The model.
        out: Path of the new folder.
        tokenizer: A transformers tokenizer to save with the model, or None.
        stop_tokens: Tokens at which an agent stops.

    Returns:
        The path of the folder.

    Raises:
        FileExistsError: `out` exists.
        ValueError: The weights are int8; there are several processes; `out` is a URL.

    Example:
        >>> import tempfile
        >>> from jaxcomm.converters import load, save
        >>> with tempfile.TemporaryDirectory() as place:
        ...     same = load(save(params, f"{place}/model"))
        >>> bool((same.embed == params.embed).all())
        True
    """
    import orbax.checkpoint as ocp

    check_not_int8(params)
    if jax.process_count() > 1:
        raise ValueError(
            f"save writes from one process, here are {jax.process_count()}: convert the model in one first"
        )
    params = params.stack()
    with new_folder(out) as folder:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / WEIGHTS, _tree(params))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        record = {
            "format": FORMAT,
            "config": dataclasses.asdict(params.config),
            "dtype": params.dtype.name,
            "stop_tokens": [int(token) for token in stop_tokens],
            "fingerprint": fingerprint(params),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return Path(out)


def load(
    folder: str | Path,
    dtype: DType = "auto",
    *,
    unroll: bool | None = None,
    max_positions: int | None = None,
    mesh: Mesh | None = None,
    int8: bool = False,
) -> Params:
    """Loads a model that `save` wrote.

    Args:
        folder: The folder.
        dtype: Dtype of the weights. "auto": float32 on CPU, where XLA is slow in 16 bits; elsewhere the dtype of the saved
            weights.
        unroll: Whether to unroll the layers (`jaxcomm.model`). Default: only on CPU. Layers of unlike shapes always are.
        max_positions: Largest number of tokens of a text, as in `from_hf`.
        mesh: Devices to place the weights on, as `jaxcomm.sharding.shard` does. Each process reads only the parts for its
            own devices.
        int8: Whether to quantise every matrix as soon as it is read (`jaxcomm.int8`).

    Returns:
        The model.

    Raises:
        ValueError: The folder holds no such model; a weight is not finite in `dtype`; `max_positions` is out of range.
            Without a mesh also: the weights differ from the saved ones (by their fingerprint).

    Example:
        >>> import tempfile
        >>> from jaxcomm.converters import load, save
        >>> with tempfile.TemporaryDirectory() as place:
        ...     same = load(save(params, f"{place}/model"), unroll=False)
        >>> same.config == params.config, same.unrolled
        (True, False)
    """
    folder, unroll = Path(folder), layers_apart() if unroll is None else unroll
    record = read_record(folder)
    config = config_of(record, folder)
    stored = np.dtype(record["dtype"])
    dtype = chosen_dtype(dtype, stored)
    like = abstract_params(config)
    leaves, structure = jax.tree_util.tree_flatten_with_path(_tree(like))
    placed = [None] * len(leaves) if mesh is None else jax.tree.leaves(_tree(shardings(like, mesh)))
    # Load leaf by leaf, so that at most one leaf is in memory twice.
    loaded, digests = [], {}
    for (path, leaf), sharding in zip(leaves, placed, strict=True):
        names = tuple(key.key for key in path)
        array = _restore(folder, names, leaf.shape, stored, sharding)
        if mesh is None:
            digests[names] = leaf_digest(array)
        array = _finite(array, dtype, ".".join(names))
        array = in_int8(path, array) if int8 else array
        if unroll and names[0] == "blocks" and config.alike:
            array = _Layers(jax.tree.map(operator.itemgetter(i), array) for i in range(config.layers))
        loaded.append(jax.block_until_ready(array))
    if mesh is None:
        blocks = [digest for names, digest in digests.items() if names[0] == "blocks"]
        others = [d for part in ("embed", "positions", "norm", "head") for n, d in digests.items() if n[0] == part]
        if (found := fingerprint_of(config, stored, (*blocks, *others))) != record["fingerprint"]:
            raise ValueError(
                f"{folder} does not hold the weights that were saved (fingerprint {found}, then {record['fingerprint']}): convert it again"
            )
    weights: dict[str, Any] = {"positions": None, "head": None} | jax.tree.unflatten(structure, loaded)
    if not config.alike:
        weights["blocks"] = tuple(weights["blocks"][name] for name in sorted(weights["blocks"]))
    elif unroll:
        layer = lambda i: jax.tree.map(
            operator.itemgetter(i), weights["blocks"], is_leaf=lambda x: isinstance(x, _Layers)
        )
        weights["blocks"] = tuple(layer(i) for i in range(config.layers))
    return Params(**weights, config=config if max_positions is None else reaching(config, max_positions))


class _Layers(list):
    """A leaf of stacked blocks, as a list with one array for each layer."""


def _finite(array: Any, dtype: np.dtype, name: str) -> jax.Array:
    """Cast a weight on its device. ValueError: a number in it is NaN, infinite or too large for the dtype."""
    with np.errstate(over="ignore"):
        cast = array if array.dtype == dtype else array.astype(dtype)
    if not (finite(cast) if isinstance(cast, np.ndarray) else bool(_all_finite(cast))):
        raise ValueError(
            f"weight {name} holds NaN, infinite values, or some too large for {dtype}: another file or dtype is needed"
        )
    return cast if isinstance(cast, jax.Array) else jax.device_put(cast)


_all_finite = jax.jit(lambda array: jnp.isfinite(array).all())


def read_record(folder: Path) -> dict[str, Any]:
    """Read jaxcomm.json. ValueError: it is missing, damaged, or has a format that this version does not know."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']} is not {FORMAT}: it was written by another version")
        if missing := {"config", "dtype", "stop_tokens", "fingerprint"} - record.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no model ({' '.join(str(error).split())}): convert it again") from error
    return record


def config_of(record: dict[str, Any], folder: Path) -> ModelConfig:
    """Read the architecture from a record. ValueError: it is invalid."""

    def fix(rope: dict[str, Any]) -> Rope:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in rope.items()}
        return Rope(**fields)

    try:
        values = dict(record["config"])
        rope = values.pop("rope")
        values |= {
            "windows": tuple(values["windows"]),
            "rope": tuple(map(fix, rope)) if isinstance(rope, list) else fix(rope),
            "delta_rule": None if values.get("delta_rule") is None else DeltaRule(*values["delta_rule"]),
            "layer_heads": tuple(map(_heads_of, values.get("layer_heads", ()))),
        }
        return ModelConfig(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / RECORD} describes no model ({error}): convert it again") from error


def _heads_of(sizes: list[Any]) -> Heads | DeltaRule:
    """The heads of a layer from their JSON, which holds a named tuple as a list."""
    return (Heads if len(sizes) == len(Heads._fields) else DeltaRule)(*sizes)


def _tree(params: Params) -> dict[str, Any]:
    """Weights by name, except those that are None. Unrolled layers have their number for a name."""
    named = {name: getattr(params, name) for name in ("embed", "positions", "blocks", "norm", "head")}
    if params.unrolled:  # layers of unlike shapes
        named["blocks"] = {f"{i:04d}": layer for i, layer in enumerate(params.blocks)}
    return {name: value for name, value in named.items() if value is not None}


def _restore(
    folder: Path, path: tuple[str, ...], shape: tuple[int, ...], dtype: Any, sharding: Any
) -> jax.Array | np.ndarray:
    """Restore one weight, on the host unless a sharding is given."""
    import orbax.checkpoint as ocp

    under = lambda leaf: functools.reduce(lambda tree, key: {key: tree}, reversed(path), leaf)
    # Do not pass the shape: Orbax would silently cut or pad an array of another shape.
    if sharding is None:
        how = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    else:
        how = ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
    like = under(jax.ShapeDtypeStruct(shape, dtype))
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=under(how), partial_restore=True)
    with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        (found,) = jax.tree.leaves(checkpointer.restore((folder / WEIGHTS).absolute(), args=arguments))
        if found.shape != shape:
            raise ValueError(f"{'.'.join(path)} is {found.shape}, the architecture asks for {shape}")
    return found


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises errors of many types, with long messages
        first = str(error).strip().split("\n")[0][:160]
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or of another model ({type(error).__name__}: {first}): convert it again"
        ) from error
