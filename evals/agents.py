"""Agents by name, as every command takes them: what `load_agent` takes, pair:a, pair:b, or a network's run folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.sharding import local_mesh

from ..converters import load_agent
from ..converters.hf import chosen_dtype
from . import pair
from .networks import folders


def load(
    *names: str,
    dtype: str = "auto",
    chat: bool | Sequence[bool] = False,
    chat_args: Mapping[str, Any] | None = None,
    system: Sequence[str] = (),
    layers: bool = False,
    tensor: int = 1,
    int8: bool = False,
) -> list[Agent]:
    """An agent for every name, with the same weights for the same.

    Args:
        names: What `load_agent` takes (folders, .gguf files, hub ids, real:smollm2), pair:a, pair:b, run folders of networks.
        dtype: As `load_agent`'s, by name.
        chat, chat_args: As `load_agent`'s; chat may be one for each.
        system: The system prompts of the first of them (`Agent.system`).
        layers: They are worked on layer by layer (stacked; networks cannot be).
        tensor: Their weights are cut over so many of this process' devices.
        int8: Their matrices are quantised (networks' cannot be).

    Raises:
        ValueError, OSError: `load_agent`'s, `folders.load`'s.
    """

    def read(name: str) -> Agent:
        if folders.is_network(name):
            if layers:
                raise ValueError(f"{name} is a network, which has no layers to be split at: name a single model")
            if tensor > 1 or int8:
                raise ValueError(f"{name} is a network, whose weights stay as they are: leave out --tensor and --int8")
            return dataclasses.replace(network(name, dtype=dtype), chat_args=chat_args or {})
        path = pair.checkpoint(name)
        how: dict[str, Any] = dict(chat_args=chat_args, unroll=False if layers else None, mesh=mesh, int8=int8)
        return load_agent(path, dtype, name=name, **how)

    mesh = None if tensor == 1 else local_mesh(tensor=tensor)
    chats = [chat] * len(names) if isinstance(chat, bool) else chat
    told = [*system, *[""] * (len(names) - len(system))]
    each = list(zip(names, chats, told, strict=True))
    agents = {name: read(name) for name in dict.fromkeys(names)}
    spoken = {key: dataclasses.replace(agents[key[0]], chat=key[1], system=key[2]) for key in dict.fromkeys(each)}
    return [spoken[key] for key in each]


def network(path: str, *, dtype: str) -> Agent:
    """A network and its tokenizer, out of its run folder; dtype "auto": as it was trained, on CPU float32. ValueError: `folders.load`'s."""
    names, kept = folders.vertices(path)
    agent = folders.load(path, load(*names, dtype=kept, layers=True))
    cast = lambda a: a.astype(chosen_dtype(dtype, np.dtype(kept)))
    params = agent.params.replace(models=jax.tree.map(cast, agent.params.models))
    return dataclasses.replace(agent, params=params)


def template_args(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, as the command line takes a chat template's arguments; a value is JSON, or else a text. ValueError: no "="."""
    args: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"--chat-args {word}: write NAME=VALUE, such as enable_thinking=false")
        try:
            args[name] = json.loads(value)
        except json.JSONDecodeError:
            args[name] = value
    return args


def read_as(agents: Sequence[Agent]) -> dict[str, Any]:
    """What a run's record says of its agents besides their names: the dtype their weights have, template arguments, and of
    hub ids the commit that was read."""
    told: dict[str, Any] = {"dtype": ", ".join(dict.fromkeys(agent.params.dtype.name for agent in agents))}
    if args := agents[0].chat_args:
        told["chat_args"] = dict(args)
    if any(agent.system for agent in agents):
        told["systems"] = [agent.system for agent in agents]
    if revisions := {agent.name: agent.revision for agent in agents if agent.revision}:
        told["revisions"] = revisions
    return told
