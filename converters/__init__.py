"""Checkpoints <-> (architecture, weights) of jaxcomm: Hugging Face's, both ways, without torch, and Orbax'."""

from .agents import load_agent
from .checkpoints import load, save
from .families import FAMILIES, Family
from .hf import from_hf, to_hf

__all__ = ["FAMILIES", "Family", "from_hf", "load", "load_agent", "save", "to_hf"]
