"""Language-model networks: `init` joins models by trainable edges; `forward` and `generate` are those of any model."""

from jaxcomm.config import EdgeConfig, NetworkConfig
from jaxcomm.decoding import generate
from jaxcomm.lmnet.network import Network, init, size
from jaxcomm.model import forward

__all__ = ["EdgeConfig", "Network", "NetworkConfig", "forward", "generate", "init", "size"]
