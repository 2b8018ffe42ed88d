"""Reading every site equals forward hooks on transformers in float64, in every family; bad input is one clear line."""

import functools

import jax
import numpy as np
import pytest

import jaxcomm as jc
from jaxcomm.lmnet import init_network
from jaxcomm.sites import differs

from conftest import ROUNDED, assert_close, prompts, refused
from hooks import PADDED, REAL, ROWS, exact_of, numbers, ones, sites_at, unchanged

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
                assert_close(x[real], want[name, layer], what, ROUNDED)
                rest = x.copy()
                rest[real] = 0
                assert not rest.any(), f"{what}: not 0 on padding"


def test_every_site_of_every_layer_is_what_hooks_see(pair):
    exact = exact_of(pair)
    names = exact.names()
    assert ("resid_mid" in names) == (pair.name != "gpt_neox")
    apart = [name for name in names if differs(pair.params.config, name)]
    logits, cache = jc.run_with_cache(pair.params, PADDED, sites=[name for name in names if name not in apart])
    assert sorted([*cache, *apart]) == sorted(names)
    assert_read(cache, exact, ROWS, [*cache])
    for sizes in set(zip(exact.kv_each, exact.size_each, strict=True)) if apart else ():
        layers = [i for i in exact.attends if (exact.kv_each[i - 1], exact.size_each[i - 1]) == sizes]
        assert_read(jc.run_with_cache(pair.params, PADDED, sites=apart, layers=layers)[1], exact, ROWS, apart, layers)
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
            theirs = kept(want[site.name, site.layer], site, row, len(tokens), 14)
            assert_close(ours, theirs, f"{site}, row {row}", ROUNDED)


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
        (lambda p, t: jc.forward(p, t, edits=jc.Edit(jc.Site("z", 1), jc.scale(0.0))), "edits are a list, got a Edit"),
        (edit_at("mlp_out", 1, change=jc.add(ones(7))), "the vector to add is (7,), the state (3, 14, 48)"),
        (edit_at("mlp_out", 1, "last", change=jc.scale(ones(3, 1))), "the factor is (3, 1), the state (3, 1, 48)"),
        (edit_at("z", 1, change=jc.project_out(ones(5))), "the direction is (5,), the state"),
        (lambda p, t: jc.forward(p, t, edits=[jc.Edit(jc.Site("mlp_out", 1), jc.replace, ones(3, 7))]), "the message is"),
        (lambda p, t: jc.project_out(np.zeros(48)), "the direction to project out has length 0"),
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
