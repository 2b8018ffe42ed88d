"""Checkpoints <-> (architecture, weights) of jaxcomm: Hugging Face's, both ways, without torch, and Orbax'."""

from jaxcomm.converters.agents import load_agent
from jaxcomm.converters.checkpoints import load, save
from jaxcomm.converters.families import FAMILIES, Family
from jaxcomm.converters.hf import from_hf, to_hf

__all__ = ["FAMILIES", "Family", "from_hf", "load", "load_agent", "save", "to_hf"]
