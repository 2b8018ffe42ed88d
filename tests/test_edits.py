"""Editing every site equals forward hooks on transformers in float64, in every family; under vmap and with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxcomm as jc
from jaxcomm.sites import HEADS

from conftest import CONFIGS, KINDS, ROUNDED, assert_close
from hooks import PADDED, POSITIONS, REAL, ROWS, WRITABLE, at, exact_of, numbers, on, ones, sites_at, unchanged

LAYOUTS = pytest.mark.parametrize("layout", ["stacked", "unrolled"])


def laid_out(pair, layout):
    return pair.params if layout == "stacked" else pair.params.unroll()


# Editing ------------------------------------------------------------------------------------------------------------


def plus(state, message, context):
    """Adds its message: a program of many edits, of which a message of 0 turns all but some off."""
    return state + message


def adding(exact, case, sites, vectors, written=()):
    """Edits that add vectors at some of the sites, (number, layer) in `case`, and nothing at the others; and their hooks.

    written: numbers of the sites of which every token that is written is edited, too.
    """
    active = dict(case)
    placed = [at_layer(s, exact.layer(s.name, active.get(n, case[0][1] or 2))) for n, s in enumerate(sites)]
    vectors = [exact.cut(v, s) for v, s in zip(vectors, placed, strict=True)]
    edits = [
        jc.Edit(s, plus, v if n in active else np.zeros_like(v), every_step=n in written)
        for n, (s, v) in enumerate(zip(placed, vectors, strict=True))
    ]

    def hooks(row, length, total):
        more = lambda n: range(length, total) if n in written else ()
        return [at(placed[n], row, length, lambda x, n=n: x + on(vectors[n][row]), more(n)) for n in active]

    return edits, hooks, [placed[n] for n in active]


def vectors_for(exact, sites, size=1.0, seed=0, *n):
    rng = np.random.default_rng(seed)
    return [(size * rng.normal(size=(len(ROWS), *n, *exact.shape(s.name, s.heads)))).astype(np.float32) for s in sites]


def at_layer(site, layer):
    return site if site.layer is None else jc.Site(site.name, layer, site.positions, site.heads)


def test_adding_at_any_site_equals_hooks_that_add(pair):
    """Each site alone, at two layers, then all of them at once; of every position's logits. Sites meet other positions and
    heads in every family. Then the same by `prefill`, unrolled, whose last block answers for the last token only."""
    exact, unrolled = exact_of(pair), pair.params.unroll()
    sites = sites_at(exact, list(CONFIGS).index(pair.name))
    vectors = vectors_for(exact, sites)
    first = lambda s: int(s.name != "resid_post")
    alone = [[(n, layer)] for n, s in enumerate(sites) for layer in ((first(s), exact.layers) if s.layer else (1,))]
    for case in [*alone, [(n, 1 + n % exact.layers) for n in range(len(sites))]]:
        edits, hooks, where = adding(exact, case, sites, vectors)
        logits = np.asarray(jc.forward(pair.params, PADDED, edits=edits))
        last = (
            jc.prefill(unrolled, PADDED, edits=edits)[0]
            if pair.name in ("llama", "gemma3_text", "gpt_neox")
            else logits[:, -1]
        )
        for row, tokens in enumerate(ROWS):
            n, what = len(tokens), f"{pair.name}, {where}, row {row}"
            want = exact.logits(tokens, hooks(row, n, n))
            assert_close(logits[row, -n:], want, what, ROUNDED)
            assert_close(last[row], want[-1], f"{what}, prefill", ROUNDED)


CHANGES = ("add", "scale", "project_out", "replace", "mean")


def changed(change, site, vector, several):
    """An edit, and for each row what it does to states [n, ...]; messages of several tokens meet the states at their ends."""
    if change in ("add", "scale", "project_out"):
        one = vector.reshape(-1, vector.shape[-1])[0]
        v = {"add": vector[0], "scale": vector[0][..., :1], "project_out": one}[change]
        x = on(v)
        does = {
            "add": lambda s: s + x,
            "scale": lambda s: s * x,
            "project_out": lambda s: s - (s @ x)[..., None] * x / (x @ x),
        }[change]
        return jc.Edit(site, getattr(jc, change)(v)), [does] * len(ROWS)
    if change == "replace":
        return jc.Edit(site, jc.replace, vector), [lambda s, m=m: m.expand(s.shape) for m in on(vector)]

    def mean(s, m):
        n = min(len(s), len(m))
        return torch.cat([s[: len(s) - n], (s[len(s) - n :] + m[len(m) - n :]) / 2])

    return jc.receive(several, site, "mean"), [functools.partial(mean, m=m) for m in on(several)]


def test_every_change_at_every_site_equals_hooks_that_make_it(pair):
    """All sites at once, each changed in its own way, which is another one in every family; all positions' logits."""
    exact, turn = exact_of(pair), list(CONFIGS).index(pair.name)
    sites = sites_at(exact, turn + 3, layer=lambda n: 1 + n % exact.layers)
    how = [CHANGES[(n + turn) % 5] for n in range(len(sites))]
    how = ["mean" if s.positions is POSITIONS[1] and h == "replace" else h for s, h in zip(sites, how, strict=True)]
    vectors = vectors_for(exact, sites), vectors_for(exact, sites, 1.0, 1, 3)
    vectors = [[exact.cut(v, s) for v, s in zip(each, sites, strict=True)] for each in vectors]
    made = [changed(*x) for x in zip(how, sites, *vectors, strict=True)]
    logits = jc.forward(pair.params, PADDED, edits=[edit for edit, _ in made])
    for row, tokens in enumerate(ROWS):
        hooks = [at(s, row, len(tokens), f[row]) for s, (_, f) in zip(sites, made, strict=True)]
        what = f"{pair.name}, row {row}, {list(zip(how, sites, strict=True))}"
        assert_close(logits[row, -len(tokens) :], exact.logits(tokens, hooks), what, ROUNDED)


def test_generate_with_edits_says_what_a_loop_with_hooks_says(kind):
    """Without a cache: the prompt is edited again in every pass, and at every other site also each token that was written."""
    exact, turn = exact_of(kind), KINDS.index(kind.name)
    sites, params = sites_at(exact, turn), kind.params if turn % 2 else kind.params.unroll()
    vectors, written, said = vectors_for(exact, sites, 2.0), range(turn % 2, len(sites), 2), set()
    alone = [[(n, exact.layers if (n + turn) % 3 else 2)] for n in range(len(sites))]
    for case in [*alone, [(n, 1 + n % exact.layers) for n in range(len(sites))]]:
        edits, hooks, where = adding(exact, case, sites, vectors, written)
        ours = np.asarray(jc.generate(params, PADDED, edits=edits, max_new_tokens=4).tokens).tolist()
        for row, tokens in enumerate(ROWS):
            text = list(tokens)
            while len(text) < len(tokens) + 4:
                text.append(int(exact.logits(text, hooks(row, len(tokens), len(text)))[-1].argmax()))
            assert ours[row] == text[len(tokens) :], f"{kind.name}, {where}, row {row}"
            said.add((row, *ours[row]))
    assert len(said) > 12, "edits change what is said"


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox"], indirect=True)
def test_layers_that_are_traced_do_what_ints_do(kind):
    names = [n for n in exact_of(kind).names(WRITABLE) if jc.SITES[n].layered]
    sites = sites_at(exact_of(kind), 3, names)
    vectors = vectors_for(exact_of(kind), sites)
    close = functools.partial(jax.tree.map, lambda x, y: assert_close(x, y, kind.name, 1e-6))
    params = laid_out(kind, "unrolled" if kind.name == "gpt_neox" else "stacked")

    def steered(layers):
        placed = [at_layer(s, layers[n]) for n, s in enumerate(sites)]
        edits = [jc.Edit(s, plus, v) for s, v in zip(placed, vectors, strict=True)]
        return jc.run_with_cache(params, PADDED, sites=placed, edits=edits)

    layers = [1 + n % 4 for n in range(len(sites))]
    traced, want = jax.jit(steered), jax.jit(functools.partial(steered, layers))()
    close(traced(jnp.asarray(layers)), want)
    close(steered(layers), want)
    for wrong in (0, 5):
        assert np.isnan(traced(jnp.asarray([wrong, *layers[1:]]))[0]).all(), "a layer out of range"


def test_directions_of_each_head_are_projected_out_of_that_head():
    rng = np.random.default_rng(0)
    v, state = rng.normal(size=(4, 16)).astype(np.float32), rng.normal(size=(2, 3, 4, 16)).astype(np.float32)
    left = np.asarray(jc.project_out(v)(jnp.asarray(state), None, None))
    assert_close(np.einsum("bnhd,hd->bnh", left, v), np.zeros((2, 3, 4)), "along the directions", 1e-4)
    along = state - left
    assert_close(
        np.abs(np.einsum("bnhd,hd->bnh", along, v)),
        np.linalg.norm(along, axis=-1) * np.linalg.norm(v, axis=-1),
        "parallel",
        1e-4,
    )


# What changes nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox"], indirect=True)
def test_edits_and_reads_that_change_nothing_change_no_bit(kind):
    exact, params = exact_of(kind), laid_out(kind, "unrolled" if kind.name == "llama" else "stacked")
    nothing = [jc.Edit(s, unchanged, every_step=True) for s in sites_at(exact, 5)]
    for call in (jc.forward, jc.prefill, functools.partial(jc.generate, max_new_tokens=4)):
        jax.tree.map(np.testing.assert_array_equal, call(params, PADDED, edits=nothing), call(params, PADDED))
    logits, cache = jc.run_with_cache(params, PADDED, sites=exact.names())
    np.testing.assert_array_equal(logits, jc.forward(params, PADDED))
    np.testing.assert_array_equal(cache["resid_post"], jc.hidden_states(params, PADDED))
    np.testing.assert_array_equal(cache["resid_pre"], cache["resid_post"][:-1])


# Composition --------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_vmap_over_steering_vectors_equals_a_loop(llama, layout):
    params, vectors = laid_out(llama, layout), 3 * jax.random.normal(jax.random.key(0), (4, 48))
    edits = lambda v: [jc.Edit(jc.Site("resid_mid", 2, [-2, 0]), jc.add(v), every_step=True)]
    read = lambda v: jc.forward(params, PADDED, edits=edits(v))
    write = lambda v: jc.generate(params, PADDED, edits=edits(v), max_new_tokens=4).tokens
    assert_close(jax.vmap(read)(vectors), jnp.stack([read(v) for v in vectors]), "logits")
    said = jax.jit(jax.vmap(write))(vectors)
    np.testing.assert_array_equal(said, jnp.stack([write(v) for v in vectors]))
    assert len(np.unique(said.reshape(4, -1), axis=0)) == 4


@LAYOUTS
def test_vmap_over_games_and_recomputation_change_nothing(llama, layout):
    params, message = laid_out(llama, layout), jax.random.normal(jax.random.key(1), (3, 48))
    edits = lambda m: [jc.receive(m, 2, "sum"), jc.Edit(jc.Site("z", 3, heads=1), jc.scale(0.5))]
    read = lambda prompts, m: jc.forward(params, prompts, edits=edits(m))
    alone = lambda tokens, mask, m: read(jc.Prompts(tokens[None], mask[None]), m[None])[0]
    want, got = read(PADDED, message), jax.vmap(alone)(jnp.asarray(PADDED.tokens), jnp.asarray(PADDED.mask), message)
    assert_close(np.asarray(got)[REAL], np.asarray(want)[REAL], "games", 1e-5)
    loss = lambda m: jnp.mean(read(PADDED, m)[:, -1] ** 2)
    slope = jax.grad(loss)(message)
    assert float(jnp.abs(slope).max()) > 1e-4
    assert_close(jax.grad(jax.checkpoint(loss))(message), slope, "computed again", 1e-6)


@LAYOUTS
def test_gradients_of_vectors_and_messages_are_torchs(llama, layout):
    """Of an added vector and of a message; then the same where they change what a sender reads, through `send` and `receive`.
    (torch's own gradient in float64: finite differences of float32 agree with it to three digits.)"""
    params, exact, rng, targets = (
        laid_out(llama, layout),
        exact_of(llama),
        np.random.default_rng(0),
        np.array([5, 40, 77]),
    )
    v, m = rng.normal(size=48).astype(np.float32), rng.normal(size=(3, 2, 4, 16)).astype(np.float32)
    added, put, sent, got = (
        jc.Site("mlp_out", 1), jc.Site("z", 1, [-2, 0]), jc.Site("attn_out", 2, -2), jc.Site("resid_post", 3, "last")
    )  # fmt: skip
    likelihood = lambda logits: jnp.mean(jax.nn.log_softmax(logits[:, -1])[jnp.arange(3), targets])
    edits = lambda v, m: (jc.Edit(added, jc.add(v)), jc.receive(m, put, "mean"))

    def direct(v, m):
        return likelihood(jc.forward(params, PADDED, edits=edits(v, m)))

    def through(v, m):
        message = jc.send(params, PADDED, sent, edits=edits(v, m))
        return likelihood(jc.forward(params, PADDED, edits=[jc.receive(message, got, "sum")]))

    x, y, plain, passed = on(v).requires_grad_(), on(m).requires_grad_(), 0.0, 0.0
    for row, tokens in enumerate(ROWS):
        n, score = len(tokens), lambda out, row=row: out.logits[0, -1].log_softmax(-1)[targets[row]] / 3
        made = [at(added, row, n, lambda s: s + x), at(put, row, n, lambda s, row=row: (s + y[row]) / 2)]
        box = {}
        look = ("attn_out", 2, lambda s, box=box: box.update(s=s[0, -2]))
        plain += score(exact.run(tokens, [*made, look], grad=True))
        passed += score(exact.run(tokens, [at(got, row, n, lambda s, box=box: s + box["s"])], grad=True))
    for ours, theirs, what in ((direct, plain, "direct"), (through, passed, "through send and receive")):
        value, grads = jax.value_and_grad(ours, (0, 1))(v, m)
        assert_close(value, theirs.detach(), what)
        for gradient, want in zip(grads, torch.autograd.grad(theirs, (x, y), retain_graph=True), strict=True):
            size = float(want.abs().max())
            assert size > 1e-4
            assert_close(gradient / size, want / size, what, 1e-4)
        jax.tree.map(lambda a, b: assert_close(a, b, "under jit", 1e-5), jax.jit(jax.grad(ours, (0, 1)))(v, m), grads)


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        ("stacked", np.array([0, -1, 2])),
        ("stacked", REAL),
        ("stacked", (0, -1)), ("stacked", slice(1, None)), ("unrolled", np.array([0, -1, 2])), ("unrolled", REAL),
    ],
)  # fmt: skip
def test_what_is_sent_from_any_positions_has_a_gradient(llama, layout, positions):
    params, edit = laid_out(llama, layout), lambda v: (jc.Edit(jc.Site("mlp_out", 1), jc.add(v)),)
    sent = lambda v: jc.send(params, PADDED, jc.Site("resid_post", 2, positions), edits=edit(v)).states
    gradient = jax.grad(lambda v: jnp.sum(sent(v) ** 2))(ones(48))
    assert np.isfinite(gradient).all() and np.abs(gradient).min() > 0


PLACES = [("resid_post", "all"), ("mlp_out", 2), ("k", slice(1, -2)), ("z", POSITIONS[9]), ("q", POSITIONS[10])]


@pytest.mark.parametrize(
    ("name", "positions"),
    [*PLACES, ("embed", [-3, -1]), ("logits", [-3, -1])],
)
def test_a_functions_context_names_the_place(llama, name, positions):
    """Its numbers are written into the state, and read there."""
    layer, seen = 3 if jc.SITES[name].layered else None, []

    def mark(state, message, context):
        seen.append(context.site)
        at = 0 if context.layer is None else context.layer
        number = jnp.asarray(100 * at + context.positions, state.dtype)
        return jnp.broadcast_to(number.reshape(*number.shape, *(1,) * (state.ndim - 2)), state.shape)

    edit = jc.Edit(jc.Site(name, layer, positions, heads=1 if name in HEADS else None), mark)
    _, cache = jc.run_with_cache(llama.params, PADDED, sites=name, layers=[3], edits=[edit])
    out = np.asarray(cache[name][0] if layer else cache[name])
    assert set(seen) == {name}
    for row, tokens in enumerate(ROWS):
        for token in numbers(positions, row, len(tokens)):
            state = out[row, token - len(tokens)]
            assert np.all((state[1] if name in HEADS else state) == 100 * (layer or 0) + token), (row, token)
