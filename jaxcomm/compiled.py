"""What a public function is wrapped in: its inputs are checked, then one compiled program runs.

A program cannot look at the values it is given. So `compiled` looks at those that are known when the function is called,
and raises; those that are not (the caller's own jit, vmap or scan traces them) become NaN inside.

    called with arrays           checked, then compiled once for every shape; layers are arguments, so all share a program
    called under jit, vmap,      inlined into the caller's program; int layers stay ints, so that reverse-mode gradients
      grad or scan               exist (`jaxcomm.model.fold_blocks`)

Invalid values that a program meets (a layer out of range, a token outside the vocabulary, a row that ends in padding)
make every number that depends on them NaN, and generated tokens -1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.extend.core
import numpy as np
from flax import struct
from jax.core import Tracer

from jaxcomm.config import ModelConfig

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


_trace = functools.partial(jax.extend.core.get_opaque_trace_state, convention="flax")
with jax.ensure_compile_time_eval():
    UNTRACED = _trace()
"""Not under any transformation. (What is traced may hide in a graft's closure, so arguments do not tell.)"""


class _Static(struct.PyTreeNode):
    """An argument that is part of the program."""

    value: Any = struct.field(pytree_node=False)


def compiled(
    *,
    prompts: Sequence[tuple[str, str, str]] = (("params", "tokens", "mask"),),
    layers: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    static: Sequence[str] = (),
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a pure function of arrays.

    Args:
        prompts: Names of the arguments that hold a model, its prompts and their mask.
        layers: Names of layers, and of the model each belongs to.
        texts: Names of given continuations, and of the model that reads each.
        static: Names of arguments that are no arrays: another value is another program.
    """
    layers, texts = layers or {}, texts or {}

    def decorate(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(fn)

        def body(given: dict[str, Any]) -> Result:
            return cast(Any, fn)(**{name: x.value if isinstance(x, _Static) else x for name, x in given.items()})

        body.__name__ = body.__qualname__ = fn.__name__
        program = jax.jit(body, inline=True)

        @functools.wraps(fn)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            for params, tokens, mask in prompts:
                check_prompts(given[params], given[tokens], given.get(mask))
            for name, params in texts.items():
                check_texts(given[params], given[name], name)
            for name, params in layers.items():
                check_layer(given[params], given[name], name)
                if not isinstance(given[name], Tracer):
                    layer = int(given[name])
                    given[name] = np.int32(layer) if _trace() == UNTRACED else _Static(layer)
            given |= {name: _Static(given[name]) for name in static if name in given}
            return program(given)

        return call

    return decorate


def known(x: Any) -> np.ndarray | None:
    """The values, if they can be looked at: not of a traced array, nor of one that other processes hold a part of."""
    if x is None or isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def check_layer(params: Any, layer: Any, name: str = "k") -> None:
    """Raises ValueError unless 0 <= layer <= L, as far as the layer is known."""
    if not isinstance(params.config, ModelConfig):
        raise ValueError(f"{name} = {layer}: a network has no layers to be split at; name a single model")
    last = params.config.layers
    if type(layer) is int and 0 <= layer <= last:  # nearly always; what follows takes ten times as long
        return
    value = known(layer)
    if value is not None and not np.issubdtype(value.dtype, np.integer):
        raise ValueError(f"{name} = {layer!r}: a layer is a whole number, 0 to {last}")
    if value is not None and not np.all((value >= 0) & (value <= last)):
        raise ValueError(f"{name} = {layer} is out of range: this model's layers are 0 (the embedding) to {last}")


def check_texts(params: Any, texts: Any, name: str) -> None:
    """Raises ValueError for continuations that cannot be scored, as far as their values are known.

    Args:
        params: The model.
        texts: Ids [.., T] in the vocabulary, and -1 after the end of each.
        name: What the caller calls them.
    """
    if (ids := known(texts)) is None:
        return
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} are tokens, whole numbers: got {ids.dtype}")
    if (wrong := (ids < -1) | (ids >= params.config.vocab)).any():
        raise ValueError(
            f"{name} have token {ids[wrong][0]}, which is not in the vocabulary: this model's tokens are 0 to {params.config.vocab - 1}, and -1 says that a text has ended"
        )
    if np.any((ids[..., :-1] < 0) & (ids[..., 1:] >= 0)):
        raise ValueError(f"{name} have a token after the end of a text: -1 goes after its last token and nowhere else")


def check_prompts(params: Any, tokens: Any, mask: Any = None) -> None:
    """Raises ValueError for prompts that cannot be read, as far as their values are known.

    Args:
        params: The model.
        tokens: Ids [B, T] in the vocabulary (any on padding), or vectors [B, T, D].
        mask: False on padding [B, T], which is on the left of every row.
    """
    if not hasattr(tokens, "shape"):
        raise ValueError(f"prompts are an array, got a {type(tokens).__name__}: jaxcomm.left_pad makes one of lists")
    if np.ndim(tokens) not in (2, 3):
        raise ValueError(
            f"prompts are tokens [rows, columns], or vectors [rows, columns, width]: got {np.shape(tokens)}"
        )
    if mask is not None and np.shape(mask) != np.shape(tokens)[:2]:
        raise ValueError(f"the mask is {np.shape(mask)}, the prompts are {np.shape(tokens)[:2]}: give both one shape")
    real, ids = known(mask), known(tokens) if np.ndim(tokens) == 2 else None
    if real is not None and real.size and not real[:, -1].all():
        row = int(np.argmin(real[:, -1]))
        if not real[row].any():
            raise ValueError(f"row {row} has no token: its mask is False everywhere")
        raise ValueError(
            f"row {row} ends in padding: pad on the left, so that the last column is every row's last token "
            "(jaxcomm.left_pad; of a transformers tokenizer, padding_side='left')"
        )
    if ids is None:
        return
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens are whole numbers, got {ids.dtype}")
    wrong = (ids < 0) | (ids >= params.config.vocab)
    if mask is not None:
        wrong = wrong & real if real is not None else np.zeros_like(wrong)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"token {ids[row, column]} at row {row}, column {column} is not in the vocabulary: this model's tokens are 0 to {params.config.vocab - 1}"
        )
