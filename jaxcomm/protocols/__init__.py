"""How agents may communicate. Every protocol is called as protocol(a, b, prompts_a, prompts_b, *, max_new_tokens,
sampling, seed, ...) and returns one `Reply` of B per game."""

from jaxcomm.protocols.activation import Control, activation
from jaxcomm.protocols.base import Reply
from jaxcomm.protocols.text import message, silent, skyline

PROTOCOLS = {"silent": silent, "skyline": skyline, "message": message, "activation": activation}

__all__ = ["PROTOCOLS", "Control", "Reply", "activation", "message", "silent", "skyline"]
