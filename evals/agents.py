"""Agents by name, as every command takes them: a checkpoint folder, a hub id, pair:a, pair:b, or a network's run folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.agent import Agent
from jaxcomm.sharding import local_mesh

from ..converters import load_agent
from . import pair
from .networks import folders


def load(
    *names: str, dtype: str = "float32", chat: bool = False, layers: bool = False, tensor: int = 1, int8: bool = False
) -> list[Agent]:
    """An agent for every name, the same for the same. layers: they are worked on layer by layer (stacked; networks cannot be).
    tensor: their weights are cut over so many of this process' devices; int8: their matrices are quantised (networks' cannot be).

    ValueError, OSError: `load_agent`'s, `folders.load`'s.
    """

    def read(name: str) -> Agent:
        if folders.is_network(name):
            if layers:
                raise ValueError(f"{name} is a network, which has no layers to be split at: name a single model")
            if tensor > 1 or int8:
                raise ValueError(f"{name} is a network, whose weights stay as they are: leave out --tensor and --int8")
            return network(name, dtype=dtype, chat=chat)
        path = pair.checkpoint(name)
        how: dict[str, Any] = dict(chat=chat, name=name, unroll=False if layers else None, mesh=mesh, int8=int8)
        return load_agent(path, getattr(jnp, dtype), **how)

    mesh = None if tensor == 1 else local_mesh(tensor=tensor)
    agents = {name: read(name) for name in dict.fromkeys(names)}
    return [agents[name] for name in names]


def network(path: str, *, dtype: str, chat: bool) -> Agent:
    """A network and its tokenizer, out of its run folder. ValueError: `folders.load`'s."""
    names, kept = folders.vertices(path)
    agent = folders.load(path, load(*names, dtype=kept, layers=True))
    cast = lambda a: a.astype(getattr(jnp, dtype))
    params = agent.params.replace(models=jax.tree.map(cast, agent.params.models))
    return dataclasses.replace(agent, params=params, chat=chat)
