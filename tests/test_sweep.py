"""A sweep is its cells: whatever is shared, cut, refilled or sharded, each equals the `communicate` call it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from jaxcomm.communication import communicate_logits
from jaxcomm.config import ModelConfig
from jaxcomm.decoding import Sampling, top_and_total
from jaxcomm.edits import Graft
from jaxcomm.layer_sweep import Grid, Plan, Sizes, by_length, sweep, sweep_answers
from jaxcomm.layer_sweep import plan as module
from jaxcomm.layer_sweep import sizes as memory
from jaxcomm.model import init_params
from jaxcomm.prompts import left_pad
from jaxcomm.sharding import shard

from conftest import assert_close, compiles, prompts, talk


def mesh(n):
    return Mesh(np.array(jax.devices()[:n]), ("data",), axis_types=(AxisType.Auto,))


ONE = mesh(1)
STOPS = (3, 11, 12, 13, 40, 41, 42, 43, 44, 45)
GAMES = 5
ANSWERS = 14 + prompts(GAMES, 2, seed=3, vocab=26)  # no stop token among them


def half(a, b):
    return a + b / 2


@pytest.fixture(scope="module")
def asked():
    """Prompts of unequal lengths for both."""
    draw = lambda lengths, seed: left_pad([prompts(1, n, seed=seed + n)[0].tolist() for n in lengths], 12)
    return draw((4, 9, 12, 7, 5), 0), draw((11, 3, 6, 12, 8), 50)


@pytest.fixture(scope="module")
def maps(llama, wide):
    return 0.3 * np.random.default_rng(0).normal(size=(3, 4, 64, 48)).astype(np.float32)


KS, JS = (0, 2, 4), (5, 0, 3, 2)


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_every_cell_equals_its_communicate_call(llama, wide, asked, maps, layout):
    pa, pb = asked
    a, b = (p.params.unroll() if layout == "unrolled" else p.params for p in (llama, wide))
    for W, grafts in ((None, ("replace", "mean", half)), (maps, ("sum",)), (maps[:, 2:3], ("replace",))):
        out = sweep(
            a, b, pa, pb, ks=KS, js=JS, grafts=grafts, maps=W,
            max_new_tokens=6, stop_tokens=STOPS, mesh=ONE,
        )  # fmt: skip
        for g, graft in enumerate(grafts):
            for k, j in np.ndindex(3, 4):
                cell = None if W is None else W[k, j if W.shape[1] > 1 else 0]
                want = talk(
                    a, b, pa, pb, k=KS[k], j=JS[j], graft=Graft(graft, cell),
                    max_new_tokens=6, stop_tokens=np.array(STOPS),
                )  # fmt: skip
                what = f"{graft}, k = {KS[k]}, j = {JS[j]}"
                np.testing.assert_array_equal(out.tokens[g, k, j], want.tokens, what)
                np.testing.assert_array_equal(out.lengths[g, k, j], want.lengths, what)
                assert_close(out.logprobs[g, k, j], want.logprobs, what, 1e-4)


def test_sliding_windows_and_soft_caps_too(kind):
    tokens = prompts(3, 14)
    out = sweep(kind.params, kind.params, tokens, tokens[::-1].copy(), ks=(1, 3), js=(1, 4), max_new_tokens=5, mesh=ONE)
    for k, j in ((0, 0), (1, 1)):
        want = talk(kind.params, kind.params, tokens, tokens[::-1].copy(), k=(1, 3)[k], j=(1, 4)[j], max_new_tokens=5)
        np.testing.assert_array_equal(out.tokens[0, k, j], want.tokens)


def test_sampled_cells_equal_their_communicate_calls(llama, asked):
    pa, pb = asked
    keys, how = jax.random.split(jax.random.key(5), GAMES), dict(sampling=Sampling(1.5, 20), max_new_tokens=5)
    p = llama.params
    out = sweep(p, p, pa, pb, ks=(1, 3), js=(2,), keys=keys, mesh=ONE, **how)
    for i, k in enumerate((1, 3)):
        want = talk(p, p, pa, pb, k=k, j=2, keys=keys, **how)
        np.testing.assert_array_equal(out.tokens[0, i, 0], want.tokens)
    with pytest.raises(ValueError, match="sampling needs keys"):
        sweep(p, p, pa, pb, ks=(1,), js=(2,), sampling=Sampling())


def test_an_answer_is_exact_if_and_only_if_decoding_writes_it(llama, wide, asked):
    """Every text that some cell writes, asked of every cell; stop tokens end answers, unless there are none."""
    pa, pb = asked
    grid = dict(ks=(1, 3), js=(0, 2, 5), grafts=("replace", "sum"), mesh=ONE)
    verdicts = []
    for stops in (STOPS, ()):
        said = sweep(llama.params, wide.params, pa, pb, max_new_tokens=4, stop_tokens=stops, **grid)
        ended = np.isin(said.tokens, stops).any(-1)
        for g, k, j in ((0, 0, 0), (1, 1, 1), (0, 1, 2)):
            text = said.tokens[g, k, j]
            answers = np.where(np.isin(text, stops), -1, text)
            rows = np.flatnonzero((answers >= 0).any(-1))
            scored = sweep_answers(
                llama.params, wide.params, pa[rows], pb[rows], answers[rows], stop_tokens=stops,
                **grid,
            )  # fmt: skip
            same = (said.tokens == text).all(-1)
            want = (same & ended if stops else same)[..., rows]
            # A text cut off by max_new_tokens has no end to be right about.
            comparable = ended[g, k, j][rows] | (not stops)
            np.testing.assert_array_equal(scored.exact[..., comparable], want[..., comparable])
            verdicts.append(scored.exact[..., comparable])
            np.testing.assert_array_equal(scored.logprobs[..., -1] != 0, np.broadcast_to(
                (answers[rows] >= 0).all(-1), scored.exact.shape
            ))  # fmt: skip
    verdicts = np.concatenate([v.ravel() for v in verdicts])
    assert 0.1 < verdicts.mean() < 0.9, "a test that knows both outcomes"


def test_answers_log_probabilities_are_the_teacher_forced_ones(llama, wide, asked, maps):
    pa, pb = asked
    answers = prompts(GAMES, 3, seed=9)
    out = sweep_answers(llama.params, wide.params, pa, pb, answers, ks=KS, js=JS, maps=maps, mesh=ONE)
    foresee = jax.jit(communicate_logits)
    for k, j in ((0, 1), (1, 0), (2, 3)):
        logits = foresee(llama.params, wide.params, pa, pb, answers, k=KS[k], j=JS[j], graft=Graft(W=maps[k, j]))
        want = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], -1)[..., 0]
        assert_close(out.logprobs[0, k, j], want, f"{k}, {j}", 1e-4)
    one = sweep_answers(llama.params, wide.params, pa, pb, answers[:, :1], ks=KS, js=JS, maps=maps)
    assert_close(one.logprobs[..., 0], out.logprobs[..., 0], "one token", 1e-4)


@pytest.fixture(scope="module")
def whole(llama, asked):
    """Every layer pair, decoded, and scored with random answers."""
    pa, pb = asked
    how = dict(ks=range(5), js=range(5), stop_tokens=STOPS, mesh=ONE)
    p, answers = llama.params, ANSWERS
    return sweep(p, p, pa, pb, max_new_tokens=5, **how), sweep_answers(p, p, pa, pb, answers, **how)


@settings(max_examples=12)
@given(data=st.data())
def test_neither_chunks_nor_order_nor_company_change_a_cell(llama, asked, whole, data):
    """Chunks of any size, layers in any order, any subset of them."""
    pa, pb = asked
    p, layers = llama.params, list(range(5))
    ks, js = (data.draw(st.lists(st.sampled_from(layers), min_size=1, unique=True)) for _ in range(2))
    cells = data.draw(st.integers(1, len(ks) * len(js)))
    sizes = Sizes(data.draw(st.integers(1, GAMES)), cells, data.draw(st.integers(1, cells)))
    how = dict(grid=Grid(ks, js), stop_tokens=STOPS, sizes=sizes, mesh=ONE)
    plan = Plan(p, p, pa, pb, max_new_tokens=5, **how)
    order = data.draw(st.permutations(range(len(plan.chunks))))
    results = {i: plan.run(plan.chunks[i]) for i in order}
    out = plan.gather([results[i] for i in range(len(plan.chunks))])
    np.testing.assert_array_equal(out["tokens"][0], whole[0].tokens[0][np.ix_(ks, js)])
    assert_close(out["logprobs"][0], whole[0].logprobs[0][np.ix_(ks, js)], "logprobs", 1e-4)

    scored = Plan(p, p, pa, pb, answers=ANSWERS, **how)
    out = scored.gather([scored.run(chunk) for chunk in scored.chunks])
    np.testing.assert_array_equal(out["exact"][0], whole[1].exact[0][np.ix_(ks, js)])
    assert_close(out["logprobs"][0], whole[1].logprobs[0][np.ix_(ks, js)], "answers' logprobs", 1e-4)


def test_eight_devices_say_what_one_says(llama, asked, whole):
    """Games over five of one device, cells over the rest; without a word from the caller."""
    pa, pb = asked
    how = dict(ks=range(5), js=range(5), stop_tokens=STOPS)
    p, answers = llama.params, ANSWERS
    for rows in (slice(0, 4), slice(0, 5)):  # four games on 4 x 2 devices, five on 1 x 8
        out = sweep(p, p, pa[rows], pb[rows], max_new_tokens=5, **how)
        np.testing.assert_array_equal(out.tokens, whole[0].tokens[..., rows, :])
        scored = sweep_answers(p, p, pa[rows], pb[rows], answers[rows], **how)
        np.testing.assert_array_equal(scored.exact, whole[1].exact[..., rows])
        assert_close(scored.logprobs, whole[1].logprobs[..., rows, :], "logprobs", 1e-4)
    plan = Plan(p, p, pa[:4], pb[:4], Grid((1,), (1,)))
    assert plan.mesh.devices.shape == (4, 2, 1, 1)


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_a_model_cut_over_devices_says_the_same(llama, asked, whole, layout):
    """A tensor axis of two (the key heads), the games and cells over the other four devices."""
    pa, pb = asked
    params = llama.params.unroll() if layout == "unrolled" else llama.params
    cut = shard(params, jax.make_mesh((2, 4), ("tensor", "data")))  # another order, and Explicit axes
    down = jax.tree.leaves(cut.blocks)[0]
    assert down.sharding.mesh.size == 8
    share = sum(a.addressable_shards[0].data.size for a in jax.tree.leaves(cut))
    assert share < 0.65 * sum(a.size for a in jax.tree.leaves(cut))
    how = dict(ks=range(5), js=range(5), stop_tokens=STOPS)
    for rows in (slice(0, 4), slice(0, 5)):  # four games on 4 x 1 devices of two, five on 1 x 4
        out = sweep(cut, cut, pa[rows], pb[rows], max_new_tokens=5, **how)
        want = whole[0].logprobs[..., rows, :]
        same = out.tokens == whole[0].tokens[..., rows, :]
        assert same.mean() > 0.99
        assert_close(np.where(same, out.logprobs, 0), np.where(same, want, 0), "logprobs", 1e-4)
    with pytest.raises(ValueError, match="weights lie on other devices than the sweep"):
        sweep(cut, cut, pa, pb, mesh=mesh(4), **how)


def test_no_layer_compiles_anything(llama, asked):
    pa, pb = (p.tokens for p in asked)
    go = lambda ks, js: sweep(llama.params, llama.params, pa, pb, ks=ks, js=js, max_new_tokens=3, mesh=ONE)
    go((1, 2), (3, 4))
    with compiles() as programs:
        go((4, 0), (1, 0))
    assert not programs


def test_the_program_grows_neither_with_layers_nor_with_cells():
    """What XLA is given to compile, line by line: L and the number of cells are only numbers in it."""

    def lines(layers, ks):
        c = ModelConfig(vocab=64, width=32, layers=layers, heads=2, kv_heads=1, head_dim=16, ff=48, max_positions=64)
        p, tokens, seen = init_params(jax.random.key(0), c), prompts(2, 8, vocab=64), []
        for how in (dict(max_new_tokens=3), dict(answers=prompts(2, 3, vocab=64))):
            plan = Plan(p, p, tokens, tokens, Grid(range(ks), range(ks)), sizes=Sizes(2, ks * ks, ks), mesh=ONE, **how)
            shared = plan.shared(plan.chunks[0].games)
            edits, at = jnp.zeros((2, ks * ks, 32)), jnp.zeros(ks * ks, jnp.int32)
            cells = module.Cells(edits[:, :, None], None, at)
            if shared.answers is None:
                lowered = module.decode_cells.lower(
                    p, shared.prompt, cells, jnp.full(2, 4), module.Drawing(plan.stop_tokens),
                    slots=ks, max_new_tokens=3, mesh=plan.mesh,
                )  # fmt: skip
            else:
                targets, tail = shared.answers
                lowered = module.score_cells.lower(p, tail, cells, targets, mesh=plan.mesh)
            seen.append(lowered.as_text().count("\n"))
        return seen

    assert lines(4, 2) == lines(8, 2) == lines(8, 4)


def test_a_device_that_tells_its_memory_is_asked():
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory.device_memory(Device({"bytes_limit": 1000, "bytes_in_use": 200})) == 720
    assert memory.device_memory(Device(None)) == memory.device_memory(jax.devices()[0]) == memory.MEMORY


def test_what_has_stopped_is_not_computed(llama, asked):
    """A slot that is done takes the next cell: tokens forwarded are the tokens written, but for the last cells."""
    pa, pb = (p.tokens for p in asked)
    grid, how = Grid(range(5), range(5), ("replace", "sum")), dict(max_new_tokens=24, stop_tokens=range(70))
    plan = Plan(llama.params, llama.params, pa, pb, grid, sizes=Sizes(GAMES, 50, 5), mesh=ONE, **how)
    out = plan.gather([plan.run(chunk) for chunk in plan.chunks])
    lengths = (out["tokens"] >= 0).sum(-1)
    per_game = lengths.sum(axis=(0, 1, 2))
    assert lengths.max() > 3 * lengths.mean(), "some cells are long, or the test says nothing"
    # All games wait for the longest; in it, slots idle for less than the longest cell.
    assert out["forwarded"] <= GAMES * (per_game.max() + 5 * lengths.max())
    assert out["forwarded"] < 0.5 * lengths.size * 24


def bytes_of(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree) if isinstance(a, jax.Array))


@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sampling": Sampling()},
        {"mapped": True},
        {"P": 96},
        {"slots": 24},
        {"vocab": 4000},
        {"new": 12},
        {"games": 16},
    ],
)
def test_peak_memory_is_what_the_formula_says(monkeypatch, decoding, change):
    """The compiler's own analysis of every program, and what lives beside it, stays within the formula and near it."""
    s = dict(P=24, slots=8, vocab=512, new=6, games=8) | change
    c = ModelConfig(vocab=s["vocab"], width=128, layers=6, heads=4, kv_heads=2, head_dim=32, ff=384, max_positions=512)
    params, tokens = init_params(jax.random.key(0), c), prompts(s["games"], s["P"])
    how = dict(max_new_tokens=s["new"]) if decoding else dict(answers=prompts(s["games"], s["new"]))
    if "sampling" in s:
        how |= dict(sampling=s["sampling"], keys=jax.random.split(jax.random.key(0), s["games"]))
    maps = None
    if "mapped" in s:
        maps = np.zeros((6, 1, 128, 128), np.float32)
    sizes = Sizes(s["games"], 30 if decoding else s["slots"], s["slots"])
    plan = Plan(params, params, tokens, tokens, Grid(range(1, 7), range(1, 7), maps=maps), sizes=sizes, mesh=ONE, **how)
    seen = {}

    def watch(name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            static = {key: kwargs[key] for key in kwargs.keys() & {"last"}}
            program = real if hasattr(real, "lower") else jax.jit(functools.partial(real, **static))
            given = {key: value for key, value in kwargs.items() if key not in static}
            analysis = program.lower(*args, **given).compile().memory_analysis()
            given = bytes_of([a for a in args if a is not plan.params_a and a is not plan.params_b])
            seen[name] = given + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("decode_cells", "score_cells", "read_prompt", "hidden_states", "edit_states", "read_answers"):
        watch(name)
    plan.run(plan.chunks[0])
    peak, formula = max(seen.values()), plan.need(params, params).bytes(sizes)
    assert peak <= formula <= 2 * peak, f"{peak / 1e6:.2f} MB, formula {formula / 1e6:.2f} MB: {seen}"


def test_cells_share_the_prompt_they_continue(llama):
    """Twice the cells cost nothing like twice the prompt."""
    p, tokens = llama.params, prompts(2, 512)
    temps = []
    for slots in (4, 8):
        grid = Grid(range(5), range(5))
        plan = Plan(p, p, tokens, tokens, grid, max_new_tokens=2, sizes=Sizes(2, 8, slots), mesh=ONE)
        shared = plan.shared(plan.chunks[0].games)
        cells = module.Cells(jnp.zeros((2, 8, 1, 48)), None, jnp.zeros(8, jnp.int32))
        compiled = module.decode_cells.lower(
            p, shared.prompt, cells, jnp.full(2, 8), module.Drawing(plan.stop_tokens),
            slots=slots, max_new_tokens=2, mesh=plan.mesh,
        ).compile()  # fmt: skip
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
    scores = 2 * 4 * 4 * 514 * 8  # of four more slots, float32, twice
    assert temps[1] - temps[0] < 1.5 * scores < bytes_of((shared.prompt.earlier.k, shared.prompt.earlier.v))


def test_a_memory_budget_cuts_and_does_not_change(llama, asked, whole):
    pa, pb = asked
    p = llama.params
    grid, how = Grid(range(5), range(5)), dict(max_new_tokens=5, stop_tokens=STOPS, mesh=ONE)
    needed = Plan(p, p, pa, pb, grid, **how).need(p, p).bytes(Sizes(1, 1, 1))
    plan = Plan(p, p, pa, pb, grid, memory=2 * needed, **how)
    assert len(plan.chunks) >= 4 and plan.need(p, p).bytes(plan.sizes) <= 2 * needed
    np.testing.assert_array_equal(plan.gather([plan.run(c) for c in plan.chunks])["tokens"], whole[0].tokens)
    with pytest.raises(
        ValueError, match=f"budget of {needed - 1} bytes is too small: one cell of one game needs {needed}"
    ):
        sweep(p, p, pa, pb, ks=range(5), js=range(5), memory=needed - 1, **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ks=()), "ks is empty"),
        (dict(js=()), "js is empty"),
        (dict(grafts=()), "grafts is empty"),
        (dict(ks=(1, 2, 1)), "ks names 1 twice"),
        (dict(js=(7,)), "j = 7 is out of range: this model's layers are 0 .* to 5"),
        (dict(ks=(-1,)), "k = -1 is out of range"),
        (dict(grafts=("add",)), "unknown graft 'add'"),
        (dict(prompts_a=prompts(4, 5)), "A has 4 prompts, B has 5"),
        (dict(maps=np.zeros((2, 2, 48, 64), np.float32)), r"maps is \(2, 2, 48, 64\): give one W per .* \(2, 2, 64, 48\)"),
        (dict(max_new_tokens=0), "max_new_tokens = 0"),
        (dict(max_new_tokens=2000), "exceed the model's 1024 positions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(llama, wide, change, message):
    good = dict(prompts_a=prompts(5, 6), prompts_b=prompts(5, 6), ks=(1, 2), js=(3, 4), max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        sweep(llama.params, wide.params, **good | change)


def test_answers_that_are_none_are_refused(llama):
    go = lambda answers: sweep_answers(
        llama.params, llama.params, prompts(2, 4), prompts(2, 4), answers, ks=(1,), js=(1,), stop_tokens=(5,)
    )
    for answers, message in (
        (np.array([[1, 2]]), "1 answers for 2 items"),
        (np.array([[1, -1], [-1, -1]]), "at least one token"),
        (np.array([[1, 2], [-1, 2]]), "with -1 after its end"),
        (np.array([[1, 2], [5, 2]]), "contains the stop token 5"),
    ):
        with pytest.raises(ValueError, match=message):
            go(answers)


def test_a_graft_may_compute_in_float32_beside_others_in_bfloat16(llama, asked):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), llama.params)
    pa, pb = (p.tokens for p in asked)
    wide = lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)) / 2
    out = sweep(half, half, pa, pb, ks=(2,), js=(1,), grafts=("mean", wide), max_new_tokens=3, mesh=ONE)
    np.testing.assert_array_equal(out.tokens[0], out.tokens[1])


def test_answers_of_all_lengths_are_scored_as_each_alone(llama):
    """In groups of about one length, in whatever order they stand; with stop tokens and without."""
    rng, p = np.random.default_rng(3), llama.params
    told, asked = prompts(9, 7, seed=1), prompts(9, 6, seed=2)
    answers = np.full((9, 5), -1, np.int32)
    for row, n in enumerate((1, 5, 2, 1, 1, 3, 1, 2, 1)):
        answers[row, :n] = rng.integers(3, 97, n)
    for stops in ((), (1, 2)):
        how = dict(ks=[1, 4], js=[2, 3], stop_tokens=stops)
        seen = []
        every = sweep_answers(p, p, told, asked, answers, **how, progress=lambda *n, seen=seen: seen.append(n))
        assert seen == sorted(seen) and len(seen) > 1 and seen[-1] == (36, 36), "4 cells of 9 games"
        for row, n in enumerate((answers >= 0).sum(axis=1)):
            one = [x[row : row + 1] for x in (told, asked)]
            alone = sweep_answers(p, p, *one, answers[row : row + 1, :n], **how)
            np.testing.assert_array_equal(every.exact[..., row], alone.exact[..., 0])
            columns = n + bool(stops)
            np.testing.assert_allclose(every.logprobs[..., row, :columns], alone.logprobs[..., 0, :], atol=1e-5)
            assert not np.any(every.logprobs[..., row, columns:])


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_groups_of_answers_hold_every_game_once_and_few_are_small(lengths):
    answers = np.where(np.arange(12) < np.array(lengths)[:, None], 5, -1)
    groups = by_length(answers)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    assert all(len(group) >= min(4, len(lengths)) for group in groups)


@pytest.mark.parametrize("vocab", [5, 128, 384])
def test_totals_in_lanes_are_logsumexp(vocab):
    logits = np.random.default_rng(0).normal(0, 30, (3, 2, vocab)).astype(np.float32)
    top, total = top_and_total(jnp.asarray(logits))
    np.testing.assert_array_equal(top, logits.max(axis=-1))
    np.testing.assert_allclose(total, scipy.special.logsumexp(logits.astype(np.float64), axis=-1), rtol=1e-6, atol=1e-5)
