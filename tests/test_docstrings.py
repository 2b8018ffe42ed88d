"""The examples in docstrings run, and print what they say. Public docstrings say what goes in, what comes out and how."""

import dataclasses
import doctest
import functools
import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm import converters, lmnet, protocols
from jaxcomm.evals.pair import folder

MODULES = (
    "prompts", "sites", "edits", "reading", "decoding", "messages", "controls", "lenses", "communication", "alignment",
    "layer_sweep", "layer_sweep.patching", "agent", "chat", "model", "mapping", "kv_mapping", "sharding", "lora", "training",
    "flops", "fingerprint", "cipher", "bridges", "cache", "prefixes", "latents", "config", "protocols.base", "protocols.controls", "protocols.text",
    "protocols.debates", "protocols.cipher", "protocols.activations", "protocols.prefixes", "protocols.state_deltas", "protocols.bridges", "lmnet.network", "protocols.inspections",
    "lmnet.controls", "converters.agents", "converters.hf", "converters.checkpoints", "converters.families",
    "converters.tensors", "converters.table", "converters.gguf.file", "evals.play", "evals.conditions",
    "evals.scores", "evals.agents", "evals.choices", "evals.cost", "evals.documents", "evals.sentences",
    "evals.biographies", "evals.processes", "evals.published", "evals.report", "evals.figures",
    "evals.inspection_figure", "evals.pair", "evals.games.companies", "evals.games.game", "evals.games.places",
    "evals.games.wording", "evals.networks.texts", "evals.injections", "evals.monitors", "evals.effects",
)  # fmt: skip

EXPORTED = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (jc, protocols, lmnet, converters)
    for name in room.__all__
    if inspect.isclass(getattr(room, name)) or inspect.isroutine(getattr(room, name))
}
"""Functions and classes; what is exported besides them are tables and types."""


@pytest.fixture(scope="module")
def names():
    """What examples may use: a model of 4 layers of width 128, two prompts of three tokens, an agent, protocols."""
    config = jc.ModelConfig(vocab=256, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, ff=128, max_positions=64)
    params = jc.init_params(jax.random.key(0), config)
    prompts = jc.left_pad([[3, 1, 4], [1, 5]])
    modules = dict(jc=jc, jax=jax, jnp=jnp, np=np, protocols=protocols)
    return modules | dict(params=params, prompts=prompts, agent=jc.load_agent(folder("b")))


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name, names):
    module = importlib.import_module(f"jaxcomm.{name}")
    ran = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
        ran.run(example)
    assert ran.failures == 0 and ran.tries > 0


def described(doc: str, section: str) -> list[str]:
    """The names that a section of a docstring describes."""
    found = re.search(rf"^{section}:\n((?: {{4}}.*\n?|\n)+)", doc, re.MULTILINE)
    return re.findall(r"^ {4}\*{0,2}(\w+):", found[1], re.MULTILINE) if found else []


def assert_described(function, doc: str) -> None:
    signature = inspect.signature(function)
    parameters = [name for name in signature.parameters if name not in ("self", "cls")]
    assert described(doc, "Args") == parameters, function.__qualname__
    if signature.return_annotation not in (None, "None", signature.empty):
        assert re.search("^(Returns|Yields):$", doc, re.MULTILINE), (
            f"{function.__qualname__} does not say what it returns"
        )


def fields(cls) -> list[str]:
    return list(getattr(cls, "_fields", ())) or [field.name for field in dataclasses.fields(cls)]


def methods(cls):
    """Public methods and properties that a class defines itself."""
    for name, value in vars(cls).items():
        for wrapped in ("__func__", "fget", "func"):
            value = getattr(value, wrapped, value)
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__.startswith("jaxcomm."):
            kind = vars(cls)[name]
            yield name, value, isinstance(kind, property | functools.cached_property)


@pytest.mark.parametrize("name", EXPORTED)
def test_public_docstrings_say_arguments_results_and_an_example(name):
    thing = EXPORTED[name]
    doc = inspect.getdoc(thing) or ""
    assert ">>> " in doc, "it has no example"
    assert thing.__module__.removeprefix("jaxcomm.") in MODULES, "its example is not run"
    if not inspect.isclass(thing):
        assert_described(thing, doc)
        return
    assert described(doc, "Attributes") == fields(thing)
    for method, function, is_property in methods(thing):
        told = inspect.getdoc(function) or ""
        assert told, f"{method} has no docstring"
        if not is_property:
            assert_described(function, told)
