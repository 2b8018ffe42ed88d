"""Networks of language models: train them, compare them with baselines, and inspect their wires."""
