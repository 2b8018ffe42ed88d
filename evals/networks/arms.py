"""The arms of a comparison: what is trained, for how long, and what it costs."""

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
    """One of the things that are compared.

    Attributes:
        kind: What is trained. None: nothing.
        equal: What it has as much of as the edges have: tokens (as many steps), or training FLOPs.
        name: What tables and files call it.
    """

    kind: Kind | None
    equal: Equal
    name: str


EDGES, LORA = Arm("edges", "tokens", "edges"), Arm("LoRA", "tokens", "LoRA")
ALONE, NEW = Arm(None, "tokens", "vertex alone"), Arm(None, "tokens", "network, new")
NAMES: dict[Kind, str] = {"LoRA": "LoRA", "all": "vertex, trained on", "scratch": "larger model, from scratch"}


def arms(kinds: Sequence[Kind], equal: Sequence[Equal]) -> list[Arm]:
    """Lists what is compared: what is not trained, then what is, the edges last.

    Args:
        kinds: What is trained beside the edges.
        equal: What they have as much of as the edges.

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
    """What all arms of a comparison are made of.

    Attributes:
        shape: Shape of the network.
        agents: Its vertices. The last one is what LoRA adapts, and what is trained on.
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
        """Rank at which LoRA has as many numbers as the wires, nearly."""
        return lora.rank_of_size(self.vertex, lmnet.size(self.wires))

    @property
    def larger(self) -> ModelConfig:
        """The vertex' architecture with so many layers that it has as many numbers as the network, nearly."""
        config = self.vertex.config
        count = lambda layers: lmnet.size(
            jax.eval_shape(lambda: init_params(jax.random.key(0), dataclasses.replace(config, layers=layers)))
        )
        layer = count(2) - count(1)
        return dataclasses.replace(config, layers=config.layers + max(1, round(lmnet.size(self.wires) / layer)))

    def begin(self, arm: Arm, seed: int) -> tuple[Any, Any]:
        """Makes what is trained and what is not, as `jaxcomm.training` takes them.

        Args:
            arm: The arm.
            seed: Seed of what is new.

        Returns:
            Both. Their join is the model that answers.
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
        """Counts the FLOPs of a training step: three passes through what is trained, two through what is frozen.

        LoRA's gradient is taken of the whole weights that it moves, so it counts as trained.

        Args:
            arm: An arm that is trained.

        Returns:
            The FLOPs of all rows, padding included.
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
        """Counts the steps of an arm: as many as the edges', or as many as their FLOPs pay for.

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
