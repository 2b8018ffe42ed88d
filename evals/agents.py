"""Load agents by name for all commands. A name is an argument of `load_agent`, pair:a, pair:b, or a network's run folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcomm.agent import Agent
from jaxcomm.lmnet import Network
from jaxcomm.sharding import local_mesh

from ..converters import load_agent
from ..converters.configs import chosen_dtype
from . import pair
from .networks import folders


def load_agents(
    *names: str,
    dtype: str = "auto",
    chat: bool | Sequence[bool] = False,
    chat_args: Mapping[str, Any] | None = None,
    system: Sequence[str] = (),
    layers: bool = False,
    tensor: int = 1,
    int8: bool = False,
) -> list[Agent]:
    """Loads one agent for every name. Agents of the same name share their weights.

    Args:
        *names: Names: arguments of `load_agent` (a folder, a .gguf file, a hub id, real:smollm2), pair:a, pair:b, or the
            run folder of a network.
        dtype: Dtype of the weights, as for `load_agent`.
        chat: Whether prompts go through the chat template: one value for all agents, or one for each.
        chat_args: Further arguments of the chat template.
        system: System prompts of the first agents (`Agent.system`). The others have none.
        layers: Whether single layers will be read or edited. Then the layers are stacked, and networks are refused.
        tensor: Number of this process's devices to distribute each weight matrix over. Above 1, networks are refused.
        int8: Whether to quantise weight matrices to 8 bits. Then networks are refused.

    Returns:
        The agents, in the order of the names.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ConnectionError: A checkpoint cannot be downloaded.
        ValueError: A checkpoint or network is not supported or is damaged, or an option does not fit a network.
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
    """Loads a network and its tokenizer from its run folder.

    Args:
        path: Run folder of `jaxcomm lmnet train`.
        dtype: Dtype of the weights. "auto": float32 on CPU; elsewhere the dtype of training.

    Returns:
        The network as an agent.

    Raises:
        ValueError: As for `folders.load_network`.
    """
    names, kept = folders.vertices(path)
    agent = folders.load_network(path, load_agents(*names, dtype=kept, layers=True))
    cast = lambda a: a.astype(chosen_dtype(dtype, np.dtype(kept)))
    read = agent.params
    assert isinstance(read, Network)
    return dataclasses.replace(agent, params=read.replace(models=jax.tree.map(cast, read.models)))


def template_args(given: Sequence[str]) -> dict[str, Any]:
    """Parses arguments of a chat template from the command line.

    Args:
        given: Texts of the form NAME=VALUE. A value that is JSON is parsed; any other value is a text.

    Returns:
        The values by name.

    Raises:
        ValueError: A text has no "=" or no name.

    Example:
        >>> template_args(["enable_thinking=false", "date=today"])
        {'enable_thinking': False, 'date': 'today'}
    """
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
    """Describes how agents read, for the record of a run.

    Args:
        agents: The agents. All have the same template arguments.

    Returns:
        The dtype of their weights; template arguments, system prompts, and the commit of each hub id, if there are any.
    """
    told: dict[str, Any] = {"dtype": ", ".join(dict.fromkeys(agent.params.dtype.name for agent in agents))}
    if args := agents[0].chat_args:
        told["chat_args"] = dict(args)
    if any(agent.system for agent in agents):
        told["systems"] = [agent.system for agent in agents]
    if revisions := {agent.name: agent.revision for agent in agents if agent.revision}:
        told["revisions"] = revisions
    return told
