"""Train bridges between keys and values, and compare them with baselines: `jaxcomm bridge`."""
