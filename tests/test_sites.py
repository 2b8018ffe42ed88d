"""Reading and editing every site equals forward hooks on transformers in float64, in every family."""

import copy
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
import torch

import jaxcomm as jc
from jaxcomm.lmnet import init_network
from jaxcomm.sites import HEADS

from conftest import CONFIGS, KINDS, assert_close, make_checkpoint, prompts

ROWS = [prompts(1, n, seed=n)[0].tolist() for n in (13, 6, 9)]
PADDED = jc.left_pad(ROWS, 14)
REAL = np.asarray(PADDED.mask)
POSITIONS = [
    "last", "all", 2, [-3, -1], [0, -2], slice(1, -2), slice(1, None, 2), slice(-4, None), np.array([4, -1, 0]),
    np.array([[0, 5], [-1, 2], [3, -9]]), np.random.default_rng(0).random(REAL.shape) < 0.4,
]  # fmt: skip
LAYOUTS = pytest.mark.parametrize("layout", ["stacked", "unrolled"])
WRITABLE = [name for name, kind in jc.SITES.items() if kind.writable]


@pytest.fixture
def unchecked():
    """As users have it: shapes in annotations are not looked at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(call, says):
    """A call that is refused in one clear line."""
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value) and "\n" not in str(error.value)


def ones(*shape):
    return np.ones(shape, np.float32)


# The oracle ---------------------------------------------------------------------------------------------------------


class Exact:
    """transformers' model in float64, one prompt at a time, so without padding; its sites are found by forward hooks."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double()
        base, c = self.model.base_model, model.config
        self.blocks = base.h if hasattr(base, "h") else base.layers
        self.heads, self.kv_heads = c.num_attention_heads, getattr(c, "num_key_value_heads", c.num_attention_heads)
        self.size = getattr(c, "head_dim", None) or c.hidden_size // self.heads
        self.layers, self.width, self.vocab = len(self.blocks), c.hidden_size, c.vocab_size
        self.parallel = getattr(c, "use_parallel_residual", False)

    def names(self, names=tuple(jc.SITES)):
        """The sites that this family has."""
        return [name for name in names if not (name == "resid_mid" and self.parallel)]

    def shape(self, name, heads=None):
        """Of one token's state there."""
        if name not in HEADS:
            return (self.vocab if name == "logits" else self.width,)
        every = self.kv_heads if name in ("k", "v") else self.heads
        return (*np.empty(every)[() if heads is None else np.array(heads)].shape, self.size)

    def hook(self, name, layer, change):
        """Calls change on what is at the site, [1, T, ...]; what it returns, if anything, takes its place. Returns handles."""
        if name == "logits":
            return [self.model.register_forward_hook(functools.partial(on_logits, change))]
        if name == "embed":
            return [leaving(self.model.get_input_embeddings(), change)]
        if name == "resid_post" and layer == 0:
            name, layer = "resid_pre", 1
        block = self.blocks[layer - 1]
        part = lambda *names: next(getattr(block, n) for n in names if hasattr(block, n))
        attention = part("self_attn", "attn", "attention")
        inner = lambda *names: next((getattr(attention, n) for n in names if hasattr(attention, n)), None)
        after = hasattr(block, "post_feedforward_layernorm")
        attn_out = block.post_attention_layernorm if after else attention
        mlp_out = block.post_feedforward_layernorm if after else block.mlp
        if name == "resid_pre":
            return [entering(block, change)]
        if name in ("resid_post", "attn_out", "mlp_out"):
            return [leaving({"resid_post": block, "attn_out": attn_out, "mlp_out": mlp_out}[name], change)]
        if name == "resid_mid":  # no module's output: attn_out is made such that it becomes what it shall be
            box = {}

            def edit(x):
                new = change(box["h"] + x)
                return None if new is None else new - box["h"]

            return [entering(block, lambda h: box.update(h=h)), leaving(attn_out, edit)]
        split = lambda x, heads: x.unflatten(-1, (heads, self.size))
        if name == "z":
            return [entering(inner("o_proj", "c_proj", "dense"), change, lambda x: split(x, self.heads))]
        heads, n = (self.heads, self.kv_heads, self.kv_heads), "qkv".index(name)
        if inner("query_key_value"):
            return [leaving(attention.query_key_value, change, lambda x: split(x, self.heads * 3)[..., n::3, :])]
        if fused := inner("c_attn", "qkv_proj"):
            begin = sum(heads[:n])
            return [leaving(fused, change, lambda x: split(x, sum(heads))[..., begin : begin + heads[n], :])]
        return [leaving(inner(f"{name}_proj"), change, lambda x: split(x, heads[n]))]

    def run(self, row, edits=(), grad=False, **how):
        """The model's output for one prompt, under (name, layer, change) edits."""
        handles = [handle for edit in edits for handle in self.hook(*edit)]
        try:
            with torch.set_grad_enabled(grad):
                return self.model(torch.tensor([row]), use_cache=False, **how)
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, row, edits=()):
        return self.run(row, edits).logits[0].numpy()

    def read(self, row, names):
        """(name, layer) -> [T, ...] of every site of these names; of a pattern [N, T, T]."""
        found = {}
        places = [(n, i) for n in names for i in (range(1, self.layers + 1) if jc.SITES[n].layered else [None])]
        keep = lambda place, x: found.update({place: x[0].clone()})
        places = [p for p in places if p[0] != "pattern"] + [("resid_post", 0)]
        edits = [(*place, functools.partial(keep, place)) for place in places]
        out = self.run(row, edits, **({"output_attentions": True} if "pattern" in names else {}))
        for i in range(self.layers if "pattern" in names else 0):
            found["pattern", i + 1] = out.attentions[i][0]
        return {place: x.numpy() for place, x in found.items()}


def swap(whole, change, view):
    """With the part that is seen through `view` changed."""
    new = change(view(whole).clone())
    if new is None:
        return None
    whole = whole.clone()
    view(whole)[...] = new
    return whole


def on_logits(change, module, inputs, out):
    new = change(out.logits.clone())
    out.logits = out.logits if new is None else new


def leaving(module, change, view=lambda x: x):
    def hook(module, inputs, out):
        new = swap(out[0] if isinstance(out, tuple) else out, change, view)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    return module.register_forward_hook(hook)


def entering(module, change, view=lambda x: x):
    def hook(module, inputs):
        new = swap(inputs[0], change, view)
        return None if new is None else (new, *inputs[1:])

    return module.register_forward_pre_hook(hook)


def numbers(positions, row, length):
    """Which tokens of a row of this length positions mean, as Python and NumPy count."""
    every = range(length)
    if isinstance(positions, str):
        return [every[-1]] if positions == "last" else list(every)
    if isinstance(positions, slice):
        return list(every[positions])
    if isinstance(positions, np.ndarray):
        positions = positions[row]
        if positions.dtype == bool:
            return np.flatnonzero(positions[len(positions) - length :]).tolist()
    return [every[p] for p in np.atleast_1d(positions)]


def at(site, row, length, f, more=()):
    """The edit (for `Exact.run`) that makes f of the states [n, ...] at a site of a row; `more`: tokens besides."""
    chosen = [*numbers(site.positions, row, length), *more]

    def change(x):
        x = x.clone()
        where = (0, chosen)
        if site.heads is not None:
            where = (0, np.array(chosen)[:, None], np.atleast_1d(site.heads)[None])
        old = x[where]
        old = old[:, 0] if isinstance(site.heads, int) else old
        new = f(old)
        x[where] = new[:, None] if isinstance(site.heads, int) else new
        return x

    return site.name, site.layer, change


MADE = {}


def exact_of(pair) -> Exact:
    """The oracle of a pair, made once."""
    if pair.folder not in MADE:
        MADE[pair.folder] = Exact(pair.torch)
    return MADE[pair.folder]


# Reading ------------------------------------------------------------------------------------------------------------


def assert_read(cache, exact, rows, names, layers=None):
    """What `run_with_cache` kept is what the hooks saw, of real tokens; 0 on padding."""
    for row, tokens in enumerate(rows):
        want, n = exact.read(tokens, names), len(tokens)
        for name in names:
            ours = np.asarray(cache[name])
            ours = ours if jc.SITES[name].layered else ours[None]
            first = int(name != "resid_post")
            numbers = [None] if not jc.SITES[name].layered else layers or range(first, exact.layers + 1)
            assert len(ours) == len(numbers)
            for x, layer in zip(ours[:, row], numbers, strict=True):
                what = f"{name} {layer}, row {row}"
                real = (slice(None), slice(-n, None), slice(-n, None)) if name == "pattern" else slice(-n, None)
                assert_close(x[real], want[name, layer], what)
                rest = x.copy()
                rest[real] = 0
                assert not rest.any(), f"{what}: not 0 on padding"


def test_every_site_of_every_layer_is_what_hooks_see(pair):
    exact = exact_of(pair)
    names = exact.names()
    assert ("resid_mid" in names) == (pair.name != "gpt_neox")
    logits, cache = jc.run_with_cache(pair.params, PADDED, sites=names)
    assert sorted(cache) == sorted(names)
    assert_read(cache, exact, ROWS, names)
    np.testing.assert_array_equal(np.asarray(cache["logits"])[REAL], np.asarray(logits)[REAL])


def test_long_prompts_are_read_as_hooks_see_them(kind):
    """Where attention takes its queries in blocks."""
    rows = [prompts(1, n, seed=n)[0].tolist() for n in (620, 601)]
    names = ["mlp_out", "z", "pattern"]
    _, cache = jc.run_with_cache(kind.params, jc.left_pad(rows), sites=names, layers=[2, 4])
    assert_read(cache, exact_of(kind), rows, names, [2, 4])


def kept(x, site, row, length, columns):
    """A row's x [T, ...] at a site's positions and heads, as it is read: slices and masks at the end of all columns."""
    x = np.moveaxis(x, 0, 1) if site.name == "pattern" else x
    chosen = numbers(site.positions, row, length)
    heads = () if site.heads is None else (slice(None), np.array(site.heads))
    found = x[chosen][heads]
    if site.name == "pattern":
        found = np.pad(found, [(0, 0)] * (found.ndim - 1) + [(columns - length, 0)])
    p = site.positions
    if isinstance(p, slice) or (isinstance(p, str) and p == "all") or getattr(p, "dtype", np.dtype(int)).kind == "b":
        return np.pad(found, [(columns - len(chosen), 0)] + [(0, 0)] * (found.ndim - 1))
    return found if isinstance(p, tuple) or np.ndim(p) == 2 else found[0]


def sites_at(exact, turn, names=WRITABLE, layer=2):
    """Each of the sites, at some of the positions and heads; another turn, others."""
    heads = (None, 1, (1, 0))
    return [
        jc.Site(
            name,
            (layer(n) if callable(layer) else layer) if jc.SITES[name].layered else None,
            POSITIONS[(n + turn) % len(POSITIONS)],
            heads[(n + turn) % 3] if name in HEADS else None,
        )
        for n, name in enumerate(exact.names(names))
    ]


@pytest.mark.parametrize("turn", [0, 4, 8])
def test_positions_and_heads_choose_what_python_and_numpy_would(llama, turn):
    exact = exact_of(llama)
    sites = sites_at(exact, turn, list(jc.SITES), layer=3)
    _, cache = jc.run_with_cache(llama.params, PADDED, sites=sites)
    for row, tokens in enumerate(ROWS):
        want = exact.read(tokens, list(jc.SITES))
        for site in sites:
            ours = np.asarray(cache[site.name][row])
            ours = np.moveaxis(ours, 0, 1) if site.name == "pattern" and ours.ndim == 3 else ours  # heads come first
            assert_close(ours, kept(want[site.name, site.layer], site, row, len(tokens), 14), f"{site}, row {row}")


# Editing ------------------------------------------------------------------------------------------------------------


def plus(state, message, context):
    """Adds its message: a program of many edits, of which a message of 0 turns all but some off."""
    return state + message


def on(x):
    return torch.tensor(np.asarray(x, np.float64))


def adding(exact, case, sites, vectors, written=()):
    """Edits that add vectors at some of the sites, (number, layer) in `case`, and nothing at the others; and their hooks.

    written: numbers of the sites of which every token that is written is edited, too.
    """
    active = dict(case)
    placed = [at_layer(s, active.get(n, case[0][1] or 2)) for n, s in enumerate(sites)]
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
            assert_close(logits[row, -n:], want, what)
            assert_close(last[row], want[-1], f"{what}, prefill")


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
    made = [changed(*x) for x in zip(how, sites, *vectors, strict=True)]
    logits = jc.forward(pair.params, PADDED, edits=[edit for edit, _ in made])
    for row, tokens in enumerate(ROWS):
        hooks = [at(s, row, len(tokens), f[row]) for s, (_, f) in zip(sites, made, strict=True)]
        what = f"{pair.name}, row {row}, {list(zip(how, sites, strict=True))}"
        assert_close(logits[row, -len(tokens) :], exact.logits(tokens, hooks), what)


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


# What changes nothing -----------------------------------------------------------------------------------------------


def laid_out(pair, layout):
    return pair.params if layout == "stacked" else pair.params.unroll()


def unchanged(state, message, context):
    return state


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


# Messages -----------------------------------------------------------------------------------------------------------


def test_send_takes_what_run_with_cache_reads(llama):
    for site in sites_at(exact_of(llama), 1, list(jc.SITES), layer=lambda n: 1 + n % 4)[::2]:
        message = jc.send(llama.params, PADDED, site)
        np.testing.assert_array_equal(message.states, jc.run_with_cache(llama.params, PADDED, sites=site)[1][site.name])
        if message.valid is not None:
            want = [len(numbers(site.positions, row, len(tokens))) for row, tokens in enumerate(ROWS)]
            assert np.asarray(message.valid).sum(axis=1).tolist() == want


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (slice(1, 4), slice(-4, None)), (POSITIONS[10], "all"), ("all", POSITIONS[10]), ([0, 2, 1], "last"), (2, "last"),
        (2, "all"),
    ],
)  # fmt: skip
def test_a_message_goes_to_the_ends_of_what_the_receiver_chose(llama, source, target):
    """The last tokens of the message meet the last ones that are chosen, the rest stays; one token's goes to each of them."""
    exact, sent, got = exact_of(llama), jc.Site("mlp_out", 1, source), jc.Site("resid_mid", 3, target)
    logits = jc.forward(llama.params, PADDED, edits=[jc.receive(jc.send(llama.params, PADDED, sent), got)])
    for row, tokens in enumerate(ROWS):
        n = len(tokens)
        taken = on(exact.read(tokens, ["mlp_out"])["mlp_out", 1][numbers(source, row, n)])

        def put(s, taken=taken):
            taken = taken.expand(s.shape) if isinstance(source, int) else taken
            m = min(len(s), len(taken))
            return torch.cat([s[: len(s) - m], taken[len(taken) - m :]])

        assert_close(logits[row, -n:], exact.logits(tokens, [at(got, row, n, put)]), f"row {row}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "site",
    [
        jc.Site("resid_post", 0, 3), jc.Site("k", 3, POSITIONS[10], 1), jc.Site("q", 1, POSITIONS[9]),
        jc.Site("embed", positions=[0, -1]), jc.Site("logits", positions="last"), jc.Site("v", 2, slice(1, None)),
        jc.Site("z", 2, "all", (1, 0)),
        jc.Site("z", 2, [np.int64(1), -1]),
    ],
)  # fmt: skip
def test_messages_survive_a_file_bit_for_bit(llama, tmp_path, site, dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), llama.params)
    message = jc.send(params, PADDED, site).replace(note="was gesagt wurde: ä")
    message.save(tmp_path / "message")
    again = jc.Message.load(tmp_path / "message")
    assert [path.name for path in tmp_path.iterdir()] == ["message"], "nothing is left behind"
    assert (again.sender, again.note, repr(again)) == (message.sender, message.note, repr(message)) and again.sender
    for got, want in ((again.states, message.states), (again.valid, message.valid)):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes() or got is want is None
    np.testing.assert_equal(again.site.positions, site.positions)
    assert (again.site.name, again.site.layer, again.site.heads) == (site.name, site.layer, site.heads)
    logits = [jc.forward(params, PADDED, edits=[jc.receive(m, site)]) for m in (again, message)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("about", ["{", "[1]", "{}", None])
def test_a_foreign_file_is_one_clear_line(tmp_path, about):
    metadata = {"format": "pt"} if about is None else {"format": "jaxcomm.message.1", "about": about}
    safetensors.numpy.save_file({"states": np.ones((2, 3))}, tmp_path / "message", metadata=metadata)
    refused(lambda: jc.Message.load(tmp_path / "message"), "is not a message (jaxcomm.message.1)")


def test_a_damaged_file_is_one_clear_line(llama, tmp_path):
    path = tmp_path / "message"
    jc.send(llama.params, PADDED, 2).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no message", whole[:9], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        refused(lambda: jc.Message.load(path), f"{path} is not a whole safetensors file")


def test_another_model_takes_a_message_through_a_map_or_from_nobody(llama, wide, tmp_path_factory):
    other = make_checkpoint(tmp_path_factory.mktemp("other"), "llama", seed=9).params
    message = jc.send(llama.params, PADDED, 2)
    forward = lambda params, *how: jc.forward(params, PADDED, edits=[jc.receive(*how)])
    same = jax.tree.map(lambda a: a + 0, llama.params).unroll()
    assert_close(forward(same, message, 3), forward(llama.params, message, 3), "the same weights", 1e-6)
    for params in (other, wide.params):
        for call in (jc.forward, jc.generate, jc.prefill):
            says = f"this message of width 48 is from model {message.sender}, the receiver is"
            refused(lambda call=call, params=params: call(params, PADDED, edits=[jc.receive(message, 3)]), says)
        W = jax.random.normal(jax.random.key(0), (params.config.width, 48))
        got = forward(params, message, jc.Site("resid_post", 3, "last"), jc.Graft(W=W))
        assert_close(got, forward(params, message.states @ W.T, 3), "W a", 1e-4)
        assert np.isfinite(forward(params, message.anonymous(), 3)).all()


# Bad input ----------------------------------------------------------------------------------------------------------


def edit_at(*site, change=jc.scale(1.0), **how):  # noqa: B008
    return lambda p, t: jc.forward(p, t, edits=[jc.Edit(jc.Site(*site, **how), change)])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p, t: jc.run_with_cache(p, t, sites=["z", "attention"]), "unknown site 'attention': choose one of embed"),
        (lambda p, t: jc.run_with_cache(p, t, sites=["z", "k"], layers=[1, 0]), "layer 0 is out of range: z of this model has layers 1 to 4"),
        (lambda p, t: jc.run_with_cache(p, t, sites=jc.Site("z", 1, 7)), "position 7 is out of range: row 1 has 6 tokens"),
        (edit_at("z", 1, -7), "position -7 is out of range: row 1 has 6 tokens"),
        (edit_at("z", 1, 0.5), "positions 0.5: give whole numbers, or a mask"),
        (edit_at("z", 1, ~REAL), "the mask of positions chooses no token of row 0"),
        (edit_at("z", 1, REAL[:2]), "positions are (2, 14) for prompts (3, 14)"),
        (edit_at("z", 1.5), "layer 1.5 is out of range"),
        (edit_at("v", 1, heads=(0, 2)), "head 2 is out of range: v has heads 0 to 1"),
        (edit_at("z", 1, heads=-1), "head -1 is out of range"),
        (edit_at("q", 1, change=lambda s, m, c: s[..., :1]), "the edit of q returned"),
        (lambda p, t: jc.forward(p, t, edits=[jc.Edit(jc.Site("z", 1, heads=h), jc.scale(0.0)) for h in (2, (1, 2))]), "edits 0 and 1 both change z 1"),
        (lambda p, t: jc.forward(p, t, edits=[jc.Edit(jc.Site("logits"), jc.scale(0.0))] * 2), "edits 0 and 1 both change logits at position 0 of row 0"),
        (lambda p, t: jc.forward(p, t, edits=[jc.receive(ones(2, 48), 1)]), "2 messages for 3 prompts: give one for each"),
        (lambda p, t: jc.forward(p, t, edits=[jc.receive(jc.send(p, t[:1], 1), 1)]), "1 messages for 3 prompts"),
        (lambda p, t: jc.forward(p, t, edits=[jc.receive(ones(3, 48), 1, jc.Graft(W=ones(3, 3)))]), "W is (3, 3), but maps from width 48 to width 48"),
        (lambda p, t: jc.run_with_cache(p, t, sites=[jc.Site("z", 1), jc.Site("z", 3)]), "z"),
        (lambda p, t: jc.run_with_cache(p, t, sites="z", layers=[]), "layer"),
        (lambda p, t: jc.run_with_cache(p, t, sites="z", layers=[2, 2]), "layer"),
        (edit_at("z", 1, slice(None, None, -1)), "step"),
        (edit_at("z", 1, slice(None, None, 0)), "step"),
        (edit_at("z", 1, heads=()), "head"),
        (edit_at("z", np.array([1, 2])), "layer"),
        (lambda p, t: jc.forward(p, t, edits=[jc.Edit(jc.Site("mlp_out", 1), jc.replace)]), "message"),
        (lambda p, t: jc.forward(p, t, edits=[jc.receive(ones(3), 1)]), "message"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(unchecked, llama, call, says):
    refused(lambda: call(llama.params, PADDED), says)


@pytest.mark.parametrize("kind", ["gpt_neox"], indirect=True)
def test_a_parallel_family_refuses_resid_mid(kind):
    p, site = kind.params, jc.Site("resid_mid", 1)
    says = "this family has no resid_mid: attention and MLP both read resid_pre"
    refused(lambda: jc.run_with_cache(p, PADDED, sites=["z", "resid_mid"]), says)
    refused(lambda: jc.run_with_cache(p, PADDED, sites=site), says)
    refused(lambda: jc.send(p, PADDED, site), says)
    for call in (jc.forward, jc.prefill, jc.generate):
        refused(lambda call=call: call(p, PADDED, edits=[jc.Edit(site, unchanged)]), says)


def test_a_network_has_no_sites(unchecked, llama):
    network = init_network(jax.random.key(0), llama.params, widths=(1, 2, 1))
    decode, says = (
        functools.partial(jc.decode, network, *jc.prefill(network, PADDED)),
        "a network has no layers to be read or edited at",
    )
    for site in (jc.Site("resid_post", 1), jc.Site("logits")):
        for call in (jc.forward, jc.prefill, jc.generate):
            refused(lambda call=call, site=site: call(network, PADDED, edits=[jc.Edit(site, unchanged)]), says)
        refused(lambda site=site: decode(edits=[jc.Edit(site, unchanged)]), says)
        refused(lambda site=site: jc.run_with_cache(network, PADDED, sites=site), says)
        refused(lambda site=site: jc.send(network, PADDED, site), says)
