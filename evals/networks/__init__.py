"""Networks of language models at work: their training, what they are compared with, what their wires carry."""
