"""Functions that read prompts: `prefix` and `suffix`, `forward`, `run_with_cache`, `hidden_states`, `prefill`.

prefix(params, prompts, k) = h[k];  suffix(params, h[k], k) = logits;  forward runs both
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomm.cache import Attended, KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.edits import Edit, Read, hook_of
from jaxcomm.language_model import LanguageModel, check_room, positions_of
from jaxcomm.model import Params, embed, enter, run, run_blocks, unembed
from jaxcomm.prompts import Prompts
from jaxcomm.sites import SITES, Site


@compiled(layers={"k": "params"})
def prefix(params: Params, prompts: Prompts, k: Any, *, past: Sequence[KVCache] = ()) -> Float[Array, "B P D"]:
    """Computes h[k]: the embedding and blocks 1 .. k.

    Args:
        params: The model.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        k: The layer, 0 .. L, an int or traced.
        past: Key/value caches of earlier tokens: one row for each prompt, or one row that all share.

    Returns:
        The residual stream after block k, [B, P, D].

    Raises:
        ValueError: k is out of range; the prompts have no token, do not fit the model's positions, or are invalid; `past` is of
            another model or has other rows.

    Example:
        >>> jc.suffix(params, jc.prefix(params, prompts, 2), 2, mask=prompts.mask).shape
        (2, 3, 256)
    """
    check_room(params, prompts)
    positions = positions_of(prompts, past)
    return run_blocks(params, embed(params, prompts.tokens, positions), positions, (0, k), attended=Attended(past))[0]


def suffix(
    params: Params, h: Float[Array, "B P D"], k: Any, *, mask: Bool[AnyArray, "B P"] | None = None
) -> Float[Array, "B P V"]:
    """Computes logits from h[k]: blocks k + 1 .. L, final norm, head.

    Args:
        params: The model.
        h: The residual stream [B, P, D] that `prefix` returned, changed or not.
        k: The layer, 0 .. L, an int or traced.
        mask: False on padding, [B, P]. None: there is none.

    Returns:
        Logits of every position [B, P, V], float32.

    Raises:
        ValueError: k is out of range; the mask has another shape.

    Example:
        >>> logits = jc.suffix(params, jc.prefix(params, prompts, 2), 2, mask=prompts.mask)
        >>> bool(jnp.allclose(logits, jc.forward(params, prompts), atol=1e-4))
        True
    """
    return _suffix(params, Prompts(h, mask), k)


@compiled(layers={"k": "params"})
def _suffix(params: Params, prompts: Prompts, k: Any) -> Float[Array, "B P V"]:
    check_room(params, prompts)
    return unembed(params, run_blocks(params, jnp.asarray(prompts.tokens), positions_of(prompts), (k, None))[0])


@compiled()
def forward(params: LanguageModel, prompts: Prompts, *, edits: Sequence[Edit] = ()) -> Float[Array, "B P V"]:
    """Computes the logits of every position.

    Args:
        params: The model, or a network (without edits).
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        edits: Edits of the model's states (`jaxcomm.edits`).

    Returns:
        Logits [B, P, V], float32.

    Raises:
        ValueError: The prompts have no token, do not fit the model's positions, or are invalid; an edit is invalid; `past` is
            of another model or has other rows.

    Example:
        >>> jc.forward(params, prompts).shape
        (2, 3, 256)
    """
    check_room(params, prompts)
    positions = positions_of(prompts)
    return run(params, prompts.tokens, positions, hook_of(params, positions, edits))[0]


@compiled(static=("sites", "layers"))
def run_with_cache(
    params: Params,
    prompts: Prompts,
    *,
    sites: str | Site | Sequence[str | Site],
    layers: Sequence[Any] | None = None,
    edits: Sequence[Edit] = (),
) -> tuple[Float[Array, "B P V"], dict[str, Array]]:
    """Computes the logits of every position, and returns the requested activations too.

    Unlike TransformerLens' `run_with_cache`, it stores only the requested sites.

    Args:
        params: The model.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        sites: Names of sites, or a `Site` for some positions or heads at one layer.
        layers: Layers to read for sites given by name. Default: all layers of each site.
        edits: Edits of the model's states. Activations are read after the edits.

    Returns:
        Logits [B, P, V], and a dict from name to activations: [layers, B, P, ...], 0 on padding (pattern:
        [layers, B, N, P, P]); [B, P, ...] for a site without layers; for a `Site` [B, n, ...], or [B, ...] at one position.

    Raises:
        ValueError: There is no such site; a layer or position is out of range; the prompts or an edit are invalid.

    Example:
        >>> logits, cache = jc.run_with_cache(params, prompts, sites=["resid_post", "z"], layers=[1, 4])
        >>> cache["z"].shape
        (2, 2, 3, 4, 32)
    """
    check_room(params, prompts)
    positions = positions_of(prompts)
    wanted = [sites] if isinstance(sites, str | Site) else list(sites)
    reads = [_read(params, site, layers) for site in wanted]
    logits, _, kept = run(params, prompts.tokens, positions, hook_of(params, positions, edits, reads))
    whole = lambda site: isinstance(site, str) and SITES[site].layered
    found = [array if whole(site) else array[0] for site, array in zip(wanted, kept, strict=True)]
    return logits, {read.site.name: array for read, array in zip(reads, found, strict=True)}


def _read(params: Params, site: str | Site, layers: Sequence[Any] | None) -> Read:
    """The `Read` for a site given by name (at these layers, or at all), or for a `Site`."""
    if isinstance(site, Site):
        return Read(site, (site.layer,))
    if not SITES[site].layered:
        return Read(Site(site), (None,))
    first = 0 if site == "resid_post" else 1
    layers = tuple(range(first, params.config.layers + 1)) if layers is None else tuple(layers)
    return Read(Site(site, layers[0]), layers)


@compiled(static=("last",))
def hidden_states(params: Params, prompts: Prompts, *, last: bool = False) -> Array:
    """Computes the residual stream after every layer, and the embedding before the first. No logits are computed.

    It returns the same states as `run_with_cache` at resid_post.

    Args:
        params: The model.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        last: Whether to return only each row's last token. The other tokens are then never stored.

    Returns:
        h[0] .. h[L], [L + 1, B, P, D], 0 on padding; or [L + 1, B, D] with `last`.

    Raises:
        ValueError: The prompts have no token, do not fit the model's positions, or are invalid.

    Example:
        >>> jc.hidden_states(params, prompts, last=True).shape
        (5, 2, 128)
    """
    check_room(params, prompts)
    positions = positions_of(prompts)
    read = Read(Site("resid_post", 0, "last" if last else "all"), tuple(range(params.config.layers + 1)))
    h, hook = enter(params, prompts.tokens, positions, hook_of(params, positions, reads=[read]))
    return run_blocks(params, h, positions, hook=hook)[2][0]


@compiled()
def prefill(
    params: LanguageModel, prompts: Prompts, *, past: Sequence[KVCache] = (), edits: Sequence[Edit] = ()
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads prompts, so that `decode` or `score` can continue from there.

    Args:
        params: The model, or a network (without edits).
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        past: Key/value caches of earlier tokens: one row for each prompt, or one row that all share.
        edits: Edits of the model's states. Blocks below an edit keep the keys and values of the unedited stream. Blocks
            above it compute theirs from the edited stream, and decoding attends to those.

    Returns:
        Logits after the last token [B, V], and the prompts' keys and values.

    Raises:
        ValueError: The prompts have no token, do not fit the model's positions, or are invalid; an edit is invalid; `past` is
            of another model or has other rows.

    Example:
        >>> logits, cache = jc.prefill(params, prompts)
        >>> logits.shape, cache.positions.shape
        ((2, 256), (2, 3))
    """
    check_room(params, prompts)
    positions = positions_of(prompts, past)
    attended = Attended(past, params.empty_cache(*prompts.shape))
    hook = hook_of(params, positions, edits)
    logits, cache, _ = run(params, prompts.tokens, positions, hook, attended=attended, last=True)
    assert cache is not None
    return logits[:, 0], cache.replace(positions=positions)
