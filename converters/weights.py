"""How each weight of a block is stored on disk: one table of names for every kind of block.

Tables are data, used both for reading (`converters.hf.from_hf`) and for writing (`to_hf`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from jaxcomm.config import ModelConfig

Path = tuple[str, ...]
"""Path of a weight in the tree of `jaxcomm.layers.Block`."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Storage of a weight in its own tensor.

    Attributes:
        name: Name of the tensor after the layer's prefix. "{e}" is the number of an expert: each expert has its own
            tensor.
    """

    name: str

    def shape(self, leaf: tuple[int, ...], c: ModelConfig) -> tuple[int, ...]:
        """Computes the shape of the tensor.

        Args:
            leaf: Shape of our weight.
            c: The architecture.

        Returns:
            The shape on disk.
        """
        return leaf

    def view(self, tensor: np.ndarray, c: ModelConfig) -> np.ndarray:
        """Returns our weight as a view of the tensor. Nothing is copied, so the view works for reading and writing.

        The first axis of the weight may still be split into several axes, such as heads and dimensions. In a quantised
        tensor the last axis is bytes. No view cuts that axis.

        Args:
            tensor: The tensor.
            c: The architecture.

        Returns:
            The view.
        """
        return tensor

    def values(self, stored: np.ndarray) -> np.ndarray:
        """Converts the numbers of the tensor to the numbers of our weight.

        Args:
            stored: Numbers of the tensor.

        Returns:
            Numbers of our weight.
        """
        return stored


@dataclasses.dataclass(frozen=True)
class Rows(Stored):
    """Storage of several weights in one tensor, one after another along the outputs.

    Attributes:
        name: Name of the tensor.
        parts: The number of outputs of each weight in the tensor.
        part: Index of this weight among them.
        transposed: Whether the tensor is [in, out], as in GPT-2's Conv1D.
    """

    parts: Callable[[ModelConfig], tuple[int, ...]]
    part: int
    transposed: bool = False

    def shape(self, leaf, c):
        whole = (sum(self.parts(c)), *leaf[1:])
        return whole[::-1] if self.transposed else whole

    def view(self, tensor, c):
        begin = sum(self.parts(c)[: self.part])
        rows = tensor.T if self.transposed else tensor
        return rows[begin : begin + self.parts(c)[self.part]]


@dataclasses.dataclass(frozen=True)
class Interleaved(Stored):
    """Storage of several weights of each head together, [heads, parts, head_dim, ..].

    Attributes:
        name: Name of the tensor.
        part: Number of this weight among them, such as 0 for queries, 1 for keys, 2 for values.
        parts: Number of weights.
    """

    part: int
    parts: int = 3

    def shape(self, leaf, c):
        return (self.parts * leaf[0], *leaf[1:])

    def view(self, tensor, c):
        return tensor.reshape(c.heads, self.parts, c.head_dim, *tensor.shape[1:])[:, self.part]


@dataclasses.dataclass(frozen=True)
class Kernel(Stored):
    """Storage of a convolution that is separate for each channel, [channels, 1, tokens]."""

    def shape(self, leaf, c):
        return (leaf[0], 1, leaf[1])

    def view(self, tensor, c):
        return tensor[:, 0]


@dataclasses.dataclass(frozen=True)
class Together(Stored):
    """Storage of a weight or bias of all experts in one tensor, [experts, out, in].

    Attributes:
        name: Name of the tensor.
        part: If the tensor holds both the gate's and the other rows: 0 for the gate, 1 for the other. None: it holds one
            weight.
        alternating: Whether the rows of the two alternate. Otherwise the gate's rows come first.
        transposed: Whether the tensor is [experts, in, out].
    """

    part: int | None = None
    alternating: bool = False
    transposed: bool = False

    def shape(self, leaf, c):
        experts, *axes = leaf
        axes[0] *= 1 if self.part is None else 2
        return (experts, *axes[::-1]) if self.transposed else (experts, *axes)

    def view(self, tensor, c):
        rows = tensor.swapaxes(1, -1) if self.transposed else tensor
        if self.part is None:
            return rows
        return rows[:, self.part :: 2] if self.alternating else rows[:, self.part * c.ff :][:, : c.ff]


@dataclasses.dataclass(frozen=True)
class PairedRows(Stored):
    """Storage of queries or keys in GGUF files of the Llama kind: the two rotary halves are interleaved in pairs.

    The tensor is [heads, head_dim / 2, 2, ..]; our weight is [heads, 2, head_dim / 2, ..].

    Attributes:
        name: Name of the tensor.
        heads: Function that returns the number of heads of an architecture.
    """

    heads: Callable[[ModelConfig], int]

    def view(self, tensor, c):
        return tensor.reshape(self.heads(c), -1, 2, *tensor.shape[1:]).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class PlusOne(Stored):
    """Storage of a norm's weight in GGUF files of Gemma: 1 + w instead of w, in float32."""

    def values(self, stored):
        return stored.astype(np.float32) - np.float32(1)


_qkv = lambda c: (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
_gate_up = lambda c: (c.ff, c.ff)
_whole = {"o": lambda c: (c.width,), "up": lambda c: (c.ff,), "down": lambda c: (c.width,)}

Table = dict[Path, Stored]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of a checkpoint's tensors, and how our weights are stored in them.

    Attributes:
        block: How each weight of a block is stored. Entries for weights that an architecture does not have are ignored.
        packed: Weights that are stored differently if the experts are packed in MXFP4 (`tensors.unpacked`).
        layer: Prefix of the names of a layer's tensors, after the root.
        embed: Name of the embedding, after the root.
        positions: Name of the learned positions, after the root.
        norm: Name of the final norm, after the root.
        head: Name of the head, without a root.
        roots: Prefixes of all names. Any of them is accepted when reading; the first one is written.
        ignored: Names of tensors that are not weights of the model.
        norm_kind: How the final norm is stored.
    """

    block: Table
    packed: Table = dataclasses.field(default_factory=dict)
    layer: str = "layers.{i}."
    embed: str = "embed_tokens.weight"
    positions: str = "wpe.weight"
    norm: str = "norm"
    head: str = "lm_head.weight"
    roots: tuple[str, ...] = ("model.",)
    ignored: re.Pattern = re.compile(r"rotary_emb\.inv_freq$")
    norm_kind: type[Stored] = Stored

    def outside(self, path: Path, root: str) -> Stored:
        """Finds how a weight outside the blocks is stored.

        Args:
            path: Path of the weight in `Params`.
            root: The root of the checkpoint's names.

        Returns:
            How it is stored, with its full name.
        """
        kind, *part = path
        if kind == "norm":
            return self.norm_kind(f"{root}{self.norm}.{part[0]}")
        return Stored(self.head if kind == "head" else root + getattr(self, kind))

    def within(self, path: Path, root: str, layer: str) -> Stored:
        """Finds how a weight of a block is stored.

        Args:
            path: Path of the weight in `jaxcomm.layers.Block`.
            root: The root of the checkpoint's names.
            layer: Number of the layer. "{i}": all layers.

        Returns:
            How it is stored, with its full name.
        """
        stored = self.block[path]
        return dataclasses.replace(stored, name=root + self.layer.replace("{i}", layer) + stored.name)


def alone(*names: tuple[Path, str]) -> Table:
    """Makes a table of layers whose weight and bias have their own tensors.

    Args:
        *names: Pairs of a path in `jaxcomm.layers.Block` and a name on disk.

    Returns:
        The table.
    """
    return {(*path, part): Stored(f"{theirs}.{part}") for path, theirs in names for part in ("weight", "bias")}


ATTENTION = alone(
    (("attention", "q"), "self_attn.q_proj"),
    (("attention", "k"), "self_attn.k_proj"),
    (("attention", "v"), "self_attn.v_proj"),
    (("attention", "o"), "self_attn.o_proj"),
    (("attention", "q_norm"), "self_attn.q_norm"),
    (("attention", "k_norm"), "self_attn.k_norm"),
)
GATED = alone((("mlp", "gate"), "mlp.gate_proj"), (("mlp", "up"), "mlp.up_proj"), (("mlp", "down"), "mlp.down_proj"))
LLAMA_BLOCK = (
    ATTENTION | GATED | alone((("attention_norm",), "input_layernorm"), (("mlp_norm",), "post_attention_layernorm"))
)
_POST_NORMS = alone(
    (("attention_post_norm",), "post_attention_layernorm"), (("mlp_post_norm",), "post_feedforward_layernorm")
)
GEMMA_BLOCK = LLAMA_BLOCK | _POST_NORMS | alone((("mlp_norm",), "pre_feedforward_layernorm"))
_HALVES = (("gate", 0), ("up", 1))
GEMMA4_BLOCK: Table = (
    GEMMA_BLOCK
    | alone(
        (("dense_post_norm",), "post_feedforward_layernorm_1"),
        (("experts_norm",), "pre_feedforward_layernorm_2"),
        (("experts_post_norm",), "post_feedforward_layernorm_2"),
        (("experts", "router"), "router.proj"),
    )
    | {("experts", x, "weight"): Together("experts.gate_up_proj", part) for x, part in _HALVES}
    | {("experts", "down", "weight"): Together("experts.down_proj")}
    | {("experts", "router_scale"): Stored("router.scale")}
    | {("experts", "expert_scale"): Stored("router.per_expert_scale")}
    | {("layer_scale",): Stored("layer_scalar")}
)
QWEN3_5_BLOCK: Table = (
    LLAMA_BLOCK
    | {
        ("attention", x, part): Interleaved(f"self_attn.q_proj.{part}", n, 2)
        for n, x in enumerate(("q", "q_gate"))
        for part in ("weight", "bias")
    }
    | alone(
        (("delta", "qkv"), "linear_attn.in_proj_qkv"),
        (("delta", "gate"), "linear_attn.in_proj_z"),
        (("delta", "strength"), "linear_attn.in_proj_b"),
        (("delta", "decay"), "linear_attn.in_proj_a"),
        (("delta", "read_norm"), "linear_attn.norm"),
        (("delta", "o"), "linear_attn.out_proj"),
    )
    | {("delta", "kernel"): Kernel("linear_attn.conv1d.weight")}
    | {("delta", "log_rate"): Stored("linear_attn.A_log"), ("delta", "decay_bias"): Stored("linear_attn.dt_bias")}
)
OLMO2_BLOCK = ATTENTION | GATED | _POST_NORMS
PHI3_BLOCK: Table = (
    LLAMA_BLOCK
    | {("attention", x, "weight"): Rows("self_attn.qkv_proj.weight", _qkv, n) for n, x in enumerate("qkv")}
    | {("mlp", x, "weight"): Rows("mlp.gate_up_proj.weight", _gate_up, n) for n, x in enumerate(("gate", "up"))}
)
MIXTRAL_BLOCK = LLAMA_BLOCK | alone(
    (("mlp", "router"), "block_sparse_moe.gate"),
    (("mlp", "gate"), "block_sparse_moe.experts.{e}.w1"),
    (("mlp", "down"), "block_sparse_moe.experts.{e}.w2"),
    (("mlp", "up"), "block_sparse_moe.experts.{e}.w3"),
)
QWEN3_MOE_BLOCK = LLAMA_BLOCK | alone(
    (("mlp", "router"), "mlp.gate"),
    (("mlp", "gate"), "mlp.experts.{e}.gate_proj"),
    (("mlp", "up"), "mlp.experts.{e}.up_proj"),
    (("mlp", "down"), "mlp.experts.{e}.down_proj"),
)
GRANITE_MOE_BLOCK: Table = (
    LLAMA_BLOCK
    | alone((("mlp", "router"), "block_sparse_moe.router.layer"))
    | {("mlp", x, "weight"): Together("block_sparse_moe.input_linear.weight", part) for x, part in _HALVES}
    | {("mlp", "down", "weight"): Together("block_sparse_moe.output_linear.weight")}
)
_GPT_OSS_EXPERTS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_PACKED: dict[Path, Together] = {
    ("mlp", x, "weight"): Together(_GPT_OSS_EXPERTS[0], part, alternating=True) for x, part in _HALVES
} | {("mlp", "down", "weight"): Together(_GPT_OSS_EXPERTS[1])}
GPT_OSS_BLOCK: Table = (
    LLAMA_BLOCK
    | {("attention", "sinks"): Stored("self_attn.sinks")}
    | alone((("mlp", "router"), "mlp.router"))
    | {path: dataclasses.replace(stored, transposed=True) for path, stored in _PACKED.items()}
    | {("mlp", x, "bias"): Together(f"{_GPT_OSS_EXPERTS[0]}_bias", part, alternating=True) for x, part in _HALVES}
    | {("mlp", "down", "bias"): Together(f"{_GPT_OSS_EXPERTS[1]}_bias")}
)
_CONV1D = {("attention", "o"): "attn.c_proj", ("mlp", "up"): "mlp.c_fc", ("mlp", "down"): "mlp.c_proj"}
GPT2_BLOCK: Table = (
    alone((("attention_norm",), "ln_1"), (("mlp_norm",), "ln_2"))
    | {("attention", x, "weight"): Rows("attn.c_attn.weight", _qkv, n, transposed=True) for n, x in enumerate("qkv")}
    | {("attention", x, "bias"): Rows("attn.c_attn.bias", _qkv, n) for n, x in enumerate("qkv")}
    | {(*path, "weight"): Rows(f"{name}.weight", _whole[path[-1]], 0, transposed=True) for path, name in _CONV1D.items()}
    | {(*path, "bias"): Stored(f"{name}.bias") for path, name in _CONV1D.items()}
)  # fmt: skip
GPT_NEOX_BLOCK: Table = alone(
    (("attention", "o"), "attention.dense"),
    (("mlp", "up"), "mlp.dense_h_to_4h"),
    (("mlp", "down"), "mlp.dense_4h_to_h"),
    (("attention_norm",), "input_layernorm"),
    (("mlp_norm",), "post_attention_layernorm"),
) | {
    ("attention", x, part): Interleaved(f"attention.query_key_value.{part}", n)
    for n, x in enumerate("qkv")
    for part in ("weight", "bias")
}

LLAMA = Layout(LLAMA_BLOCK)
GEMMA = Layout(GEMMA_BLOCK)
GEMMA_VISION = Layout(
    GEMMA_BLOCK, roots=("model.language_model.", "language_model.model."),
    ignored=re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.|^(language_model\.)?lm_head\.weight$"),
)  # fmt: skip
GEMMA4 = Layout(GEMMA4_BLOCK)
GEMMA4_WHOLE = Layout(
    GEMMA4_BLOCK, roots=("model.language_model.",),
    ignored=re.compile(r"^(model\.)?(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\."),
)  # fmt: skip
QWEN3_5 = Layout(QWEN3_5_BLOCK, ignored=re.compile(r"^mtp\."))
QWEN3_5_WHOLE = Layout(QWEN3_5_BLOCK, roots=("model.language_model.",), ignored=re.compile(r"^(mtp|model\.visual)\."))
OLMO2 = Layout(OLMO2_BLOCK)
PHI3 = Layout(PHI3_BLOCK)
MIXTRAL = Layout(MIXTRAL_BLOCK)
QWEN3_MOE = Layout(QWEN3_MOE_BLOCK)
GRANITE_MOE = Layout(GRANITE_MOE_BLOCK)
GPT_OSS = Layout(GPT_OSS_BLOCK, packed={**_PACKED})
GPT2 = Layout(
    GPT2_BLOCK, layer="h.{i}.", embed="wte.weight", norm="ln_f", roots=("transformer.", ""),
    ignored=re.compile(r"\.attn\.(masked_)?bias$"),
)  # fmt: skip
GPT_NEOX = Layout(
    GPT_NEOX_BLOCK, embed="embed_in.weight", norm="final_layer_norm", head="embed_out.weight", roots=("gpt_neox.",),
    ignored=re.compile(r"\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)$"),
)  # fmt: skip
