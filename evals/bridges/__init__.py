"""Training of bridges between keys and values, and what they are compared with: `jaxcomm bridge`."""
