"""A model in JAX's own form: weights as Orbax keeps them, beside architecture, tokenizer and fingerprint, in one folder.

jaxcomm.json    architecture, dtype, stop tokens, fingerprint
weights/        an Orbax checkpoint of stacked layers, which is restored in parallel, and straight onto a mesh
tokenizer.json  and what else transformers writes of a tokenizer
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcomm.config import ModelConfig, Rope
from jaxcomm.fingerprint import fingerprint
from jaxcomm.int8 import check_not_int8
from jaxcomm.model import Params
from jaxcomm.sharding import shardings

from .hf import abstract_params, new_folder, reaching

RECORD, WEIGHTS = "jaxcomm.json", "weights"
FORMAT = 1


def is_saved(path: str | Path) -> bool:
    """Whether it is a folder that `save` has written."""
    return (Path(path) / RECORD).is_file()


def save(params: Params, out: str | Path, *, tokenizer: Any = None, stop_tokens: Sequence[int] = ()) -> Path:
    """Writes a model, and a transformers tokenizer if there is one, into a new folder, which is there whole or not at all.

    Layers that lie one by one are stacked first, which takes a second copy of them. FileExistsError if `out` exists, ValueError
    if weights are int8.
    """
    import orbax.checkpoint as ocp

    check_not_int8(params)
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
    dtype=None,
    *,
    unroll: bool = False,
    max_positions: int | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """What `save` wrote, as it was, or cast to `dtype`, with its layers unrolled, or placed on `mesh`
    (`jaxcomm.sharding.shard`), of which every process reads what its devices hold. max_positions: as `from_hf`'s.

    ValueError: the folder holds no such model, or is damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    config = config_of(record, folder)
    dtype = jnp.dtype(record["dtype"] if dtype is None else dtype)
    like = abstract_params(config)
    place = None if mesh is None else _tree(shardings(like, mesh))
    weights: dict[str, Any] = {"positions": None, "head": None}
    # Leaf by leaf: at no time is more than one of them there twice.
    leaves, structure = jax.tree.flatten(_tree(like))
    placed = [None] * len(leaves) if place is None else jax.tree.leaves(place)
    paths = [[key.key for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(_tree(like))]
    loaded = []
    for path, leaf, sharding in zip(paths, leaves, placed, strict=True):
        array = _restore(folder, path, leaf.shape, dtype, sharding)
        split = unroll and path[0] == "blocks"
        loaded.append(jax.block_until_ready([array[i] for i in range(config.layers)] if split else array))
    weights |= jax.tree.unflatten(structure, loaded)
    if unroll:
        is_list = lambda x: isinstance(x, list)
        layer = lambda i: jax.tree.map(lambda x: x[i], weights["blocks"], is_leaf=is_list)
        weights["blocks"] = tuple(layer(i) for i in range(config.layers))
    return Params(**weights, config=config if max_positions is None else reaching(config, max_positions))


def read_record(folder: Path) -> dict[str, Any]:
    """What jaxcomm.json says. ValueError: it is missing, damaged, or of a format this version does not know."""
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
    """The architecture in a record. ValueError: it is none."""

    def fix(rope: dict[str, Any]) -> Rope:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in rope.items()}
        return Rope(**fields)

    try:
        values = dict(record["config"])
        rope = values.pop("rope")
        values |= {
            "windows": tuple(values["windows"]),
            "rope": tuple(map(fix, rope)) if isinstance(rope, list) else fix(rope),
        }
        return ModelConfig(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / RECORD} describes no model ({error}): convert it again") from error


def _tree(params: Params) -> dict[str, Any]:
    """Weights by name, without those that are None."""
    named = {name: getattr(params, name) for name in ("embed", "positions", "blocks", "norm", "head")}
    return {name: value for name, value in named.items() if value is not None}


def _restore(folder: Path, path: list[str], shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    """One of the weights, on the default device where no sharding says otherwise."""
    import orbax.checkpoint as ocp

    under = lambda leaf: functools.reduce(lambda tree, key: {key: tree}, reversed(path), leaf)
    # Without the shape: given one, Orbax cuts and pads what has another.
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
    return found if isinstance(found, jax.Array) else jax.device_put(found)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax' are of many kinds, and long
        first = str(error).strip().split("\n")[0][:160]
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or of another model ({type(error).__name__}: {first}): convert it again"
        ) from error
