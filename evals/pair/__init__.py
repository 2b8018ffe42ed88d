"""The embedded pair: two small Llama-architecture models that ship with the package, trained by `evals/pair/train.py`.

They are ordinary Hugging Face checkpoints, loaded like any other.
"""

from importlib import resources
from pathlib import Path

NAMES = ("a", "b")


def folder(name: str) -> Path:
    """Finds the checkpoint of a model of the embedded pair.

    Args:
        name: "a" (the sender, wider and deeper) or "b" (the receiver).

    Returns:
        Its folder.

    Raises:
        ValueError: There is no model of this name.

    Example:
        >>> folder("b").name
        'b'
    """
    if name not in NAMES:
        raise ValueError(f"the embedded pair has no model {name!r}, only {' and '.join(NAMES)}")
    return Path(str(resources.files("jaxcomm.evals.pair").joinpath(name)))


def checkpoint(name: str) -> str | Path:
    """Resolves a model's name from the command line.

    Args:
        name: pair:a or pair:b for the embedded pair, or the name of another checkpoint.

    Returns:
        The folder of the pair's model. Any other name is returned as it is.

    Raises:
        ValueError: The embedded pair has no such model.
    """
    return folder(name.removeprefix("pair:")) if name.startswith("pair:") else name
