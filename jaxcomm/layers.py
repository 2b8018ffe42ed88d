"""Flax Linen modules: one `Block` serves every family; `ModelConfig` holds all differences.

Every linear weight is [out, in], as in Hugging Face checkpoints, so conversion copies bytes and never transposes.
Norms, rotary angles, routing and the softmax are computed in float32, whatever the weights' dtype.
The results match transformers' modeling files of the families in `jaxcomm.converters.families`, with eager attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxcomm.attention import Aside, Scoring, Segment, attend, beside, pattern
from jaxcomm.cache import ALONE, Attended, DeltaState
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.linear_attention import blank_state, convolve, delta_rule, split_heads


class Hook(NamedTuple):
    """A function to call at the sites (`jaxcomm.sites`) while the blocks run.

    at(site, layer, x, state) -> x, state: reads or changes the activation x. state: any pytree, passed from site to site.
    sites: names of the sites that `at` is called for. valid: False in rows with invalid input; their results become NaN.
    """

    at: Callable[[str, Any, Array, Any], tuple[Array, Any]] = lambda site, layer, x, state: (x, state)
    state: PyTree = ()
    sites: frozenset[str] = frozenset()
    valid: bool | Bool[Array, "B"] = True

    def __call__(self, site: str, layer: Any, x: Array) -> tuple[Array, Hook]:
        """Call the hook at a site. Returns x, and the hook with its new state."""
        if site not in self.sites:
            return x, self
        x, state = self.at(site, layer, x, self.state)
        return x, self._replace(state=state)

    def within(self, columns: int) -> Hook:
        """The same hook, applied only to the first `columns` columns."""

        def at(site: str, layer: Any, x: Array, state: Any) -> tuple[Array, Any]:
            new, state = self.at(site, layer, x[:, :columns], state)
            return jnp.concatenate([new, x[:, columns:]], axis=1), state

        return self._replace(at=at)


NO_HOOK = Hook()


class Surroundings:
    """The inputs of one call of a block, besides its weights and its stream.

    Attributes:
        layer: Number of the block, from 1; may be traced.
        angles: Angles of its rotary embedding (`angles_of`).
        positions: [B, T], positions of the tokens.
        window: How far back a query sees; None: to the first token.
        attended: The caches that the tokens attend to, and the one that they fill.
        first: Only tokens from this one on have queries: Q = T - first.
        hook: The hook to call at sites. After the call of the block it has its new state.
        kept: The cache with this layer's part, None without one; set by the call of the block.
    """

    def __init__(self, layer, angles, positions, window, attended: Attended = ALONE, first=0, hook: Hook = NO_HOOK):
        self.layer, self.angles, self.positions, self.window = layer, angles, positions, window
        self.attended, self.first, self.hook, self.kept = attended, first, hook, None

    def wants(self, site: str) -> bool:
        """Whether the hook is called at a site."""
        return site in self.hook.sites

    def at(self, site: str, x: Array) -> Array:
        """Call the hook at a site. Returns the activation."""
        x, self.hook = self.hook(site, self.layer, x)
        return x

    def segments(self, k: Array, v: Array) -> tuple[Segment | Aside, ...]:
        """The segments that queries attend to. The tokens' own segment is the last one. k, v: [B, K, T, H]."""
        found, self.kept = self.attended.segments(self.layer - 1, self.positions, k, v)
        return found

    def carry(self, step: Callable, x: Any, blank: DeltaState) -> Array:
        """Run linear attention over the tokens, from the state before them (`Attended.carry`)."""
        out, self.kept = self.attended.carry(self.layer - 1, self.positions, step, x, blank)
        return out


FEW = 128
"""Largest number of tokens for which a linear layer puts the weight on the left (`project`)."""
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
_init_each = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2, batch_axis=0)


def project(weight: Any, x: Float[Array, "B T X"], dtype=None) -> Float[Array, "B T Y"]:
    """x W^T, in `dtype` if given, W [Y, X], or int8 with scales [Y, 1] (`jaxcomm.int8`).

    For few tokens (decoding) the weight is the left operand: on CPU this is up to twice as fast as the other order. For
    many tokens it is a quarter slower. (On accelerators the order only affects layouts.) Many tokens are flattened to one
    axis. The weight's gradient is then a product of two matrices. As a sum over two axes, XLA on CPU would transpose both
    sides first.
    """
    if hasattr(weight, "qvalue"):
        y = project(weight.qvalue.astype(x.dtype), x, dtype)
        return y * weight.scale[:, 0].astype(y.dtype)
    if x.shape[0] * x.shape[1] > FEW:
        rows = x.reshape(-1, x.shape[-1])
        return jnp.einsum("ni,oi->no", rows, weight, preferred_element_type=dtype).reshape(*x.shape[:2], -1)
    y = jax.lax.dot_general(weight, x, (((1,), (2,)), ((), ())), preferred_element_type=dtype)
    return y.transpose(1, 2, 0)


class Linear(nn.Module):
    """y = x W^T (+ b), W [features, in]."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T X"]) -> Float[Array, "B T Y"]:
        y = project(self.param("weight", _init, (self.features, x.shape[-1])), x)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,))
        return y


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32. `kind` is a value of `ModelConfig.norm`."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        start = nn.initializers.zeros if self.kind == "rms_plus_one" else nn.initializers.ones
        weight, wide = self.param("weight", start, (x.shape[-1],)), x.astype(jnp.float32)
        if self.kind == "layer":
            wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms":
            return wide.astype(x.dtype) * weight
        wide *= weight.astype(jnp.float32) + (1.0 if self.kind == "rms_plus_one" else 0.0)
        if self.kind == "layer":
            wide += self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        return wide.astype(x.dtype)


def unit(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x divided by its root mean square over the last axis, computed in float32: RMSNorm without a weight."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def norm_of(config: ModelConfig, name: str | None = None) -> Norm:
    return Norm(config.norm, config.norm_eps, name=name)


def rope_frequencies(rope: Rope, head_dim: int, max_positions: int) -> np.ndarray:
    """Frequencies [H' / 2] of the H' rotated dimensions: angle per position, float32. longrope uses `max_positions`."""
    dims = rope.dims(head_dim)
    if rope.kind == "none":
        return np.zeros(dims // 2, np.float32)
    # Round at the same points as torch's float32 pow. Else a frequency may be off by an ulp: 1e-5 turns at position 700.
    exponent = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    period = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    frequency = 1 / period
    if rope.kind in ("linear", "proportional"):
        frequency /= np.float32(rope.factor)
    if rope.kind == "proportional":
        frequency[int(rope.share * head_dim // 2) :] = 0
    if rope.kind == "longrope":
        chosen = rope.long if max_positions > rope.original_positions else rope.short
        frequency = 1 / (np.asarray(chosen, np.float32) * period)
    if rope.kind == "llama3":
        turns = rope.original_positions * frequency / (2 * np.pi)
        keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
        frequency = (1.0 - keep) * frequency / rope.factor + keep * frequency
    if rope.kind == "yarn":
        # The dimension that makes n turns within the original positions.
        turning = lambda n: dims * math.log(rope.original_positions / (n * 2 * math.pi)) / (2 * math.log(rope.theta))
        low, high = turning(rope.beta_fast), turning(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        keep = 1 - np.clip((np.arange(dims // 2, dtype=np.float32) - low) / (high - low or 0.001), 0.0, 1.0)
        frequency = (1 - keep) / (np.float32(rope.factor) * period) + keep * frequency
    return frequency.astype(np.float32)


def rotary(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array] | None:
    """Cosines and sines [R, B, T, H' / 2] of the positions for each of the model's `turns`, float32; None if no layer
    rotates anything. H' is that of the largest heads. `angles_of` cuts the tables for smaller ones."""
    ropes = config.ropes
    if all(rope.kind == "none" for rope in ropes):
        return None
    every = [rope_frequencies(rope, size, config.max_positions) for rope, size in config.turns]
    widest = max(map(len, every))
    every = [np.pad(frequencies, (0, widest - len(frequencies))) for frequencies in every]
    angles = jnp.stack([positions[..., None].astype(jnp.float32) * frequencies for frequencies in every])
    # Multiply by the identity, so that the tables are computed once. Without the product, XLA on CPU would recompute the
    # cosines in every unrolled layer, for every head.
    eye = jnp.eye(angles.shape[-1], dtype=jnp.float32)
    cos, sin = jnp.matmul(jnp.stack([jnp.cos(angles), jnp.sin(angles)]), eye, precision="highest")
    if any(rope.scale != 1.0 for rope in ropes):
        scale = jnp.asarray([rope.scale for rope, _ in config.turns], jnp.float32)[:, None, None, None]
        return cos * scale, sin * scale
    return cos, sin


def angles_of(config: ModelConfig, tables: tuple[Array, Array] | None, i) -> tuple[Array, Array] | None:
    """The tables of `rotary` for layer i, [B, T, H' / 2]; i counts from 0 and may be traced."""
    if tables is None:
        return None
    turn = config.turn_of[i] if isinstance(i, int) else jnp.asarray(config.turn_of)[i]
    cos, sin = (table[turn] for table in tables)
    if not config.alike:  # then i is an int
        rope, size = config.turns[turn]
        cos, sin = (table[..., : rope.dims(size) // 2] for table in (cos, sin))
    return cos, sin


def rotate(x: Float[Array, "B T X H"], angles: tuple[Array, Array] | None) -> Float[Array, "B T X H"]:
    """Rotate the first H' dimensions of every head, in float32."""
    if angles is None:
        return x
    cos, sin = (table[:, :, None, :] for table in angles)
    half = cos.shape[-1]
    low, high = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = [low * cos - high * sin, high * cos + low * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)


class Attention(nn.Module):
    """Grouped-query attention over any number of segments (`Surroundings.segments`). Segments are not concatenated, so all
    continuations of a prompt can share its cache."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], around: Surroundings) -> Float[Array, "B Q D"]:
        c, first = self.config, around.first
        B, T, _ = x.shape
        q, k, v, gate = self.project(x, around)
        q = rotate(q, around.angles and tuple(table[:, first:] for table in around.angles))
        q = q.reshape(B, T - first, c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = rotate(k, around.angles).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        sinks = self.param("sinks", nn.initializers.zeros, (c.heads,)) if c.sinks else None
        found, how = around.segments(k, v), Scoring(scale, c.attention_softcap, around.window, sinks)
        segments = [part for part in found if not isinstance(part, Aside)]
        asked = around.positions[:, first:]
        ordered = segments[-1][0] is k
        if around.wants("pattern"):
            around.at("pattern", pattern(q, asked, found, how, ordered))
        out = attend(q, asked, segments, how, ordered)
        for part in found:
            if isinstance(part, Aside):
                out += beside(q, asked, part, how).astype(out.dtype)
        z = out.transpose(0, 3, 1, 2, 4).reshape(B, T - first, c.heads, c.head_dim)
        z = around.at("z", z if gate is None else z * jax.nn.sigmoid(gate))
        return Linear(c.width, c.out_bias, name="o")(z.reshape(B, T - first, c.heads * c.head_dim))

    def project(self, x: Float[Array, "B T D"], around: Surroundings) -> tuple[Array, Array, Array, Array | None]:
        """Queries [B, Q, N, H] of the last Q tokens, keys and values [B, T, K, H] of all tokens, before rotation; and the
        gates [B, Q, N, H] of what the queries read, before the sigmoid."""
        c = self.config
        made, flat = {}, x
        for name, heads, read in (("q", c.heads, x[:, around.first :]), ("k", c.kv_heads, x), ("v", c.kv_heads, x)):
            if not (name == "v" and c.keys_as_values):  # else flat still holds the keys
                flat = Linear(heads * c.head_dim, c.qkv_bias, name=name)(read)
            y = around.at(name, flat.reshape(*flat.shape[:2], heads, c.head_dim))
            if name == "v" and c.v_norm:
                y = unit(y, c.norm_eps)
            if name != "v" and c.qk_norm == "width":
                y = norm_of(c, f"{name}_norm")(y.reshape(flat.shape)).reshape(y.shape)
            if name != "v" and c.qk_norm == "head":
                y = norm_of(c, f"{name}_norm")(y)
            made[name] = y
        gate = None
        if c.attention_gate:
            flat = Linear(c.heads * c.head_dim, c.qkv_bias, name="q_gate")(x[:, around.first :])
            gate = flat.reshape(made["q"].shape)
        return made["q"], made["k"], made["v"], gate


class DeltaNet(nn.Module):
    """Linear attention: a short causal convolution, then the gated delta rule (transformers' qwen3_5,
    `Qwen3_5GatedDeltaNet`). Its state holds all earlier tokens (`cache.DeltaState`). Padding on the left changes no state."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], around: Surroundings) -> Float[Array, "B Q D"]:
        c, rule, first = self.config, self.config.delta_rule, around.first
        assert rule is not None
        N, Y = rule.value_heads, rule.value_dim
        each = lambda name, start: self.param(name, start, (N,)).astype(jnp.float32)
        real = around.positions[..., None] >= 0
        channels = Linear(rule.channels, name="qkv")(jnp.where(real, x, 0))
        strength = jax.nn.sigmoid(Linear(N, name="strength")(x))
        rate, bias = -jnp.exp(each("log_rate", nn.initializers.zeros)), each("decay_bias", nn.initializers.ones)
        decay = rate * jax.nn.softplus(Linear(N, name="decay")(x).astype(jnp.float32) + bias)
        kernel = self.param("kernel", _init, (rule.channels, rule.kernel))
        blank = blank_state(rule, x.dtype, 1)

        def step(state: DeltaState, given: tuple[Array, ...], positions: Array) -> tuple[Array, DeltaState]:
            channels, decay, strength = given
            mixed, inputs = convolve(kernel, state.inputs, channels, positions)
            q, k, v = split_heads(rule, ACTIVATIONS[c.activation](mixed))
            out, memory = delta_rule(state.memory, q, k, v, decay, strength)
            return out, DeltaState(inputs, memory)

        decay, strength = jnp.where(real, decay, 0), jnp.where(real, strength.astype(jnp.float32), 0)
        read = around.carry(step, (channels, decay, strength), blank)[:, first:].astype(x.dtype)
        read = Norm("rms", c.norm_eps, name="read_norm")(read)
        gate = Linear(N * Y, name="gate")(x[:, first:]).reshape(read.shape).astype(jnp.float32)
        read = (read.astype(jnp.float32) * jax.nn.silu(gate)).astype(x.dtype)
        return Linear(c.width, name="o")(read.reshape(*read.shape[:2], N * Y))


def opened(config: ModelConfig, gate: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """act(gate). The gate is clipped above the limit, if the architecture has one."""
    gate = gate if config.mlp_limit is None else jnp.minimum(gate, config.mlp_limit)
    return ACTIVATIONS[config.activation](gate)


def let_through(config: ModelConfig, up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """The factor that the gate multiplies. It is clipped to the limits, if the architecture has them."""
    up = up if config.mlp_limit is None else jnp.clip(up, -config.mlp_limit, config.mlp_limit)
    return up + 1 if config.up_plus_one else up


def scaled(x: Float[Array, "*B D"], factor: float) -> Float[Array, "*B D"]:
    """x times a number. The number is not rounded to x's dtype first."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        ff = c.dense_ff or c.ff
        if c.gated:
            inner = opened(c, Linear(ff, c.mlp_bias, name="gate")(x))
            inner *= let_through(c, Linear(ff, c.mlp_bias, name="up")(x))
        else:
            inner = ACTIVATIONS[c.activation](Linear(ff, c.mlp_bias, name="up")(x))
        return Linear(c.width, c.mlp_bias, name="down")(inner)


class Experts(nn.Module):
    """A sparse mixture of gated MLPs. The router picks the `experts_per_token` most probable experts for each token. The
    result is the sum of their outputs, weighted by their probabilities (transformers' mixtral, qwen3_moe and gpt_oss).

    Tokens are sorted by expert and cut into blocks of one expert each. So the work grows with the number of chosen experts,
    not of all experts, on every backend, under vmap and grad. (`jax.lax.ragged_dot` multiplies every token by every expert
    on CPU, and has no vmap for this layout.)
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], stream: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        shape = lambda *axes: (c.experts, *axes)

        def draw(name: str, init: Callable, bias: bool, *axes: int) -> dict[str, Any]:
            zero = lambda: {"bias": jnp.zeros(shape(*axes[:-1]), jnp.float32)} if bias else {}
            return self.param(name, lambda key: {"weight": init(key, shape(*axes)), **zero()})

        router = draw("router", _init, c.router_bias, c.width)
        asked = x
        if c.router_norm:
            factor = self.param("router_scale", nn.initializers.ones, (c.width,))
            asked = scaled(unit(stream, c.norm_eps) * factor, c.width**-0.5)
        logits = project(router["weight"], asked, jnp.float32)
        if c.router_bias:
            logits += router["bias"].astype(jnp.float32)
        logits = logits.reshape(-1, c.experts)
        weights = [
            draw(name, _init_each, c.mlp_bias, *axes)
            for name, axes in (("gate", (c.ff, c.width)), ("up", (c.ff, c.width)), ("down", (c.width, c.ff)))
        ]
        share, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), c.experts_per_token)
        if c.normalised_experts:
            share /= jnp.sum(share, axis=-1, keepdims=True)
        if c.router_norm:
            share *= self.param("expert_scale", nn.initializers.ones, (c.experts,)).astype(jnp.float32)[chosen]
        rows, blocks = block_rows(chosen, c.experts)
        read = x.reshape(-1, c.width)[blocks.tokens]

        def block(_, given):
            x, expert, used = given
            one = jax.tree.map(lambda w: w[expert], weights)
            return None, jax.lax.cond(used, lambda x: self.one(x, one), jnp.zeros_like, x)

        said = jax.lax.scan(block, None, (read, blocks.experts, blocks.used))[1].reshape(-1, c.width)[rows]
        out = jnp.einsum("nkd,nk->nd", said.astype(jnp.float32), share)
        return out.astype(x.dtype).reshape(x.shape)

    def one(self, x: Float[Array, "M D"], weights: Sequence[Any]) -> Float[Array, "M D"]:
        through = lambda w, x: project(w["weight"], x) + w["bias"] if self.config.mlp_bias else project(w["weight"], x)
        gate, up, down = (functools.partial(through, w) for w in weights)
        return down(opened(self.config, gate(x[None])) * let_through(self.config, up(x[None])))[0]


class Blocks(NamedTuple):
    """Blocks of M tokens for the same expert: tokens [blocks, M] (any token in unused places), the expert of each block
    [blocks], and whether the block is used [blocks]."""

    tokens: Array
    experts: Array
    used: Array


def block_rows(chosen: Int[Array, "n k"], experts: int) -> tuple[Int[Array, "n k"], Blocks]:
    """Make the blocks for tokens with these chosen experts. Also returns the row among all blocks of each choice.

    M is half of the average number of tokens of an expert, between 1 and 256. On average an expert's last block is half
    empty.
    """
    n, k = chosen.shape
    size = 1 << min(8, max(0, (n * k // experts).bit_length() - 2))
    blocks = min(n * k, n * k // size + min(experts, n * k))
    flat = chosen.reshape(-1)
    counts = jnp.bincount(flat, length=experts)
    ends = jnp.cumsum(-(-counts // size))
    order = jnp.argsort(jnp.argsort(flat, stable=True))
    within = order - (jnp.cumsum(counts) - counts)[flat]
    rows = ((ends - -(-counts // size))[flat] * size + within).astype(jnp.int32)
    tokens = jnp.zeros(blocks * size, jnp.int32).at[rows].set(jnp.arange(n * k, dtype=jnp.int32) // k)
    number = jnp.arange(blocks)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1)
    return rows.reshape(n, k), Blocks(tokens.reshape(blocks, size), expert, number < ends[-1])


class Block(nn.Module):
    """One layer: h[i-1] -> h[i], for the tokens that have queries (`Surroundings.first`)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], around: Surroundings) -> Float[Array, "B Q D"]:
        c = self.config
        before = lambda name, x: x if c.norms == "after" else norm_of(c, name)(x)
        after = lambda name, x: x if c.norms == "before" else norm_of(c, name)(x)
        h = around.at("resid_pre", h)
        mixer = Attention(c, name="attention") if c.delta_rule is None else DeltaNet(c, name="delta")
        x = mixer(before("attention_norm", h), around)
        h = h[:, around.first :]
        attended = h + around.at("attn_out", scaled(after("attention_post_norm", x), c.residual_scale))
        if not c.parallel:
            attended = around.at("resid_mid", attended)
        x = self.feed(h if c.parallel else attended, before)
        added = around.at("mlp_out", scaled(after("mlp_post_norm", x), c.residual_scale))
        out = attended + added
        if c.layer_scale:
            out *= self.param("layer_scale", nn.initializers.ones, (1,))
        return around.at("resid_post", out)

    def feed(self, h: Float[Array, "B T D"], before: Callable) -> Float[Array, "B T D"]:
        """The MLP or the experts of the stream. With both, their outputs are normalised and added."""
        c = self.config
        if not c.experts:
            return MLP(c, name="mlp")(before("mlp_norm", h))
        if not c.dense_ff:
            return Experts(c, name="mlp")(before("mlp_norm", h), h)
        dense = norm_of(c, "dense_post_norm")(MLP(c, name="mlp")(before("mlp_norm", h)))
        return dense + norm_of(c, "experts_post_norm")(Experts(c, name="experts")(before("experts_norm", h), h))
