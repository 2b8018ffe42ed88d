"""Networks of language models (LMNet). `init_network` connects models by trainable edges. `forward` and `generate` work
as for any model. `control_edges` replaces the states on edges by controls."""

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
