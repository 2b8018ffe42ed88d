"""Locate a checkpoint: a folder, a .gguf file, a package (`real`), or a hub repository, which is downloaded."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from . import gguf, real
from .configs import parse_config
from .tensors import INDEX, WEIGHTS, read_index

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt",
    INDEX, WEIGHTS,
)  # fmt: skip
"""Files to download from a hub repository, besides the shards that its index names."""

HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Finds the folder or the .gguf file of a checkpoint, and downloads it from the hub if it is not local.

    Args:
        path_or_hub_id: A folder, a .gguf file, a hub id ("gpt2", "org/name"), a .gguf file on the hub
            ("org/name/file.gguf"), or a real model from the package index ("real:smollm2"). A name on the hub may end
            in "@" and a revision.
        revision: Branch, tag or commit of the hub's repository. Default: the revision in the id, or else the main
            branch.

    Returns:
        The path of the folder or file.

    Raises:
        FileNotFoundError: There is no such checkpoint, or the real model is not installed.
        ConnectionError: The checkpoint cannot be downloaded.
        ValueError: The config is not supported (it is read before the weights are downloaded); two revisions are given;
            a revision is given for a local checkpoint or a real model.
    """
    if real.is_real(path_or_hub_id):
        if revision is not None:
            raise ValueError(
                f"revision = {revision!r} applies to hub ids only, {path_or_hub_id} has one version: leave it out"
            )
        return real.find(str(path_or_hub_id))
    path = Path(path_or_hub_id)
    name, _, at = str(path_or_hub_id).partition("@")
    if path.is_dir() or gguf.is_gguf(path):
        if revision is not None:
            raise ValueError(
                f"revision = {revision!r} applies to hub ids only, {path} is a local checkpoint: leave it out"
            )
        return path
    repository, file = name, None
    if name.endswith(".gguf"):  # owner/name/file on the hub, or a local file that does not exist
        *owner, file = name.split("/", 2)
        repository = "/".join(owner) if len(owner) == 2 and not Path(owner[0]).exists() else ""
    if path.exists() or not HUB_ID.fullmatch(repository):
        raise FileNotFoundError(
            f"{name} is not a checkpoint: give a folder with config.json and {WEIGHTS}, a .gguf file, or a hub id such as org/name"
        )
    if revision and at and revision != at:
        raise ValueError(f"{path_or_hub_id} names a revision, revision = {revision!r} another: give one")
    fetch = functools.partial(_fetch, str(path_or_hub_id), repository)
    revision = revision or at or None
    if file is not None:
        folder = fetch(revision, gguf.all_files(file))
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{repository} has no file {file}")
        return folder / file
    folder = fetch(revision, "config.json")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{name} has no config.json: of a repository of GGUF files name one, such as {name}/FILE.gguf"
        )
    parse_config(folder)
    revision = commit_of(folder) or revision  # download the rest from the same commit, even if the branch moves
    folder = fetch(revision, *FILES)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        folder = fetch(revision, *sorted(set(read_index(folder).values())))
    return folder


def _fetch(asked: str, repository: str, revision: str | None, *files: str) -> Path:
    """Download these files of a hub repository. Returns the folder. asked: name of the checkpoint in an error."""
    import huggingface_hub  # slow to import, and only needed for downloads

    pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files), **pinned))
    except Exception as error:  # many types: no network, no such repository, no access, disk full
        raise ConnectionError(
            f"cannot download {asked} ({type(error).__name__}): check the id, the network and your access, or give a local checkpoint"
        ) from error


def commit_of(path: Path) -> str | None:
    """Finds the commit of a checkpoint in the hub's cache.

    Args:
        path: A folder, or a .gguf file.

    Returns:
        The commit, or None for other places.
    """
    near = [path, *path.parents] if path.suffix == ".gguf" else [path]
    return next((folder.name for folder in near if folder.parent.name == "snapshots"), None)
