"""The embedded pair is what the demo says it is, measured on games its training never saw."""

from typing import get_args

import jax
import numpy as np
import pytest

from jaxcomm.converters import load_agent
from jaxcomm.evals.demo import draw, search
from jaxcomm.evals.games import GAMES
from jaxcomm.evals.games import draw as draw_game
from jaxcomm.evals.pair import NAMES, folder
from jaxcomm.evals.pair.train import COLUMNS, TOKENS, batches, make_tokenizer, train_and_save
from jaxcomm.evals.play import PlaySettings, play
from jaxcomm.protocols import Control


@pytest.fixture(scope="session")
def pair():
    return {name: load_agent(folder(name), name=name, unroll=False) for name in NAMES}


def test_the_models_are_small_and_differ_in_width_and_depth(pair):
    a, b = (pair[name].params.config for name in NAMES)
    assert a.width != b.width and a.layers != b.layers
    for name in NAMES:
        assert sum(f.stat().st_size for f in folder(name).iterdir()) <= 8e6


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("sender", NAMES)
def test_activations_carry_what_silence_and_every_control_lack(pair, sender, game):
    """Layers chosen as the demo does, played on a third seed of the games: b with itself, and a to b through W."""
    a, b, reported = pair[sender], pair["b"], draw_game(game, 5, 50)
    choice = search(a, b, draw(game)[1])
    hits = lambda protocol, on=reported, **s: np.mean(
        play(on, protocol, a, b, PlaySettings(max_new_tokens=8), **s).hits
    )
    assert hits("skyline") >= 0.9
    alone = hits("silent")
    assert alone <= (0.1 if game == "countries" else 0.5)
    at = {name: choice.at(choice.into)[name] for name in ("k", "j", "W")}
    assert hits("activation", draw(game)[1], **at) == choice.accuracies[choice.k - 1, choice.j - 1]
    controls = [hits("activation", control=c, **at) for c in get_args(Control)]
    ours = hits("activation", **at)
    assert ours >= max(alone, *controls) + 0.4
    if sender == "a":
        assert hits("activation", **at | {"W": None}) <= ours - 0.4, "the trailing-dimensions rule does not carry it"


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
        train_and_save("b", tmp_path / "b", steps=1)
    agent, shipped = load_agent(tmp_path / "b"), load_agent(folder("b"))
    assert agent.params.config == shipped.params.config
    assert agent.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        train_and_save("b", tmp_path / "b", steps=2)
