"""The embedded pair: two small Llama-architecture models that ship with the package, trained by `evals/pair/train.py`.

They are ordinary Hugging Face checkpoints and are loaded like any other.
"""

from importlib import resources
from pathlib import Path

NAMES = ("a", "b")


def folder(name: str) -> Path:
    """Where the checkpoint of model "a" (the sender, wider and deeper) or "b" (the receiver) lies. ValueError for other names."""
    if name not in NAMES:
        raise ValueError(f"the embedded pair has no model {name!r}, only {' and '.join(NAMES)}")
    return Path(str(resources.files("jaxcomm.evals.pair").joinpath(name)))


def checkpoint(name: str) -> str | Path:
    """What a command's name of a model stands for: pair:a and pair:b for the embedded pair, anything else for itself."""
    return folder(name.removeprefix("pair:")) if name.startswith("pair:") else name
