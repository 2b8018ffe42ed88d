"""Hugging Face checkpoints <-> (architecture, weights) of jaxcomm, both ways, without torch."""

from jaxcomm.converters.agents import agent_from_hf
from jaxcomm.converters.families import FAMILIES, Family
from jaxcomm.converters.hf import from_hf, to_hf

__all__ = ["FAMILIES", "Family", "agent_from_hf", "from_hf", "to_hf"]
