"""Prefixes seen by some layers: against transformers with a mask of its own in every layer, and against reading both texts."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jaxcomm as jc
from jaxcomm import prefixes
from jaxcomm.prefixes import attention_mass, attention_onto, greedy_scores, join, layer_scores, move, spread, stretch

from conftest import assert_close, compiles, make_checkpoint, prompts, refused

TOLD = [prompts(1, n, seed=n)[0].tolist() for n in (13, 6, 9)]
ASKED = [prompts(1, n, seed=10 * n)[0].tolist() for n in (3, 7, 4)]
WRITES = jc.left_pad(TOLD, 16)
READS = jc.left_pad(ASKED, 8)
NEVER = -1e30


class Masked:
    """transformers' model in float64. Every layer has a mask of its own, and tokens have any positions."""

    def __init__(self, pair):
        self.model, c = copy.deepcopy(pair.torch).double(), pair.params.config
        base = self.model.base_model
        self.blocks = base.h if hasattr(base, "h") else base.layers
        self.windows = c.windows or (0,) * c.layers

    def attention(self, block):
        return next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))

    def run(self, tokens, positions, seen):
        """Logits [T, V] and weights of every layer [N, T, T], if token q sees token c in layer l where seen[l][q, c]."""
        handles = []
        for block, own in zip(self.blocks, seen, strict=True):
            mask = torch.tensor(np.where(own, 0.0, NEVER))[None, None]
            put = lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask})
            handles.append(self.attention(block).register_forward_pre_hook(put, with_kwargs=True))
        try:
            with torch.no_grad():
                where = torch.tensor([positions])
                out = self.model(torch.tensor([tokens]), position_ids=where, use_cache=False, output_attentions=True)
        finally:
            for handle in handles:
                handle.remove()
        return out.logits[0].numpy(), [a[0].numpy() for a in out.attentions]

    def behind(self, told, asked, chosen, *, own=False, sink=False, future=False):
        """What `run` says of asked, behind told: each rule written out."""
        C, Q = len(told), len(asked)
        every = []
        for layer, window in enumerate(self.windows):
            whole = chosen[layer] or (sink and layer == 0)
            seen = np.zeros((C + Q, C + Q), bool)
            for q in range(C + Q):
                for c in range(C + Q):
                    if q < C or c >= C:  # among themselves
                        apart = q - c
                        if future and q >= C and not whole:
                            apart += C - 1  # the authors' mask is cut out of one for the whole text
                        seen[q, c] = apart >= 0 and (not window or apart < window)
                    elif whole or (sink and c == 0):
                        apart = q - C if own else q - c
                        seen[q, c] = not window or apart < window
            every.append(seen)
        positions = [*range(C), *(range(Q) if own else range(C, C + Q))]
        logits, weights = self.run([*told, *asked], positions, every)
        return logits[C:], [w[:, C:, :C] for w in weights]


WAYS = {
    "plain": {},
    "own positions": dict(positions="own"),
    "sink": dict(sink=True),
    "published mask": dict(sink=True, future=True),
}


@pytest.fixture(scope="module")
def masked(attending):
    return Masked(attending)


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_are_not_chosen_do_not_see_the_prefix(attending, masked, way):
    how = WAYS[way]
    told = jc.receive_cache(jc.send_cache(attending.params, WRITES), attending.params)
    names = dict(own=how.get("positions") == "own", sink=how.get("sink", False), future=how.get("future", False))
    for chosen in ([False, True, False, True], [True, True, False, False], [False] * 4):
        logits, _ = jc.prefill(attending.params, READS, past=[jc.select(told, np.array(chosen), **how)])
        for row, (x, y) in enumerate(zip(TOLD, ASKED, strict=True)):
            if names["future"] and any(0 < window < len(x) for window in masked.windows):
                continue  # a token does not even see itself
            want = masked.behind(x, y, chosen, **names)[0][-1]
            assert_close(logits[row], want, f"{way}, {chosen}, row {row}", 1e-4)


def test_what_is_written_behind_a_selection_is_what_transformers_writes(attending, masked):
    told = jc.receive_cache(jc.send_cache(attending.params, WRITES), attending.params)
    for how, names in (({}, {}), (dict(positions="own"), dict(own=True))):
        cache = jc.select(told, [1, 4], **how)
        wrote = jc.generate(attending.params, READS, past=[cache], max_new_tokens=4)
        for row, (x, y) in enumerate(zip(TOLD, ASKED, strict=True)):
            said = list(y)
            for _ in range(4):
                said.append(int(masked.behind(x, said, [True, False, False, True], **names)[0][-1].argmax()))
            assert np.asarray(wrote.tokens[row]).tolist() == said[len(y) :]


def test_all_layers_are_the_whole_prefix_bit_for_bit_and_none_is_none(attending):
    """None but for rounding: XLA may add up in another order beside a segment that nobody sees."""
    params = attending.params
    told = jc.receive_cache(jc.send_cache(params, WRITES), params)
    whole, _ = jc.prefill(params, READS, past=[told])
    every, _ = jc.prefill(params, READS, past=[jc.select(told, np.ones(4, bool))])
    assert np.asarray(every).tobytes() == np.asarray(whole).tobytes()
    silent, _ = jc.prefill(params, READS)
    none, _ = jc.prefill(params, READS, past=[jc.select(told, [], positions="own")])
    assert_close(none, silent, "no layer", 2e-6)


def test_attention_on_the_prefix_is_transformers(attending, masked):
    told = jc.receive_cache(jc.send_cache(attending.params, WRITES), attending.params)
    for sink in (False, True):
        mass = attention_mass(attending.params, READS, past=[told], sink=sink)
        for row, (x, y) in enumerate(zip(TOLD, ASKED, strict=True)):
            weights = masked.behind(x, y, [True] * 4)[1]
            want = [w[..., int(sink) :].sum(axis=-1).mean() for w in weights]
            assert_close(mass[:, row], np.array(want), f"row {row}", 1e-5)
    some = jc.select(told, [2, 4])
    onto = attention_onto(attending.params, READS, past=[some], last=True)
    for row, (x, y) in enumerate(zip(TOLD, ASKED, strict=True)):
        weights = masked.behind(x, y, [False, True, False, True])[1]
        want = np.stack([np.pad(w[:, -1].mean(axis=0), (16 - len(x), 0)) for w in weights])
        assert_close(onto[:, row], want, f"the last token of row {row}", 1e-5)


def test_scores_are_the_papers():
    mass = np.array([[0.2, 0.4], [0.7, 0.5], [0.1, 0.1], [0.4, 0.4]])
    attention = (np.array([0.3, 0.6, 0.1, 0.4]) - 0.1) / 0.5
    prior = np.exp(-((np.arange(4) - 2) ** 2) / (2 * 10**2))
    assert np.allclose(layer_scores(mass, alpha=0.8), 0.8 * attention + 0.2 * prior)
    assert np.allclose(layer_scores(mass), attention)


@given(st.integers(1, 40), st.floats(0, 1), st.sampled_from(["first", "last", "random", "every", "score", "greedy"]))
def test_every_scheme_chooses_as_many_layers_as_the_ratio_says(layers, ratio, scheme):
    scores = np.random.default_rng(layers).permutation(layers)
    chosen = jc.choose_layers(scheme, ratio, layers, scores=scores, seed=layers)
    assert chosen.sum() == int(np.ceil(round(ratio * layers, 9)))
    if scheme in ("first", "last", "random", "score"):
        more = jc.choose_layers(scheme, min(1.0, ratio + 0.1), layers, scores=scores, seed=layers)
        assert not (chosen & ~more).any(), "a larger ratio keeps what a smaller one has"
    if scheme == "score" and 0 < chosen.sum() < layers:
        assert scores[chosen].min() > scores[~chosen].max()


def test_many_selections_are_one_program_and_say_what_each_says_alone(llama):
    params = llama.params
    told = jc.receive_cache(jc.send_cache(params, WRITES), params)
    answers = np.array([[5, 6, 7], [8, -1, -1], [9, 10, -1]])
    every = np.stack([jc.choose_layers(scheme, n / 4, 4, seed=3) for scheme in ("first", "random") for n in range(5)])
    logprobs, greedy = jc.selection_logprobs(params, READS, told, every, answers)
    with compiles() as made:
        jc.selection_logprobs(params, READS, told, every[::-1].copy(), answers)
    assert not made
    many, cache = spread(READS, told, every)
    wrote = jc.generate(params, many, past=[cache], max_new_tokens=3).tokens
    for c, chosen in enumerate(every):
        past = [jc.select(told, chosen)]
        logits, own = jc.prefill(params, READS, past=past)
        want, likeliest = jc.score(params, logits, own, answers[:, None], past=past)
        assert_close(logprobs[:, c], want.sum(axis=(1, 2)), f"selection {c}", 1e-4)
        assert greedy[:, c].tolist() == likeliest.all(axis=(1, 2)).tolist()
        alone = jc.generate(params, READS, past=past, max_new_tokens=3).tokens
        assert np.asarray(wrote).reshape(3, len(every), 3)[:, c].tolist() == np.asarray(alone).tolist()


def test_greedy_choice_takes_the_best_layer_at_every_step(llama):
    params, answers = llama.params, np.array([[5], [8], [9]])
    told = jc.receive_cache(jc.send_cache(params, WRITES), params)
    scores = greedy_scores(params, READS, told, answers)
    chosen = np.zeros(4, bool)
    for step in range(4):
        worth = {}
        for layer in np.flatnonzero(~chosen):
            tried = chosen.copy()
            tried[layer] = True
            worth[layer] = jc.selection_logprobs(params, READS, told, tried[None], answers)[0].mean()
        best = max(worth, key=worth.get)
        assert scores[best] == 4 - step
        chosen[best] = True


def test_prefixes_of_fewer_rows_serve_consecutive_prompts(kind):
    """Two questions to each text, and one text for all."""
    params = kind.params
    told = jc.receive_cache(jc.send_cache(params, WRITES), params)
    twice = jc.left_pad([row for row in ASKED for _ in range(2)], 8)
    got = jc.prefill(params, twice, past=[told])[0]
    want = jc.prefill(params, READS, past=[told])[0]
    assert_close(got[::2], want, "first", 1e-5)
    assert_close(got[1::2], want, "second", 1e-5)
    texts = np.array([[[5, 6], [7, -1]]] * 6)
    logits, own = jc.prefill(params, twice, past=[told])
    scored, _ = jc.score(params, logits, own, texts, past=[told])
    logits, own = jc.prefill(params, READS, past=[told])
    alone, _ = jc.score(params, logits, own, texts[:3], past=[told])
    assert_close(scored[::2], alone, "scored", 1e-5)


def test_several_senders_lie_side_by_side(llama):
    """Each has read only its own text; B's prompt follows the sum of their lengths."""
    params, masked = llama.params, Masked(llama)
    first, second = (jc.receive_cache(jc.send_cache(params, x), params) for x in (WRITES, READS))
    both = jc.select(join([first, second]), [2, 3])
    logits, _ = jc.prefill(params, READS, past=[both])
    for row, (x, y) in enumerate(zip(TOLD, ASKED, strict=True)):
        C, Q = len(x), len(y)
        tokens, positions = [*x, *y, *y], [*range(C), *range(Q), *range(C + Q, C + 2 * Q)]
        text = np.repeat([0, 1, 2], [C, Q, Q])
        causal = np.tri(len(tokens), dtype=bool)
        among, ours = causal & (text[:, None] == text), causal & ((text[:, None] == text) | (text[:, None] == 2))
        want = masked.run(tokens, positions, [among, ours, ours, among])[0][-1]
        assert_close(logits[row], want, f"row {row}", 1e-4)


def test_a_prefix_moves_behind_what_the_receiver_has_read(attending, masked):
    """Worked examples, then A's text, which has not read them, then the question."""
    params, shown = attending.params, prompts(1, 5, seed=7)[0].tolist()
    told = jc.receive_cache(jc.send_cache(params, WRITES), params)
    if attending.name == "gpt2":  # learned positions do not move
        assert np.array_equal(move(told, params.config, 5).k, told.k)
        return
    before = jc.prefill(params, jc.left_pad([shown], 8))[1]
    for chosen in ([True] * 4, [False, True, False, True]):
        past = [before, jc.select(move(told, params.config, len(shown)), np.array(chosen))]
        logits, _ = jc.prefill(params, READS, past=past)
        for row, (x, y) in enumerate(zip(TOLD, ASKED, strict=True)):
            tokens = [*shown, *x, *y]
            part = np.repeat([0, 1, 2], [len(shown), len(x), len(y)])
            apart = np.arange(len(tokens))[:, None] - np.arange(len(tokens))
            own = (part[:, None] == part) | (part[:, None] == 2) & (part == 0)
            every = []
            for layer, window in enumerate(masked.windows):
                seen = own | ((part[:, None] == 2) & (part == 1) & chosen[layer])
                every.append(seen & (apart >= 0) & ((apart < window) if window else True))
            want = masked.run(tokens, [*range(len(tokens))], every)[0][-1]
            assert_close(logits[row], want, f"{chosen}, row {row}", 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "smollm3", "gpt_neox"])
def test_moved_keys_are_those_of_the_later_positions(family, tmp_path):
    """Every kind of rotary embedding: scaled (yarn), of two tables, of a part of the head, none in some layers."""
    params = make_checkpoint(tmp_path, family, seed=6).params
    read = jc.send_cache(params, WRITES).states
    hidden = jc.select(
        jc.send_cache(params, jc.left_pad(TOLD[:1])).states, []
    )  # takes positions, and nothing is seen of it
    later = jc.send_cache(params, WRITES, past=[hidden]).states
    moved = move(read, params.config, len(TOLD[0]))
    assert np.array_equal(moved.positions, later.positions)
    real = np.asarray(read.positions) >= 0
    for n in range(params.config.layers):
        for got, want in ((moved.k[n], later.k[n]), (moved.v[n], later.v[n])):
            pick = lambda x: np.moveaxis(np.asarray(x), 2, 1)[real]
            assert_close(pick(got), pick(want), f"layer {n + 1}", 1e-4)


def test_a_prefix_of_another_depth_goes_where_it_is_as_deep(llama, tmp_path):
    deep = make_checkpoint(tmp_path, "llama", seed=5, num_hidden_layers=6).params
    told = jc.receive_cache(jc.send_cache(llama.params, WRITES), llama.params)
    there = stretch(told, 6)
    # By hand: round((l + 1/2) 6/4 - 1/2) of 0..3 is 0, 2, 3, 5.
    assert np.asarray(there.seen)[:, 0, 0].tolist() == [True, False, True, True, False, True]
    for n, layer in enumerate((0, 2, 3, 5)):
        assert np.array_equal(there.k[layer], told.k[n])
    logits, _ = jc.prefill(deep, READS, past=[there])
    moved = jax.tree.map(
        lambda a: jnp.where(jnp.isin(jnp.arange(6), jnp.array([1, 4])).reshape(-1, 1, 1, 1, 1), 9.0, a),
        (there.k, there.v),
    )
    again, _ = jc.prefill(deep, READS, past=[there.replace(k=moved[0], v=moved[1])])
    assert np.array_equal(logits, again), "layers to which none goes see nothing"
    back = stretch(jc.receive_cache(jc.send_cache(deep, WRITES), deep), 4)
    assert back.k.shape[0] == 4 and np.isfinite(np.asarray(jc.prefill(llama.params, READS, past=[back])[0])).all()


def test_a_message_weighs_what_its_layers_see_and_survives_a_file(llama, tmp_path):
    sent = jc.send_cache(llama.params, WRITES)
    c, tokens = llama.params.config, sum(map(len, TOLD))
    one = 2 * c.kv_heads * c.head_dim * 4
    assert sent.bytes == 4 * tokens * one
    chosen = sent.replace(states=jc.select(sent.states, [2, 4], sink=True, future=True))
    assert chosen.bytes == (2 + 1) * tokens * one + 3 * one  # layer 1 whole, layer 3 the first token of each row
    two = sent.replace(states=jc.select(sent.states, [2, 4]))
    sizes = []
    for message in (sent, two, chosen):
        message.sign(b"key").save(tmp_path / "message")
        sizes.append((tmp_path / "message").stat().st_size)
        again = jc.Message.load(tmp_path / "message").verify(b"key")
        assert again.bytes == message.bytes
        past = [[jc.receive_cache(x, llama.params)] for x in (message, again)]
        want, got = (jc.prefill(llama.params, READS, past=x)[0] for x in past)
        assert np.array_equal(want, got)
    assert sizes[1] < 0.6 * sizes[0], "layers that see nothing are not written"
    rows = two.take([2, 0])
    assert rows.bytes == 2 * (len(TOLD[2]) + len(TOLD[0])) * one
    assert chosen.take([1]).bytes == (3 * len(TOLD[1]) + 1) * one


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m, told: jc.select(told, [0]), "layer 0 cannot see a prefix: this model's layers are 1 to 4"),
        (lambda m, told: jc.select(told, np.ones(3, bool)), "the mask of layers has 3 entries, the prefix 4"),
        (lambda m, told: jc.select(told, [1], future=True), "the published mask belongs to sink=True"),
        (lambda m, told: jc.choose_layers("best", 0.5, 4), "unknown scheme 'best'"),
        (lambda m, told: jc.choose_layers("first", 1.5, 4), "ratio 1.5: it is a share of the layers, 0 to 1"),
        (lambda m, told: jc.choose_layers("score", 0.5, 4), "needs scores, one for each of 4 layers"),
        (lambda m, told: jc.prefill(m, READS, past=[told.take(np.array([0, 1]))]), "a cache has 2 rows for 3 prompts"),
        (lambda m, told: jc.prefill(m, prompts(3, 1020), past=[told]), "exceed the model's 1024 positions"),
        (lambda m, told: join([told, told.take(np.array([0]))]), "they must be alike"),
    ],
)
def test_bad_input_is_one_clear_line(llama, call, says, unchecked):
    told = jc.receive_cache(jc.send_cache(llama.params, WRITES), llama.params)
    refused(lambda: call(llama.params, told), says)


def test_models_whose_keys_do_not_match_are_told_so(llama, tmp_path):
    wide = make_checkpoint(tmp_path / "w", "qwen2", seed=3, hidden_size=64, num_hidden_layers=5).params
    other = make_checkpoint(
        tmp_path / "o", "llama", seed=3, rope_parameters={"rope_theta": 999.0, "rope_type": "default"}
    ).params
    heads = make_checkpoint(tmp_path / "h", "llama", seed=3, num_key_value_heads=4).params
    check = lambda b: prefixes.check_prefix(llama.params.config, b.config)
    refused(lambda: check(other), "rotary embeddings differ")
    refused(lambda: check(heads), "A's keys are 2 heads of 16 numbers, B's 4 heads of 16")
    refused(lambda: check(wide), "rotary embeddings differ")
    check(make_checkpoint(tmp_path / "d", "llama", seed=4, num_hidden_layers=6).params)


def test_a_window_that_hides_the_prefix_is_told_of(tmp_path):
    config = make_checkpoint(tmp_path, "gemma2", seed=3).params.config  # windows 9, all, 9, all
    prefixes.check_reach(config, np.array([True, True, True, True]), 30)
    prefixes.check_reach(config, np.array([False, True, False, True]), 30)
    prefixes.check_reach(config, np.array([True, False, False, False]), 8)
    says = "layer 1 sees 9 tokens back, and B's prompt has 30"
    refused(lambda: prefixes.check_reach(config, np.array([True, False, False, False]), 30), says)
