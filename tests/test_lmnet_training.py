"""Training of networks: gradients, packing, resuming, and what must not change."""

import copy
import dataclasses
import functools
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomm import lmnet, lora
from jaxcomm.converters import load_agent
from jaxcomm.evals.games.world import held_out, world
from jaxcomm.evals.networks import folders, texts, training
from jaxcomm.evals.networks.settings import Recipe
from jaxcomm.evals.networks.training import batches, manager, train
from jaxcomm.evals.pair import folder
from jaxcomm.model import init_params
from jaxcomm.prompts import left_pad
from jaxcomm.reading import forward
from jaxcomm.sharding import local_mesh
from jaxcomm.training import Batch, Everything, begin, losses, make_optimizer, make_step, pack

from conftest import assert_close, make_checkpoint, read
from crashes import crash_everywhere, kills
from test_lmnet import perturbed

TINY = Recipe(steps=6, rows=8, columns=12, learning_rate=1e-2, every=2)


def counting(start: int):
    """Texts that can be learned: runs of numbers."""
    for i in itertools.count(start):
        rng = np.random.default_rng(i)
        first, n = rng.integers(1, 80), rng.integers(2, 11)
        yield [int(first + t) for t in range(n)], [1.0] * int(n)


@pytest.fixture(scope="module")
def tiny(llama):
    """Wires and what stays, of the smallest network."""
    config = dataclasses.replace(llama.params.config, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ff=24)
    return lmnet.init_network(jax.random.key(0), init_params(jax.random.key(1), config), (1, 1)).split()


def one_batch(rows: int = 2, columns: int = 12, accumulate: int = 1) -> Batch:
    recipe = dataclasses.replace(TINY, rows=rows, columns=columns, accumulate=accumulate)
    return next(batches(counting, recipe))[0]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=40), st.integers(1, 4))
def test_every_text_is_packed_once_whole_and_who_resumes_gets_the_same_batches(lengths, rows):
    documents = [([i] * n, [2.0] * n) for i, n in enumerate(lengths)]
    every, before = list(pack(documents, rows, 9)), 0
    found = []
    for batch, count in every:
        for row in range(rows):
            for number in range(batch.documents[row].max() + 1):
                (at,) = np.nonzero(batch.documents[row] == number)
                assert np.all(np.diff(at) == 1)
                found.append(batch.tokens[row, at].tolist())
                assert batch.weights[row, at].tolist() == [0.0] + [2.0] * (len(at) - 1)
        np.testing.assert_array_equal(batch.weights[batch.documents < 0], 0)
        again = [b for b, _ in pack(documents[before:], rows, 9)]
        np.testing.assert_array_equal(again[0].tokens, batch.tokens)
        before = count
    assert sorted(found) == sorted(list(ids) for ids, _ in documents) and before == len(documents)


@pytest.mark.parametrize("family", ["qwen2_windows", "gpt2"])
def test_packed_texts_do_not_see_each_other(family, tmp_path):
    params = make_checkpoint(tmp_path, family, seed=5).params
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 97, n).tolist(), [1.0] * n) for n in (13, 2, 17, 5, 21, 9)]
    for model in (params, networks_of(params)):
        ((batch, _),) = pack(documents, 2, 40)
        together = np.asarray(jax.jit(losses)(model, batch))
        padded = left_pad([ids for ids, _ in documents])
        alone = np.asarray(jax.nn.log_softmax(read(model, padded)))
        for row, number in {(r, n) for r, own in enumerate(batch.documents) for n in own if n >= 0}:
            (at,) = np.nonzero(batch.documents[row] == number)
            ids = batch.tokens[row, at].tolist()
            (text,) = (n for n, (own, _) in enumerate(documents) if own == ids)
            want = -alone[text, -len(ids) : -1][np.arange(len(ids) - 1), ids[1:]]
            assert_close(together[row, at[:-1]], want, f"text {row}.{number}", 2e-5)
        assert np.all(together[batch.documents < 0] == 0)


def networks_of(params):
    return perturbed(lmnet.init_network(jax.random.key(0), params, (1, 1)))


def test_gradients_equal_finite_differences(tiny):
    """Along random directions, of the wires and of everything, in float64."""
    wires, frozen = tiny
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)
        wires, frozen = wide(wires), wide(frozen)
        wires = jax.tree.map(lambda a: a + 0.1 * np.random.default_rng(a.size).standard_normal(a.shape), wires)
        batch = jax.tree.map(lambda a: a[0], one_batch())
        for trained, rest in ((wires, frozen), (Everything(wires.join(frozen)), None)):
            total = jax.jit(
                lambda trained, rest=rest, remat="off": jnp.sum(losses(trained.join(rest), batch, remat)),
                static_argnames="remat",
            )
            gradient = jax.jit(jax.grad(lambda t, total=total: total(t, remat="products")))(trained)
            for seed in range(3):
                rng = np.random.default_rng(seed)
                way = jax.tree.map(lambda a, rng=rng: jnp.asarray(rng.standard_normal(a.shape)), trained)
                step = lambda by, way=way, trained=trained: jax.tree.map(lambda a, b: a + by * b, trained, way)
                h = 3e-3  # norms and scores are float32 inside
                difference = float(total(step(h)) - total(step(-h))) / (2 * h)
                product = sum(
                    float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True)
                )
                assert product == pytest.approx(difference, rel=2e-2, abs=1e-2)


def test_accumulated_rematerialised_and_spread_over_devices_a_step_is_the_same(tiny):
    wires, frozen = perturbed(tiny[0].join(tiny[1])).split()
    optimizer = make_optimizer(1e-2, 10)
    step = lambda batch, **how: jax.jit(make_step(optimizer, **how))(begin(wires, optimizer), frozen, batch)
    whole, want = step(one_batch(rows=8))
    parts = jax.tree.map(lambda a: a.reshape(4, 2, -1), one_batch(rows=8))
    others = [
        step(one_batch(rows=8), **how) for how in ({"remat": "products"}, {"remat": "all"}, {"mesh": local_mesh(4)})
    ]
    assert float(want["norm"]) > 0.1
    for got, metrics in (step(parts), *others):
        assert_close(metrics["loss"], want["loss"], "loss")
        assert_close(metrics["norm"], want["norm"], "norm")
        # Adam's first moment is a tenth of the gradient. (Its first step is of the gradient's sign, whose least differences show.)
        for x, y in zip(jax.tree.leaves(got.moments), jax.tree.leaves(whole.moments), strict=True):
            assert_close(x, y, "moments", 1e-4)
        moved = [
            not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(got.trained), jax.tree.leaves(wires), strict=True)
        ]
        assert all(moved)


@pytest.mark.parametrize(("steps", "warmup", "risen"), [(10, 0.0, 1), (10, 0.5, 5), (1, 0.03, 1)])
def test_the_rate_rises_from_the_first_step_and_ends_at_a_tenth(steps, warmup, risen):
    optimizer, weight = make_optimizer(1e-2, steps, warmup=warmup, weight_decay=0.0), {"weight": jnp.ones((1, 1))}
    rates, state = [], begin(weight, optimizer).moments
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, state = optimizer.update(weight, state, weight)
            rates.append(-float(updates["weight"][0, 0]))  # of a gradient that stays: the rate itself
    np.testing.assert_allclose(rates[:risen], 1e-2 * np.arange(1, risen + 1) / risen, rtol=1e-4)
    assert rates[-1] == pytest.approx(1e-3 if steps > 1 else 1e-2, rel=1e-4) and rates[risen - 1] == max(rates)


def test_sharded_and_accumulated_training_of_everything_goes_on_the_same(tiny, tmp_path):
    """Bit for bit, in bfloat16, on eight devices; the network that was given stays as it was."""
    network, curve = tiny[0].join(tiny[1]), []
    before, recipe = jax.device_get(network), dataclasses.replace(TINY, fsdp=8, accumulate=2, dtype="bfloat16")
    train(Everything(network), None, counting, recipe, tmp_path / "whole", losses=curve)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    train(Everything(network), None, counting, recipe, tmp_path / "cut", losses=curve)
    assert curve[6:] == curve[4:6]  # it went on from step 4
    files = [(tmp_path / out / "metrics.jsonl").read_bytes() for out in ("whole", "cut")]
    assert files[0] == files[1]
    for x, y in zip(*(jax.tree.leaves(kept(tmp_path / out)) for out in ("whole", "cut")), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(network), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, y)


def test_layers_taken_one_by_one_learn_the_same_and_go_on(llama, tmp_path):
    """As the stack does, but for rounding; from a checkpoint bit for bit. What is kept and returned are stacks."""
    network = perturbed(lmnet.init_network(jax.random.key(0), llama.params, (1, 1)))
    assert not network.models[0].unrolled and llama.params.config.layers > 1
    curves = [], []
    go = lambda out, **how: train(Everything(network), None, counting, TINY, out, **how)
    stacked, alone = go(None, losses=curves[0]), go(tmp_path / "whole", losses=curves[1], unroll=True)
    assert_close(*curves, "loss curves", 1e-4)
    assert jax.tree.structure(alone) == jax.tree.structure(stacked)
    for x, y in zip(jax.tree.leaves(alone.moments), jax.tree.leaves(stacked.moments), strict=True):
        assert_close(x, y, "moments", 1e-3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    go(tmp_path / "cut", losses=curves[1], unroll=True)
    assert curves[1][6:] == curves[1][4:6]
    for x, y in zip(*(jax.tree.leaves(kept(tmp_path / out)) for out in ("whole", "cut")), strict=True):
        np.testing.assert_array_equal(x, y)


def test_norms_biases_and_factors_do_not_decay(tmp_path):
    params = make_checkpoint(tmp_path, "qwen2", seed=1).params
    whole = lmnet.init_network(jax.random.key(0), params, (1, 1), aggregate="concat")
    optimizer = make_optimizer(1e-2, 10, weight_decay=0.5)
    state = begin(Everything(whole), optimizer)
    nothing = jax.tree.map(jnp.zeros_like, state.trained)
    with jax.numpy_dtype_promotion("standard"):
        _, moments = optimizer.update(nothing, state.moments, state.trained)
        updates, _ = optimizer.update(nothing, moments, state.trained)
    moved = {jax.tree_util.keystr(path) for path, u in jax.tree_util.tree_leaves_with_path(updates) if np.any(u)}
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)}
    kept = {name for name in every if "norm" in name or "bias" in name or "scale" in name}
    assert moved == {name for name in every - kept if "'o'" not in name or "edge" not in name} - {
        name for name in every if "edge" in name and "'down'" in name
    }  # what begins at 0 stays there


def test_weights_cut_over_devices_learn_the_same(tiny):
    curves = []
    for fsdp in (1, 8):
        own = []
        state = train(*tiny, counting, dataclasses.replace(TINY, fsdp=fsdp), losses=own)
        curves.append(own)
    assert_close(*curves, "loss curves", 1e-4)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.trained))


def test_training_edges_leaves_every_vertex_as_it_was_and_halves_the_loss():
    """The sample task and the defaults, on the embedded pair: far fewer than 300 steps are needed."""
    agent = load_agent(folder("b"), unroll=False)
    kept = jax.tree.map(np.array, agent.params)
    network, curve = lmnet.init_network(jax.random.key(0), agent.params, (1, 2, 1)), []
    recipe = Recipe(steps=14)
    state = train(*network.split(), texts.source("two-places", agent, recipe.columns), recipe, losses=curve)
    model = state.trained.join(network.split()[1]).models[0]
    for before, after in zip(jax.tree.leaves(kept), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(np.asarray(after), before)
    assert np.mean(curve[-4:]) < curve[0] / 2
    assert all(
        np.any(np.asarray(x) != np.asarray(y))
        for x, y in zip(jax.tree.leaves(state.trained), jax.tree.leaves(network.split()[0]), strict=True)
    )


def test_bfloat16_computation_trains_float32_edges(tiny):
    wires, frozen = tiny
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), frozen)
    curves = [[], []]
    for curve, rest, dtype in ((curves[0], low, "bfloat16"), (curves[1], frozen, "float32")):
        state = train(wires, rest, counting, dataclasses.replace(TINY, dtype=dtype), losses=curve)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trained)} == {"float32"}
    np.testing.assert_allclose(*curves, rtol=0.05)


KILLED = """
import jax, numpy, orbax.checkpoint, tensorboardX
from jaxcomm import lmnet
from jaxcomm.config import ModelConfig
from jaxcomm.evals import programs
from jaxcomm.evals.networks.settings import Recipe
from jaxcomm.evals.networks.training import train
from jaxcomm.model import init_params

config = ModelConfig(vocab=97, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ff=24, max_positions=32)

def counting(start):
    for i in range(start, 10**9):
        rng = numpy.random.default_rng(i)
        n, first = int(rng.integers(2, 11)), int(rng.integers(1, 80))
        yield list(range(first, first + n)), [1.0] * n

def go(out):
    programs.keep()
    network = lmnet.init_network(jax.random.key(0), init_params(jax.random.key(1), config), (1, 1))
    train(*network.split(), counting, Recipe(steps=40, rows=2, columns=12, every=6), home / out)

def steps():
    path = home / "killed" / "metrics.jsonl"
    return path.read_bytes().count(b"\\n") if path.exists() else 0

in_peace(go, "whole")
for wanted in (2, 14, 27):
    killed(lambda: steps() >= wanted, go, "killed")
    print(steps(), flush=True)
in_peace(go, "killed")
"""


def test_real_kills_leave_no_trace(tmp_path):
    reached = [int(word) for word in kills(KILLED, tmp_path)]
    assert len(reached) == 3 and max(reached) < 40
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 40
    found = [kept(path) for path in (whole, killed)]
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_crash_at_any_step_leaves_no_trace(tiny, tmp_path, monkeypatch):
    """Before every line of metrics and every checkpoint, so after every other. (What a step computes is stood in for: it compiles anew in
    every run. What Orbax does between its files is the kills'.)"""

    def make_step(*_, **__):
        def step(state, frozen, batch):
            mean = jnp.mean(batch.tokens.astype(jnp.float32))
            trained = jax.tree.map(lambda a: a + mean, state.trained)
            return state.replace(step=state.step + 1, trained=trained), {"loss": mean, "norm": mean}

        return step

    monkeypatch.setattr(training, "make_step", make_step)
    go = lambda out: train(*tiny, counting, TINY, tmp_path / out)
    go("whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_bytes()

    def whole():
        path = tmp_path / "killed" / "metrics.jsonl"
        found = path.read_bytes() if path.exists() else b""
        assert lines.startswith(found) and (not found or found.endswith(b"\n"))

    watched = ((training, "write_whole"), (training.Records, "note"), (training.Records, "keep"))
    assert crash_everywhere(lambda: go("killed"), whole, watched) >= 6
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == lines
    for x, y in zip(*(jax.tree.leaves(kept(tmp_path / out)) for out in ("whole", "killed")), strict=True):
        np.testing.assert_array_equal(x, y)


def test_an_answer_ends_as_the_chat_template_ends_a_turn(trained):
    """And a text as the first stop token says, also where the template's is another."""
    agent = trained.agent
    tokenizer = copy.deepcopy(agent.tokenizer)
    end, text_end = tokenizer.convert_tokens_to_ids(["!", tokenizer.eos_token])
    ends = lambda agent: [texts._document(agent, texts.Text("Greece", *prompt))[0][-1] for prompt in ((), ("Where?",))]
    assert ends(agent) == [text_end] * 2
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}!{% endfor %}"
    both = dataclasses.replace(agent, tokenizer=tokenizer, stop_tokens=(text_end, end))
    assert ends(both) == ends(dataclasses.replace(both, chat=True)) == [text_end, end]
    assert ends(dataclasses.replace(both, stop_tokens=(text_end,))) == [text_end] * 2, "a turn's end that stops nothing"


def test_a_hubs_data_set_is_the_same_when_training_goes_on(monkeypatch):
    """Its commit is part of what makes a run this run."""
    command = dataclasses.make_dataclass("Command", [("text", str)])("hub:a/b:c:train:text")
    asked = []
    info = lambda name: asked.append(name) or SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.dataset_info", info)
    assert folders.identity(command)["revision"] == "abc" and asked == ["a/b"]
    assert folders.identity(dataclasses.replace(command, text="two-places"))["revision"] is None
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name: 1 / 0)
    with pytest.raises(OSError, match="hub:a/b:c:train:text cannot be read .*: check its name and the network"):
        folders.identity(command)


def kept(path):
    """What the newest checkpoint holds, as it is on disk."""
    import orbax.checkpoint as ocp

    with manager(path) as checkpoints:
        step = checkpoints.latest_step()
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(), optimizer=ocp.args.StandardRestore(), data=ocp.args.JsonRestore()
        )
        got = checkpoints.restore(step, args=items)
    return step, got["model"], got["optimizer"], got["data"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny, tmp_path):
    curve = []
    train(*tiny, counting, TINY, tmp_path / "whole", losses=curve)
    train(*tiny, counting, dataclasses.replace(TINY, steps=6), tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoints" / "6"
    (biggest,) = sorted((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)[-1:]
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    with pytest.raises(ValueError, match="checkpoints/6 is damaged or of another network") as caught:
        train(*tiny, counting, TINY, tmp_path / "cut")
    assert "\n" not in str(caught.value)
    shutil.rmtree(newest)
    train(*tiny, counting, TINY, tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == curve and [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_network_is_refused(tiny, tmp_path):
    train(*tiny, counting, TINY, tmp_path)
    model = tiny[0].join(tiny[1]).models[0]
    other = lmnet.init_network(jax.random.key(0), model, (1, 3, 1)).split()
    with pytest.raises(ValueError, match="of another network"):
        train(*other, counting, TINY, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    def spoiled(start: int):
        for i, (ids, _) in enumerate(counting(start), start):
            yield ids, [1.0 if i < 60 else float("nan")] * len(ids)

    with pytest.raises(
        FloatingPointError, match=r"loss is nan, .* at step \d+: .* keeps step \d+; lower the learning rate"
    ) as caught:
        train(*tiny, spoiled, dataclasses.replace(TINY, steps=40), tmp_path)
    step, last = map(int, re.findall(r"step (\d+)", str(caught.value)))
    assert step - TINY.every <= last < step
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(kept(tmp_path)[1]))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step - 1


def test_metrics_can_be_read_by_tensorboard(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = []
    train(*tiny, counting, TINY, tmp_path, losses=curve)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "norm", "tokens_per_second"}
    assert_close([e.value for e in events.Scalars("loss")], curve, "loss")


@given(st.integers(0, 400), st.sampled_from([None, 7, 50]))
def test_texts_can_be_entered_anywhere(start, n):
    agent = pair_b()
    read = texts.source("two-hop", agent, 64, n=n, seed=3)
    some = list(itertools.islice(read(start), 3))
    assert some == list(itertools.islice(read(0), start, start + 3))


@functools.cache
def pair_b():
    return load_agent(folder("b"), unroll=False)


@pytest.mark.parametrize("test", [False, True])
def test_questions_are_of_what_was_told_and_tests_keep_their_combinations_out_of_training(test):
    marks = {mark.phrase: mark for mark in world().landmarks}
    for n in range(200):
        two, hop = (ask(0, n, test=test) for ask in texts.QUESTIONS.values())
        for text in (two, hop):
            places = dict(sentence.split(" is at ") for sentence in text.prompt.split(". ")[:2])
            countries = {person: marks[place].country for person, place in places.items()}
            assert len(set(countries.values())) == 2
            assert all(held_out(person, marks[place].name) == test for person, place in places.items())
            if text is two:
                assert text.answer == " and ".join(countries.values())
            else:
                who, whom = text.prompt.split(". ")[2].split(" is with ")
                assert countries[whom] == text.answer and who not in countries
                assert text.prompt.endswith(f"Which country is {who} located in?")


def test_files_of_texts_and_of_questions(tmp_path):
    agent = pair_b()
    (tmp_path / "a.txt").write_text("Alice is at Meteora.\n\nBob\nis there.\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "Who?", "answer": "Alice"}\n\n{"text": "Bob is at Meteora."}\n')
    plain = {tuple(ids) for ids, _ in itertools.islice(texts.source(str(tmp_path / "a.txt"), agent, 64)(0), 2)}
    assert {agent.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in plain} == {
        "Alice is at Meteora.",
        "Bob\nis there.",
    }
    both = list(itertools.islice(texts.source(str(tmp_path / "b.jsonl"), agent, 64)(0), 2))
    asked = next(doc for doc in both if 0.0 in doc[1])
    learned = [token for token, weight in zip(*asked, strict=True) if weight]
    assert agent.tokenizer.decode(learned[:-1]).strip() == "Alice" and learned[-1] == agent.stop_tokens[0]
    long = texts.source(str(tmp_path / "a.txt"), agent, 4)
    assert max(len(ids) for ids, _ in itertools.islice(long(0), 10)) == 4
    for content, message in (("[1]\n", "line 1 is not a JSON object"), ('{"answer": "x"}\n', 'neither a "text" nor')):
        (tmp_path / "c.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            texts.source(str(tmp_path / "c.jsonl"), agent, 64)


def test_a_hubs_texts_are_read_whole_in_pieces_and_again(monkeypatch):
    import datasets

    agent, asked = pair_b(), [("Alice is at Meteora. " * 150).strip(), "Bob is at the Colosseum."]
    records = [{"text": text} for text in asked]
    streamed = lambda *_, **how: datasets.IterableDataset.from_generator(lambda: iter(records))
    monkeypatch.setattr(datasets, "load_dataset", streamed)
    read = texts.source("hub:some/where::train:text", agent, 100)
    long, short = ([*agent.tokenizer.encode(text), agent.stop_tokens[0]] for text in asked)
    assert len(long) % 100 > 1  # a single last token would be left out
    once = -(-len(long) // 100) + 1
    found = [ids for ids, _ in itertools.islice(read(0), 2 * once)]
    for epoch in (found[:once], found[once:]):
        assert sorted(itertools.chain(*epoch)) == sorted([*long, *short])
    assert max(map(len, found)) == 100
    assert [ids for ids, _ in itertools.islice(read(3), 4)] == found[3:7]
    records.clear()
    with pytest.raises(ValueError, match="there is nothing to learn"):
        texts.source("hub:some/where::train:text", agent, 100)
    with pytest.raises(ValueError, match="write hub:NAME:CONFIG:SPLIT:FIELD"):
        texts.source("hub:some/where", agent, 100)


def test_lora_begins_as_the_model_and_is_the_sum_of_both(llama):
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    factors = lora.init_lora(jax.random.key(0), llama.params, 3)
    assert_close(forward(factors.join(llama.params), tokens), forward(llama.params, tokens), "new factors")
    moved = jax.tree.map(lambda a: a + 0.1, factors)
    model = moved.join(llama.params)
    at = moved.factors["['mlp']['down']['weight']"]
    by = 2.0 * np.asarray(at["up"], np.float64)[2] @ np.asarray(at["down"], np.float64)[2]
    want = np.asarray(llama.params.blocks["mlp"]["down"]["weight"])[2] + by
    assert_close(model.blocks["mlp"]["down"]["weight"][2], want, "W + 2 up down")
    assert set(moved.factors) == {
        f"['{m}']['{w}']['weight']" for m, ws in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))) for w in ws
    }
    for rank in (1, 5, 40):
        assert (
            lora.rank_of_size(llama.params, lmnet.size(lora.init_lora(jax.random.key(0), llama.params, rank))) == rank
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tiny: train(*tiny, counting, dataclasses.replace(TINY, columns=2000)), "rows of 2000 tokens are longer"),
        (lambda tiny: train(*tiny, lambda n: itertools.islice(counting(n), 40), TINY), r"the texts end after \d of 6 steps"),
        (lambda tiny: train(*tiny, counting, dataclasses.replace(TINY, rows=3)), "3 rows cannot be spread over 8 devices"),
        (lambda tiny: train(*tiny, counting, dataclasses.replace(TINY, fsdp=3)), "over 3 of 8 devices"),
        (lambda tiny: train(tiny[0].replace(edges={}), tiny[1], counting, TINY), "nothing to train on the edges"),
        (lambda tiny: Recipe(steps=0), "steps = 0: it must be at least 1"),
        (lambda tiny: Recipe(learning_rate=-1.0), "learning rate and clip must be above 0"),
        (lambda tiny: list(pack([([1], [1.0])], 1, 4)), "text 0 has 1 tokens"),
        (lambda tiny: list(pack([([1] * 5, [1.0] * 5)], 1, 4)), "rows hold 2 to 4"),
        (lambda tiny: lora.init_lora(jax.random.key(0), tiny[1].models[0], 0), "rank 0"),
        (lambda tiny: lora.init_lora(jax.random.key(0), tiny[1].models[0], 2).join(tiny[1].models[0].unroll()), "must be laid out as"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(tiny, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tiny)
    assert "\n" not in str(caught.value)
