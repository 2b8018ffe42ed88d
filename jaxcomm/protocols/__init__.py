"""How agents may communicate. Every protocol is called as protocol(a, b, prompts_a, prompts_b, *, sampling, seed, ...)
and returns B's `Turn` (or the `Panel` of all who answer): it has heard everything, and now writes or scores.

sampling, seed: of what is written before that turn, which has its own. Where nothing is (silent, sender, skyline, an activation
without thinking) they change nothing; CIPHER, which says everything in vectors, refuses `sampling`."""

from jaxcomm.protocols.activations import Back, Control, activation, exchange
from jaxcomm.protocols.base import Reply, Scored, Turn
from jaxcomm.protocols.cipher import cipher_debate
from jaxcomm.protocols.debates import FORMS, Form, Panel, debate
from jaxcomm.protocols.text import message, sender, silent, skyline

PROTOCOLS = {
    "silent": silent,
    "sender": sender,
    "skyline": skyline,
    "message": message,
    "debate": lambda a, b, prompts_a, prompts_b, **how: debate((a, b), (prompts_a, prompts_b), **how),
    "cipher": lambda a, b, prompts_a, prompts_b, **how: cipher_debate((a, b), (prompts_a, prompts_b), **how),
    "activation": activation,
    "exchange": exchange,
}
"""name -> protocol. Two agents debate here; `debate` and `cipher_debate` take any number."""

__all__ = [
    "FORMS",
    "PROTOCOLS",
    "Back",
    "Control",
    "Form",
    "Panel",
    "Reply",
    "Scored",
    "Turn",
    "activation",
    "cipher_debate",
    "debate",
    "exchange",
    "message",
    "sender",
    "silent",
    "skyline",
]
