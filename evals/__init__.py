"""The games, benchmarks and command line jaxcomm is judged with."""
