"""The embedded pair is what the demo says it is, measured on games its training never saw."""

import jax
import numpy as np
import pytest

from jaxcomm.converters import agent_from_hf
from jaxcomm.evals.demo import fit
from jaxcomm.evals.games import GAMES
from jaxcomm.evals.pair import NAMES, folder
from jaxcomm.evals.pair.train import COLUMNS, TOKENS, batches, make_tokenizer, train_and_save
from jaxcomm.evals.play import play


@pytest.fixture(scope="session")
def pair():
    return {name: agent_from_hf(folder(name), name=name, unroll=False) for name in NAMES}


def test_the_models_are_small_and_differ_in_width_and_depth(pair):
    a, b = (pair[name].params.config for name in NAMES)
    assert a.width != b.width and a.layers != b.layers
    for name in NAMES:
        assert sum(f.stat().st_size for f in folder(name).iterdir()) <= 8e6


@pytest.mark.parametrize("game", GAMES)
def test_activations_carry_what_silence_and_every_control_lack(pair, game):
    """One model with itself, at the layers the demo chose, on a third seed of the games."""
    b, items = pair["b"], GAMES[game](5, 50)
    hits = lambda protocol, **s: np.mean(play(game, items, protocol, b, b, max_new_tokens=8, **s).hits)
    assert hits("skyline") >= 0.9
    alone = hits("silent")
    assert alone <= (0.1 if game == "countries" else 0.5)
    at = dict(k=5, j=2)
    controls = [hits("activation", control=c, **at) for c in ("unrelated", "shuffled", "zero", "noise", "self")]
    assert hits("activation", **at) >= max(alone, *controls) + 0.4


def test_between_models_of_different_width_a_fitted_map_carries_what_the_trailing_rule_does_not(pair):
    a, b = pair["a"], pair["b"]
    items, W = GAMES["countries"](5, 50), fit(a, b)
    hits = lambda W: np.mean(play("countries", items, "activation", a, b, k=6, j=2, W=W, max_new_tokens=8).hits)
    assert hits(W[6, 2]) >= hits(None) + 0.1


def test_training_text_is_batched_without_loss_on_padding():
    tokenizer = make_tokenizer(sample=2000)
    eos = tokenizer.token_to_id("</s>")
    stream = batches(tokenizer, 0)
    for _ in range(8):
        tokens, weights = next(stream)
        assert tokens.shape == weights.shape and tokens.shape[1] in COLUMNS and tokens.size <= TOKENS
        ends = np.argmax(tokens == eos, axis=1)
        for row, end in enumerate(ends):
            assert (weights[row, end + 1 :] == 0).all() and (tokens[row, end:] == eos).all()
            assert (weights[row, 1 : end + 1] > 0).all()


def test_the_command_that_made_the_models_makes_one_that_loads(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax's Muon adds ints to floats
        train_and_save("a", tmp_path / "a", steps=2)
    agent = agent_from_hf(tmp_path / "a")
    assert agent.params.config == agent_from_hf(folder("a")).params.config
    assert agent.tokenizer.get_vocab() == agent_from_hf(folder("a")).tokenizer.get_vocab()
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        train_and_save("a", tmp_path / "a", steps=2)
