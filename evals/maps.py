"""Save and load maps: an Orbax checkpoint with a record of the two models that it belongs to.

    maps/    W [K, J, D_B, D_A] and the held-out errors [K, J]; or maps of keys and values
    about/   JSON: layers, recipe, text and its hash, seed, the models' fingerprints, versions

Orbax writes to a temporary folder and renames it at the end. So a folder with this name is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from jaxcomm.agent import Agent
from jaxcomm.fingerprint import fingerprint, identity
from jaxcomm.kv_mapping import KVMaps, LayerMaps, attention_cosine, map_cache
from jaxcomm.mapping import HELD_OUT, Maps, Similarity
from jaxcomm.reading import prefill

from .files import check_new
from .runs import surroundings

PROBE = "Read this: 1, 2."
"""A text that is tokenized to identify how an agent reads: its tokenizer and chat template."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Maps W from layers of A to layers of B, with the settings of the fit.

    Attributes:
        W: The maps [K, J, D_B, D_A], one matrix for each pair of layers (k, j).
        error: Error [K, J] on held-out sentences, as in `jaxcomm.Maps`. It has no unit.
        ks: The layers of A.
        js: The layers of B.
        recipe: "ridge" (`jaxcomm.fit_maps`) or "gradient" (`jaxcomm.train_maps`).
        text: Source of the sentences (`evals.sentences`).
        seed: Random seed for the choice of sentences, and for the recipe.
        sentences: Number of sentences.
        sha256: SHA-256 of the sentences, one per line.
    """

    W: np.ndarray
    error: np.ndarray
    ks: Sequence[int]
    js: Sequence[int]
    recipe: str
    text: str
    seed: int
    sentences: int
    sha256: str

    @classmethod
    def of(cls, maps: Maps, sentences: Sequence[str], **how: Any) -> Fitted:
        """Combines maps with the settings of the fit.

        Args:
            maps: The maps.
            sentences: The sentences.
            **how: The fields ks, js, recipe, text and seed.

        Returns:
            The maps with these settings.
        """
        digest = _digest(sentences)
        return cls(np.asarray(maps.W), np.asarray(maps.error), sentences=len(sentences), sha256=digest, **how)

    def at(self, k: int, j: int) -> np.ndarray:
        """Selects one map.

        Args:
            k: Layer of A.
            j: Layer of B.

        Returns:
            W [D_B, D_A] from h_A[k] to h_B[j].

        Raises:
            ValueError: There is no map for these layers.
        """
        if k not in self.ks or j not in self.js:
            listed = lambda layers: ", ".join(map(str, layers))
            raise ValueError(
                f"there is no W for k = {k}, j = {j}: it was fitted for k = {listed(self.ks)} and j = {listed(self.js)}"
            )
        return self.W[self.ks.index(k), self.js.index(j)]


@dataclasses.dataclass(frozen=True)
class FittedKV:
    """Maps of keys and values, with the settings of the fit.

    Attributes:
        maps: The maps (`jaxcomm.fit_kv_maps`).
        stride: Distance between sampled tokens.
        text: Source of the texts (`evals.sentences`).
        seed: Random seed for the choice of texts.
        sentences: Number of texts.
        sha256: SHA-256 of the texts, one per line.
    """

    maps: KVMaps
    stride: int
    text: str
    seed: int
    sentences: int
    sha256: str

    @classmethod
    def of(cls, maps: KVMaps, sentences: Sequence[str], **how: Any) -> FittedKV:
        """Combines maps with the settings of the fit, like `Fitted.of`: stride, text and seed."""
        return cls(maps, sentences=len(sentences), sha256=_digest(sentences), **how)


def save(folder: Path, fitted: Fitted | FittedKV, a: Agent, b: Agent) -> None:
    """Saves maps in a new folder.

    Args:
        folder: The folder. It must not exist.
        fitted: The maps.
        a: The sender.
        b: The receiver.

    Raises:
        OSError: The folder exists, or cannot be written.
        ValueError: It is not a local path.
    """
    import orbax.checkpoint as ocp

    check_new(folder)
    about = {f.name: getattr(fitted, f.name) for f in dataclasses.fields(fitted)}
    if isinstance(fitted, FittedKV):
        maps = about.pop("maps")
        parts = (("k", maps.k), ("v", maps.v))
        arrays = jax.device_get({f"{part}_{f.name}": getattr(of, f.name) for part, of in parts for f in _LAYERS})
    else:
        arrays = {name: about.pop(name) for name in ("W", "error")}
        about |= {"ks": list(fitted.ks), "js": list(fitted.js)}
    about |= surroundings()
    for side, agent in (("a", a), ("b", b)):
        about |= {side: agent.name, f"fingerprint_{side}": fingerprint(agent.params), f"chat_{side}": agent.chat}
        about |= {f"reads_{side}": agent.encode(PROBE)}
    items = ocp.args.Composite(maps=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute(), args=items)


def load(folder: Path, a: Agent, b: Agent) -> Fitted:
    """Loads maps that were saved for a pair of agents.

    Args:
        folder: The folder.
        a: The sender.
        b: The receiver.

    Returns:
        The maps.

    Raises:
        ValueError: The folder holds no maps, or incomplete ones. The maps belong to another pair (other weights,
            architecture or dtype), or to agents that read differently (raw or through a chat template, another
            tokenizer).
    """
    arrays, how = _read(folder, a, b, Fitted)
    return Fitted(**arrays, **how)


def load_kv(folder: Path, a: Agent, b: Agent) -> FittedKV:
    """Loads maps of keys and values, like `load` for maps of states."""
    arrays, how = _read(folder, a, b, FittedKV)
    k, v = (LayerMaps(**{f.name: jnp.asarray(arrays[f"{part}_{f.name}"]) for f in _LAYERS}) for part in "kv")
    return FittedKV(KVMaps(k, v, identity(a.single), identity(b.single)), **how)


_LAYERS = dataclasses.fields(LayerMaps)


def _digest(sentences: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()


def _read(folder: Path, a: Agent, b: Agent, kind: type[Fitted | FittedKV]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the arrays and the other fields of a folder of this kind, and check that they belong to these agents."""
    import orbax.checkpoint as ocp

    def read(**items: Any) -> Any:
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                return checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**items))
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no maps, or incomplete ones: make them with jaxcomm fit-map") from error

    about = read(about=ocp.args.JsonRestore())["about"]
    if ("stride" in about) != (kind is FittedKV):
        found, wanted = ("keys and values", "states") if "stride" in about else ("states", "keys and values")
        raise ValueError(f"{folder} holds maps of {found}, not of {wanted}: name another folder")
    others = [
        f"{side} was {about[side]} ({about[f'fingerprint_{side}']}), here it is {agent.name} ({found})"
        for side, agent in (("a", a), ("b", b))
        if (found := fingerprint(agent.params)) != about[f"fingerprint_{side}"]
    ]
    if others:
        raise ValueError(f"{folder} was fitted for another pair (weights, architecture or dtype): {'; '.join(others)}")
    for side, agent in (("a", a), ("b", b)):
        if agent.chat != about[f"chat_{side}"]:
            was, mend = ("through its chat template", "add") if about[f"chat_{side}"] else ("raw", "leave out")
            raise ValueError(f"{folder} was fitted on text that {side} read {was}: {mend} --chat, or fit another map")
        if about.get(f"reads_{side}", found := agent.encode(PROBE)) != found:
            raise ValueError(
                f"{folder} was fitted with another tokenizer or chat template of {side}, which reads {PROBE!r} as other tokens: fit another map"
            )
    how = {f.name: about[f.name] for f in dataclasses.fields(kind) if f.name in about}
    return read(maps=ocp.args.PyTreeRestore())["maps"], how


def show(title: str, ks: Sequence[int], js: Sequence[int], fits: Mapping[str, Maps], alike: Similarity) -> None:
    """Prints the held-out error of every recipe, and the similarity of the two spaces, for every pair of layers.

    Args:
        title: Title of the table.
        ks: Layers of A.
        js: Layers of B.
        fits: The maps of each recipe.
        alike: The similarity of the spaces (`jaxcomm.mapping.similarity`).
    """
    table = rich.table.Table(title=title, title_justify="left")
    errors = {f"error, {recipe}": np.asarray(maps.error) for recipe, maps in fits.items()}
    columns = {**errors, "similarity (B.4)": np.asarray(alike.activation), "CKA": np.asarray(alike.cka)}
    for name in ("k", "j", *columns):
        table.add_column(name, justify="right")
    for i, k in enumerate(ks):
        for n, j in enumerate(js):
            table.add_row(str(k), str(j), *(f"{values[i, n]:.3f}" for values in columns.values()))
    console = rich.console.Console(width=None if sys.stdout.isatty() else 112)
    console.print(table)
    console.print(
        f"error: as a share of the mean square of h_B[j], on every {HELD_OUT}th sentence; W is fitted without these.",
        markup=False,
    )


def cosines(maps: KVMaps, a: Agent, b: Agent, sentences: Sequence[str], most: int = 40) -> np.ndarray:
    """Compares B's attention to mapped and to its own keys and values, on held-out texts (`jaxcomm.attention_cosine`).

    The first half of a text is the context. B reads the second half after it.

    Args:
        maps: The maps.
        a: The sender.
        b: The receiver.
        sentences: The texts that the maps were fitted on. Every tenth was held out.
        most: Largest number of texts.

    Returns:
        The cosine of each of B's layers, as a mean over the texts' tokens.
    """
    halves = [cut(text) for text in sentences[HELD_OUT - 1 :: HELD_OUT][:most]]
    contexts, questions = ([half[n] for half in halves] for n in (0, 1))
    same = a.tokenizer.get_vocab() == b.tokenizer.get_vocab()
    read = prefill(a.single, a.tokenize(contexts))[1]
    mapped = map_cache(maps, read, a.single, b.single, None if same else a.align(b, contexts))
    return np.asarray(attention_cosine(b.single, b.tokenize(contexts), b.tokenize(questions), mapped))


def cut(text: str) -> tuple[str, str]:
    """Splits a text into two halves, between words.

    Args:
        text: The text.

    Returns:
        Both halves. For a text of one word, both are the whole text.
    """
    words = text.split()
    middle = len(words) // 2
    return (" ".join(words[:middle]), " ".join(words[middle:])) if middle else (text, text)


def show_kv(title: str, maps: KVMaps, cosine: np.ndarray) -> None:
    """Prints the quality of the maps of keys and values, layer by layer.

    Args:
        title: Title of the table.
        maps: The maps.
        cosine: Result of `cosines`.
    """
    table = rich.table.Table(title=title, title_justify="left")
    for name in (
        "B's layer",
        "A's layers (keys)",
        "A's layers (values)",
        "R2, keys",
        "R2, values",
        "attention, cosine",
    ):
        table.add_column(name, justify="right")
    for n, value in enumerate(cosine):
        listed = (", ".join(str(int(x)) for x in sorted(part.sources[n])) for part in (maps.k, maps.v))
        table.add_row(str(n + 1), *listed, f"{float(maps.k.r2[n]):.3f}", f"{float(maps.v.r2[n]):.3f}", f"{value:.3f}")
    rich.console.Console().print(table)
    print(
        "R2: on held-out texts. Cosine: between what B's tokens read in one layer from mapped keys and values, and from B's own."
    )
    print("It predicts right answers better than R2 does. But another text's keys and values also have a high cosine.")
