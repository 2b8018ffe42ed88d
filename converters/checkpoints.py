"""A model in JAX's own form: weights as Orbax keeps them, beside architecture, tokenizer and fingerprint, in one folder.

jaxcomm.json    architecture, dtype, stop tokens, fingerprint
weights/        an Orbax checkpoint of stacked layers, which is restored in parallel, and straight onto a mesh
tokenizer.json  and what else transformers writes of a tokenizer
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcomm.config import ModelConfig, Rope
from jaxcomm.converters.hf import abstract_params, new_folder, reaching
from jaxcomm.fingerprint import fingerprint
from jaxcomm.model import Params
from jaxcomm.sharding import shardings

RECORD, WEIGHTS = "jaxcomm.json", "weights"
FORMAT = 1


def is_saved(path: str | Path) -> bool:
    """Whether it is a folder that `save` has written."""
    return (Path(path) / RECORD).is_file()


def save(params: Params, out: str | Path, *, tokenizer: Any = None, stop_tokens: Sequence[int] = ()) -> Path:
    """Writes a model, and a transformers tokenizer if there is one, into a new folder, which is there whole or not at all.

    Layers that lie one by one are stacked first, which takes a second copy of them. FileExistsError if `out` exists.
    """
    import orbax.checkpoint as ocp

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
    folder, record = Path(folder), read_record(folder)
    config = config_of(record, folder)
    dtype = jnp.dtype(record["dtype"] if dtype is None else dtype)
    like = abstract_params(config)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), like)
    if mesh is not None:
        place = shardings(like, mesh)
        like = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, dtype, sharding=at), like, place)
    if not unroll:
        return Params(**_restore(folder, _tree(like)), config=_config(config, max_positions))
    rest = _restore(folder, _tree(like.replace(blocks=None)))
    # Leaf by leaf: at no time are there two copies of more than one.
    leaves, structure = jax.tree.flatten(like.blocks)
    names = [path for path, _ in jax.tree_util.tree_leaves_with_path(like.blocks)]
    split = []
    for path, leaf in zip(names, leaves, strict=True):
        tree: Any = leaf
        for key in reversed(path):
            tree = {key.key: tree}
        (stack,) = jax.tree.leaves(_restore(folder, {"blocks": tree}))
        split.append([stack[i] for i in range(config.layers)])
        jax.block_until_ready(split[-1])
    blocks = tuple(jax.tree.unflatten(structure, [leaf[i] for leaf in split]) for i in range(config.layers))
    return Params(**(rest | {"blocks": blocks}), config=_config(config, max_positions))


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
    fix = lambda rope: Rope(**{key: tuple(v) if isinstance(v, list) else v for key, v in rope.items()})
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


def _config(config: ModelConfig, max_positions: int | None) -> ModelConfig:
    return config if max_positions is None else reaching(config, max_positions)


def _tree(params: Params) -> dict[str, Any]:
    """Weights by name, without those that are None."""
    named = {name: getattr(params, name) for name in ("embed", "positions", "blocks", "norm", "head")}
    return {name: value for name, value in named.items() if value is not None}


def _restore(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Some of the weights."""
    import orbax.checkpoint as ocp

    arguments = ocp.args.PyTreeRestore(
        item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
    )
    with _readable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore((folder / WEIGHTS).absolute(), args=arguments)
    return {"positions": None, "blocks": None, "norm": None, "head": None} | found


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax' are of many kinds, and long
        first = str(error).strip().split("\n")[0][:160]
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or of another model ({type(error).__name__}: {first}): convert it again"
        ) from error
