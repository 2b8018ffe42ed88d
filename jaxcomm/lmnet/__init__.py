"""Language-model networks: `init_network` joins models by trainable edges; `forward` and `generate` are those of any
model; `control_edges` puts controls in place of what edges carry."""

from jaxcomm.config import EdgeConfig, NetworkConfig
from jaxcomm.decoding import generate
from jaxcomm.lmnet.controls import control_edges, edge_sets
from jaxcomm.lmnet.network import Network, init_network, size
from jaxcomm.reading import forward

__all__ = [
    "EdgeConfig",
    "Network",
    "NetworkConfig",
    "control_edges",
    "edge_sets",
    "forward",
    "generate",
    "init_network",
    "size",
]
