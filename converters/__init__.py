"""Convert checkpoints to and from jaxcomm's architecture and weights: Hugging Face's, without torch, and Orbax'."""

from .agents import load_agent
from .checkpoints import load, save
from .families import FAMILIES, Family
from .hf import from_hf, to_hf

__all__ = ["FAMILIES", "Family", "from_hf", "load", "load_agent", "save", "to_hf"]
