"""`jaxcomm fit-map`: the map W between two models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .. import options

if TYPE_CHECKING:  # commands load nothing before they run
    from jaxcomm.agent import Agent


@dataclasses.dataclass(frozen=True)
class FitMap:
    """Fit the map W from A's layers into B's, in closed form and by the paper's gradient descent. Keep one, and print
    both errors on held-out sentences and the similarity of the two spaces. With --kv: fit maps of keys and values, layer by layer.

    Example: jaxcomm fit-map --a meta-llama/Llama-3.2-3B-Instruct --b meta-llama/Llama-3.1-8B-Instruct --ks 26 --js 26 --text hub:allenai/c4:en:train:text --out maps/3b-8b
    """

    typed: ClassVar = "fit-map"

    a: options.LayeredSender
    b: options.Receiver
    text: str
    """statements:countries or statements:tip_sheets (what A reads in that game), a file with a sentence per line, FILE.jsonl or
    FILE.jsonl:FIELD, or a hub's data set, hub:NAME:CONFIG:SPLIT:FIELD."""
    out: Path
    """New folder for W; it must not exist."""
    ks: tuple[int, ...] = ()
    """A's layers."""
    js: tuple[int, ...] = ()
    """B's layers; there is a W for every k and j."""
    kv: bool = False
    """Map keys and values of all layers instead, for the protocols kv and latent (jaxcomm play --kv-map)."""
    sources: int = 8
    """kv: number of A's layers that each of B's layers is mapped from. The layers that explain most are chosen."""
    stride: int = 4
    """kv: distance between the tokens of a text that are used."""
    n: int | None = None
    """Number of sentences; default: all of a file, the paper's 3072 of other sources."""
    recipe: Literal["ridge", "gradient"] = "ridge"
    """The W to keep."""
    seed: int = 0
    """Seed of the sentences, and of the start and the order of gradient descent."""
    chat: bool = False
    """Put sentences through each tokenizer's chat template instead of reading them raw."""
    chat_args: options.ChatArgs = ()
    dtype: options.Dtype = "auto"

    def run(self) -> None:
        """Fits the maps, saves one of them, and prints the errors.

        Raises:
            ValueError: An agent, a layer or the text is invalid.
            OSError: A file or checkpoint does not exist, or the new folder exists or cannot be written.
        """
        import jax
        import rich

        from jaxcomm.mapping import fit_maps, similarity, train_maps

        from .. import maps
        from ..agents import load_agents, template_args
        from ..files import check_new
        from ..sentences import read_both, sentences

        check_new(self.out)
        if self.kv != (not self.ks and not self.js) or len({not self.ks, not self.js}) > 1:
            raise ValueError("give --ks and --js, the layers that W maps between, or --kv, which maps all of them")
        text = sentences(self.text, self.n, seed=self.seed)
        told: dict[str, Any] = dict(dtype=self.dtype, chat=self.chat, chat_args=template_args(self.chat_args))
        a, b = load_agents(self.a, self.b, layers=True, **told)
        if self.kv:
            self._fit_kv(a, b, text)
            return
        at = dict(ks=self.ks, js=self.js)
        on = lambda function, **more: function(a.params, b.params, read_both(a, b, text), **at, **more)
        fits = {"ridge": on(fit_maps), "gradient": on(train_maps, key=jax.random.key(self.seed))}
        how = dict(at, recipe=self.recipe, text=self.text, seed=self.seed)
        maps.save(self.out, maps.Fitted.of(fits[self.recipe], text, **how), a, b)
        title = f"W, {a.name} -> {b.name}, {len(text)} sentences of {self.text}"
        maps.show(title, **at, fits=fits, alike=on(similarity))
        rich.print(f"{self.out}: W by {self.recipe}.")

    def _fit_kv(self, a: Agent, b: Agent, text: list[str]) -> None:
        """Fits, saves and prints the maps of keys and values."""
        import rich

        from jaxcomm.kv_mapping import fit_kv_maps

        from .. import maps
        from ..sentences import read_aligned

        found = fit_kv_maps(a.single, b.single, read_aligned(a, b, text), sources=self.sources, stride=self.stride)
        maps.save(self.out, maps.FittedKV.of(found, text, stride=self.stride, text=self.text, seed=self.seed), a, b)
        title = f"Keys and values, {a.name} -> {b.name}, {len(text)} sentences of {self.text}"
        maps.show_kv(title, found, maps.cosines(found, a, b, text))
        rich.print(f"{self.out}: maps of keys and values.")
