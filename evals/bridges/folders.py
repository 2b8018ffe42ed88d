"""Train a bridge in a run folder of `jaxcomm bridge train`, and load it for games and evaluations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from jaxcomm.agent import Agent
from jaxcomm.bridges import C2C, Gated, Pair, init_c2c, init_gated
from jaxcomm.fingerprint import identity as model_identity

from ..networks.folders import identity
from ..networks.settings import Recipe, pick
from ..networks.texts import Source, source
from ..networks.training import check, newest, train
from ..runs import RunFolder, agent_fingerprint, surroundings
from .settings import Span


def build(span: Span, a: Agent, b: Agent, steps: int) -> C2C | Gated:
    """Makes a new bridge.

    Args:
        span: Its kind and size.
        a: The sender.
        b: The receiver.
        steps: Number of training steps.

    Returns:
        The bridge, with closed gates.

    Raises:
        ValueError: An agent is a network; a size is below 1.
    """
    key = jax.random.key(span.bridge_seed)
    if span.kind == "gated":
        return init_gated(key, a.single, b.single, rank=span.rank)
    made = init_c2c(key, a.single, b.single, hidden=span.hidden, steps=steps, seed=span.bridge_seed)
    return made.replace(aligned=span.align)


def lessons(command: Any, span: Span, a: Agent, b: Agent, seed: int) -> Source:
    """Opens the training texts of a bridge.

    Args:
        command: The settings: text, columns, examples.
        span: The kind of the bridge. Only a gated bridge has texts that A reads alone.
        a: The sender.
        b: The receiver.
        seed: Seed of the order.

    Returns:
        The texts as tokens.

    Raises:
        ValueError: A text has no prompt; A and B read it as different tokens (c2c), or A has nothing to read (gated);
            otherwise as for `texts.source`.
        OSError: A file does not exist.
    """
    alone = span.kind == "gated"
    if not alone and not span.align and a.tokenizer.get_vocab() != b.tokenizer.get_vocab():
        raise ValueError(f"{a.name} and {b.name} have different tokens: let the fuser align them (--align)")
    how: Any = dict(sharer=a if alone or span.align else None, aligned=not alone)
    read = source(command.text, b, command.columns, n=command.examples, seed=seed, **how)
    weights = next(read(0))[1]
    if weights[0] or not any(weights[2:]):
        raise ValueError(f"{command.text}: a bridge acts between a prompt and its answer, give texts with both")
    return read


def train_bridge(command: Any, a: Agent, b: Agent, *, words: str) -> C2C | Gated:
    """Trains a command's bridge in its run folder.

    Args:
        command: The settings (`evals.commands.bridge.Train`).
        a: The sender.
        b: The receiver.
        words: The command line that runs it again.

    Returns:
        The trained bridge.

    Raises:
        ValueError: A setting or text is invalid, or the folder holds another run.
        OSError: A file does not exist, or the folder cannot be written.
        FloatingPointError: The loss or the gradient is not a finite number.
    """
    span, recipe = pick(Span, command), pick(Recipe, command)
    made, texts = build(span, a, b, recipe.steps), lessons(command, span, a, b, command.seed)
    config = identity(command) | {"fingerprints": [agent_fingerprint(a), agent_fingerprint(b)]}
    config |= {"models": [model_identity(a.single), model_identity(b.single)], "reads": [reads(a), reads(b)]}
    config |= surroundings("optax", "orbax-checkpoint")
    check(recipe, made, min(agent.single.config.max_positions for agent in (a, b)))
    title = f"{command.out}, {span.kind}"
    with RunFolder(command.out, config, dict, command=words, resume=command.resume, free=("every",)) as folder:
        return train(made, Pair(a.single, b.single), texts, recipe, folder.path, title=title).trained


def reads(agent: Agent) -> str:
    """Hashes everything that affects how an agent reads: tokenizer, chat template, whether it is used, and system prompt."""
    how = agent.tokenizer.backend_tokenizer.to_str(), agent.tokenizer.chat_template, agent.chat, agent.system
    return hashlib.sha256(repr(how).encode()).hexdigest()[:16]


def load_bridge(path: str | Path, a: Agent, b: Agent) -> C2C | Gated:
    """Loads the newest bridge of a run folder.

    Args:
        path: Run folder of `jaxcomm bridge train`.
        a: The sender.
        b: The receiver.

    Returns:
        The bridge.

    Raises:
        ValueError: The folder holds no bridge, or no finished checkpoint; it belongs to another pair, or to agents that
            read differently.
    """
    path = Path(path)
    try:
        config = json.loads((path / "run.json").read_text())["config"]
        kept, steps = {field.name: config[field.name] for field in dataclasses.fields(Span)}, config["steps"]
        made_for = list(zip("AB", (a, b), config["models"], config["reads"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no bridge: make one with jaxcomm bridge train") from error
    for name, agent, model, read in made_for:
        if (found := model_identity(agent.single)) != model:
            raise ValueError(f"{path} was trained for model {model} as {name}, {agent.name} is {found}: train another")
        if reads(agent) != read:
            raise ValueError(
                f"{path} was trained with another tokenizer, chat template or system prompt of {name} than {agent.name} "
                "has: read as in training (--chat), or train another"
            )
    return newest(path, build(Span(**kept), a, b, steps))
