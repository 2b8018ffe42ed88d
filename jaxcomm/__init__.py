"""Language models that communicate through activations.

The core: `Params` (weights with their architecture), `prefix` / `suffix` / `forward` / `hidden_states`, `generate`,
`communicate` and its parts, `sweep` for every layer pair at once. `load_agent` and `from_hf` read checkpoints
(`jaxcomm.converters` has the rest), games and the command line are in `jaxcomm.evals`.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from jaxcomm.agent import Agent
from jaxcomm.cache import KVCache
from jaxcomm.communication import answer, communicate, communicate_logits, receive, send
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.decoding import Generation, Sampling, decode, generate, left_pad, score
from jaxcomm.graft import GRAFTS, apply_graft
from jaxcomm.layer_sweep import AnswerSweep, Sweep, sweep, sweep_answers
from jaxcomm.mapping import Maps, RidgeMaps, Similarity, fit_maps, similarity, train_maps
from jaxcomm.model import Params, forward, hidden_states, init, prefill, prefix, suffix
from jaxcomm.sharding import deliver, shard, shardings

if _TYPE_CHECKING:
    from jaxcomm.converters import from_hf, load_agent

__version__ = _version("jaxcomm")

__all__ = [
    "GRAFTS",
    "Agent",
    "AnswerSweep",
    "Generation",
    "KVCache",
    "Maps",
    "ModelConfig",
    "Params",
    "RidgeMaps",
    "Rope",
    "Sampling",
    "Similarity",
    "Sweep",
    "answer",
    "apply_graft",
    "communicate",
    "communicate_logits",
    "decode",
    "deliver",
    "fit_maps",
    "forward",
    "from_hf",
    "generate",
    "hidden_states",
    "init",
    "left_pad",
    "load_agent",
    "prefill",
    "prefix",
    "receive",
    "score",
    "send",
    "shard",
    "shardings",
    "similarity",
    "suffix",
    "sweep",
    "sweep_answers",
    "train_maps",
]


def __getattr__(name: str) -> _Any:
    """What reads checkpoints imports the core, and much else; so it is imported when it is asked for."""
    if name in ("from_hf", "load_agent"):
        from jaxcomm import converters

        return getattr(converters, name)
    raise AttributeError(f"module 'jaxcomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
