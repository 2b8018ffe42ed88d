"""The arms of a comparison: trained weights, number of steps, and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax

from jaxcomm import lmnet, lora
from jaxcomm.agent import Agent
from jaxcomm.config import ModelConfig
from jaxcomm.flops import Config, blocks_flops, head_flops, wires_flops
from jaxcomm.model import init_params
from jaxcomm.training import Everything

from .folders import build
from .settings import Recipe, Shape

Kind = Literal["edges", "LoRA", "all", "scratch"]
Equal = Literal["tokens", "flops"]


class Arm(NamedTuple):
    """One arm of a comparison.

    Attributes:
        kind: The trained weights. None: nothing is trained.
        equal: The budget that it shares with the edges: tokens (the same number of steps), or training FLOPs.
        name: Its name in tables and files.
    """

    kind: Kind | None
    equal: Equal
    name: str


EDGES, LORA = Arm("edges", "tokens", "edges"), Arm("LoRA", "tokens", "LoRA")
ALONE, NEW = Arm(None, "tokens", "vertex alone"), Arm(None, "tokens", "network, new")
NAMES: dict[Kind, str] = {"LoRA": "LoRA", "all": "vertex, trained on", "scratch": "larger model, from scratch"}


def arms(kinds: Sequence[Kind], equal: Sequence[Equal]) -> list[Arm]:
    """Lists the arms: untrained ones first, then trained ones, the edges last.

    Args:
        kinds: Trained arms besides the edges.
        equal: Budgets that they share with the edges.

    Returns:
        The arms.

    Example:
        >>> [arm.name for arm in arms(["LoRA"], ["tokens", "flops"])]
        ['vertex alone', 'network, new', 'LoRA', 'LoRA, equal FLOPs', 'edges']
    """
    named = lambda kind, what: NAMES[kind] + (", equal FLOPs" if what == "flops" else "")
    trained = [Arm(kind, what, named(kind, what)) for kind in NAMES if kind in kinds for what in equal]
    return [ALONE, NEW, *trained, EDGES]


@dataclasses.dataclass(frozen=True)
class Field:
    """The models and settings of all arms of a comparison.

    Attributes:
        shape: Shape of the network.
        agents: Its vertices. The last one is adapted by LoRA, and is the model that is trained further.
        recipe: How the edges are trained.
    """

    shape: Shape
    agents: Sequence[Agent]
    recipe: Recipe

    @property
    def vertex(self) -> Any:
        """The model that is compared with the network."""
        return self.agents[-1].single

    @property
    def wires(self) -> Any:
        """Shapes of the network's wires."""
        return jax.eval_shape(lambda: build(self.shape, self.agents).split()[0])

    @property
    def rank(self) -> int:
        """Rank at which LoRA has about as many parameters as the wires."""
        return lora.rank_of_size(self.vertex, lmnet.size(self.wires))

    @property
    def larger(self) -> ModelConfig:
        """The vertex's architecture with more layers, so that it has about as many parameters as the network."""
        config = self.vertex.config
        count = lambda layers: lmnet.size(
            jax.eval_shape(lambda: init_params(jax.random.key(0), dataclasses.replace(config, layers=layers)))
        )
        layer = count(2) - count(1)
        return dataclasses.replace(config, layers=config.layers + max(1, round(lmnet.size(self.wires) / layer)))

    def begin(self, arm: Arm, seed: int) -> tuple[Any, Any]:
        """Makes the trained and the frozen weights, as input of `jaxcomm.training`.

        Args:
            arm: The arm.
            seed: Random seed for new weights.

        Returns:
            Trained and frozen weights. Their join is the model that answers.
        """
        if arm.kind == "edges" or arm == NEW:
            return build(
                dataclasses.replace(self.shape, network_seed=self.shape.network_seed + seed), self.agents
            ).split()
        if arm.kind == "scratch":
            return Everything(init_params(jax.random.key(seed), self.larger)), None
        if arm.kind == "all":
            return Everything(self.vertex), None
        return lora.init_lora(jax.random.key(seed), self.vertex, self.rank), self.vertex

    def step_flops(self, arm: Arm) -> int:
        """Counts the FLOPs of a training step: three passes through trained weights, two through frozen weights.

        LoRA's gradient is computed through the full weights that it changes, so these count as trained.

        Args:
            arm: A trained arm.

        Returns:
            The FLOPs of all rows, including padding.
        """
        recipe = self.recipe
        rows, columns = recipe.rows * recipe.accumulate, recipe.columns
        whole = lambda config: rows * (blocks_flops(config, columns) + columns * head_flops(config))
        if arm.kind == "edges":
            config: Config = jax.eval_shape(lambda: build(self.shape, self.agents)).config
            assert not isinstance(config, ModelConfig)
            return 2 * whole(config) + rows * wires_flops(config, columns)
        return 3 * whole(self.larger if arm.kind == "scratch" else self.vertex.config)

    def steps(self, arm: Arm) -> int:
        """Counts the steps of an arm: the same number as the edges, or as many as the edges' FLOPs allow.

        Args:
            arm: The arm.

        Returns:
            The number, 0 if nothing is trained.
        """
        if arm.kind is None:
            return 0
        if arm.equal == "tokens":
            return self.recipe.steps
        return max(1, round(self.recipe.steps * self.step_flops(EDGES) / self.step_flops(arm)))
