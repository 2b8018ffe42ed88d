"""Models as JAX keeps them: the same bits back, in another dtype, on another mesh, whole or not at all."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm.converters import from_hf, load, load_agent, save
from jaxcomm.converters.agents import architecture
from jaxcomm.evals.agents import load_agents
from jaxcomm.evals.commands.convert import Convert
from jaxcomm.evals.pair import folder
from jaxcomm.fingerprint import fingerprint
from jaxcomm.sharding import shard

from conftest import toy_tokenizer
from crashes import kills


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32)), a, b)


@pytest.fixture(scope="module")
def saved(kind, tmp_path_factory):
    return save(kind.params, tmp_path_factory.mktemp("saved") / "model", tokenizer=toy_tokenizer(), stop_tokens=(1,))


def test_what_is_loaded_is_what_was_saved_in_both_layouts(kind, saved):
    for again in (load(saved, unroll=False), load(saved, unroll=True).stack()):
        equal(again, kind.params)
        assert again.config == kind.params.config and again.dtype == kind.params.dtype
    assert load(saved, unroll=True).unrolled
    assert not any(a.committed for a in jax.tree.leaves((load(saved), load(saved, unroll=True)))), "free to be moved"
    told = json.loads((saved / "jaxcomm.json").read_text())
    assert told["fingerprint"] == fingerprint(load(saved)) == fingerprint(kind.params)


def test_another_dtype_and_another_mesh(kind, saved):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    want = shard(jax.tree.map(lambda a: a.astype(jnp.bfloat16), kind.params), mesh)
    for unroll in (False, True):
        got = load(saved, jnp.bfloat16, unroll=unroll, mesh=mesh)
        equal(got.stack() if unroll else got, want)
        assert got.dtype == jnp.bfloat16
        assert {a.sharding.mesh.size for a in jax.tree.leaves(got)} == {8}
        if not unroll:
            assert jax.tree.map(lambda a: a.sharding, got) == jax.tree.map(lambda a: a.sharding, want)


def test_a_cut_model_is_saved_whole(llama, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    equal(load(save(shard(llama.params.unroll(), mesh), tmp_path / "cut"), unroll=False), llama.params)


def test_every_command_takes_either_form(tmp_path):
    """The loader that all of them call gives the same agent, and `cost` the same architecture."""
    Convert("pair:b", tmp_path / "orbax", "float32").run()
    Convert(str(tmp_path / "orbax"), tmp_path / "hf", "float32", "hf").run()
    agents = [*load_agents("pair:b", str(tmp_path / "orbax")), load_agent(tmp_path / "hf", name="hf")]
    for agent in agents[1:]:
        equal(agent.params, agents[0].params)
        assert agent.stop_tokens == agents[0].stop_tokens
        assert agent.encode("Alice is at Big Ben.") == agents[0].encode("Alice is at Big Ben.")
        assert agent.tokenizer.chat_template == agents[0].tokenizer.chat_template
    other = save(agents[0].single, tmp_path / "other", tokenizer=agents[0].tokenizer, stop_tokens=(3,))
    assert load_agent(tmp_path / "orbax", tokenizer=other).stop_tokens == (3,)
    assert architecture(tmp_path / "orbax") == architecture(folder("b")) == agents[0].params.config
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        Convert(str(folder("b")), tmp_path / "orbax").run()


def test_positions_of_a_saved_longrope_model_are_chosen_when_it_is_loaded(tmp_path):
    from conftest import make_checkpoint

    pair = make_checkpoint(tmp_path / "phi3", "phi3", seed=8)
    kept = save(pair.params, tmp_path / "kept")
    assert load(kept, max_positions=4096).config == from_hf(pair.folder, max_positions=4096).config


def change(record, **values):
    path = record / "jaxcomm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f / "weights"), "weights is damaged or of another model"),
        (lambda f: [p.write_bytes(p.read_bytes()[:-7]) for p in f.rglob("d/*")], "weights is damaged or of another model"),
        (lambda f: (f / "jaxcomm.json").write_text("{"), "jaxcomm.json describes no model"),
        (lambda f: (f / "jaxcomm.json").unlink(), "jaxcomm.json describes no model"),
        (lambda f: change(f, format=9), "format 9 is not 1: it was written by another version"),
        (lambda f: change(f, config={"vocab": 3}), "jaxcomm.json describes no model"),
        (lambda f: change(f, config=json.loads((f / "jaxcomm.json").read_text())["config"] | {"width": 40}), "weights is damaged or of another model"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(llama, tmp_path, damage, message):
    kept = save(llama.params, tmp_path / "model")
    damage(kept)
    with pytest.raises(ValueError, match=".*") as error:
        load(kept)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_saves_that_are_killed_are_never_taken_for_whole_ones(llama, tmp_path):
    """Three processes save one model after another, and are killed while they do: what is there loads."""
    code = f"""
from transformers import AutoConfig
import orbax.checkpoint
from jaxcomm.converters import from_hf, save
from jaxcomm.converters.configs import read_config

read_config(Path({str(llama.folder)!r}))  # imports what takes longest

def go(out):
    params = from_hf({str(llama.folder)!r})
    out.mkdir()
    for n in range(1000):
        save(params, out / str(n))

def after(seconds, out, begun):
    if out.is_dir() and not begun:
        begun.append(time.monotonic())
    return begun and time.monotonic() > begun[0] + seconds

for turn, delay in enumerate((0.3, 0.9, 1.6)):
    begun = []
    killed(lambda: after(delay, home / str(turn), begun), go, home / str(turn))
"""
    kills(code, tmp_path)
    begun = 0
    for out in tmp_path.iterdir():
        begun += len(list(out.iterdir()))
        for kept in out.iterdir():
            if not kept.name.startswith("."):
                equal(load(kept, unroll=False), llama.params)
    assert begun
