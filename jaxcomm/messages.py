"""Messages: what one model reads out of itself for another, as a value that can be printed, saved and sent.

    read       send(params, prompts, site) -> Message
    deliver    sharding.deliver(message, params_b), or save and load
    receive    receive(message, site, graft) -> Edit, for generate, forward and all that take edits

A message knows the model it is from. Another model takes it only through a map W, as nothing else says what its numbers
mean there. (`communicate` follows the paper's rule for unequal models, which asks nothing.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer
from jaxtyping import Array

from jaxcomm.cache import KVCache
from jaxcomm.compiled import UNTRACED, compiled, trace_state
from jaxcomm.config import AnyArray
from jaxcomm.edits import Edit, Graft, Read, as_graft, hook_of, is_number
from jaxcomm.fingerprint import identity
from jaxcomm.model import Attended, Params, check_room, enter, positions_of, run, run_blocks
from jaxcomm.prompts import Prompts, as_prompts, known
from jaxcomm.sites import Site, as_site, columns_of

FORMAT = "jaxcomm.message.1"


class Message(struct.PyTreeNode):
    """What a model held at one site of its prompts.

    Attributes:
        states: [B, ...] of a single position, else [B, n, ...], 0 where a row has fewer.
        valid: [B, n], False there; None: nowhere.
        site: Where they were read; for embeddings that are said (CIPHER), `embed`.
        sender: `fingerprint.identity` of the model; None: nobody asks.
        note: Anything else that is to be kept with it, such as the text it is of.

    Example:
        >>> message = jc.send(params, prompts, jc.Site("resid_post", 3, "last"))
        >>> message.states.shape
        (2, 128)
    """

    states: Any
    valid: Any = None
    site: Any = None
    sender: str | None = struct.field(pytree_node=False, default=None)
    note: str = struct.field(pytree_node=False, default="")

    @property
    def norms(self) -> Array:
        """Length of every state, [B] or [B, n]: over all axes of one token."""
        wide = jnp.asarray(self.states, jnp.float32)
        first = 1 if self.valid is None and self.site is not None and self.site.single else 2
        return jnp.sqrt(jnp.sum(wide**2, axis=tuple(range(first, wide.ndim))))

    def __repr__(self) -> str:
        shape, dtype = tuple(self.states.shape), self.states.dtype
        at = (
            ""
            if self.site is None
            else f"{self.site.name} {'' if self.site.layer is None else self.site.layer} at {self.site.positions}, "
        )
        norms = known(self.norms) if known(self.states) is not None else None
        length = "" if norms is None else f", norm {norms.min():.1f} to {norms.max():.1f}"
        return f"Message({at}{dtype}{list(shape)}{length}, from {self.sender or 'nobody named'})"

    def anonymous(self) -> Message:
        """The same, from nobody in particular: any model takes it, by the rule for unequal widths (`Graft`)."""
        return Message(self.states, self.valid)

    def check_fits(self, params: Any, change: Any) -> None:
        """Raises ValueError unless a model can take it: it sent it, or there is a map W."""
        if self.sender is None or (isinstance(change, Graft) and change.W is not None):
            return
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
            return
        if (own := identity(params)) != self.sender:
            raise ValueError(
                f"this message of width {self.states.shape[-1]} is from model {self.sender}, the receiver is {own}, of width "
                f"{params.config.width}: give a map (Graft(f, W)), or send message.anonymous() to try it as it is"
            )

    def nearest(self, params: Params, count: int = 5) -> Array:
        """The tokens that a stream means most to the sender's own head (logit lens): ids [B, count], or [B, n, count]."""
        flat = jnp.asarray(self.states).reshape(-1, 1, self.states.shape[-1])
        found = jax.lax.top_k(params.logits(flat)[:, 0], count)[1]
        return found.reshape(*self.states.shape[:-1], count)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whose header says where the states were read, and whose they are."""
        from safetensors.flax import save_file

        site = self.site
        arrays = {"states": jnp.asarray(self.states)} | (
            {} if self.valid is None else {"valid": jnp.asarray(self.valid)}
        )
        where = (
            {} if site is None else {"name": site.name, "layer": site.layer if site.layer is None else int(site.layer)}
        )
        if site is not None:
            p = site.positions
            if hasattr(p, "dtype"):
                arrays["positions"] = jnp.asarray(p)
            where |= {
                "heads": site.heads,
                "positions": [p.start, p.stop, p.step] if isinstance(p, slice) else None if hasattr(p, "dtype") else p,
                "slice": isinstance(p, slice),
            }
        header = {"format": FORMAT, "site": json.dumps(where), "sender": self.sender or "", "note": self.note}
        part = Path(f"{path}.part")
        save_file(arrays, part, metadata=header)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Message:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a message, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such message")
        try:
            with safe_open(path, framework="flax") as file:
                header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if header.get("format") != FORMAT or "states" not in arrays:
            raise ValueError(f"{path} is not a message ({FORMAT}): write one with Message.save")
        where, site = json.loads(header["site"]), None
        if where:
            p = slice(*where["positions"]) if where["slice"] else arrays.get("positions", where["positions"])
            site = Site(where["name"], where["layer"], p, where["heads"])
        return cls(arrays["states"], arrays.get("valid"), site, header["sender"] or None, header["note"])


def send(
    params: Params,
    prompts: Prompts | AnyArray,
    site: Any,
    *,
    past: tuple[KVCache, ...] = (),
    edits: tuple[Edit, ...] = (),
) -> Message:
    """Reads prompts up to a site, and takes what is there for a message. What is above the site is not computed.

    Args:
        params: The sender.
        prompts: What it reads.
        site: Which activation, at which positions; a layer k means the stream after it, at the last token.
        past: Caches of what stands before (`prefix`).
        edits: What is changed on the way.

    Returns:
        The message, with the sender's identity (under your own jit without it).

    Raises:
        ValueError: No such site, a layer or position out of range, invalid prompts or edits.
    """
    message = read_message(params, as_prompts(prompts), site=site, past=past, edits=edits)
    return message if trace_state() != UNTRACED else message.replace(site=as_site(site), sender=identity(params))


@compiled()
def read_message(
    params: Params, prompts: Prompts, *, site: Site, past: tuple[KVCache, ...] = (), edits: tuple[Edit, ...] = ()
) -> Message:
    """`send`, as one program, without the sender's identity."""
    check_room(params, prompts)
    positions = positions_of(prompts, past)
    hook = hook_of(params, positions, edits, [Read(site, (site.layer,))])
    attended = Attended(past)
    if site.name == "logits":
        (states,) = run(params, prompts.tokens, positions, hook, attended=attended)[2]
    else:
        h, hook = enter(params, prompts.tokens, positions, hook)
        above = 0 if site.layer is None else site.layer
        (states,) = run_blocks(params, h, positions, (0, above), attended=attended, hook=hook)[2]
    if site.layer is not None and not is_number(site.layer):
        first = int(site.name != "resid_post")
        states = jnp.where((site.layer >= first) & (site.layer <= params.config.layers), states, jnp.nan)
    valid = None if site.single or site.numbered else columns_of(site.positions, positions).valid
    return Message(states[0], valid, site)


def receive(message: Message | AnyArray, site: Any, graft: Any = "replace") -> Edit:
    """The edit by which a receiver takes a message in.

    Args:
        message: A message, or states of one's own.
        site: Where it goes; a layer j means the stream after it, at the last token. A message from several tokens and the
            tokens of the site are aligned at their ends.
        graft: sum, mean, replace, a function f(a, b), or `Graft(f, W)` with a map.

    Returns:
        What `generate`, `forward` and the others take in `edits`.

    Example:
        >>> message = jc.send(params, prompts, 3)
        >>> jc.generate(params, prompts, edits=[jc.receive(message, 1, "sum")], max_new_tokens=2).tokens.shape
        (2, 2)
    """
    return Edit(as_site(site), as_graft(graft), message)
