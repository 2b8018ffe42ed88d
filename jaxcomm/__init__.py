"""Language models that communicate through activations.

`Params` holds a model: its weights and its architecture. `prefix`, `suffix`, `forward`, `run_with_cache` and `generate`
run it, and can read and edit any site. `communicate` grafts A's activation into B; `send` and `receive` are its two
parts. `sweep` runs every layer pair at once. `load_agent` and `from_hf` load checkpoints (more in
`jaxcomm.converters`). Games and the command line are in `jaxcomm.evals`.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from jaxcomm.agent import Agent
from jaxcomm.alignment import align
from jaxcomm.bridges import C2C, Gated, fuse, init_c2c, init_gated, remember
from jaxcomm.cache import KVCache
from jaxcomm.chat import Chat
from jaxcomm.communication import answer_logits, communicate, communicate_logits
from jaxcomm.config import ModelConfig, Rope
from jaxcomm.controls import adversary, derange, overlap, stand_in
from jaxcomm.decoding import Generation, Sampling, decode, generate, score
from jaxcomm.edits import GRAFTS, Context, Edit, Graft, add, apply_graft, project_out, replace, scale
from jaxcomm.kv_mapping import KVMaps, LayerMaps, attention_cosine, fit_kv_maps, map_cache
from jaxcomm.latents import Thoughts, think
from jaxcomm.layer_sweep import AnswerSweep, Patching, Sweep, patch, sweep, sweep_answers
from jaxcomm.lenses import Lens, logit_lens, nearest_tokens, patchscope
from jaxcomm.mapping import Maps, RidgeMaps, Similarity, fit_maps, similarity, train_maps
from jaxcomm.messages import Message, receive, receive_cache, send, send_cache
from jaxcomm.model import Params, init_params
from jaxcomm.prefixes import choose_layers, select, selection_logprobs
from jaxcomm.prompts import Prompts, left_pad
from jaxcomm.reading import forward, hidden_states, prefill, prefix, run_with_cache, suffix
from jaxcomm.sharding import deliver, shard, shardings
from jaxcomm.sites import SITES, Site

if _TYPE_CHECKING:
    from jaxcomm.converters import from_hf, load_agent

__version__ = _version("jaxcomm")

__all__ = [
    "C2C",
    "GRAFTS",
    "SITES",
    "Agent",
    "AnswerSweep",
    "Chat",
    "Context",
    "Edit",
    "Gated",
    "Generation",
    "Graft",
    "KVCache",
    "KVMaps",
    "LayerMaps",
    "Lens",
    "Maps",
    "Message",
    "ModelConfig",
    "Params",
    "Patching",
    "Prompts",
    "RidgeMaps",
    "Rope",
    "Sampling",
    "Similarity",
    "Site",
    "Sweep",
    "Thoughts",
    "add",
    "adversary",
    "align",
    "answer_logits",
    "apply_graft",
    "attention_cosine",
    "choose_layers",
    "communicate",
    "communicate_logits",
    "decode",
    "deliver",
    "derange",
    "fit_kv_maps",
    "fit_maps",
    "forward",
    "from_hf",
    "fuse",
    "generate",
    "hidden_states",
    "init_c2c",
    "init_gated",
    "init_params",
    "left_pad",
    "load_agent",
    "logit_lens",
    "map_cache",
    "nearest_tokens",
    "overlap",
    "patch",
    "patchscope",
    "prefill",
    "prefix",
    "project_out",
    "receive",
    "receive_cache",
    "remember",
    "replace",
    "run_with_cache",
    "scale",
    "score",
    "select",
    "selection_logprobs",
    "send",
    "send_cache",
    "shard",
    "shardings",
    "similarity",
    "stand_in",
    "suffix",
    "sweep",
    "sweep_answers",
    "think",
    "train_maps",
]


def __getattr__(name: str) -> _Any:
    """Import `jaxcomm.converters` on first use, because it imports many other packages."""
    if name in ("from_hf", "load_agent"):
        from jaxcomm import converters

        return getattr(converters, name)
    raise AttributeError(f"module 'jaxcomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
