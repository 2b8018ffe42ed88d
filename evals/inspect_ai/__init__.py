"""Pairs of models under any protocol as models of Inspect AI (UK AISI), and the games as its tasks.

    inspect eval jaxcomm/countries --model jaxcomm/activation -M a=pair:a -M b=pair:b -M k=5 -M j=2

Needs the extra `jaxcomm[inspect]`. Inspect finds this module by the entry point `inspect_ai`.
Models are loaded on first use.
"""

from inspect_ai.model import ModelAPI, modelapi

from .tasks import countries, tip_sheets

__all__ = ["countries", "jaxcomm", "tip_sheets"]


@modelapi(name="jaxcomm")
def jaxcomm() -> type[ModelAPI]:
    """Returns the provider's class."""
    from .model import ProtocolAPI

    return ProtocolAPI
