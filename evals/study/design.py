"""Design of the study: set-ups (how a game is put to the agents), sizes, and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..games import Game, Wording
from ..games.wording import Reads

PREREGISTRATION = Path(__file__).with_name("preregistration.md")
SHOWN = 4
"""Number of worked examples in set-ups with examples."""
PRIMARY = "replace"
"""The graft of the registered tests."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a game is put to both agents.

    Attributes:
        form: Whether prompts are read raw or through the chat templates.
        reads: Contents of A's prompt.
        examples: Number of worked examples before B's question; also before A's if it reads the question.
        preset: A key of `games.PRESETS`.
    """

    form: Literal["raw", "chat"]
    reads: Reads
    examples: int
    preset: str = "paper"

    @property
    def name(self) -> str:
        """Its name in tables, such as "raw, statement, 4 examples"."""
        first = "KVComm's wording" if self.preset == "kvcomm" else self.form
        return f"{first}, {self.reads}, {self.examples} examples"

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.preset}-{self.form}-{self.reads.replace('+', '-')}-{self.examples}"

    @property
    def wording(self) -> Wording:
        """The wording of the game's texts."""
        return Wording(self.preset, reads=self.reads)


def setups(*, chat: bool, instructed: bool, whole: bool) -> list[Setup]:
    """Lists the set-ups of the study.

    Args:
        chat: Whether both models have a chat template.
        instructed: Whether the game has an instruction on the answer's form; a game from a file has none.
        whole: Whether chats have worked examples too (`Size.whole`).

    Returns:
        Raw and chat, statement and statement+question, without and with worked examples; last, KVComm's wording, with
        which KVComm found that activations carry nothing. In a chat the question has an instruction on the answer's form,
        if the game has one.

    Example:
        >>> [setup.name for setup in setups(chat=False, instructed=True, whole=True)][:2]
        ['raw, statement, 0 examples', 'raw, statement, 4 examples']
    """
    reads: tuple[Reads, ...] = ("statement", "statement+question")
    made = [Setup("raw", what, n) for what in reads for n in (0, SHOWN)]
    if chat:
        preset = "instructed" if instructed else "paper"
        made += [Setup("chat", what, n, preset) for what in reads for n in ((0, SHOWN) if whole else (0,))]
        made.append(Setup("chat", "statement", 0, "kvcomm"))
    return made


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a study.

    Attributes:
        items: Number of items of each half; None: the paper's numbers, 100 (countries) and 70 (tip_sheets).
        games: The games.
        layers: Number of layers of each model for the graft replace. None: all of them.
        others: Number of layers for sum, mean and W. 0: sum and mean are left out, and W is fitted only on a given text, at
            `layers`.
        whole: Whether chats have worked examples too, whether channels, controls and other sites are played, and whether B
            writes replies besides the scored choices.
    """

    items: int | None
    games: tuple[str, ...]
    layers: int | None
    others: int
    whole: bool


SIZES = {
    "quick": Size(40, ("countries",), 6, 0, False),
    "full": Size(None, ("countries", "tip_sheets"), None, 10, True),
}
"""quick: took 11 minutes for SmolLM2-135M on two busy CPU cores, with compilation. full: hours. Countries with raw prompts, 40 + 40 items and ten layers took 57 minutes on one of two busy cores."""
CONTROLS = ("generated", "mean", "moments", "noise", "zero", "adversarial", "self", "equal-flops", "equal-bytes")
"""Controls of the activation, besides another item's message."""


def channels(setup: Setup, same_shape: bool) -> dict[str, dict[str, Any]]:
    """Lists the channels to play besides the activation.

    Args:
        setup: The set-up.
        same_shape: Whether A's keys and values fit B (`measure.same_shape`).

    Returns:
        For each protocol, its settings. In a chat, A is asked to write a message; raw, it continues its prompt.
    """
    words = {"max_message_tokens": 48}
    asked = {"ask": "{prompt} Tell your partner what you know."} if setup.form == "chat" else {}
    texts = {"message": words | asked, "debate": words | {"form": "plain", "rounds": 2, "tie": "last"}}
    caches = {"kv": {"place": "turn"}, "latent": {"place": "turn", "steps": 5}}
    return texts | (caches if same_shape else {})


def spread(count: int, n: int | None) -> tuple[int, ...]:
    """Chooses layers that are evenly spaced.

    Args:
        count: Number of layers of the model.
        n: Number of layers to choose. None: all.

    Returns:
        Their numbers, ascending, including the last layer.

    Example:
        >>> spread(30, 6), spread(4, 6)
        ((5, 10, 15, 20, 25, 30), (1, 2, 3, 4))
    """
    n = count if n is None else min(n, count)
    return tuple(sorted({round(count * (i + 1) / n) for i in range(n)}))


def halves(n: int) -> tuple[Sequence[int], Sequence[int]]:
    """Splits the items of a draw in two halves.

    Args:
        n: Number of items.

    Returns:
        Indices of the items for choosing layers, and of the reported items.
    """
    return range(n // 2), range(n // 2, n)


@dataclasses.dataclass(frozen=True)
class Cell:
    """An operator at its chosen layers.

    Attributes:
        operator: "replace", "sum", "mean", "W, statements", "W, text", "attn_out", "mlp_out", "entity".
        rule: The rule that chose the layers: "content" or "likelihood" (`analysis.RULES`).
        k: Layer of A.
        j: Layer of B.
    """

    operator: str
    rule: str
    k: int
    j: int

    @property
    def label(self) -> str:
        """Its name in tables. Cells with the same layers have the same name, whatever rule chose them."""
        return f"{self.operator}, k {self.k}, j {self.j}"


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Measurements of one game in one set-up.

    Attributes:
        game: The game, with the items of both halves.
        setup: The set-up.
        layers: For each operator, the tried layers of A and of B.
        maps: For each operator, the result of `measure.layer_maps`: arrays [K, J, items of the first half].
        cells: The layers chosen on the first half.
        scores: For each condition, its scores on the second half, [items] (`measure.SCORES`).
    """

    game: Game
    setup: Setup
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    maps: Mapping[str, Mapping[str, np.ndarray]]
    cells: tuple[Cell, ...]
    scores: Mapping[str, Mapping[str, np.ndarray]]
