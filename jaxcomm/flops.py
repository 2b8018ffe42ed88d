"""What a protocol costs: matrix-multiplication FLOPs (a multiply-add counts 2) of the architecture as it is, with a KV
cache and without padding. Section 3.2 of Ramesh & Li counts the same things without a cache."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomm.config import ModelConfig, NetworkConfig
from jaxcomm.lmnet import edges


def block_weights(config: ModelConfig) -> int:
    """Matrix entries of one block that a token is multiplied by."""
    c = config
    return c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + mlp_weights(c)


def mlp_weights(config: ModelConfig) -> int:
    """Of its MLP: of the chosen experts and the router, where there are some."""
    c = config
    return (2 + c.gated) * c.width * c.ff * max(1, c.experts_per_token) + c.experts * c.width


Config = ModelConfig | NetworkConfig


def blocks_flops(config: Config, tokens: int, context: int = 0, blocks: int | None = None) -> int:
    """`blocks` layers (default: all) over `tokens` tokens that follow `context` others; windows are not deducted. Of a network:
    all of its vertices' blocks, and its edges."""
    if isinstance(config, NetworkConfig):
        vertices = sum(g.copies * blocks_flops(config.models[g.model], tokens, context) for g in config.groups.values())
        return vertices + wires_flops(config, tokens, context)
    layer = 2 * tokens * block_weights(config) + _scores_flops(config, tokens, context)
    return layer * (config.layers if blocks is None else blocks)


def _scores_flops(config: ModelConfig, tokens: int, context: int) -> int:
    pairs = tokens * context + tokens * (tokens + 1) // 2
    return 4 * config.heads * config.head_dim * pairs


def wires_flops(config: NetworkConfig, tokens: int, context: int = 0) -> int:
    """A network's edges, and the matrices that join them."""
    total, kinds = 0, edges.parts(config.edge)
    for source, target in config.stacks.values():
        c, out = edges.shape(config.models[source.model], config.edge), config.models[target.model].width
        mlp, linear = mlp_weights(c), c.width**2 * (out == c.width)
        each = {"attention": block_weights(c) - mlp, "mlp": mlp, "linear": linear}
        entries = sum(each[part] for part in kinds) + c.width * out * (out != c.width)
        one = 2 * tokens * entries + ("attention" in kinds) * _scores_flops(c, tokens, context)
        joined = 2 * tokens * out**2 if config.aggregate == "concat" else 0
        total += source.copies * target.copies * (one + joined)
    return total


def reading_flops(config: Config, tokens: int) -> int:
    """All blocks over a prompt of whose last token alone more than keys and values is asked, so the last block makes no
    more of the others (`model.run_blocks`, unrolled). Of a network, that is the last vertex' last block."""
    if isinstance(config, NetworkConfig):
        saved = blocks_flops(config.writer, tokens) - reading_flops(config.writer, tokens)
        return blocks_flops(config, tokens) - saved
    c = config
    keys = 2 * tokens * c.width * c.head_dim * 2 * c.kv_heads
    one = blocks_flops(c, 1, context=tokens - 1, blocks=1) - keys // tokens
    return blocks_flops(c, tokens, blocks=c.layers - 1) + keys + one


def head_flops(config: Config) -> int:
    """Logits of one token."""
    if isinstance(config, NetworkConfig):
        return head_flops(config.writer)
    return 2 * config.width * config.vocab


def generation_flops(config: Config, prompt: int, new: int) -> int:
    """Reading `prompt` tokens and writing `new` after them; the last one written is not read again."""
    reading = reading_flops(config, prompt) + head_flops(config)
    return reading + blocks_flops(config, new - 1, context=prompt) + (new - 1) * head_flops(config)


def scoring_flops(config: Config, prompt: int, texts: Sequence[int]) -> int:
    """Reading `prompt` tokens, and after them each of several texts of so many tokens, the last of which is not read."""
    after = sum(blocks_flops(config, n - 1, context=prompt) + (n - 1) * head_flops(config) for n in texts)
    return reading_flops(config, prompt) + head_flops(config) + after


def graft_flops(config_a: ModelConfig, config_b: ModelConfig, mapped: bool) -> int:
    """The edit of one state: W a if there is a map; the sum, mean or copy itself is O(D) and counted as D."""
    return config_b.width + (2 * config_a.width * config_b.width if mapped else 0)


# Section 3.2 of Ramesh & Li (2025), as printed: no cache (every token reads the whole prompt again), MLPs of two matrices,
# K the size and H the number of heads, as many for keys as for queries.


def paper_layer(config: ModelConfig, n: int) -> int:
    """8 n D K H + 4 n^2 K H + 3 H n^2 + 4 n D F."""
    D, K, H, F = config.width, config.head_dim, config.heads, config.ff
    return 8 * n * D * K * H + 4 * n * n * K * H + 3 * H * n * n + 4 * n * D * F


def paper_message(a: ModelConfig, b: ModelConfig, prompt: int, message: int, answer: int) -> int:
    """M (4 P V D + L layer(P)) + T (4 (P + M) V D + L layer(P + M)), the first in A's letters, the second in B's."""
    told = prompt + message
    writing = message * (4 * prompt * a.vocab * a.width + a.layers * paper_layer(a, prompt))
    return writing + answer * (4 * told * b.vocab * b.width + b.layers * paper_layer(b, told))


def paper_activation(a: ModelConfig, b: ModelConfig, prompt: int, answer: int, k: int, mapped: bool) -> int:
    """2 P V D + k layer(P) + T (4 P V D + L layer(P)) + F(D), the first two terms in A's letters."""
    sending = 2 * prompt * a.vocab * a.width + k * paper_layer(a, prompt)
    answering = answer * (4 * prompt * b.vocab * b.width + b.layers * paper_layer(b, prompt))
    return sending + answering + graft_flops(a, b, mapped)
