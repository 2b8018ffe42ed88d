"""Trained bridges between keys and values: the fuser of C2C and the gated memory, against plain PyTorch; training; the
protocol under its controls."""

import dataclasses
import shutil

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm import bridges
from jaxcomm.bridges import Pair, answered, fuse, gates, init_c2c, init_gated, remember
from jaxcomm.evals.games import draw
from jaxcomm.evals.networks import texts
from jaxcomm.evals.networks.settings import Recipe
from jaxcomm.evals.networks.training import train
from jaxcomm.evals.pair import folder
from jaxcomm.flops import c2c_flops, gated_flops, generation_flops, keys_flops
from jaxcomm.prefixes import attention_onto
from jaxcomm.protocols import CONTROLS, Bridging, StandIn, bridge, inspect_bridge, send_bridged, silent
from jaxcomm.protocols.text import likelihoods
from jaxcomm.sharding import local_mesh
from jaxcomm.training import begin, losses, make_optimizer, make_step, pack

from conftest import assert_close, make_checkpoint, refused
from speakers import QUESTIONS

READS = jc.left_pad([[5, 9, 3, 22, 41, 8, 30], [7, 2, 60], [33, 11, 90, 4, 17]], 8)
TOLD = jc.left_pad([[15, 6, 13, 2], [71, 2, 6, 8, 9, 10], [3, 1, 9]], 6)


def lively(tree, seed=0):
    """Weights with nothing at 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype), tree)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Families with unequal heads, head sizes and depths; B has windows."""
    where = tmp_path_factory.mktemp("two")
    a = make_checkpoint(where / "a", "llama", seed=2, num_hidden_layers=5, num_key_value_heads=4)
    b = make_checkpoint(where / "b", "qwen2_windows", seed=3)
    return a.params, b.params


# The fuser ----------------------------------------------------------------------------------------------------------


def t(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def torch_residual(bridge, part, layer, own, other):
    """What one layer's keys or values of one row are moved by before its gate: [K, H] of one token, written out."""
    at = lambda tree: jax.tree.map(lambda a: t(a)[part, layer], tree)
    w = at(bridge.weights)

    def linear(module, x):
        return torch.nn.functional.linear(x, module["weight"], module["bias"])

    def ffn(module, x):
        normed = x / torch.sqrt((x * x).mean() + 1e-6) * module["norm"]["scale"]
        return x + linear(module["down"], torch.nn.functional.gelu(linear(module["up"], normed)))

    x = ffn(w["block"], linear(w["enter"], torch.cat([other.flatten(), own.flatten()])))
    weight = torch.sigmoid(linear(w["weigh"]["out"], ffn(w["weigh"]["block"], x)))
    made = linear(w["project"]["out"], ffn(w["project"]["block"], x)).reshape(own.shape)
    return weight[:, None] * made


def test_several_sharers_are_fused_as_in_pytorch(two):
    """Unequal heads, head sizes and depths, left padding; one sharer reads other tokens, aligned by columns."""
    (a, b), texts = two, (READS, TOLD)
    own = jc.prefill(b, READS)[1]
    others = [jc.prefill(a, x)[1] for x in texts]
    columns = [None, np.array([[-1, 2, 2, -2, 3, 4, 5, 5]] * 3)]
    made = [lively(init_c2c(jax.random.key(n), a, b, hidden=16), n) for n in range(2)]
    assert {bool(x) for bridge in made for x in np.asarray(bridge.open).ravel()} == {True, False}
    got = fuse(made, own, others, columns)
    assert got.k.shape == own.k.shape and np.array_equal(got.positions, own.positions)
    moved = 0
    for part, (mine, found) in enumerate(((own.k, got.k), (own.v, got.v))):
        for layer, row, column in np.ndindex(4, 3, 8):
            want = t(mine)[layer, row, :, column]
            if own.positions[row, column] >= 0:
                for bridge, other, at in zip(made, others, columns, strict=True):
                    there = column if at is None else at[row, column]
                    if there < 0 or other.positions[row, there] < 0 or not bridge.open[part, layer]:
                        continue
                    heard = t((other.k, other.v)[part])[layer + 1, row, :, there]  # A is a layer deeper
                    want = want + torch_residual(bridge, part, layer, t(mine)[layer, row, :, column], heard)
                    moved += 1
            assert_close(found[layer, row, :, column], want.numpy(), f"{part}, {layer}, {row}, {column}", 1e-5)
    assert moved > 50


def test_layers_without_a_partner_stay(two):
    """B is deeper: its lowest layer has none."""
    b, a = two
    bridge = lively(init_c2c(jax.random.key(0), a, b, hidden=8))
    bridge = bridge.replace(weights={**bridge.weights, "gate": {"bias": jnp.ones((2, 4))}})
    own = jc.prefill(b, READS)[1]
    got = fuse([bridge], own, [jc.prefill(a, READS)[1]])
    changed = [not np.array_equal(got.k[n], own.k[n]) for n in range(5)]
    assert changed == [False, True, True, True, True]
    assert np.array_equal(fuse([bridge], own, [jc.prefill(a, READS)[1]]).k[0], own.k[0])


def test_gates_are_drawn_once_for_each_row_head_and_token_and_cool_to_a_step(two):
    bridge = init_c2c(jax.random.key(0), *two, hidden=8, steps=11, seed=4)
    at = lambda step, part=0: np.asarray(gates(bridge, jnp.array([step, part], jnp.int32), (40, 2, 25)))
    first, last = at(0), at(10)
    assert first.shape == (2, 4, 40, 2, 25) and len(np.unique(first)) > 0.99 * first.size
    assert np.array_equal(first, at(0)) and not np.array_equal(first, at(1)) and not np.array_equal(first, at(0, 1))
    # One Gumbel: P(g > 0) = 1 - exp(-1), at every temperature.
    assert np.mean(first > 0.5) == pytest.approx(1 - np.exp(-1), abs=0.01)
    assert np.mean(last > 0.5) == pytest.approx(1 - np.exp(-1), abs=0.01)
    assert np.mean((last > 0.01) & (last < 0.99)) < 0.01, "at 0.001 gates are open or closed"
    half = at(5)  # T = 0.001^(1/2): the logit of the gate over that of the same draw at T = 1
    logit = lambda p: np.log(p / (1 - p))
    g = np.asarray(jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(jax.random.key(4), 5), 0), half.shape))
    inside = np.abs(g) < 0.2
    np.testing.assert_allclose(logit(half[inside].astype(np.float64)), g[inside] / 0.001**0.5, rtol=2e-3)
    assert set(np.unique(gates(bridge, None, (1, 1, 1)))) == {0.0}


# The gated memory ---------------------------------------------------------------------------------------------------


def test_a_memory_is_read_beside_the_text_as_in_numpy(two):
    """One layer by hand: what its heads add, from queries, memory and gates, for every token of B."""
    a, b = two
    bridge = lively(init_gated(jax.random.key(0), a, b, rank=3))
    other = jc.prefill(a, TOLD)[1]
    memory = remember(bridge, other)
    c, depth = b.config, [int(np.clip(round((n + 0.5) * 5 / 4 - 0.5), 0, 4)) for n in range(4)]
    rms = lambda x: x / np.sqrt((x**2).mean() + 1e-6)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), bridge.weights)
    for layer, row, column in ((0, 1, 2), (3, 0, 5), (2, 2, 4)):
        k, v = (np.asarray(x, np.float64)[depth[layer], row, :, column].ravel() for x in (other.k, other.v))
        x = np.concatenate([rms(k), rms(v)])
        for part, made in enumerate((memory.k, memory.v)):
            want = (w["up"][part, layer] @ (w["down"][part, layer] @ x)).reshape(c.kv_heads, -1)
            assert_close(made[layer, row, :, column], want, f"{layer}", 1e-5)
    # The first layer's queries meet nothing of the memory before.
    alone = jc.run_with_cache(b, READS, sites=["q", "z"], layers=[1])[1]
    with_it = read_with(b, READS, memory)
    rows = np.asarray(READS.mask)
    looked = np.zeros((*rows.shape, c.heads, TOLD.shape[1]))
    for row in range(3):
        keys = np.asarray(memory.k)[0, row][:, np.asarray(TOLD.mask)[row]]
        values = np.asarray(memory.v)[0, row][:, np.asarray(TOLD.mask)[row]]
        for place, column in enumerate(np.flatnonzero(rows[row])):
            q = turned(np.asarray(alone["q"])[0, row, column], place, c)
            for head in range(c.heads):
                pair = head // (c.heads // c.kv_heads)
                s = keys[pair] @ q[head] / np.sqrt(c.head_dim)
                p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
                want = np.asarray(alone["z"])[0, row, column, head] + np.tanh(w["gate"]["bias"][0, head]) * (
                    p @ values[pair]
                )
                assert_close(with_it[row, column, head], want, f"{row}, {column}, {head}", 2e-5)
                looked[row, column, head, np.flatnonzero(np.asarray(TOLD.mask)[row])] = p
    weight = rows / rows.sum(axis=1, keepdims=True)
    # The memory's columns are weights of its own softmax, wherever it lies among what is read.
    for past in ([memory], [memory, jc.prefill(b, READS)[1]]):
        onto = attention_onto(b, READS, past=past)[0, :, : looked.shape[-1]]
        if len(past) == 1:
            assert_close(onto, np.einsum("bqhs,bq->bs", looked, weight) / c.heads, "attention on the memory", 1e-5)
        assert_close(np.asarray(onto).sum(axis=1), np.ones(3), "its own softmax", 1e-5)


def turned(q, place, c):
    half = c.head_dim // 2
    angle = place * c.rope.theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([q[:, :half] * cos - q[:, half:] * sin, q[:, half:] * cos + q[:, :half] * sin], axis=1)


def read_with(params, prompts, memory):
    """Site z of the first layer behind a memory."""
    from jaxcomm.cache import Attended
    from jaxcomm.edits import Read, hook_of
    from jaxcomm.language_model import positions_of
    from jaxcomm.model import enter, run_blocks

    positions = positions_of(prompts, [memory])
    hook = hook_of(params, positions, (), [Read(jc.Site("z", 1, "all"), (1,))])
    h, hook = enter(params, prompts.tokens, positions, hook)
    return np.asarray(run_blocks(params, h, positions, attended=Attended([memory]), hook=hook)[2][0][0])


def test_closed_gates_leave_the_receiver_bit_for_bit(two):
    a, b = two
    for params in (b, b.unroll()):
        plain, cache = jc.prefill(params, READS)
        memory = remember(init_gated(jax.random.key(0), a, params), jc.prefill(a, TOLD)[1])
        logits, own = jc.prefill(params, READS, past=[memory])
        assert np.asarray(logits).tobytes() == np.asarray(plain).tobytes()
        assert np.array_equal(own.k[2], cache.k[2])
        wrote = [jc.generate(params, READS, past=past, max_new_tokens=4).tokens for past in ([], [memory])]
        assert np.array_equal(*wrote)
        fused = fuse([init_c2c(jax.random.key(0), a, params, hidden=8)], cache, [jc.prefill(a, READS)[1]])
        for x, y in zip(jax.tree.leaves(fused), jax.tree.leaves(cache), strict=True):
            assert np.array_equal(x, y)


def test_an_empty_memory_adds_nothing(two):
    a, b = two
    bridge = lively(init_gated(jax.random.key(0), a, b))
    other = jc.prefill(a, TOLD)[1]
    plain = jc.prefill(b, READS)[0]
    for nothing in (other.replace(positions=jnp.full_like(other.positions, -1)), jax.tree.map(jnp.zeros_like, other)):
        assert np.array_equal(jc.prefill(b, READS, past=[remember(bridge, nothing)])[0], plain)
    assert not np.allclose(jc.prefill(b, READS, past=[remember(bridge, other)])[0], plain, atol=1e-3)
    empty = other.replace(positions=jnp.full_like(other.positions, -1))
    assert not np.any(attention_onto(b, READS, past=[remember(bridge, empty)]))


# Training -----------------------------------------------------------------------------------------------------------


DOCUMENTS = [
    ([5, 9, 3, 22, 41, 8, 30], [0, 0, 0, 0, 1, 1, 1], [15, 6, 13, 2]),
    ([7, 2, 60], [0, 0, 1], [71, 2, 6, 8, 9, 10]),
    ([33, 11, 90, 4, 17, 5], [0, 0, 1, 0, 0, 1], [3, 1, 9]),
    ([12, 40, 77, 8], [0, 0, 1, 1], [44]),
]
DOCUMENTS = [(ids, [float(w) for w in weights], told) for ids, weights, told in DOCUMENTS]


def one_by_one(kind, bridge, a, b):
    """Log-probabilities of what is learned, text by text, as the bridge is used."""
    found = []
    for ids, weights, told in (DOCUMENTS[n] for n in (0, 1, 3, 2)):
        first = weights.index(1.0)
        prompt, answer = ids[:first], ids[first:]
        if kind == "c2c":
            heads = np.array([prompt[:-1]])
            past = [fuse([bridge], jc.prefill(b, heads)[1], [jc.prefill(a, heads)[1]])]
            logits, own = jc.prefill(b, np.array([prompt[-1:]]), past=past)
        else:
            past = [remember(bridge, jc.prefill(a, np.array([told]))[1])]
            logits, own = jc.prefill(b, np.array([prompt]), past=past)
        scores, _ = jc.score(b, logits, own, np.array([[answer]]), past=past)
        found += (np.asarray(scores)[0, 0] * np.array(weights[first:])).tolist()
    return [x for x in found if x]


def opened(bridge):
    bridge = lively(bridge, 1)
    if isinstance(bridge, jc.C2C):
        bridge = bridge.replace(
            weights={**bridge.weights, "gate": {"bias": jnp.array([[1, -1, 1, 1], [1.0, 1, -1, 1]])}}
        )
    return bridge


def made(kind, two, **how):
    init = {"c2c": init_c2c, "gated": init_gated}[kind]
    return init(jax.random.key(0), *two, **({"hidden": 8} if kind == "c2c" else {"rank": 2}), **how)


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_packed_texts_are_read_as_each_is_alone(two, kind):
    bridge, pieces = opened(made(kind, two)), slice(0, 2 if kind == "c2c" else 3)
    ((batch, _),) = pack([text[pieces] for text in DOCUMENTS], 2, 14)
    assert batch.documents.max(axis=1).tolist() == [2, 0], "the first row has texts 0, 1 and 3"
    packed = np.asarray(losses(bridge.join(Pair(*two)), batch))
    assert_close(-packed[packed != 0], np.array(one_by_one(kind, bridge, *two)), "log-probabilities", 1e-4)
    plain = np.asarray(losses(two[1], batch))
    assert not np.allclose(packed, plain, atol=1e-2), "the bridge says something"


def test_packed_texts_of_other_tokens_are_aligned(trio):
    """As the protocol reads each of them: tokens of A of other numbers, and of another vocabulary."""
    a, b = trio["reversed"].agent, trio["gemma2"].agent
    made = init_c2c(jax.random.key(0), a.params, b.params, hidden=8)
    made = made.replace(aligned=True, weights={**made.weights, "gate": {"bias": jnp.ones((2, 2))}})
    asked = [texts.Text("bob", question) for question in QUESTIONS]
    documents = [texts._document(b, text, a, aligned=True) for text in asked]
    assert all(len(document) == 4 and document[2] != document[0] for document in documents)
    batch = jax.tree.map(jnp.asarray, next(pack(documents, 1, 64))[0])
    packed = np.asarray(losses(made.join(Pair(a.params, b.params)), batch))[0]
    turn = bridge(a, b, (), QUESTIONS, bridge=made)
    ends = [scored.logprobs[0] for scored in turn.score_tokens([[document[0][-2:]] for document in documents])]
    found = [-packed[np.asarray(batch.documents)[0] == n].sum() for n in range(3)]
    assert_close(np.array(found), np.array(ends), "log-probabilities", 1e-4)


def test_what_attends_to_the_fused_cache_begins_at_the_last_token_of_each_prompt():
    ((batch, _),) = pack([text[:2] for text in DOCUMENTS], 1, 24)
    from jaxcomm.training import positions_in

    found = answered(jnp.asarray(batch.weights > 0), positions_in(batch.documents))
    want = [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert np.asarray(found)[0].astype(int).tolist() == want


def learnable(start: int):
    """What A reads says what B is to answer."""
    i = start
    while True:
        rng = np.random.default_rng(i)
        x = int(rng.integers(10, 16))
        yield [3, int(rng.integers(20, 40)), 4, x + 40], [0.0, 0.0, 0.0, 1.0], [5, x, 6]
        i += 1


def told_nothing(start: int):
    for ids, weights, _ in learnable(start):
        yield [ids[0], ids[3] - 40, *ids[1:]], [0.0, *weights]


SOURCES = {"c2c": told_nothing, "gated": learnable}
TINY = Recipe(steps=6, rows=8, columns=12, learning_rate=1e-2, every=2)


@pytest.fixture(scope="module")
def small(two):
    """As small as can be, to compile quickly."""
    cut = dict(layers=1, width=32, heads=2, kv_heads=1, head_dim=16, ff=24, windows=())
    a = dataclasses.replace(two[0].config, **{**cut, "layers": 2})
    b = dataclasses.replace(two[1].config, **cut)
    return jc.init_params(jax.random.key(1), a), jc.init_params(jax.random.key(2), b)


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_training_goes_on_bit_for_bit_and_moves_the_bridge_alone(small, kind, tmp_path):
    """Draws and temperature, too; on eight devices, in two accumulated parts."""
    how = {"steps": TINY.steps} if kind == "c2c" else {}
    bridge, curve = made(kind, small, **how), []
    before = jax.device_get(small)
    recipe = dataclasses.replace(TINY, accumulate=2)
    go = lambda out, **more: train(bridge, Pair(*small), SOURCES[kind], recipe, tmp_path / out, losses=curve, **more)
    trained = go("whole").trained
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    again = go("cut").trained
    assert curve[6:] == curve[4:6]
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(small), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, y)
    still = [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(jax.tree.leaves_with_path(trained), jax.tree.leaves(bridge), strict=True)
        if np.array_equal(x, y)
    ]
    assert not still, "every leaf is trained"


def one_step(bridge, pair, batch, **how):
    optimizer = make_optimizer(1e-2, 10)
    parts = jax.tree.map(lambda a: a[None], batch)
    return jax.jit(make_step(optimizer, **how))(begin(bridge, optimizer), Pair(*pair), parts)


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_a_step_is_the_same_rematerialised_and_spread_and_its_gradient_is_finite(small, kind):
    bridge = lively(made(kind, small, **({"steps": 10} if kind == "c2c" else {})))
    batch, _ = next(pack(SOURCES[kind](0), 8, 12))
    whole, want = one_step(bridge, small, batch)
    assert np.isfinite(want["norm"]) and float(want["norm"]) > 0.01
    for how in ({"remat": "all"}, {"remat": "products", "mesh": local_mesh(4)}):
        got, metrics = one_step(bridge, small, batch, **how)
        assert_close(metrics["loss"], want["loss"], "loss")
        for x, y in zip(jax.tree.leaves(got.moments), jax.tree.leaves(whole.moments), strict=True):
            assert_close(x, y, "moments", 1e-4)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small)
    rough = one_step(bridge, low, batch, dtype=jnp.bfloat16)[1]
    assert float(rough["loss"]) == pytest.approx(float(want["loss"]), rel=0.05)


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_what_only_the_sender_knows_is_learned(small, kind):
    """The models are random and stay so. What is said of another's text is not what was learned."""
    curve, recipe = [], dataclasses.replace(TINY, steps=60, learning_rate=5e-2)
    bridge = made(kind, small, **({"steps": 60} if kind == "c2c" else {}))
    trained = train(bridge, Pair(*small), SOURCES[kind], recipe, losses=curve).trained
    assert np.mean(curve[-5:]) < 0.5 * curve[0]
    assert np.asarray(trained.open).all()
    if kind == "gated":
        batch, _ = next(pack(learnable(10**6), 8, 12))
        others = jax.tree.map(lambda a: np.roll(a, 1, axis=0), batch.told)
        mean = lambda told: float(
            losses(trained.join(Pair(*small)), batch.replace(told=told)).sum() / batch.weights.sum()
        )
        assert mean(others) > mean(batch.told) + 1


def test_gradients_of_a_closed_memory_open_its_gates(small):
    batch, _ = next(pack(learnable(0), 4, 12))
    bridge = made("gated", small)
    gradient = jax.grad(lambda x: jnp.sum(losses(x.join(Pair(*small)), batch)))(bridge).weights
    assert float(jnp.abs(gradient["gate"]["bias"]).min()) > 0 and not np.any(gradient["down"])


def test_texts_and_what_the_sender_reads_are_packed_side_by_side():
    ((batch, count),) = pack(DOCUMENTS, 2, 14)
    assert count == 4
    found = {}
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
        pick = lambda part, row=row, number=number: part.tokens[row][part.documents[row] == number].tolist()
        found[tuple(pick(batch))] = pick(batch.told)
    assert found == {tuple(ids): told for ids, _, told in DOCUMENTS}
    tight = list(pack(DOCUMENTS, 1, 8))
    assert [n for _, n in tight] == [1, 2, 3, 4], "a row is full when either side is"


# The protocol -------------------------------------------------------------------------------------------------------


GAME = draw("countries", 3, 5)
TOLD_A, ASKED, ANSWERS = (tuple(x) for x in zip(*((i.prompt_a, i.prompt_b, i.answer) for i in GAME.items), strict=True))


@pytest.fixture(scope="module")
def agents():
    return [jc.load_agent(folder(name)) for name in "ab"]


@pytest.fixture(scope="module")
def crossing(agents):
    """Both kinds, as if trained."""
    pair = [agent.params for agent in agents]
    fused, beside = init_c2c(jax.random.key(0), *pair, hidden=8), init_gated(jax.random.key(1), *pair, rank=2)
    rng = np.random.default_rng(0)
    fused = fused.replace(
        weights={**fused.weights, "gate": {"bias": jnp.asarray(rng.choice([-1.0, 1.0], (2, 6)), jnp.float32)}}
    )
    gate = {"bias": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32).at[2].set(0)}
    return {"c2c": fused, "gated": beside.replace(weights={**beside.weights, "gate": gate})}


def logits(turn):
    return np.asarray(turn.logits)


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_the_protocol_is_its_parts_game_by_game(agents, crossing, kind):
    """What is written, too: without padding, each game alone."""
    (a, b), made = agents, crossing[kind]
    replies = bridge(a, b, TOLD_A, ASKED, bridge=made).write(3)
    for reply, told, asked in zip(replies, TOLD_A, ASKED, strict=True):
        (told,), (asked,) = a.rows([told]), b.rows([asked])
        one = lambda row: np.array([row])
        if kind == "c2c":
            own, other = (jc.prefill(x.params, one(asked[:-1]))[1] for x in (b, a))
            past, asked = [fuse([made], own, [other])], asked[-1:]
        else:
            past = [remember(made, jc.prefill(a.params, one(told))[1])]
        wrote = jc.generate(b.params, one(asked), past=past, max_new_tokens=3, stop_tokens=b.stop_tokens)
        assert reply.text == b.text(wrote)[0].strip()


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_a_game_over_a_bridge_is_looked_into(agents, crossing, kind):
    a, b = agents
    found = inspect_bridge(a, b, TOLD_A, ASKED, ANSWERS, Bridging(crossing[kind]), max_new_tokens=3)
    replies, open = bridge(a, b, TOLD_A, ASKED, bridge=crossing[kind]).write(3), np.asarray(crossing[kind].open)
    for x, reply in zip(found, replies, strict=True):
        assert x.reply == reply and x.heard[-1].likeliest.ids[0] == reply.ids[0] and x.sent.kind == kind
        assert [layer.layer for layer in x.heard] == [1, 2, 3, 4, 5, 6] and x.heard != x.alone
        if kind == "gated":
            want = np.abs(np.tanh(np.asarray(crossing[kind].weights["gate"]["bias"]))).mean(axis=1)
            np.testing.assert_allclose(x.sent.keys, want, rtol=1e-5)
            np.testing.assert_allclose(np.sum(x.sent.looks.last, axis=1), 1, rtol=1e-5)
        else:
            for moved, gate in zip((x.sent.keys, x.sent.values), open, strict=True):
                assert ((np.array(moved) > 0) == gate).all() and max(moved) < 10
    silent = bridge(a, b, TOLD_A, ASKED, bridge=crossing[kind], control="zero")
    if kind == "gated":
        for x, logprobs in zip(found, np.asarray(jax.nn.log_softmax(silent.logits)), strict=True):
            assert x.alone[-1].answer_logprob == pytest.approx(logprobs[x.answer_id], abs=1e-4)


def test_details_name_the_open_gates(agents, crossing):
    a, b = agents
    told = bridge(a, b, TOLD_A, ASKED, bridge=crossing["c2c"]).details[0]
    want = [(np.flatnonzero(row > 0) + 1).tolist() for row in np.asarray(crossing["c2c"].weights["gate"]["bias"])]
    assert (told["kind"], told["open_keys"], told["open_values"]) == ("c2c", *want)
    told = bridge(a, b, TOLD_A, ASKED, bridge=crossing["gated"], control="zero").details[0]
    assert (told["kind"], told["open"], told["control"]) == ("gated", [1, 2, 4, 5, 6], "zero")


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_models_may_be_of_two_dtypes(agents, crossing, kind):
    a, b = agents
    low = dataclasses.replace(a, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), a.params))
    made = crossing[kind].replace(sender=None)
    rough, plain = (logits(bridge(agent, b, TOLD_A, ASKED, bridge=made)) for agent in (low, a))
    alone = logits(silent(a, b, TOLD_A, ASKED))
    assert np.abs(rough - plain).mean() < 0.2 * np.abs(alone - plain).mean()


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_every_control_stands_in_for_the_senders_keys_and_values(agents, crossing, kind):
    (a, b), how = agents, {"bridge": crossing[kind]}
    alone, plain = logits(silent(b, b, TOLD_A, ASKED)), logits(bridge(a, b, TOLD_A, ASKED, **how))
    sent = send_bridged([a], b, TOLD_A, ASKED, Bridging(crossing[kind]))
    found = {}
    for control in CONTROLS:
        stand_in = StandIn(control, answers=ANSWERS, seed=3)
        turn = bridge(a, b, TOLD_A, ASKED, sent=sent, control=stand_in, **how)
        found[control] = logits(turn)
        assert np.isfinite(found[control]).all() and turn.details[0]["control"] == control
        assert (turn.received is None) == (control == "self")
    far = lambda x, y: np.abs(x - y).max() > 1e-2
    assert not far(found["self"], alone), "without A, B is alone"
    assert far(plain, alone)
    for control in ("other", "mean", "moments", "noise", "adversarial", "unrelated"):
        assert far(found[control], plain), control
    order = jc.derange(ANSWERS, 3)
    if kind == "gated":
        np.testing.assert_allclose(
            found["other"], logits(bridge(a, b, [TOLD_A[i] for i in order], ASKED, **how)), atol=1e-4
        )
        np.testing.assert_allclose(found["generated"], logits(bridge(a, b, ASKED, ASKED, **how)), atol=1e-4)
        np.testing.assert_allclose(found["zero"], alone, atol=1e-4)
    else:
        np.testing.assert_allclose(found["generated"], plain, atol=1e-4)
        assert far(found["zero"], alone), "a fuser also reads B's own"
    likely = lambda x: np.array([np.sum(y) for y in likelihoods(x, ANSWERS)])
    worst = likely(
        bridge(a, b, TOLD_A, ASKED, sent=sent, control=StandIn("adversarial", answers=ANSWERS, seed=3), **how)
    )
    assert worst.sum() < likely(bridge(a, b, TOLD_A, ASKED, **how)).sum()


def dots(jaxpr, times=1):
    """FLOPs of all matrix products of a program, a multiply-add counted twice."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[n] for n in contracted], dtype=int)
            total += 2 * times * int(inner * np.prod(eqn.outvars[0].aval.shape, dtype=int))
        for inside in jax.extend.core.jaxprs_in_params(eqn.params):
            total += dots(inside, times * eqn.params.get("length", 1))
    return total


@pytest.mark.parametrize("kind", ["c2c", "gated"])
def test_a_bridge_costs_what_its_program_multiplies(agents, crossing, kind):
    (a, b), made = agents, crossing[kind]
    rows = np.arange(7)[None] + 5
    own, other = (jc.prefill(agent.params, rows)[1] for agent in (b, a))
    program = (lambda: fuse([made], own, [other])) if kind == "c2c" else (lambda: remember(made, other))
    count, configs = dots(jax.make_jaxpr(program)().jaxpr), [agent.params.config for agent in agents]
    flops = c2c_flops(*configs, 8, 7) if kind == "c2c" else gated_flops(*configs, 2, 7)
    assert count == flops
    replies = bridge(a, b, TOLD_A, ASKED, bridge=made).write(2)
    for reply, told, asked in zip(replies, a.rows(TOLD_A), b.rows(ASKED), strict=True):
        new, read = len(reply.written), len(asked) - 1 if kind == "c2c" else len(told)
        want = keys_flops(configs[0], read) + flops // 7 * read + generation_flops(configs[1], len(asked), new)
        layers = 6 if kind == "c2c" else len(set(bridges.sources(made.shape)))
        if kind == "gated":  # five layers of B attend to it, the last one for one token of the prompt
            pairs = read * (4 * len(asked) + 1 + 5 * (new - 1))
            want += 4 * configs[1].heads * configs[1].head_dim * pairs
        assert reply.spent.flops == want
        assert reply.spent.sent == 2 * layers * configs[0].kv_heads * configs[0].head_dim * 4 * read
        assert reply.spent.read == len(asked) + read


def test_several_sharers_and_other_tokens(trio):
    """Tokens of other numbers, aligned by characters, are fused as the same tokens are."""
    a, b, other = (trio[name].agent for name in ("llama", "gemma2", "reversed"))
    first = init_c2c(jax.random.key(0), a.params, b.params, hidden=8)
    open_ = lambda one: one.replace(weights={**one.weights, "gate": {"bias": jnp.ones((2, 2))}})
    first, by_letter = open_(first), lambda one: one.replace(aligned=True)
    plain = bridge(a, b, (), QUESTIONS, bridge=first)
    aligned = bridge(a, b, (), QUESTIONS, bridge=by_letter(first))
    np.testing.assert_allclose(logits(aligned), logits(plain), atol=1e-4)
    second = open_(init_c2c(jax.random.key(1), other.params, b.params, hidden=8))
    refused(
        lambda: bridge(other, b, (), QUESTIONS, bridge=second), "read the prompts as different tokens: train a bridge"
    )
    alone = logits(bridge(other, b, (), QUESTIONS, bridge=by_letter(second)))
    both = logits(bridge([a, other], b, (), QUESTIONS, bridge=[first, by_letter(second)]))
    assert np.abs(both - logits(plain)).max() > 1e-2 and np.abs(both - alone).max() > 1e-2
    twice = logits(bridge([a, a], b, (), QUESTIONS, bridge=[first, first], control="self"))
    np.testing.assert_allclose(twice, logits(silent(b, b, (), QUESTIONS)), atol=1e-3)


def test_bad_input_is_one_clear_line(agents, crossing, two):
    (a, b), c2c, gated = agents, crossing["c2c"], crossing["gated"]
    play = lambda *who, made, asked=ASKED, **how: bridge(*who, TOLD_A, asked, bridge=made, **how)
    refused(lambda: play(b, b, made=c2c), "this bridge is from 7 layers of 5 heads of 32 -> 6 layers of 4 heads of 32")
    moved = dataclasses.replace(a, params=jax.tree.map(lambda x: x + 0.01, a.params))
    refused(lambda: play(moved, b, made=gated), f"this bridge was made for model {gated.sender} as A, this one is")
    refused(lambda: play(a, b, made="bridge"), "a bridge is a C2C or a Gated, got str")
    refused(lambda: play(a, b, made=[c2c, gated]), "only fusers")
    refused(lambda: play([a, a], b, made=c2c), "2 senders, 1 bridges: give one of each")
    refused(lambda: play(a, b, made=c2c, control="silence"), "unknown control 'silence'")
    refused(lambda: play(a, b, made=gated, asked=ASKED[:2]), "5 messages for 2 prompts: give one for each")
    refused(lambda: init_c2c(jax.random.key(0), *two, hidden=0), "hidden = 0, steps = 1: both must be at least 1")
    refused(lambda: init_gated(jax.random.key(0), *two, rank=0), "rank 0: the maps need at least 1")
    refused(lambda: list(pack([([1, 2], [0.0, 1.0], [])], 1, 4)), "of text 0 another model reads 0 tokens")
    refused(lambda: losses(gated.join(Pair(a.params, b.params)), one_row()), "reads a text of its own")


def one_row():
    return next(pack([([5, 6, 7], [0.0, 0.0, 1.0])], 1, 4))[0]
