"""What the study compares: set-ups (how a game is put to the agents), sizes, and layers."""

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
"""Number of worked examples, where there are any."""
PRIMARY = "replace"
"""The graft of the registered tests."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a game is put to both agents.

    Attributes:
        form: Whether prompts are read raw or through the chat templates.
        reads: What A reads.
        examples: Number of worked examples before B's question; before A's, too, if it reads the question.
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
        """How the game's texts are worded."""
        return Wording(self.preset, reads=self.reads)


def setups(*, chat: bool, instructed: bool, whole: bool) -> list[Setup]:
    """Lists the set-ups of the study.

    Args:
        chat: Whether both models have a chat template.
        instructed: Whether the game has an instruction on the answer's form; a game from a file has none.
        whole: Whether chats have worked examples, too (`Size.whole`).

    Returns:
        Raw and chat, statement and statement+question, without and with worked examples; last, KVComm's wording, in which
        it found that activations carry nothing. In a chat the question has an instruction on the answer's form, where
        the game has one.

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
    """How much is run.

    Attributes:
        items: Number of items of each half; None: the paper's numbers, 100 (countries) and 70 (tip_sheets).
        games: The games.
        layers: Number of layers of each model at which replace is looked at. None: all of them.
        others: Number of layers at which sum, mean and W are. 0: they are left out.
        whole: Whether chats have worked examples, too, and everything beside the activation is played: channels, controls,
            other sites.
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
"""quick: ten minutes for a model of 135 million parameters on two cores. full: a night."""
CONTROLS = ("generated", "mean", "moments", "noise", "zero", "adversarial", "self", "equal-flops", "equal-bytes")
"""Controls of the activation, beside another item's message."""


def channels(setup: Setup, same_shape: bool) -> dict[str, dict[str, Any]]:
    """Lists what is played beside the activation.

    Args:
        setup: The set-up.
        same_shape: Whether A's keys and values fit B (`measure.same_shape`).

    Returns:
        By protocol, its settings. In a chat, A is asked to write a message; raw, it goes on from what it read.
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
        Their numbers, ascending, the last layer among them.

    Example:
        >>> spread(30, 6), spread(4, 6)
        ((5, 10, 15, 20, 25, 30), (1, 2, 3, 4))
    """
    n = count if n is None else min(n, count)
    return tuple(sorted({round(count * (i + 1) / n) for i in range(n)}))


def halves(n: int) -> tuple[Sequence[int], Sequence[int]]:
    """Parts the items of a draw.

    Args:
        n: Number of items.

    Returns:
        Indices of those on which layers are chosen, and of those that are reported.
    """
    return range(n // 2), range(n // 2, n)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A way to graft, at the layers that were chosen for it.

    Attributes:
        operator: "replace", "sum", "mean", "W, statements", "W, text", "attn_out", "mlp_out", "entity".
        rule: What the layers were chosen by: "content" or "likelihood" (`analysis.RULES`).
        k: Layer of A.
        j: Layer of B.
    """

    operator: str
    rule: str
    k: int
    j: int

    @property
    def label(self) -> str:
        """Its name in tables. Cells of the same layers have the same, whatever they were chosen by."""
        return f"{self.operator}, k {self.k}, j {self.j}"


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One game in one set-up: what was measured.

    Attributes:
        game: The game, all items of both halves.
        setup: The set-up.
        layers: By operator, the layers of A and of B that were looked at.
        maps: By operator, what `measure.layer_maps` found for it: arrays [K, J, items of the first half], and "alone".
        cells: The layers that were chosen on the first half.
        scores: By condition, its scores on the second half, [items] (`measure.SCORES`).
    """

    game: Game
    setup: Setup
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    maps: Mapping[str, Mapping[str, np.ndarray]]
    cells: tuple[Cell, ...]
    scores: Mapping[str, Mapping[str, np.ndarray]]
