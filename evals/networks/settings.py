"""Settings of a network and of its training as plain data, so that the command line can show its help without loading a
model."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a new network."""

    vertices: tuple[str, ...] = ("pair:b",)
    """The model all vertices share, or one for each, layer by layer: checkpoint folders, .gguf files, hub ids, real:smollm2, pair:a, pair:b."""
    widths: tuple[int, ...] = (1, 2, 1)
    """Vertices per layer; the paper's network is 1 4 4 4 1."""
    edge: Literal["block", "attention", "mlp", "linear", "identity"] = "block"
    """Form of an edge: a whole decoder block, its attention, its MLP, a matrix, or only the factor."""
    attention: Literal["mha", "gqa"] = "mha"
    """Key heads of an edge: as many as query heads, or as many as the vertex has."""
    residual: bool = True
    """Edges add their output to their input, instead of replacing it."""
    zero_init: bool = True
    """New edges pass on their input unchanged."""
    scale: float | None = 1.0
    """Initial value of an edge's trainable factor; it is divided by the number of edges that are summed. None: no factor, no division."""
    aggregate: Literal["sum", "mean", "concat"] = "sum"
    """How the outputs of a vertex' incoming edges are combined."""
    norm: bool = True
    """Interior vertices keep their model's final norm."""
    share: bool = True
    """Vertices of one checkpoint share its weights. If not, --train all trains each vertex separately."""
    network_seed: int = 0
    """Seed of the new edges."""

    def options(self) -> dict[str, Any]:
        """The settings as arguments of `jaxcomm.lmnet.init_network`."""
        from jaxcomm.config import EdgeConfig

        edge = EdgeConfig(self.edge, self.attention, self.residual, self.zero_init, self.scale)
        return {"widths": self.widths, "edge": edge, "aggregate": self.aggregate, "norm": self.norm}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are for edges and questions."""

    steps: int = 300
    """Number of training steps."""
    rows: int = 8
    """Rows of a batch; each holds as many texts as fit."""
    columns: int = 112
    """Tokens of a row."""
    accumulate: int = 1
    """Number of batches whose gradients are summed for one step."""
    learning_rate: float = 1e-3
    """Largest learning rate, after the warm-up."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises; afterwards it falls as a cosine, to a tenth."""
    weight_decay: float = 0.0
    """Weight decay of matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    remat: Literal["off", "products", "all"] = "products"
    """What the backward pass recomputes instead of storing: nothing, everything between the matrix products, or whole blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; what is trained is float32."""
    fsdp: int = 1
    """Number of devices that weights and moments are divided over. Batches are divided over all devices."""
    every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self):
        for name in ("steps", "rows", "columns", "accumulate", "fsdp", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least 1")
        if not self.learning_rate > 0 or not self.clip > 0 or not 0 <= self.warmup <= 1 or self.weight_decay < 0:
            raise ValueError("learning rate and clip must be above 0, warmup a share, weight decay not below 0")


def pick(kind: type, settings: Any) -> Any:
    """Picks the part of a command's settings that belongs to one class.

    Args:
        kind: `Shape` or `Recipe`.
        settings: The settings of the command.

    Returns:
        An object of that class.
    """
    return kind(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)})
