"""What a user calls to read prompts: `prefix` and `suffix`, `forward`, `run_with_cache`, `hidden_states`, `prefill`.

prefix(params, prompts, k) = h[k];  suffix(params, h[k], k) = logits;  forward is both
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomm.cache import KVCache
from jaxcomm.compiled import compiled
from jaxcomm.config import AnyArray
from jaxcomm.edits import Edit, Read, hook_of
from jaxcomm.model import (
    Attended,
    LanguageModel,
    Params,
    check_room,
    embed,
    enter,
    positions_of,
    run,
    run_blocks,
    unembed,
)
from jaxcomm.prompts import Prompts
from jaxcomm.sites import SITES, Site


@compiled(layers={"k": "params"})
def prefix(params: Params, prompts: Prompts, k: Any, *, past: tuple[KVCache, ...] = ()) -> Float[Array, "B P D"]:
    """h[k]: the embedding and blocks 1 .. k.

    Args:
        params: The model.
        prompts: What it reads: `Prompts`, or tokens [B, P] without padding.
        k: 0 .. L, an int or traced.
        past: Caches of what stands before, of every row or of one that all share.

    Returns:
        The stream after block k, [B, P, D].

    Raises:
        ValueError: k out of range, no or too many tokens, invalid prompts.

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
    """Logits from h[k]: blocks k + 1 .. L, final norm, head.

    Args:
        params: The model.
        h: What `prefix` returned, or what was made of it.
        k: 0 .. L, an int or traced.
        mask: False on padding.

    Returns:
        Logits of every position, float32.

    Raises:
        ValueError: k out of range, a mask of another shape.
    """
    return _suffix(params, Prompts(h, mask), k)


@compiled(layers={"k": "params"})
def _suffix(params: Params, prompts: Prompts, k: Any) -> Float[Array, "B P V"]:
    check_room(params, prompts)
    return unembed(params, run_blocks(params, jnp.asarray(prompts.tokens), positions_of(prompts), (k, None))[0])


@compiled()
def forward(params: LanguageModel, prompts: Prompts, *, edits: Sequence[Edit] = ()) -> Float[Array, "B P V"]:
    """Logits of every position.

    Args:
        params: The model, or a network (without edits).
        prompts: What it reads.
        edits: What is changed on the way (`jaxcomm.edits`).

    Returns:
        Logits [B, P, V], float32.

    Raises:
        ValueError: No or too many tokens, invalid prompts or edits.
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
    """Logits of every position, and the activations that are asked for; no others are kept (TransformerLens' `run_with_cache`).

    Args:
        params: The model.
        prompts: What it reads.
        sites: Names of sites, or a `Site` for some positions or heads (its layer is the one that is read).
        layers: Which layers of the sites that are named; default: all they have.
        edits: What is changed on the way; a site is read as it was left.

    Returns:
        Logits [B, P, V], and a dict: name -> [layers, B, P, ...], 0 on padding; of a site without layers [B, P, ...], of a
        `Site` [B, n, ...] (`sites.read_at`).

    Raises:
        ValueError: No such site, a layer or position out of range, invalid prompts or edits.

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
    """What is kept of a site that is named (of all its layers, or of these), or of a `Site`."""
    if isinstance(site, Site):
        return Read(site, (site.layer,))
    if not SITES[site].layered:
        return Read(Site(site), (None,))
    first = 0 if site == "resid_post" else 1
    layers = tuple(range(first, params.config.layers + 1)) if layers is None else tuple(layers)
    return Read(Site(site, layers[0]), layers)


@compiled(static=("last",))
def hidden_states(params: Params, prompts: Prompts, *, last: bool = False) -> Array:
    """Every layer's stream, the embedding's first: `run_with_cache` of resid_post, without logits.

    Args:
        params: The model.
        prompts: What it reads.
        last: Only each row's last token; the rest is never stored.

    Returns:
        h[0] .. h[L] as [L + 1, B, P, D], 0 on padding, or [L + 1, B, D].

    Raises:
        ValueError: No or too many tokens, invalid prompts.
    """
    check_room(params, prompts)
    positions = positions_of(prompts)
    read = Read(Site("resid_post", 0, "last" if last else "all"), tuple(range(params.config.layers + 1)))
    h, hook = enter(params, prompts.tokens, positions, hook_of(params, positions, reads=[read]))
    return run_blocks(params, h, positions, hook=hook)[2][0]


@compiled()
def prefill(
    params: LanguageModel, prompts: Prompts, *, past: tuple[KVCache, ...] = (), edits: Sequence[Edit] = ()
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads prompts, to go on from.

    Args:
        params: The model, or a network (without edits).
        prompts: What it reads.
        past: Caches of what stands before, of every row or of one that all share.
        edits: What is changed on the way. Blocks before an edit keep the keys and values of the stream as it was; the later
            ones make theirs from the edited one, and decoding reads those.

    Returns:
        Logits after the last token [B, V], and the prompts' keys and values.

    Raises:
        ValueError: No or too many tokens, invalid prompts or edits.
    """
    check_room(params, prompts)
    positions = positions_of(prompts, past)
    attended = Attended(past, params.empty_cache(*prompts.shape))
    hook = hook_of(params, positions, edits)
    logits, cache, _ = run(params, prompts.tokens, positions, hook, attended=attended, last=True)
    assert cache is not None
    return logits[:, 0], cache.replace(positions=positions)
