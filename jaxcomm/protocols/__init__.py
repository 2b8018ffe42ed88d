"""How agents may communicate.

Every protocol is called as protocol(a, b, prompts_a, prompts_b, *, sampling, seed, ...). It returns B's `Turn` (or the
`Panel` of all who answer): B has read everything, and now writes or scores.

A protocol of your own is put together from its parts, with anything in between:

    sent = send_states(a, b, prompts_a, Grafting(), k=26, games=n)   or send_text(a, prompts_a, Conversation())
    turn = receive_states(b, prompts_b, sent, Grafting(), j=26)      or receive_text(b, prompts_b, sent, Conversation())

Protocols that send take `control`: what every receiver gets in place of its message (`CONTROLS`).

sampling and seed are those of what is written before that turn, which has its own. Where nothing is written (silent,
sender, skyline, an activation without thinking) they change nothing. CIPHER, which says everything in vectors, refuses
`sampling`.
"""

from jaxcomm.protocols.activations import Back, Grafting, activation, exchange, receive_states, send_states
from jaxcomm.protocols.base import Reply, Scored, Sent, Turn
from jaxcomm.protocols.bridges import Bridging, Crossing, bridge, receive_bridged, send_bridged
from jaxcomm.protocols.cipher import cipher_debate
from jaxcomm.protocols.controls import CONTROLS, Control, StandIn
from jaxcomm.protocols.debates import FORMS, Form, Panel, debate
from jaxcomm.protocols.inspections import (
    Inspecting,
    Inspection,
    inspect_activation,
    inspect_bridge,
    inspect_deltas,
    inspect_prefix,
)
from jaxcomm.protocols.prefixes import Prefixing, kv, latent, receive_prefix, send_prefix, thinking
from jaxcomm.protocols.state_deltas import deltas, receive_deltas, send_deltas, sweep_deltas
from jaxcomm.protocols.text import Conversation, message, receive_text, send_text, sender, silent, skyline

PROTOCOLS = {
    "silent": silent,
    "sender": sender,
    "skyline": skyline,
    "message": message,
    "debate": lambda a, b, prompts_a, prompts_b, **how: debate((a, b), (prompts_a, prompts_b), **how),
    "cipher": lambda a, b, prompts_a, prompts_b, **how: cipher_debate((a, b), (prompts_a, prompts_b), **how),
    "activation": activation,
    "exchange": exchange,
    "kv": kv,
    "latent": latent,
    "thinking": thinking,
    "deltas": deltas,
    "bridge": bridge,
}
"""name -> protocol. Two agents debate here; `debate` and `cipher_debate` take any number."""

__all__ = [
    "CONTROLS",
    "FORMS",
    "PROTOCOLS",
    "Back",
    "Bridging",
    "Control",
    "Conversation",
    "Crossing",
    "Form",
    "Grafting",
    "Inspecting",
    "Inspection",
    "Panel",
    "Prefixing",
    "Reply",
    "Scored",
    "Sent",
    "StandIn",
    "Turn",
    "activation",
    "bridge",
    "cipher_debate",
    "debate",
    "deltas",
    "exchange",
    "inspect_activation",
    "inspect_bridge",
    "inspect_deltas",
    "inspect_prefix",
    "kv",
    "latent",
    "message",
    "receive_bridged",
    "receive_deltas",
    "receive_prefix",
    "receive_states",
    "receive_text",
    "send_bridged",
    "send_deltas",
    "send_prefix",
    "send_states",
    "send_text",
    "sender",
    "silent",
    "skyline",
    "sweep_deltas",
    "thinking",
]
