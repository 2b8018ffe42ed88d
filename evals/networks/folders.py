"""Train a network in a run folder of `jaxcomm lmnet train`, and load it as an agent for games and evaluations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxcomm import lmnet
from jaxcomm.agent import Agent
from jaxcomm.fingerprint import fingerprint
from jaxcomm.model import Params, layers_apart
from jaxcomm.training import Everything

from ..runs import RunFolder, agent_fingerprint, surroundings
from ..sentences import revision
from .settings import Recipe, Shape, pick
from .texts import source
from .training import check, newest, train

LONG = 1000
"""From this number of steps on, a run on CPU unrolls its vertices' layers. A step is then up to a fifth faster, and
compiling takes up to three times as long (ARCHITECTURE.md, decision 47)."""


def build(shape: Shape, agents: Sequence[Agent]) -> lmnet.Network:
    """Builds a new network.

    Args:
        shape: Its shape.
        agents: The vertices: one that all share, or one for each, layer by layer.

    Returns:
        The network, with new edges.

    Raises:
        ValueError: The tokenizers of the vertices differ, or the shape is not possible (`jaxcomm.lmnet.init_network`).
    """
    words = agents[0].tokenizer.get_vocab()
    for agent in agents:
        if agent.tokenizer.get_vocab() != words:
            raise ValueError(
                f"{agent.name} and {agents[0].name} have different vocabularies: all vertices must have the output's"
            )
    models = agents[0].single if len(agents) == 1 else [agent.single for agent in agents]
    if not shape.share:
        count = sum(shape.widths)
        models = [model.replace() for model in ([models] * count if isinstance(models, Params) else models)]
    return lmnet.init_network(jax.random.key(shape.network_seed), models, **shape.options())


def train_network(
    command: Any, agents: Sequence[Agent], *, words: str, start: lmnet.Network | None = None
) -> lmnet.Network:
    """Trains a command's network in its run folder.

    Args:
        command: The settings (`evals.commands.lmnet.Train`).
        agents: The vertices: one that all share, or one for each.
        words: The command line that runs it again.
        start: The network of `command.start`, the start of training. None: a new network.

    Returns:
        The trained network.

    Raises:
        ValueError: A setting, a text or the shape is invalid; `start` has another shape or other vertices;
            the folder holds another run. It is raised before training, unless the texts end too early.
        OSError: A file does not exist, or the folder cannot be written.
        FloatingPointError: The loss or the gradient is not a finite number.
    """
    shape, recipe = pick(Shape, command), pick(Recipe, command)
    network = build(shape, agents)
    texts = source(command.text, agents[-1], recipe.columns, n=command.examples, seed=command.seed)
    config = identity(command) | {"fingerprints": [agent_fingerprint(a) for a in agents]}
    config |= surroundings("optax", "orbax-checkpoint")
    if start is not None:
        begun = _config(command.start)
        if (start.config, begun["vertices"]) != (network.config, list(command.vertices)):
            raise ValueError(
                f"{command.start} holds another network ({start.config.widths}): ask for its vertices and shape"
            )
        if (begun["train"], command.train) == ("all", "edges"):
            raise ValueError(
                f"{command.start} was trained as a whole, and a run with --train edges saves only edges: use --train all"
            )
        # If the vertices were not trained, use the ones just loaded: they may have another dtype.
        network = network.replace(edges=start.edges, joints=start.joints) if begun["train"] == "edges" else start
        config["start_fingerprint"] = fingerprint(start)
    trained, frozen = network.split() if command.train == "edges" else (Everything(network), None)
    check(recipe, trained, network.config.max_positions)
    with RunFolder(command.out, config, dict, command=words, resume=command.resume, free=("every",)) as folder:
        apart = layers_apart() and recipe.steps >= LONG
        state = train(
            trained, frozen, texts, recipe, folder.path, title=f"{command.out}, {command.train}", unroll=apart
        )
    return state.trained.join(frozen)


def identity(command: Any) -> dict[str, Any]:
    """Lists the identity of a command's run: its settings, and hashes of its files. Paths of folders are left out.

    Args:
        command: The settings (`evals.commands.lmnet`).

    Returns:
        The settings as JSON values.

    Raises:
        OSError: A data set of the hub cannot be reached.
    """
    told = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    for name in ("out", "start", "resume"):
        told.pop(name, None)
    files = [Path(told[name]) for name in ("text", "test") if told.get(name) and Path(told[name]).is_file()]
    told |= {"revision": revision(told["text"])}
    told |= {"data": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]}
    return json.loads(json.dumps(told, default=str))


def is_network(path: str | Path) -> bool:
    """Whether a path is a run folder that holds a network."""
    return (Path(path) / "run.json").is_file() and (Path(path) / "checkpoints").is_dir()


def vertices(path: str | Path) -> tuple[tuple[str, ...], str]:
    """Reads the vertices of a network.

    Args:
        path: Run folder of `jaxcomm lmnet train`.

    Returns:
        The names of their checkpoints, and the dtype that they were loaded in.

    Raises:
        ValueError: The folder holds no network.
    """
    config = _config(Path(path))
    return tuple(config["vertices"]), vertex_dtype(config["train"], config["dtype"])


def vertex_dtype(trained: str, dtype: str) -> str:
    """Chooses the dtype for loading vertices: float32 if they are trained.

    Args:
        trained: The trained part: "edges" or "all".
        dtype: Dtype of the computation.

    Returns:
        Name of the dtype.
    """
    return "float32" if trained == "all" else dtype


def load_network(path: str | Path, agents: Sequence[Agent]) -> Agent:
    """Loads the newest network of a run folder as an agent.

    Args:
        path: Run folder of `jaxcomm lmnet train`.
        agents: The network's vertices.

    Returns:
        The agent. It reads and stops like the last vertex.

    Raises:
        ValueError: The folder holds no finished checkpoint, or the vertices differ (in weights, dtype or tokenizers).
    """
    path = Path(path)
    config = _config(path)
    found = [agent_fingerprint(agent) for agent in agents]
    if found != config["fingerprints"]:
        raise ValueError(
            f"{path} was made of other vertices than {', '.join(a.name for a in agents)}: their weights, dtype or tokenizers differ"
        )
    names = {field.name for field in dataclasses.fields(Shape)}
    kept: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items() if name in names}
    network = build(Shape(**kept), agents)
    trained, frozen = network.split() if config["train"] == "edges" else (Everything(network), None)
    return dataclasses.replace(agents[-1], params=newest(path, trained).join(frozen), name=str(path))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "run.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no network: make one with jaxcomm lmnet train") from error
    if not {"vertices", "train", "fingerprints"} <= config.keys():
        raise ValueError(f"{path} is the folder of another command: make a network with jaxcomm lmnet train")
    return config
