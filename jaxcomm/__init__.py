"""Language models that communicate through activations.

The core: `Params` (weights with their architecture), `prefix` / `suffix` / `forward` / `hidden_states`, `generate`,
`communicate` and its parts. Checkpoints come from `jaxcomm.converters`, games and the command line from `jaxcomm.evals`.
"""

from jaxcomm.agent import Agent
from jaxcomm.cache import KVCache
from jaxcomm.communicate import communicate, communicate_logits, receive, send
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.generate import Generation, Sampling, decode, generate, left_pad
from jaxcomm.graft import GRAFTS, apply_graft
from jaxcomm.mapping import fit_maps
from jaxcomm.model import Params, forward, hidden_states, init, prefill, prefix, suffix

__all__ = [
    "GRAFTS",
    "Agent",
    "Generation",
    "KVCache",
    "ModelConfig",
    "Params",
    "Rope",
    "Sampling",
    "apply_graft",
    "communicate",
    "communicate_logits",
    "decode",
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
    "suffix",
]
