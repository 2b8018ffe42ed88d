"""The examples in docstrings run, and print what they say."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm.evals.pair import folder

MODULES = (
    "prompts", "sites", "edits", "reading", "decoding", "messages", "communication", "layer_sweep",
    "layer_sweep.patching", "agent", "chat", "model", "mapping", "sharding", "lora", "training", "flops", "fingerprint",
    "cipher", "lmnet.network", "converters.agents", "converters.hf", "converters.checkpoints",
    "converters.tensors", "converters.table", "converters.gguf.file", "evals.play", "evals.conditions", "evals.scores",
    "evals.agents", "evals.choices", "evals.cost", "evals.documents", "evals.sentences", "evals.biographies",
    "evals.processes", "evals.published", "evals.report", "evals.figures", "evals.pair", "evals.games.companies",
    "evals.games.game", "evals.games.places", "evals.games.wording", "evals.networks.texts",
)  # fmt: skip


@pytest.fixture(scope="module")
def names():
    """What examples may use: a model of 4 layers of width 128, two prompts of three tokens, an agent."""
    config = jc.ModelConfig(vocab=256, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, ff=128, max_positions=64)
    params = jc.init_params(jax.random.key(0), config)
    prompts = jc.left_pad([[3, 1, 4], [1, 5]])
    return dict(jc=jc, jax=jax, jnp=jnp, np=np, params=params, prompts=prompts, agent=jc.load_agent(folder("b")))


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name, names):
    module = importlib.import_module(f"jaxcomm.{name}")
    ran = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
        ran.run(example)
    assert ran.failures == 0 and ran.tries > 0
