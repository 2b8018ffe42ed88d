"""Convert Hugging Face checkpoints to `Params` and back, without torch.

Reading is strict: an unsupported config key that would change the results, or a missing, unknown, misshapen or non-finite
tensor, raises an error that names it. Reading is streamed: weights are read piece by piece from memory-mapped safetensors
to their final place (`jaxcomm.converters.tensors`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from jaxcomm.config import ModelConfig
from jaxcomm.int8 import check_not_int8, in_int8
from jaxcomm.model import Params, init_params, layers_apart
from jaxcomm.sharding import shardings

from . import gguf
from .configs import DType, chosen_dtype, family_of, reaching, read_config, stored_dtype
from .families import Family
from .folders import new_folder
from .hub import locate
from .tensors import INDEX, MXFP4, WEIGHTS, Part, Tensor, check, fill, find_tensors, finite, mapped, same, unpacked
from .weights import Layout, Stored

SHARD_BYTES = 5 * 10**9


class _Leaf(NamedTuple):
    """A leaf of Params on disk: how its tensors are stored, the leaf's shape, and how many of its first axes are numbers in
    the tensors' names ({i}: layers, {e}: experts)."""

    stored: Stored
    shape: tuple[int, ...]
    numbered: int

    def name(self, number: tuple[int, ...]) -> str:
        fields = [field for field in "ie" if f"{{{field}}}" in self.stored.name]
        return self.stored.name.format(**dict(zip(fields, number, strict=True)))


def _leaf(layout: Layout, root: str, path: tuple, shape: tuple[int, ...]) -> _Leaf:
    """The `_Leaf` for a path in Params, with stacked or unrolled layers."""
    keys: list[Any] = [getattr(p, "name", getattr(p, "key", getattr(p, "idx", None))) for p in path]
    if keys[0] != "blocks":
        return _Leaf(layout.outside(tuple(keys), root), shape, 0)
    layer, keys = ("{i}", keys[1:]) if isinstance(keys[1], str) else (str(keys[1]), keys[2:])
    stored = layout.within(tuple(keys), root, layer)
    return _Leaf(stored, shape, stored.name.count("{"))


@functools.cache
def abstract_params(config: ModelConfig, unroll: bool = False) -> Params:
    """Computes the shapes of a model's weights, without the weights.

    Args:
        config: Architecture of the model.
        unroll: Whether to unroll the layers.

    Returns:
        `Params` with a `jax.ShapeDtypeStruct` in the place of each weight.
    """
    made = lambda: init_params(jax.random.key(0), config)
    return jax.eval_shape(lambda: made().unroll() if unroll else made())


class _Source:
    """A model's leaves in a checkpoint. All tensors must exist with the right shapes and dtypes; this is checked before the
    first one is read."""

    def __init__(self, path: Path, family: Family, config: ModelConfig):
        if gguf.is_gguf(path):
            self.layout, self.tensors = gguf.tensors(path)
        else:
            self.layout, self.tensors = family.layout, find_tensors(path)
            if any(map(MXFP4.search, self.tensors)):
                if not self.layout.packed:
                    raise ValueError(
                        f"{path} has weights packed in MXFP4, which are not supported for {family.model_type}: give an unpacked checkpoint"
                    )
                block = self.layout.block | self.layout.packed
                self.layout, self.tensors = dataclasses.replace(self.layout, block=block), unpacked(self.tensors)
        # Like transformers, also accept a bare model, whose names lack the causal model's prefix.
        roots = dict.fromkeys((*self.layout.roots, ""))
        self.root = next((root for root in roots if root + self.layout.embed in self.tensors), self.layout.roots[0])
        head, embed = (self.tensors.get(name) for name in (self.layout.head, self.root + self.layout.embed))
        if config.tied_head and head and embed and not same(head, embed):
            # The config says tied, but the checkpoint has a separate head. transformers also uses it.
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
        """The parts that fill these rows, columns .. of a leaf, tensor by tensor. Each reads only the bytes it needs."""
        numbers, index = index[: leaf.numbered], index[leaf.numbered :]

        def stored(tensor: Tensor, index: tuple[range, ...]) -> np.ndarray:
            rows = index[0]
            ours = leaf.stored.view(mapped(tensor), self.config)
            first = ours.ndim - len(index) + 1  # so many axes (heads and dimensions) are our first axis
            each = math.prod(ours.shape[1:first])
            begin = rows.start // each
            whole = ours[begin : -(-rows.stop // each)]
            whole = whole.reshape(-1, *whole.shape[first:])[rows.start - begin * each : rows.stop - begin * each]
            between = [slice(r.start, r.stop) for r in index[1:-1]]
            return whole[:, *between] if between else whole

        def read(name: str, index: tuple[range, ...]) -> np.ndarray:
            tensor = self.tensors[name]
            whole, columns = stored(tensor, index), slice(None)
            if len(index) > 1:
                columns = slice(index[-1].start, index[-1].stop)
            if tensor.decode is not None:
                whole = tensor.decode(whole, *([] if tensor.scales is None else [stored(tensor.scales, index)]))
            return leaf.stored.values(whole[..., columns])

        for at in np.ndindex(tuple(map(len, numbers))):
            name = leaf.name(tuple(r[n] for r, n in zip(numbers, at, strict=True)))
            yield Part((*at, *(0 for _ in index)), index, name, functools.partial(read, name))

    def load(self, leaf: _Leaf, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
        """Load the leaf on the default device, or this process's part of it."""
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
        dtype: Dtype of the weights. "auto": float32 on CPU, where XLA is slow in 16 bits; elsewhere the checkpoint's
            dtype.
        revision: Branch, tag or commit of the hub's repository.
        unroll: Whether to unroll the layers (`jaxcomm.model`). Default: only on CPU. Layers of unlike shapes always are.
        max_positions: Largest number of tokens of a text. Default: the config's. With longrope the default is the number
            up to which the short factors apply. A larger number selects the long factors, which change every output.
            (transformers selects them when a text is too long for the short factors.)
        mesh: Devices to place the weights on, as `jaxcomm.sharding.shard` does. Each process reads only the parts for its
            own devices.
        int8: Whether to quantise every matrix as soon as it is read (`jaxcomm.int8`).

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


def _tensors(params: Params, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor with its name on disk, layer by layer. A tensor that is stored in several leaves is joined."""
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
        tokenizer: A transformers tokenizer to save with the model, or None.
        stop_tokens: End-of-sequence tokens for the config. Default: the tokenizer's.
        dtype: Dtype of the written weights. Default: the model's dtype.
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
        _write_weights(params, written, folder, dtype, shard_bytes)
    return Path(out)


def _write_weights(params: Params, written: Family, folder: Path, dtype: np.dtype, shard_bytes: int) -> None:
    """Write the weights as safetensors: one file, or several of at most `shard_bytes` with an index."""
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
        return
    where = {name: _shard_name(n) for n, names in enumerate(shards) for name in names}
    size = dtype.itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
