"""The edges of a network: small trainable modules that map sequences of states to sequences of the same length.

Edges between two groups of vertices are one stack of weights, [sources, targets, ...], and one batched call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomm.config import EdgeConfig, ModelConfig
from jaxcomm.layers import MLP, Attention, Linear, Surroundings, angles_of, norm_of, rotary

_LAST = {"attention": "o", "mlp": "down"}
"""The last matrix of each part of f."""


def shape(config: ModelConfig, edge: EdgeConfig) -> ModelConfig:
    """Derives the architecture of an edge's block from the architecture of the vertex that the edge leaves.

    The block has full attention without windows. It uses the heads and the rotary embedding of the vertex's first layer
    that has full attention and a rotary embedding. It normalises its input, and has one MLP, as wide as one expert of the
    vertex. Its output is added without a norm or a factor.

    Args:
        config: Architecture of the vertex.
        edge: The kind of edge.

    Returns:
        Architecture of one block.
    """
    layers = [config.layer(i) for i in range(config.layers)]
    like = next((one for one in layers if not any(one.windows) and one.ropes[0].kind != "none"), layers[0])
    norms: Any = "both" if config.norms == "both" else "before"
    one = dict(windows=(), norms=norms, parallel=False, experts=0, experts_per_token=0, dense_ff=0, router_norm=False)
    one |= dict(router_bias=False, residual_scale=1.0, keys_as_values=False)
    return dataclasses.replace(like, kv_heads=like.heads if edge.attention == "mha" else like.kv_heads, **one)


def parts(edge: EdgeConfig) -> tuple[str, ...]:
    """Lists the parts of f, in order.

    Args:
        edge: The kind of edge.

    Returns:
        Some of "attention", "mlp" and "linear".
    """
    return ("attention", "mlp") if edge.kind == "block" else () if edge.kind == "identity" else (edge.kind,)


class Edge(nn.Module):
    """An edge of a network: y = scale * (x + f(x)) (`EdgeConfig`).

    If the next vertex has another width, a matrix then maps y to it.

    Attributes:
        config: Architecture of the vertex that the edge leaves.
        edge: The kind of edge.
        out: Width of the next vertex.
    """

    config: ModelConfig
    edge: EdgeConfig
    out: int
    """Width of the next vertex."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], around: Surroundings) -> Float[Array, "B T Y"]:
        c = shape(self.config, self.edge)
        h = x
        for part in parts(self.edge):
            if part == "linear":
                h += Linear(c.width, name="linear")(x) if self.out == c.width else jnp.zeros_like(x)
                continue
            read = norm_of(c, f"{part}_norm")(h)
            made = Attention(c, name=part)(read, around) if part == "attention" else MLP(c, name=part)(read)
            h += norm_of(c, f"{part}_post_norm")(made) if c.norms == "both" else made
        if not self.edge.residual:
            h -= x
        if self.edge.scale is not None:
            h *= self.param("scale", nn.initializers.constant(self.edge.scale), ()).astype(h.dtype)
        return h if self.out == c.width else Linear(self.out, name="across")(h)


def init_edge(key: Array, config: ModelConfig, edge: EdgeConfig, out: int) -> Any:
    """Draws the weights of one edge.

    Args:
        key: Random key.
        config: Architecture of the vertex that the edge leaves.
        edge: The kind of edge. With `zero_init`, the last matrices of f begin at 0 (or its last norms do).
        out: Width of the next vertex.

    Returns:
        The weights of `Edge`, float32.
    """
    x, positions = jnp.zeros((1, 1, config.width), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    angles = angles_of(shape(config, edge), rotary(shape(config, edge), positions), 0)
    alone = Surroundings(1, angles, positions, None)
    made: Any = Edge(config, edge, out).init(key, x, alone)
    weights = dict(made.get("params", {}))
    if not edge.zero_init:
        return weights
    start = -1.0 if config.norm == "rms_plus_one" else 0.0
    for part in weights.keys() & {*parts(edge)}:
        if config.norms == "both" and part != "linear":
            weights[f"{part}_post_norm"] |= {"weight": jnp.full(config.width, start)}
        else:
            last = _LAST.get(part)
            zero = jax.tree.map(jnp.zeros_like, weights[part] if last is None else weights[part][last])
            weights[part] = zero if last is None else {**weights[part], last: zero}
    return weights
