"""Run folders: the settings of a run and its finished pieces. A piece is either complete or absent.

    run.json           the command that runs it again, and the identity of the run: settings, seeds, versions,
                       fingerprints of the models
    chunks/*.parquet   finished pieces, each written as soon as it is done
    results.parquet    all pieces together
    *.npz              arrays that all pieces need and that are costly to compute (the maps W)

A stopped run resumes where it was, and produces the same bytes. A run that is refused before its first piece leaves no
files, so the corrected command can use the same folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcomm.agent import Agent
from jaxcomm.fingerprint import fingerprint

from .files import check_folder, write_whole


def agent_fingerprint(agent: Agent) -> str:
    """Computes a fingerprint of an agent: its model, tokenizer, chat template, stop tokens, and system prompt.

    Args:
        agent: The agent.

    Returns:
        16 hexadecimal digits. Agents with the same fingerprint read and write the same.
    """
    kept = (agent.tokenizer.backend_tokenizer.to_str(), agent.tokenizer.chat_template, agent.stop_tokens, agent.chat)
    kept += (agent.system,) if agent.system else ()
    return hashlib.sha256(repr((fingerprint(agent.params), kept)).encode()).hexdigest()[:16]


PACKAGES = ("jaxcomm", "jax", "jaxlib", "transformers", "numpy")
ALSO = ("python", "lm_eval", "optax", "orbax-checkpoint")


def surroundings(*others: str) -> dict[str, Any]:
    """Lists the versions and devices of this process. They may change the last bits of a result.

    Args:
        *others: Further packages to list (from `ALSO`).

    Returns:
        Version of Python and of each package; kind and number of the devices.
    """
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *others)}
    devices = jax.local_devices()
    return {"python": platform.python_version(), **versions, "device": devices[0].device_kind, "devices": len(devices)}


class RunFolder(contextlib.ExitStack):
    """The folder of one run. It is a context manager that locks the folder for other processes.

    Args:
        path: The folder. It is created if it does not exist.
        config: The identity of the run, as JSON values. A folder with another config is refused. Of a version, only the
            first two numbers are compared.
        plan: A function that is called once, when the run begins. Its result is stored, and used again when the run is
            resumed. It holds values that depend on the machine's state at that time, such as sizes of chunks.
        command: The command line that runs it again.
        resume: Whether to resume a run that is already in the folder.
        free: Names in the config that may differ when the run is resumed, since they change no finished piece. The newest
            values are stored.
        shared: Whether another process of the same run has locked the folder.

    Attributes:
        path: The folder.
        chunks: The subfolder of the finished pieces.
        plan: Result of `plan` from the beginning of the run.

    Raises:
        ValueError: The folder holds a different run, or this run and `resume` is false; or another process uses it.
        OSError: The folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        plan: Callable[[], Any],
        *,
        command: str,
        resume: bool,
        free: Collection[str] = (),
        shared: bool = False,
    ):
        super().__init__()
        self.path, self.chunks, self.began = path, path / "chunks", False
        check_folder(path)
        fresh = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            undo.push(self.__exit__)
            if not shared:
                self._lock()
                self.push(functools.partial(self._withdraw, fresh))  # runs before the lock is released
            self._begin(json.loads(json.dumps(config)), plan, command, resume, {*free, "devices"}, clean=not shared)
            undo.pop_all()

    def _withdraw(self, fresh: bool, kind: type[BaseException] | None, *_: Any) -> None:
        """Removes run.json of a refused run that has no other files, and the folder if it is new."""
        if kind is None or not issubclass(kind, ValueError):
            return
        if self.began and [p.name for p in self.path.iterdir()] == ["run.json"]:
            (self.path / "run.json").unlink()
        if fresh and not any(self.path.iterdir()):
            self.path.rmdir()

    def _lock(self) -> None:
        """Locks the folder itself. So no lock file is left, however the process ends."""
        handle = os.open(self.path, os.O_RDONLY)
        self.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another process: wait for its end, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _begin(
        self,
        config: dict[str, Any],
        plan: Callable[[], Any],
        command: str,
        resume: bool,
        free: Collection[str],
        clean: bool,
    ) -> None:
        path = self.path
        record = path / "run.json"
        if record.exists():
            kept = json.loads(record.read_text())
            if different := _differences(_compared(kept["config"], free), _compared(config, free)):
                raise ValueError(f"{path} holds a different run ({'; '.join(different)}): choose another folder")
            if not resume:
                raise ValueError(f"{path} holds this run already: add --resume to go on, or choose another folder")
            self.plan = kept["plan"]
            if clean and (kept["config"], kept["command"]) != (config, command):
                write_whole(record, _record(command, config, self.plan))
            for leftover in [*path.glob(".*.*"), *self.chunks.glob(".*.*")]:  # of a write that was killed
                if clean and leftover.is_file():
                    leftover.unlink()
            return
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        if any(p.is_file() and not hidden(p) for p in path.rglob("*")):
            raise ValueError(f"{path} is not empty and holds no run: choose another folder")
        self.plan = json.loads(json.dumps(plan()))
        self.began = True
        write_whole(record, _record(command, config, self.plan))

    def done(self, name: str) -> bool:
        """Whether a piece is finished."""
        return (self.chunks / f"{name}.parquet").exists()

    def write(self, name: str, columns: Mapping[str, Any]) -> None:
        """Writes a finished piece as a table.

        Args:
            name: Name of the piece.
            columns: The columns of the table, by name.

        Raises:
            OSError: It cannot be written, for example because the disk is full. Then the piece does not exist; the
                others do.
        """
        self.put(f"chunks/{name}.parquet", parquet(pa.table(dict(columns))))

    def read(self, name: str) -> pa.Table:
        """Reads a finished piece.

        Args:
            name: Name of the piece.

        Returns:
            The table.

        Raises:
            ValueError: The file is missing or damaged.
        """
        path = self.chunks / f"{name}.parquet"
        try:
            return pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and add --resume") from error

    def put(self, name: str, data: bytes) -> None:
        """Writes a file into the folder atomically.

        Args:
            name: Path of the file within the folder.
            data: Its bytes.

        Raises:
            OSError: It cannot be written.
        """
        write_whole(self.path / name, data)

    def arrays(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Returns arrays that are costly to compute. They are computed once, and then read from the folder.

        Args:
            name: The file is `name`.npz.
            make: A function that computes the arrays.

        Returns:
            The arrays, by name.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.path / f"{name}.npz"
        if not path.exists():
            file = io.BytesIO()
            np.savez(file, **make())
            self.put(path.name, file.getvalue())
        try:
            with path.open("rb") as file, np.load(file) as kept:
                return dict(kept)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and add --resume") from error


def _record(command: str, config: dict[str, Any], plan: Any) -> bytes:
    """The text of run.json."""
    return (json.dumps({"command": command, "config": config, "plan": plan}, indent=1) + "\n").encode()


def parquet(table: pa.Table) -> bytes:
    """Packs a table as a Parquet file. The same table gives the same bytes.

    Args:
        table: The table.

    Returns:
        The bytes of the file.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _compared(config: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The part of a config that must be equal to resume a run. Patch numbers of versions may differ."""
    short = lambda name, value: ".".join(value.split(".")[:2]) if name in (*PACKAGES, *ALSO) else value
    return {name: short(name, value) for name, value in config.items() if name not in free}


def _differences(kept: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*kept, *asked}):
        old, new = kept.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_short(old)} there, {_short(new)} here")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
