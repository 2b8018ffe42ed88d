"""What a protocol costs: matrix-multiplication FLOPs (a multiply-add counts 2) of the architecture as it is, with a KV
cache and without padding. Section 3.2 of Ramesh & Li counts the same things without a cache."""

from __future__ import annotations

from jaxcomm.config import ModelConfig


def block_weights(config: ModelConfig) -> int:
    """Matrix entries of one block."""
    c = config
    return c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.ff


def blocks_flops(config: ModelConfig, tokens: int, context: int = 0, blocks: int | None = None) -> int:
    """`blocks` layers (default: all) over `tokens` tokens that follow `context` others; windows are not deducted."""
    pairs = tokens * context + tokens * (tokens + 1) // 2
    layer = 2 * tokens * block_weights(config) + 4 * config.heads * config.head_dim * pairs
    return layer * (config.layers if blocks is None else blocks)


def head_flops(config: ModelConfig) -> int:
    """Logits of one token."""
    return 2 * config.width * config.vocab


def generation_flops(config: ModelConfig, prompt: int, new: int) -> int:
    """Reading `prompt` tokens and writing `new` after them; the last one written is not read again."""
    reading = blocks_flops(config, prompt) + head_flops(config)
    return reading + blocks_flops(config, new - 1, context=prompt) + (new - 1) * head_flops(config)


def graft_flops(config_a: ModelConfig, config_b: ModelConfig, mapped: bool) -> int:
    """The edit of one state: W a if there is a map; the sum, mean or copy itself is O(D) and counted as D."""
    return config_b.width + (2 * config_a.width * config_b.width if mapped else 0)
