"""The decorator of public functions: it checks the inputs, then runs one compiled program.

A compiled program cannot raise on the values of its inputs. So `compiled` checks all concrete values when the function is
called, and raises. It cannot check traced values (inside the caller's own jit, vmap or scan): the program turns results
of invalid ones into NaN.

    called with arrays           checked, then compiled once for every shape; layers are arguments, so all share a program
    called under jit, vmap,      inlined into the caller's program; int layers stay ints, so that reverse-mode gradients
      grad or scan               exist (`jaxcomm.model.fold_blocks`)

Inside a program, an invalid value (a layer out of range, a token outside the vocabulary, a row that ends in padding)
turns every number that depends on it into NaN, and generated tokens into -1.
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

from jaxcomm.cache import KVCache, in_order
from jaxcomm.config import NEW_TOKENS, ModelConfig
from jaxcomm.edits import Graft, checked, is_number
from jaxcomm.prompts import Prompts, as_prompts, known
from jaxcomm.sites import SITES, Site, as_site, check_positions, check_site, differs

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


trace_state = functools.partial(jax.extend.core.get_opaque_trace_state, convention="flax")
with jax.ensure_compile_time_eval():
    UNTRACED = trace_state()
"""Whether no transformation is active. (Checking the arguments is not enough: a graft's closure may hold traced values.)"""


class _Static(struct.PyTreeNode):
    """A static argument, which is part of the program."""

    value: Any = struct.field(pytree_node=False)


def compiled(
    *,
    prompts: Mapping[str, str] | None = None,
    layers: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    static: Sequence[str] = (),
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a pure function of arrays. If it has `edits`, they apply to `params` and `prompts`.

    Args:
        prompts: Argument names of prompts -> of the model that reads them. Default: `prompts` -> `params`.
        layers: Argument names of layers -> of the model that they belong to.
        texts: Argument names of given continuations -> of the model that reads them. The arguments may be omitted.
        static: Names of arguments that are not arrays. Each value has its own program. Arguments that hold arrays (a
            `Site`, a `Graft`) are not static.
    """
    prompts = {"prompts": "params"} if prompts is None else prompts
    layers, texts = layers or {}, texts or {}

    def decorate(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(fn)
        options = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

        def body(given: dict[str, Any]) -> Result:
            return cast(Any, fn)(**{name: _released(x) for name, x in given.items()})

        body.__name__ = body.__qualname__ = fn.__name__
        program = jax.jit(body, inline=True)

        @functools.wraps(fn)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            given = signature.bind(*args, **kwargs).arguments
            for name in options:
                given |= given.pop(name, {})
            for name, params in prompts.items():
                given[name] = as_prompts(given[name])
                check_tokens(given[params], given[name])
            for name, params in texts.items():
                check_texts(given[params], given.get(name), name)
            untraced = trace_state() == UNTRACED
            for name, params in layers.items():
                given[name] = _checked_layer(given, name, params, untraced)
            if "site" in given:
                given["site"] = _checked_site(given["params"], as_site(given["site"]), given["prompts"], untraced)
            _check_reads(given)
            if (sampling := given.get("sampling")) is not None and given.get("keys") is None and sampling.greedy:
                given["sampling"] = None
            if "past" in given or "cache" in given:
                new = given.get("max_new_tokens", NEW_TOKENS) if "max_new_tokens" in static else 0
                given["past"] = _checked_past(given, new)
            if given.get("edits"):
                given["edits"] = checked(given["params"], given["edits"], given.get("prompts"))
                given["edits"] = tuple(e.replace(site=_in_place(given["params"], e.site)) for e in given["edits"])
            if "sites" in given and not isinstance(given["sites"], str):
                several = [given["sites"]] if isinstance(given["sites"], Site) else given["sites"]
                given["sites"] = [x if isinstance(x, str) else _in_place(given["params"], x) for x in several]
            given |= {name: _fixed(given[name]) for name in static if name in given}
            return program(given)

        return call

    return decorate


def _checked_layer(given: Mapping[str, Any], name: str, params: str, untraced: bool) -> Any:
    """Check a layer, or a site in its place, and prepare it for the program."""
    layer = given[name]
    if isinstance(layer, Site):
        return _checked_site(given[params], layer, given[f"prompts_{params[-1]}"], untraced)
    check_layer(given[params], layer, name)
    if isinstance(layer, Tracer):
        return layer
    return np.int32(layer) if untraced else _Static(int(layer))


def _checked_site(params: Any, site: Site, prompts: Prompts, untraced: bool) -> Any:
    """Check a site and prepare it for the program: its layer becomes an array, or stays an int in the caller's program."""
    check_site(params.config, site)
    check_positions(site, prompts)
    return _in_place(params, site) if untraced else _fixed_site(site)


def _in_place(params: Any, site: Site) -> Site:
    """The site, with a static layer if the activations have other shapes in other layers."""
    return _fixed_site(site) if differs(params.config, site.name) else site


def _fixed_site(site: Site) -> Site:
    """The site with a static layer, so that it stays an int in the program. A traced layer stays as it is."""
    (layer, positions), fixed = site.tree_flatten()
    if layer is None or isinstance(layer, Tracer | _Static):
        return site
    return Site.tree_unflatten(fixed, (_Static(int(layer)), positions))


def _checked_past(given: Mapping[str, Any], new: int) -> tuple[KVCache, ...]:
    """Check caches and prepare them for the program."""
    if not isinstance(past := given.get("past", ()), list | tuple):
        raise ValueError(f"past is a list of caches, got a {type(past).__name__}: write past=[cache]")
    before = (*past, given["cache"]) if "cache" in given else past
    check_past(given["params"], before, given.get("prompts"), new)
    return tuple(past)


def _check_reads(given: Mapping[str, Any]) -> None:
    """Raises ValueError for sites that cannot be read, and for sites that are requested twice."""
    sites = given.get("sites", ())
    sites = [sites] if isinstance(sites, str | Site) else sites
    names = [site.name if isinstance(site, Site) else site for site in sites]
    layers = given.get("layers")
    for what, values in (("sites", names), ("layers", [] if layers is None else [x for x in layers if is_number(x)])):
        if twice := [value for n, value in enumerate(values) if value in values[:n]]:
            raise ValueError(f"{what} name {twice[0]} twice: read them in two calls")
    if layers is not None and not len(layers):
        raise ValueError("layers are empty: name at least one, or leave them out for all")
    for site in sites:
        _check_read(given, site)


def _check_read(given: Mapping[str, Any], site: str | Site) -> None:
    """Raises ValueError for a site that cannot be read, or that does not exist at the given layers."""
    config = given["params"].config
    if isinstance(site, Site):
        check_site(config, site)
        check_positions(site, given["prompts"])
    elif site in SITES and not SITES[site].layered:
        check_site(config, Site(site))
    else:
        every = range(1, config.layers + 1) if differs(config, site) else (1,)
        for layer in every if given.get("layers") is None else given["layers"]:
            check_site(config, Site(site, layer))


def _fixed(value: Any) -> Any:
    """Make a value static, except arrays and the arrays in a `Site`."""
    if isinstance(value, list | tuple | range):
        return tuple(map(_fixed, value))
    return value if isinstance(value, Site | Graft | jax.Array | np.ndarray) else _Static(value)


def _released(value: Any) -> Any:
    """Undo `_fixed`. Lists come back as tuples."""
    is_fixed = lambda x: isinstance(x, _Static)
    return jax.tree.map(lambda x: x.value if is_fixed(x) else x, value, is_leaf=is_fixed)


def check_layer(params: Any, layer: Any, name: str = "k") -> None:
    """Raises ValueError unless 0 <= layer <= L. A traced layer is not checked."""
    if not isinstance(params.config, ModelConfig):
        raise ValueError(f"{name} = {layer}: a network has no layers to be split at; name a single model")
    last = params.config.layers
    if type(layer) is int and 0 <= layer <= last:  # the usual case; the general check takes ten times as long
        return
    value = known(layer)
    if value is not None and not np.issubdtype(value.dtype, np.integer):
        raise ValueError(f"{name} = {layer!r}: a layer is a whole number, 0 to {last}")
    if value is not None and not np.all((value >= 0) & (value <= last)):
        raise ValueError(f"{name} = {layer} is out of range: this model's layers are 0 (the embedding) to {last}")


def check_past(params: Any, past: Sequence[KVCache], prompts: Prompts | None, new: int = 0) -> None:
    """Raises ValueError for caches that a model cannot continue from. Traced values are not checked.

    Args:
        params: The model, or a network.
        past: The caches.
        prompts: The prompts that follow them. None: no prompts.
        new: Number of new tokens after that.
    """
    for cache in past:
        check_cache(params, cache)
    rows = len(prompts) if prompts is not None else max((len(cache.positions) for cache in past), default=1)
    for cache in past:
        if rows % len(cache.positions) or (cache.seen is not None and cache.seen.shape[1] not in (1, rows)):
            told = len(cache.positions) if cache.seen is None else max(len(cache.positions), cache.seen.shape[1])
            raise ValueError(
                f"a cache has {told} rows for {rows} prompts: give a divisor of {rows} (each row serves consecutive prompts)"
            )
    concrete = not any(known(cache.positions) is None for cache in past)
    if any(cache.indivisible for cache in past) and concrete and not in_order(past, rows).all():
        raise ValueError(
            "linear attention goes on from one state, so each cache must follow the one before it: read the next with past=[...]"
        )
    limit, columns = params.config.max_positions, prompts.shape[1] if prompts is not None else 0
    real = np.ones((rows, 0), bool) if prompts is None else prompts.real
    held, numbered = sum(cache.positions.shape[-1] for cache in past), any(cache.begin is not None for cache in past)
    if not numbered and held + columns + new <= limit:
        return  # the usual case; the general check waits until the caches are computed
    places = [known(cache.positions if cache.begin is None else cache.begin[:, None] - 1) for cache in past]
    if real is None or any(x is None for x in places):
        return
    repeated = lambda x: np.repeat(x, rows // len(x))
    before = np.max([repeated(x.max(axis=-1) + 1) for x in places if x is not None], axis=0)
    if (over := before + real.sum(axis=1) + new > limit).any():
        row = int(np.argmax(over))
        raise ValueError(
            f"{before[row]} tokens before row {row}, {real[row].sum()} in it and {new} new ones exceed the model's {limit} positions: shorten the past or the prompt"
        )


def check_cache(params: Any, cache: Any) -> None:
    """Raises ValueError unless the cache fits the model. For a network, checks only that it is a network's cache."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"past holds a {type(cache).__name__}: give caches (of a message, receive_cache makes one)")
    if not isinstance(c := getattr(params, "config", params), ModelConfig):
        return
    keys = cache.k if isinstance(cache.k, tuple) else jax.tree.leaves(cache.k)[:1] * len(jax.tree.leaves(cache.k)[0])
    found = [(leaf.shape[-3], leaf.shape[-1]) for leaf in keys]
    wanted = [heads[:2] if heads else (0, 0) for heads in c.key_heads]
    rules = [one and one.memory.shape[-3:] for one in cache.states] or [None] * c.layers
    if found == wanted and rules != [rule and (rule.value_heads, rule.key_dim, rule.value_dim) for rule in c.rules]:
        raise ValueError("the states of linear attention are missing, or of other sizes: read with the same model")
    if found != wanted:
        n = next((n for n, (x, y) in enumerate(zip(found, wanted, strict=False)) if x != y), 0)
        (heads, size), (own, own_size) = found[n], wanted[n]
        raise ValueError(
            f"the cache has {len(found)} layers and, in layer {n + 1}, {heads} key heads of size {size}; this model has {c.layers} layers and {own} heads of size {own_size}: read with the same model"
        )


def check_texts(params: Any, texts: Any, name: str) -> None:
    """Raises ValueError for continuations that cannot be scored. Traced values are not checked.

    Args:
        params: The model.
        texts: Ids [.., T] in the vocabulary, and -1 after the end of each.
        name: Its name in an error message.
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


def check_tokens(params: Any, prompts: Prompts) -> None:
    """Raises ValueError for a token that is not in the vocabulary. Traced values are not checked.

    Args:
        params: The model.
        prompts: Its prompts.
    """
    ids, real = known(prompts.tokens) if np.ndim(prompts.tokens) == 2 else None, known(prompts.mask)
    if ids is None:
        return
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens are whole numbers, got {ids.dtype}")
    wrong = (ids < 0) | (ids >= params.config.vocab)
    if prompts.mask is not None:
        wrong = wrong & real if real is not None else np.zeros_like(wrong)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"token {ids[row, column]} at row {row}, column {column} is not in the vocabulary: this model's tokens are 0 to {params.config.vocab - 1}"
        )
