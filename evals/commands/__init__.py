"""The commands of `jaxcomm`, a module for each or for two that belong together: its arguments, and what it does with them."""
