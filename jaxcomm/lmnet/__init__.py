"""Language-model networks: `init_network` joins models by trainable edges; `forward` and `generate` are those of any
model."""

from jaxcomm.config import EdgeConfig, NetworkConfig
from jaxcomm.decoding import generate
from jaxcomm.lmnet.network import Network, init_network, size
from jaxcomm.reading import forward

__all__ = ["EdgeConfig", "Network", "NetworkConfig", "forward", "generate", "init_network", "size"]
