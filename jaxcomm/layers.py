"""Flax Linen modules: one `Block` serves every family, told apart by `ModelConfig` alone.

Every linear weight is [out, in], as Hugging Face stores it, so conversion moves bytes and never transposes them.
Norms, rotary angles and the softmax are computed in float32 whatever the weights' dtype.
Mirrors `transformers.models.llama.modeling_llama` (and qwen2, gemma2) with eager attention.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomm.config import ModelConfig, Rope

Segment = tuple[Float[Array, "#B K *_ H"], Float[Array, "#B K *_ H"], Int[Array, "#B *_"]]
"""Keys, values [B, K, S, H] and positions [B, S] of earlier tokens; -1 marks an empty slot. S differs by segment. B may
be 1: what all rows share.

Or of C branches, [B, K, C, S, H] and [B, C, S]: the row's T queries are then C groups of T / C, and each group sees its
own branch only. So many continuations of one prompt are one row, which shares that prompt's segment."""
Gather = Callable[[Array, Array], tuple[tuple[Segment, ...], Any]]

MASKED = -1e30
BLOCK, BLOCKS = 128, 4
"""Attention takes the queries of a text in at most BLOCKS blocks of at least BLOCK tokens."""
FEW = 128
"""Tokens up to which a linear layer multiplies from the left (`project`)."""
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


def project(weight: Float[Array, "Y X"], x: Float[Array, "B T X"], dtype=None) -> Float[Array, "B T Y"]:
    """x W^T, in `dtype` if given.

    Of few tokens (decoding) the weight is the left operand, which on CPU is up to twice as fast as the other order; of
    many it is a quarter slower. (Elsewhere the order is a matter of layouts.) Many are one axis: the weight's gradient is then
    a product of two matrices, and not a sum over two axes, for which XLA on CPU transposes both sides first.
    """
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


class RMSNorm(nn.Module):
    """x / rms(x) * w, cast back before the weight (Llama) or, with `plus_one`, after 1 + w in float32 (Gemma)."""

    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        weight = self.param("weight", start, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * weight


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[H / 2] angles per position, float32."""
    frequency = (1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return (frequency / rope.factor).astype(np.float32)
    turns = rope.original_positions * frequency / (2 * np.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return ((1.0 - keep) * frequency / rope.factor + keep * frequency).astype(np.float32)


def rotary(rope: Rope, head_dim: int, positions: Int[Array, "B T"], dtype) -> tuple[Array, Array]:
    """Cosines and sines [B, T, H / 2] of the positions, computed in float32 and rounded to `dtype`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    # What comes out of a product is there once: XLA on CPU would compute cosines again in every unrolled layer, for every head.
    once = jnp.matmul(
        jnp.stack([jnp.cos(angles), jnp.sin(angles)]), jnp.eye(head_dim // 2, dtype=jnp.float32), precision="highest"
    )
    return once[0].astype(dtype), once[1].astype(dtype)


def rotate(x: Float[Array, "B T X H"], angles: tuple[Array, Array]) -> Float[Array, "B T X H"]:
    cos, sin = (table[:, :, None, :] for table in angles)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def visible(queries: Int[Array, "*#n T"], keys: Int[Array, "*#n S"], window) -> Array:
    """[*n, T, S]: key exists, is not later than the query and, if `window` is not None, is within the window."""
    distance = queries[..., :, None] - keys[..., None, :]
    seen = (keys[..., None, :] >= 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


class Attention(nn.Module):
    """Grouped-query attention over any number of segments.

    `gather(k, v)` gets the tokens' own keys and values [B, K, T, H] and says which segments they attend to (their own
    among them) and what is to be kept, which is returned. A segment is scored where it lies, so a prompt's cache is
    shared by everything that continues it. Only the tokens from `first` on ask: Q = T - first.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], angles, positions: Int[Array, "B T"], window, gather: Gather, first: int = 0
    ) -> tuple[Float[Array, "B Q D"], Any]:
        c = self.config
        B, T, _ = x.shape
        Q = T - first
        q = Linear(c.heads * c.head_dim, c.qkv_bias, name="q")(x[:, first:]).reshape(B, Q, c.heads, c.head_dim)
        k = Linear(c.kv_heads * c.head_dim, c.qkv_bias, name="k")(x).reshape(B, T, c.kv_heads, c.head_dim)
        v = Linear(c.kv_heads * c.head_dim, c.qkv_bias, name="v")(x).reshape(B, T, c.kv_heads, c.head_dim)
        q = rotate(q, tuple(table[:, first:] for table in angles))
        q = q.reshape(B, Q, c.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
        k, v = rotate(k, angles).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

        segments, kept = gather(k, v)
        # A long text's own keys come last, in order: queries are taken in blocks, each of which sees only those up to its
        # end, so five eighths of the scores are made, and fewer at a time (a seventh of reading 400 to 600 tokens).
        *past, own = segments
        size = max(BLOCK, -(-T // BLOCKS)) if own[0] is k else T
        until = lambda end: (own[0][:, :, :end], own[1][:, :, :end], own[2][:, :end]) if end < T else own
        asked = positions[:, first:]
        out = [
            self.attend(q[..., t : t + size, :], asked[:, t : t + size], window, [*past, until(first + t + size)])
            for t in range(0, Q, size)
        ]
        out = jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4)
        out = Linear(c.width, c.out_bias, name="o")(out.reshape(B, Q, c.heads * c.head_dim))
        return out, kept

    def attend(
        self, q: Float[Array, "B K G T H"], positions: Int[Array, "B T"], window, segments: Sequence[Segment]
    ) -> Float[Array, "B K G T H"]:
        """What the queries at these positions read in all segments."""
        c = self.config
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        scores = []
        for keys, _, key_positions in segments:
            branches = (*key_positions.shape[1:-1], -1)  # (-1,), or (C, -1)
            queries = q.reshape(*q.shape[:3], *branches, c.head_dim)
            score = jnp.einsum("bkg...th,bk...sh->bkg...ts", queries, keys, preferred_element_type=jnp.float32) * scale
            if c.attention_softcap is not None:
                score = jnp.tanh(score / c.attention_softcap) * c.attention_softcap
            seen = visible(positions.reshape(len(positions), *branches), key_positions, window)
            score = jnp.where(seen[:, None, None], score, MASKED)
            scores.append(score.reshape(*q.shape[:4], -1))

        # A softmax over all segments where they lie: one maximum, one sum, and the division after the values, where it
        # is smallest. (Joining the scores and dividing them: 13 % slower in a sweep over prompts of 256 tokens.)
        most = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
        parts = [jnp.exp(s - jax.lax.stop_gradient(most)) for s in scores]
        out, total = jnp.zeros(q.shape, jnp.float32), functools.reduce(jnp.add, [jnp.sum(p, axis=-1) for p in parts])
        for part, (_, values, key_positions) in zip(parts, segments, strict=True):
            part = part.astype(q.dtype).reshape(*q.shape[:3], *key_positions.shape[1:-1], -1, values.shape[-2])
            got = jnp.einsum("bkg...ts,bk...sh->bkg...th", part, values).astype(jnp.float32)
            out += got.reshape(q.shape)
        return (out / total[..., None]).astype(q.dtype)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate = ACTIVATIONS[c.activation](Linear(c.ff, c.mlp_bias, name="gate")(x))
        return Linear(c.width, c.mlp_bias, name="down")(gate * Linear(c.ff, c.mlp_bias, name="up")(x))


class Block(nn.Module):
    """One layer: h[i-1] -> h[i] from the token `first` on, and what `gather` kept (`Attention`)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "B T D"], angles, positions: Int[Array, "B T"], window, gather: Gather, first: int = 0
    ) -> tuple[Float[Array, "B Q D"], Any]:
        c = self.config
        norm = lambda name: RMSNorm(c.norm_eps, c.norm_plus_one, name=name)
        x, kept = Attention(c, name="attention")(norm("attention_norm")(h), angles, positions, window, gather, first)
        h = h[:, first:]
        h += norm("attention_post_norm")(x) if c.post_norms else x
        x = GatedMLP(c, name="mlp")(norm("mlp_norm")(h))
        h += norm("mlp_post_norm")(x) if c.post_norms else x
        return h, kept
