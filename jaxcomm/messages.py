"""Messages that one model sends to another. A message is a value: it can be printed, saved and sent.

    read       send(params, prompts, site), send_cache(params, prompts) -> Message
    deliver    sharding.deliver(message, params_b), or save and load; if others could change it on the way, call
               message.sign(key) and message.verify(key)
    receive    receive(message, site, graft) -> Edit, for generate, forward and every function that takes `edits`;
               receive_cache(message, params_b) -> KVCache, for `past`

One format holds states at a site, expected embeddings (CIPHER), keys and values, and text. A message knows which model
it is from. Another model accepts it only through a map W, because without a map the numbers have no defined meaning
there. (`communicate` does not check this: it follows the paper's rule for models of unequal width.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxcomm.cache import Attended, DeltaState, KVCache
from jaxcomm.compiled import UNTRACED, check_cache, compiled, trace_state
from jaxcomm.config import AnyArray
from jaxcomm.edits import Edit, Graft, Read, as_graft, hook_of, is_number
from jaxcomm.fingerprint import identity
from jaxcomm.language_model import check_room, positions_of
from jaxcomm.model import Params, enter, run, run_blocks
from jaxcomm.prompts import Prompts, as_prompts, known
from jaxcomm.reading import prefill
from jaxcomm.sites import Site, as_site, columns_of

FORMAT = "jaxcomm.message.1"


class Message(struct.PyTreeNode):
    """The messages that one model sends to another, for B prompts.

    Attributes:
        states: States of one position [B, ...], or of n positions [B, n, ...], 0 where a row has fewer; or the keys and
            values of every token (`send_cache`). None: the message is text only.
        valid: Whether each state of a row is present, [B, n]. None: every row has all n.
        site: Where the states were read. `embed` for the expected embeddings of CIPHER.
        sender: Identity of the model that produced the states (`fingerprint.identity`). None: it is not checked.
        text: One text for each prompt, if the message says something in words.
        note: Free text to keep with the message.
        mac: Signature of all the fields above (`sign`). None: the message is not signed.

    Example:
        >>> message = jc.send(params, prompts, jc.Site("resid_post", 3, "last"))
        >>> message.states.shape, message.bytes
        ((2, 128), 1024)
    """

    states: Float[AnyArray, "B *n"] | KVCache | None = None
    valid: Bool[AnyArray, "B n"] | None = None
    site: Site | None = None
    sender: str | None = struct.field(pytree_node=False, default=None)
    text: tuple[str, ...] | None = struct.field(pytree_node=False, default=None)
    note: str = struct.field(pytree_node=False, default="")
    mac: str | None = struct.field(pytree_node=False, default=None)

    def __len__(self) -> int:
        """Number of prompts."""
        if isinstance(self.states, KVCache):
            return len(self.states.positions)
        return len(self.text or ()) if self.states is None else len(self.states)

    @property
    def bytes(self) -> int:
        """Number of bytes to send: states without padding, keys and values that some layer sees, or UTF-8 text."""
        if self.states is None:
            return sum(len(text.encode()) for text in self.text or ())
        if isinstance(self.states, KVCache):
            return int(self.states.bytes.sum())
        size, there = self.states.nbytes, np.ones(1) if self.valid is None else np.asarray(self.valid)
        return round(size * float(there.mean()))

    @property
    def single(self) -> bool:
        """Whether each row has one state. The states then have no axis of positions."""
        at_one = self.site is not None and self.site.single
        return self.valid is None and (at_one or np.ndim(self.states) == 2)  # pyright: ignore[reportArgumentType]

    @property
    def norms(self) -> Array:
        """Euclidean length of every state over all axes of one token, [B] or [B, n].

        Raises:
            ValueError: The message holds no states.
        """
        wide = jnp.asarray(self.state_array(), jnp.float32)
        first = 1 if self.single else 2
        return jnp.sqrt(jnp.sum(wide**2, axis=tuple(range(first, wide.ndim))))

    def state_array(self) -> AnyArray:
        """Returns the states as an array that an edit can use.

        Returns:
            The states [B, ...] or [B, n, ...].

        Raises:
            ValueError: The message holds keys and values, or only text.
        """
        if isinstance(self.states, KVCache):
            raise ValueError("this message holds keys and values: take it with receive_cache, not at a site")
        if self.states is None:
            raise ValueError("this message holds text: put it into the receiver's prompt, not at a site")
        return self.states

    def __repr__(self) -> str:
        told = []
        if self.site is not None:
            layer = "" if self.site.layer is None else f" {self.site.layer}"
            told.append(f"{self.site.name}{layer} at {self.site.positions}")
        if isinstance(self.states, KVCache):
            leaf = next((leaf for leaf in jax.tree.leaves(self.states.k) if leaf.size), jnp.zeros(0))
            told.append(f"keys and values, {leaf.dtype}{list(leaf.shape)} each")
            if count := sum(state is not None for state in self.states.states):
                told.append(f"states of {count} layers with linear attention")
        elif self.states is not None:
            told.append(f"{self.states.dtype}{list(self.states.shape)}")
            if known(self.states) is not None and (norms := known(self.norms)) is not None and norms.size:
                told.append(f"norm {norms.min():.1f} to {norms.max():.1f}")
        told += [repr(text[:60]) for text in (self.text or ())[:3]]
        signed = "" if self.mac is None else ", signed"
        return f"Message({', '.join(told)}, from {self.sender or 'an unknown sender'}{signed})"

    def take(self, rows: Any) -> Message:
        """Selects the messages for some of the prompts, in any order.

        Args:
            rows: Their indices.

        Returns:
            A message for the selected prompts.
        """
        rows = np.asarray(rows)
        pick = lambda a: None if a is None else jnp.asarray(a)[rows]
        states, site, text = self.states, self.site, self.text
        if isinstance(states, KVCache):
            states = states.take(rows)
        elif states is not None:
            states = pick(states)
        if site is not None and hasattr(positions := site.positions, "dtype") and np.ndim(positions):  # pyright: ignore[reportArgumentType]
            site = dataclasses.replace(site, positions=pick(positions))
        text = None if text is None else tuple(text[i] for i in rows.tolist())
        return self.replace(states=states, valid=pick(self.valid), site=site, text=text, mac=None)

    def anonymous(self) -> Message:
        """Removes everything but the states: sender, signature, site, text and note. Any model accepts it, by the rule for unequal
        widths.

        Returns:
            A message with the same states.
        """
        return Message(self.states, self.valid)

    def check_fits(self, params: Any, change: Any) -> None:
        """Checks that a model can receive the message: it sent the message itself, or `change` has a map W.

        Args:
            params: The receiver.
            change: The change that uses the message.

        Raises:
            ValueError: The message is from another model, and `change` is not a `Graft` with a map; it holds no states.
        """
        width = self.state_array().shape[-1]
        if self.sender is None or (isinstance(change, Graft) and change.W is not None):
            return
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
            return
        if (own := identity(params)) != self.sender:
            raise ValueError(
                f"this message of width {width} is from model {self.sender}, the receiver is {own}, of width "
                f"{params.config.width}: give a map (Graft(f, W)), or send message.anonymous() to try it as it is"
            )

    def save(self, path: str | Path) -> None:
        """Writes the message to a safetensors file.

        The file's header records where the states were read and which model they are from.

        Args:
            path: Path of the file. An existing file is replaced atomically.
        """
        from safetensors.flax import save_file

        arrays, about = self._parts()
        part = Path(f"{path}.part")
        save_file(arrays, part, metadata={"format": FORMAT, "about": _as_json(about | {"mac": self.mac})})
        os.replace(part, path)

    def _parts(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Everything in the message except the signature: arrays by name, and JSON values. `save` and `sign` use it."""
        arrays: dict[str, Any] = {"valid": self.valid}
        if isinstance(self.states, KVCache):
            cache, kept = self.states, slice(None)
            if cache.seen is not None:  # layers that see nothing are not sent
                kept = np.flatnonzero(np.asarray(cache.seen).any(axis=(1, 2)))
            for name, x in (("k", _stacked(cache.k)), ("v", _stacked(cache.v))):
                if isinstance(x, tuple):  # layers of unlike shapes, of which all are sent
                    arrays |= {f"{name}.{n}": leaf for n, leaf in enumerate(x)}
                else:
                    arrays[name] = jnp.asarray(x)[kept]
            arrays |= {
                f"state.{n}.{name}": leaf
                for n, one in enumerate(cache.states)
                if one
                for name, leaf in one._asdict().items()
            }
            arrays["columns"] = cache.positions
            arrays |= {"seen": cache.seen, "begin": cache.begin, "back": cache.back, "gate": cache.gate}
        else:
            arrays |= {"states": self.states}
        about: dict[str, Any] = {"sender": self.sender, "text": self.text, "note": self.note, "site": None}
        if (site := self.site) is not None:
            at = site.positions
            fixed = {"slice": [at.start, at.stop, at.step]} if isinstance(at, slice) else {"fixed": at}
            if hasattr(at, "dtype"):
                arrays, fixed = arrays | {"positions": at}, {}
            about["site"] = {"name": site.name, "layer": site.layer, "heads": site.heads, **fixed}
        return {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}, about

    def sign(self, key: bytes) -> Message:
        """Signs the message with HMAC-SHA256 over all its fields.

        Anyone who has the key can call `verify` to check that a holder of the key signed exactly this message.
        docs/security.md says what this protects against and what it does not.

        Args:
            key: A secret that sender and receiver share, such as `secrets.token_bytes(32)`.

        Returns:
            The same message with a signature. It survives `save` and `deliver`; any change makes it void.

        Raises:
            ValueError: The key is empty; the message is being computed (under your own jit).

        Example:
            >>> message = jc.send(params, prompts, 3).sign(b"a secret of ours")
            >>> len(message.mac), message.anonymous().mac
            (64, None)
        """
        return self.replace(mac=self._mac(key))

    def verify(self, key: bytes) -> Message:
        """Checks the signature of a message that has arrived.

        Args:
            key: The secret that the message was signed with.

        Returns:
            The message, ready for `receive` or `receive_cache`.

        Raises:
            ValueError: The message is not signed; it was signed with another key, or changed since; the key is empty;
                the message is being computed (under your own jit).

        Example:
            >>> message = jc.send(params, prompts, 3).sign(b"a secret of ours")
            >>> edit = jc.receive(message.verify(b"a secret of ours"), 1)
            >>> jc.generate(params, prompts, edits=[edit], max_new_tokens=2).tokens.shape
            (2, 2)
        """
        found = self._mac(key)
        if self.mac is None:
            raise ValueError("this message is not signed: ask the sender for message.sign(key)")
        # ascii: a file may hold any string as its signature, and compare_digest accepts ASCII strings only.
        if not hmac.compare_digest(ascii(self.mac), ascii(found)):
            raise ValueError(
                f"the signature of this message (sender {self.sender!r}) does not match: it was changed since it was "
                "signed, or signed with another key; do not use it, ask for it again"
            )
        return self

    def _mac(self, key: bytes) -> str:
        """HMAC over the format's name, the JSON values, and each array's name, dtype, shape and bytes, with all lengths."""
        if not key:
            raise ValueError("the key is empty: share a secret, such as secrets.token_bytes(32)")
        if trace_state() != UNTRACED:
            raise ValueError("a message has no values yet under jit, grad or vmap: sign and verify it outside of them")
        arrays, about = self._parts()
        parts = [FORMAT.encode(), _as_json(about).encode()]
        for name, array in sorted(arrays.items()):
            parts += [name.encode(), array.dtype.name.encode(), repr(array.shape).encode(), np.asarray(array).tobytes()]
        digest = hmac.new(key, digestmod=hashlib.sha256)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
        return digest.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Message:
        """Reads a message that `save` wrote.

        Args:
            path: Path of the file.

        Returns:
            The message.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a message, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such message")
        try:
            with safe_open(path, framework="flax") as file:
                header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        try:
            if header["format"] != FORMAT:
                raise ValueError(header["format"])
            about = json.loads(header["about"])
            states = arrays.get("states")
            if "columns" in arrays:
                states = _cache_of(arrays)
            text = None if about["text"] is None else tuple(about["text"])
            site = None if about["site"] is None else _site_of(about["site"], arrays.get("positions"))
            return cls(states, arrays.get("valid"), site, about["sender"], text, about["note"], about.get("mac"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a message ({FORMAT}): write one with Message.save") from error


def _stacked(layers: Any) -> Any:
    """Keys or values of all layers as one array, unless their shapes differ."""
    return jnp.stack(layers) if isinstance(layers, tuple) and len({x.shape for x in layers}) == 1 else layers


def _cache_of(arrays: dict[str, Array]) -> KVCache:
    """Rebuild a cache from the arrays that `Message.save` writes. They leave out layers that see nothing."""
    seen = arrays.get("seen")
    if "k" not in arrays:  # layers of unlike shapes
        numbers = range(sum(name.startswith("k.") for name in arrays))
        k, v = (tuple(arrays[f"{name}.{n}"] for n in numbers) for name in "kv")
        about = seen, arrays.get("begin"), arrays.get("back"), arrays.get("gate")
        states = tuple(
            DeltaState(*(arrays[f"state.{n}.{name}"] for name in DeltaState._fields))
            if f"state.{n}.memory" in arrays
            else None
            for n in numbers
        )
        return KVCache(k, v, arrays["columns"], *about, states=states if any(states) else ())
    k, v = arrays["k"], arrays["v"]
    if seen is not None:
        kept = np.flatnonzero(np.asarray(seen).any(axis=(1, 2)))
        k, v = (jnp.zeros((len(seen), *x.shape[1:]), x.dtype).at[kept].set(x) for x in (k, v))
    return KVCache(k, v, arrays["columns"], seen, arrays.get("begin"), arrays.get("back"), arrays.get("gate"))


def _as_json(about: dict[str, Any]) -> str:
    return json.dumps(about, default=int, sort_keys=True)


def _site_of(told: dict[str, Any], positions: AnyArray | None) -> Site:
    """Rebuild a site from the record that `Message.save` writes. positions: the site's positions, if they are an array."""
    fixed = slice(*told["slice"]) if "slice" in told else positions if positions is not None else told["fixed"]
    return Site(
        told["name"], told["layer"], fixed, tuple(told["heads"]) if isinstance(told["heads"], list) else told["heads"]
    )


def send(
    params: Params,
    prompts: Prompts | AnyArray,
    site: Any,
    *,
    past: Sequence[KVCache] = (),
    edits: Sequence[Edit] = (),
) -> Message:
    """Reads prompts up to a site, and makes a message of the activation there. Later layers are not computed.

    Args:
        params: The sender.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        site: Which activation, at which positions. An int k means the residual stream after layer k, at the last token.
        past: Caches of what the model read before the prompts. They are not changed.
        edits: Edits of the model's states.

    Returns:
        The message, with the sender's identity. (Inside your own jit the identity is left out.)

    Raises:
        ValueError: There is no such site; a layer or position is out of range; the prompts or an edit are invalid.

    Example:
        >>> jc.send(params, prompts, 3).states.shape
        (2, 128)
    """
    message = read_message(params, as_prompts(prompts), site=site, past=past, edits=edits)
    return message if trace_state() != UNTRACED else message.replace(site=as_site(site), sender=identity(params))


@compiled()
def read_message(
    params: Params, prompts: Prompts, *, site: Site, past: Sequence[KVCache] = (), edits: Sequence[Edit] = ()
) -> Message:
    """`send` as one compiled program, without the sender's identity."""
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
    """Makes the edit that puts a message into the receiver.

    Args:
        message: A message, or an array of states.
        site: Where the message goes. An int j means the residual stream after layer j, at the last token. If the message
            has several tokens, they are aligned with the site's tokens at their ends.
        graft: "sum", "mean", "replace", a function f(a, b), or `Graft(f, W)` with a map.

    Returns:
        The edit, for `generate`, `forward` and every function that takes `edits`.

    Raises:
        ValueError: There is no such site, or no such graft.

    Example:
        >>> message = jc.send(params, prompts, 3)
        >>> jc.generate(params, prompts, edits=[jc.receive(message, 1, "sum")], max_new_tokens=2).tokens.shape
        (2, 2)
    """
    return Edit(as_site(site), as_graft(graft), message)


def send_cache(params: Params, prompts: Prompts | AnyArray, *, past: Sequence[KVCache] = ()) -> Message:
    """Reads prompts, and makes a message of their keys and values in every layer.

    Args:
        params: The sender.
        prompts: Its prompts: `Prompts`, or tokens [B, P] without padding.
        past: Caches of what the model read before the prompts. They are not changed.

    Returns:
        The message, with the sender's identity. (Inside your own jit the identity is left out.)

    Raises:
        ValueError: The prompts have no token, do not fit the model's positions, or are invalid.

    Example:
        >>> told = jc.send_cache(params, prompts)
        >>> jc.generate(params, prompts, past=[jc.receive_cache(told, params)], max_new_tokens=2).tokens.shape
        (2, 2)
    """
    cache = prefill(params, as_prompts(prompts), past=past)[1]
    message = Message(cache.replace(k=_stacked(cache.k), v=_stacked(cache.v)))
    return message if trace_state() != UNTRACED else message.replace(sender=identity(params))


def receive_cache(message: Message, params: Params) -> KVCache:
    """Takes the keys and values out of a message. With them the receiver continues as if it had read the sender's prompt.

    Args:
        message: Result of `send_cache`.
        params: The receiver.

    Returns:
        The cache, for `past` of `prefill`, `decode` and `generate`.

    Raises:
        ValueError: The message holds no keys and values; they are from another model.

    Example:
        >>> told = jc.send_cache(params, prompts)
        >>> jc.receive_cache(told, params).positions.shape
        (2, 3)
    """
    if not isinstance(cache := message.states, KVCache):
        raise ValueError("this message holds no keys and values: make it with send_cache")
    if message.sender not in (None, own := identity(params)):
        raise ValueError(
            f"these keys and values are from model {message.sender}, the receiver is {own}: send from the same model, or map them (fit_kv_maps)"
        )
    check_cache(params, cache)
    return cache
