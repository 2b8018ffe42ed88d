"""The commands of `jaxcomm`. Each module has one command or two related ones: arguments, and a method `run`."""
