"""Costs of protocols: matrix-multiplication FLOPs (a multiply-add counts 2) of the actual architecture, with a key/value
cache and without padding. Section 3.2 of Ramesh & Li counts the same operations without a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxcomm.config import ModelConfig, NetworkConfig
from jaxcomm.lmnet import edges


def block_weights(config: ModelConfig) -> int:
    """Counts the matrix entries of one block that are used for each token.

    Args:
        config: Architecture of the model, or of one layer of it (`ModelConfig.layer`), if layers differ.

    Returns:
        Entries of the attention matrices (or those of linear attention, with its convolution), the chosen experts (or the one
        MLP) and the router.
    """
    c, rule = config, config.delta_rule
    if rule is not None:
        outputs = rule.channels + rule.value_heads * (2 * rule.value_dim + 2)
        return c.width * outputs + rule.channels * rule.kernel + mlp_weights(c)
    queries = (2 + c.attention_gate) * c.heads
    return c.width * c.head_dim * (queries + (2 - c.keys_as_values) * c.kv_heads) + mlp_weights(c)


def mlp_weights(config: ModelConfig) -> int:
    """Counts the matrix entries of one block's MLP that are used for each token.

    Args:
        config: Architecture of the model.

    Returns:
        Entries of the MLP, or of the experts that a token uses, of the MLP beside them and of the router.
    """
    c = config
    ff = c.ff * max(1, c.experts_per_token) + c.dense_ff
    return (2 + c.gated) * c.width * ff + c.experts * c.width


Config = ModelConfig | NetworkConfig


def blocks_flops(config: Config, tokens: int, context: int = 0, blocks: int | None = None) -> int:
    """FLOPs of the blocks over tokens that follow a cached context.

    Attention is counted over the whole context in every layer, even if a sliding window is shorter. Linear attention counts
    as if read token by token, whatever the context.

    Args:
        config: Architecture of the model, or of a network.
        tokens: Number of tokens that are read.
        context: Number of tokens already in the cache.
        blocks: Number of blocks of a model, from the first on; default: all. A network is always counted whole: the blocks
            of all vertices, and the edges.

    Returns:
        FLOPs; a multiply-add counts 2.
    """
    if isinstance(config, NetworkConfig):
        vertices = sum(g.copies * blocks_flops(config.models[g.model], tokens, context) for g in config.groups.values())
        return vertices + wires_flops(config, tokens, context)
    layer = lambda one: 2 * tokens * block_weights(one) + _scores_flops(one, tokens, context)
    return sum(map(layer, _layers(config)[:blocks]))


@functools.lru_cache
def _layers(config: ModelConfig) -> tuple[ModelConfig, ...]:
    return tuple(config.layer(i) for i in range(config.layers))


def _scores_flops(config: ModelConfig, tokens: int, context: int) -> int:
    if (rule := config.delta_rule) is not None:  # three products with S: S^T k, k u^T, S^T q
        return 6 * rule.value_heads * rule.key_dim * rule.value_dim * tokens
    pairs = tokens * context + tokens * (tokens + 1) // 2
    return 4 * config.heads * config.head_dim * pairs


def wires_flops(config: NetworkConfig, tokens: int, context: int = 0) -> int:
    """FLOPs of a network's edges, and of the matrices that combine them.

    Args:
        config: Architecture of the network.
        tokens: Number of tokens that are read.
        context: Number of tokens already in the cache.

    Returns:
        FLOPs; a multiply-add counts 2.
    """
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


def prefix_flops(config: Config, prefix: Sequence[int], prompt: int, new: int = 1) -> int:
    """FLOPs of attending to a prefix, in addition to the cost of reading a prompt and writing after it.

    Args:
        config: Architecture of the model that reads.
        prefix: Number of the prefix's tokens that each layer sees. Empty: there is no prefix.
        prompt: Length of the prompt behind it, P. In the last layer only its last token has a query. 0: counted elsewhere.
        new: Number of new tokens. The model does not read the last one.

    Returns:
        FLOPs; a multiply-add counts 2.
    """
    if not len(prefix):
        return 0
    assert isinstance(config, ModelConfig)  # networks see no prefix
    asking = [prompt + new - 1] * (config.layers - 1) + [bool(prompt) + new - 1]  # so many tokens of each layer
    sizes = [one.head_dim if one.delta_rule is None else 0 for one in _layers(config)]
    return 4 * config.heads * sum(int(n) * q * size for n, q, size in zip(prefix, asking, sizes, strict=True))


def thinking_flops(config: Config, prompt: int, steps: int, mapped: bool = True) -> int:
    """FLOPs of thinking in latents after a prompt (`latents.think`).

    Args:
        config: Architecture of the model.
        prompt: Length of the prompt, P.
        steps: Number of steps.
        mapped: Whether states go through the matrix W_a.

    Returns:
        FLOPs; a multiply-add counts 2.
    """
    if not steps:
        return 0
    return blocks_flops(config, steps, context=prompt) + mapped * steps * 2 * config.width**2


def reading_flops(config: Config, tokens: int) -> int:
    """FLOPs of the blocks over a prompt, when only the last token's output is needed.

    The last block then computes keys and values of all tokens, but queries and MLP of the last token only
    (`model.run_blocks` of unrolled layers). In a network this is the last block of the last vertex.

    Args:
        config: Architecture of the model, or of a network.
        tokens: Length of the prompt, P.

    Returns:
        FLOPs without the head; a multiply-add counts 2.
    """
    if isinstance(config, NetworkConfig):
        saved = blocks_flops(config.writer, tokens) - reading_flops(config.writer, tokens)
        return blocks_flops(config, tokens) - saved
    last = config.layer(config.layers - 1)
    one = blocks_flops(last, 1, context=tokens - 1) - _keys(last, 1)
    return keys_flops(config, tokens) + one


def keys_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the keys and values of a prompt in every layer, if no token follows.

    Args:
        config: Architecture of the model.
        tokens: Length of the prompt.

    Returns:
        FLOPs of all blocks but the last, and of the last block's keys and values; a multiply-add counts 2.
    """
    return blocks_flops(config, tokens, blocks=config.layers - 1) + _keys(config.layer(config.layers - 1), tokens)


def _keys(layer: ModelConfig, tokens: int) -> int:
    if (rule := layer.delta_rule) is not None:
        entries = layer.width * (rule.channels + 2 * rule.value_heads) + rule.channels * rule.kernel
        return 2 * tokens * entries + _scores_flops(layer, tokens, 0)
    return 2 * tokens * layer.width * layer.head_dim * (2 - layer.keys_as_values) * layer.kv_heads


def head_flops(config: Config) -> int:
    """FLOPs of the logits of one token.

    Args:
        config: Architecture of the model, or of a network.

    Returns:
        2 D V; a multiply-add counts 2.

    Example:
        >>> from jaxcomm.flops import head_flops
        >>> head_flops(params.config)
        65536
    """
    if isinstance(config, NetworkConfig):
        return head_flops(config.writer)
    return 2 * config.width * config.vocab


def generation_flops(config: Config, prompt: int, new: int) -> int:
    """FLOPs of reading a prompt and writing tokens after it, with a cache.

    Args:
        config: Architecture of the model, or of a network.
        prompt: Length of the prompt, P.
        new: Number of new tokens, at least 1. The model does not read the last one.

    Returns:
        FLOPs; a multiply-add counts 2.

    Example:
        >>> from jaxcomm.flops import generation_flops
        >>> generation_flops(params.config, prompt=3, new=2)
        2968064
    """
    reading = reading_flops(config, prompt) + head_flops(config)
    return reading + blocks_flops(config, new - 1, context=prompt) + (new - 1) * head_flops(config)


def graft_flops(config_a: ModelConfig, config_b: ModelConfig, mapped: bool) -> int:
    """FLOPs of one edit of B's state with A's.

    The sum, mean or copy counts as D_B FLOPs. A map W adds 2 D_A D_B.

    Args:
        config_a: Architecture of the sender A.
        config_b: Architecture of the receiver B.
        mapped: Whether A's state goes through a map W.

    Returns:
        FLOPs of one state.
    """
    return config_b.width + (2 * config_a.width * config_b.width if mapped else 0)


def c2c_flops(a: ModelConfig, b: ModelConfig, hidden: int, tokens: int) -> int:
    """FLOPs of fusing A's keys and values into B's (`bridges.C2C`).

    Args:
        a: Architecture of the sender A.
        b: Architecture of the receiver B.
        hidden: Width of the fuser.
        tokens: Number of fused tokens.

    Returns:
        FLOPs; a multiply-add counts 2.
    """
    own = b.kv_heads * b.head_dim
    each = (a.kv_heads * a.head_dim + own) * hidden + 6 * hidden**2 + hidden * (b.kv_heads + own)
    return 2 * tokens * each * 2 * min(a.layers, b.layers)


def gated_flops(a: ModelConfig, b: ModelConfig, rank: int, tokens: int) -> int:
    """FLOPs of mapping A's keys and values to a memory for B (`bridges.Gated`).

    Args:
        a: Architecture of the sender A.
        b: Architecture of the receiver B.
        rank: Rank of the maps.
        tokens: Number of tokens that A has read.

    Returns:
        FLOPs; a multiply-add counts 2.
    """
    each = rank * (2 * a.kv_heads * a.head_dim + b.kv_heads * b.head_dim)
    return 2 * tokens * each * 2 * b.layers


# Section 3.2 of Ramesh & Li (2025), as printed: no cache (the whole prompt is read again for every token), MLPs of two
# matrices, head size K, and H heads for queries and keys.


def paper_layer(config: ModelConfig, n: int) -> int:
    """FLOPs of one layer over n tokens, as printed in Ramesh & Li (2025, section 3.2).

    The formula is 8 n D K H + 4 n^2 K H + 3 H n^2 + 4 n D F. In the paper's letters K is the size of a head and H the
    number of heads.

    Args:
        config: Architecture of the model, or of one layer of it (`ModelConfig.layer`), if layers differ.
        n: Number of tokens.

    Returns:
        FLOPs.
    """
    D, K, H, F = config.width, config.head_dim, config.heads, config.ff
    return 8 * n * D * K * H + 4 * n * n * K * H + 3 * H * n * n + 4 * n * D * F


def _paper_layers(config: ModelConfig, n: int, layers: int | None = None) -> int:
    """FLOPs of the first layers (default: of all)."""
    return sum(paper_layer(one, n) for one in _layers(config)[:layers])


def paper_message(a: ModelConfig, b: ModelConfig, prompt: int, message: int, answer: int) -> int:
    """FLOPs of communication by text, as printed in Ramesh & Li (2025, section 3.2).

    The formula is M (4 P V D + L layer(P)) + T (4 (P + M) V D + L layer(P + M)): A writes a message, then B answers.
    There is no cache.

    Args:
        a: Architecture of the sender A. The first term uses its sizes.
        b: Architecture of the receiver B. The second term uses its sizes.
        prompt: Length of the prompt, P.
        message: Number of tokens of the message, M.
        answer: Number of tokens of the answer, T.

    Returns:
        FLOPs.
    """
    told = prompt + message
    writing = message * (4 * prompt * a.vocab * a.width + _paper_layers(a, prompt))
    return writing + answer * (4 * told * b.vocab * b.width + _paper_layers(b, told))


def paper_activation(a: ModelConfig, b: ModelConfig, prompt: int, answer: int, k: int, mapped: bool) -> int:
    """FLOPs of communication by activations, as printed in Ramesh & Li (2025, section 3.2).

    The formula is 2 P V D + k layer(P) + T (4 P V D + L layer(P)) + F(D): A reads its prompt up to layer k, then B
    answers. F(D) is the cost of the edit (`graft_flops`). There is no cache.

    Args:
        a: Architecture of the sender A. The first two terms use its sizes.
        b: Architecture of the receiver B. The third term uses its sizes.
        prompt: Length of the prompt, P.
        answer: Number of tokens of the answer, T.
        k: Layer after which A is read, 0 .. L_A.
        mapped: Whether A's state goes through a map W.

    Returns:
        FLOPs.
    """
    sending = 2 * prompt * a.vocab * a.width + _paper_layers(a, prompt, k)
    answering = answer * (4 * prompt * b.vocab * b.width + _paper_layers(b, prompt))
    return sending + answering + graft_flops(a, b, mapped)
