"""Protocols: ways for agents to communicate.

Call a protocol as protocol(a, b, prompts_a, prompts_b, *, sampling, seed, ...). It lets B read everything and returns
B's `Turn` (or a `Panel`, if several agents answer). Call `.write()` on it to generate a reply, or `.score()` to score
given continuations.

To build a protocol of your own, call the two parts of one, and do anything in between:

    sent = send_states(a, b, prompts_a, Grafting(), k=26, games=n)   or send_text(a, prompts_a, Conversation())
    turn = receive_states(b, prompts_b, sent, Grafting(), j=26)      or receive_text(b, prompts_b, sent, Conversation())

Protocols that send a message accept `control`: a stand-in that every receiver gets instead of its message (`CONTROLS`).

`sampling` and `seed` apply to text that agents generate before that turn, `seed` also to random controls. The turn's
own methods have their own. Without such text, `sampling` has no effect. CIPHER sends
vectors only and refuses `sampling`.
"""

from jaxcomm.protocols.activations import (
    Asked,
    Back,
    Grafting,
    activation,
    exchange,
    read_receiver,
    receive_states,
    send_states,
)
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
"""name -> protocol. The debates here have two agents; `debate` and `cipher_debate` accept any number."""

__all__ = [
    "CONTROLS",
    "FORMS",
    "PROTOCOLS",
    "Asked",
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
    "read_receiver",
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
