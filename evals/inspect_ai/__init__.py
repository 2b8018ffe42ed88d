"""Pairs of models under any protocol as models of Inspect AI (UK AISI), and the games as one of its tasks.

    inspect eval jaxcomm/game -T game=countries --model jaxcomm/activation -M a=pair:b -M b=pair:b -M k=4 -M j=1

Needs the extra `jaxcomm[inspect]`. Inspect finds this module by the entry point `inspect_ai`.
Models are loaded on first use.
"""

from inspect_ai.model import ModelAPI, modelapi

from .tasks import game

__all__ = ["game", "jaxcomm"]


@modelapi(name="jaxcomm")
def jaxcomm() -> type[ModelAPI]:
    """Returns the provider's class."""
    from .model import ProtocolAPI

    return ProtocolAPI
