"""Language models that communicate through activations.

The core: `Params` (weights with their architecture), `prefix` / `suffix` / `forward` / `hidden_states`, `generate`,
`communicate` and its parts, `sweep` for every layer pair at once. Checkpoints come from `jaxcomm.converters`, games and the command line from `jaxcomm.evals`.
"""

from jaxcomm.agent import Agent
from jaxcomm.cache import KVCache
from jaxcomm.communication import answer, communicate, communicate_logits, receive, send
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.decoding import Generation, Sampling, decode, generate, left_pad
from jaxcomm.graft import GRAFTS, apply_graft
from jaxcomm.layer_sweep import AnswerSweep, Sweep, sweep, sweep_answers
from jaxcomm.mapping import Maps, RidgeMaps, Similarity, fit_maps, similarity, train_maps
from jaxcomm.model import Params, forward, hidden_states, init, prefill, prefix, suffix
from jaxcomm.sharding import deliver, shard, shardings

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
    "generate",
    "hidden_states",
    "init",
    "left_pad",
    "prefill",
    "prefix",
    "receive",
    "send",
    "shard",
    "shardings",
    "similarity",
    "suffix",
    "sweep",
    "sweep_answers",
    "train_maps",
]
