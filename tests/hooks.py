"""transformers' model in float64 with forward hooks at every site; prompts, positions and sites to compare at."""

import copy
import functools

import numpy as np
import torch

import jaxcomm as jc
from jaxcomm.sites import HEADS

from conftest import prompts

ROWS = [prompts(1, n, seed=n)[0].tolist() for n in (13, 6, 9)]
PADDED = jc.left_pad(ROWS, 14)
REAL = np.asarray(PADDED.mask)
POSITIONS = [
    "last", "all", 2, [-3, -1], [0, -2], slice(1, -2), slice(1, None, 2), slice(-4, None), np.array([4, -1, 0]),
    np.array([[0, 5], [-1, 2], [3, -9]]), np.random.default_rng(0).random(REAL.shape) < 0.4,
]  # fmt: skip
WRITABLE = [name for name, kind in jc.SITES.items() if kind.writable]


class Exact:
    """transformers' model in float64, one prompt at a time, so without padding; its sites are found by forward hooks."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).double()
        base, c = self.model.base_model, model.config
        self.blocks = base.h if hasattr(base, "h") else base.layers
        each = c.per_layer_config if getattr(c, "per_layer_config", None) else [c] * len(self.blocks)
        each, self.heads = [each[i] for i in range(len(self.blocks))], c.num_attention_heads
        self.kv_each = [getattr(one, "num_key_value_heads", self.heads) for one in each]
        self.size_each = [getattr(one, "head_dim", None) or c.hidden_size // self.heads for one in each]
        self.kv_heads, self.size = max(self.kv_each), max(self.size_each)
        self.layers, self.width, self.vocab = len(self.blocks), c.hidden_size, c.vocab_size
        self.gated = c.model_type == "qwen3_5_text"
        self.attends = [n + 1 for n, block in enumerate(self.blocks) if not hasattr(block, "linear_attn")]
        self.parallel = getattr(c, "use_parallel_residual", False)
        self.embedding, self.residual = (getattr(c, f"{x}_multiplier", 1.0) for x in ("embedding", "residual"))

    def names(self, names=tuple(jc.SITES)):
        """The sites that this family has."""
        return [name for name in names if not (name == "resid_mid" and self.parallel)]

    def layer(self, name, layer):
        """The layer, or the next one that has heads, if the site has an axis of them."""
        return layer if name not in HEADS else next(n for n in self.attends if n >= layer)

    def shape(self, name, heads=None):
        """Of one token's state there; where layers differ, the largest."""
        if name not in HEADS:
            return (self.vocab if name == "logits" else self.width,)
        every = self.kv_heads if name in ("k", "v") else self.heads
        return (*np.empty(every)[() if heads is None else np.array(heads)].shape, self.size)

    def cut(self, x, site):
        """As much of an array of that shape as the site's layer has."""
        if site.name not in HEADS:
            return x
        kv, size = self.kv_each[site.layer - 1], self.size_each[site.layer - 1]
        return x[..., :kv, :size] if site.heads is None and site.name in ("k", "v") else x[..., :size]

    def hook(self, name, layer, change):
        """Calls change on what is at the site, [1, T, ...]; what it returns, if anything, takes its place. Returns handles."""
        if name == "logits":
            return [self.model.register_forward_hook(functools.partial(on_logits, change))]
        if name == "embed":
            return [leaving(self.model.get_input_embeddings(), times(self.embedding, change))]
        if name == "resid_post" and layer == 0:
            name, layer = "resid_pre", 1
        block = self.blocks[layer - 1]
        part = lambda *names: next(getattr(block, n) for n in names if hasattr(block, n))
        attention = part("self_attn", "attn", "attention", "linear_attn")
        inner = lambda *names: next((getattr(attention, n) for n in names if hasattr(attention, n)), None)
        after = hasattr(block, "post_feedforward_layernorm")
        attn_out = block.post_attention_layernorm if after else attention
        mlp_out = block.post_feedforward_layernorm if after else part("mlp", "block_sparse_moe")
        if name == "resid_pre":
            return [entering(block, change)]
        if name == "resid_post":
            return [leaving(block, change)]
        if name in ("attn_out", "mlp_out"):
            return [leaving({"attn_out": attn_out, "mlp_out": mlp_out}[name], times(self.residual, change))]
        if name == "resid_mid":  # no module's output: attn_out is made such that it becomes what it shall be
            box = {}

            def edit(x):
                new = change(box["h"] + x)
                return None if new is None else new - box["h"]

            return [entering(block, lambda h: box.update(h=h)), leaving(attn_out, times(self.residual, edit))]
        if name in "kv" and (normed := inner("v_norm")):  # behind a matrix of both, perhaps
            return [entering(normed if name == "v" else attention.k_norm, change)]
        split = lambda x, heads: x.unflatten(-1, (heads, self.size_each[layer - 1]))
        if name == "z":
            return [entering(inner("o_proj", "c_proj", "dense"), change, lambda x: split(x, self.heads))]
        kv_heads = self.kv_each[layer - 1]
        heads, n = (self.heads, kv_heads, kv_heads), "qkv".index(name)
        if inner("query_key_value"):
            return [leaving(attention.query_key_value, change, lambda x: split(x, self.heads * 3)[..., n::3, :])]
        if fused := inner("c_attn", "qkv_proj"):
            begin = sum(heads[:n])
            return [leaving(fused, change, lambda x: split(x, sum(heads))[..., begin : begin + heads[n], :])]
        if self.gated and name == "q":  # a head's queries, then its gates
            return [leaving(attention.q_proj, change, lambda x: x.unflatten(-1, (self.heads, 2, -1))[..., 0, :])]
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
        layers = lambda n: self.attends if n in HEADS else range(1, self.layers + 1) if jc.SITES[n].layered else [None]
        places = [(n, i) for n in names for i in layers(n)]
        keep = lambda place, x: found.update({place: x[0].clone()})
        places = [p for p in places if p[0] != "pattern"] + [("resid_post", 0)]
        edits = [(*place, functools.partial(keep, place)) for place in places]
        out = self.run(row, edits, **({"output_attentions": True} if "pattern" in names else {}))
        if "pattern" in names:
            seen = [a for a in out.attentions if a is not None]
            found |= {("pattern", i): a[0] for i, a in zip(self.attends, seen, strict=True)}
        return {place: x.numpy() for place, x in found.items()}


def times(factor, change):
    """`change` of what is multiplied by a factor after it left its module."""

    def scaled(x):
        new = change(x * factor)
        return None if new is None else new / factor

    return change if factor == 1 else scaled


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


def sites_at(exact, turn, names=WRITABLE, layer=2):
    """Each of the sites, at some of the positions and heads; another turn, others."""
    heads = (None, 1, (1, 0))
    return [
        jc.Site(
            name,
            exact.layer(name, layer(n) if callable(layer) else layer) if jc.SITES[name].layered else None,
            POSITIONS[(n + turn) % len(POSITIONS)],
            heads[(n + turn) % 3] if name in HEADS else None,
        )
        for n, name in enumerate(exact.names(names))
    ]


def on(x):
    return torch.tensor(np.asarray(x, np.float64))


def ones(*shape):
    return np.ones(shape, np.float32)


def unchanged(state, message, context):
    return state
