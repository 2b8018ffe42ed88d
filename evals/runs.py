"""Run folders: what was asked, and what is done of it, each piece whole or not there.

    run.json           the command that runs it again, and what makes this run this run: settings, seeds, versions,
                       fingerprints of the models
    chunks/*.parquet   finished pieces, each written at once when it is done
    results.parquet    all of them
    *.npz              what all pieces need and is costly to make (the maps W)

A run that was stopped, by whatever, goes on where it was; the same bytes come out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
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
    """Of the model, and of how its agent reads and stops: tokenizer, chat template, stop tokens."""
    kept = (agent.tokenizer.backend_tokenizer.to_str(), agent.tokenizer.chat_template, agent.stop_tokens, agent.chat)
    kept += (agent.system,) if agent.system else ()
    return hashlib.sha256(repr((fingerprint(agent.params), kept)).encode()).hexdigest()[:16]


PACKAGES = ("jaxcomm", "jax", "jaxlib", "transformers", "numpy")
ALSO = ("python", "lm_eval", "optax", "orbax-checkpoint")


def surroundings(*others: str) -> dict[str, Any]:
    """Versions, of other packages too (of `ALSO`), and devices: what may change the last bits of a result."""
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, *others)}
    devices = jax.local_devices()
    return {"python": platform.python_version(), **versions, "device": devices[0].device_kind, "devices": len(devices)}


class RunFolder(contextlib.ExitStack):
    """A folder that belongs to one run, and, as a context, to one process at a time.

    Args:
        path: Where; it is made.
        config: JSON; a folder that holds another is refused. Of versions only the first two numbers are compared.
        plan: Made once, when the run begins, and the same when it goes on (what depends on the machine's state of that hour,
            such as chunk sizes).
        command: What to type to run it again.
        resume: Go on with what is there.
        free: Names in config that change no result: kept, not compared.
        shared: Other processes of this run have the folder, too, and one of them has locked it.

    Raises:
        ValueError: The folder is of a different run, or of this one and `resume` was not asked for, or another process works
            on it.
        OSError: It is not writable.
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
        self.path, self.chunks = path, path / "chunks"
        check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            if not shared:
                self._lock()
            self._begin(json.loads(json.dumps(config)), plan, command, resume, {*free, "devices"}, clean=not shared)
            undo.pop_all()

    def _lock(self) -> None:
        """Of the folder itself, so nothing is left of it, whatever ends the process."""
        handle = os.open(self.path, os.O_RDONLY)
        self.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another process: wait for its end, or choose another folder"
            ) from None
        except OSError:  # a file system that knows no locks
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
            for leftover in [*path.glob(".*.*"), *self.chunks.glob(".*.*")]:  # of a write that was killed
                if clean and leftover.is_file():
                    leftover.unlink()
            return
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        if any(p.is_file() and not hidden(p) for p in path.rglob("*")):
            raise ValueError(f"{path} is not empty and holds no run: choose another folder")
        self.plan = json.loads(json.dumps(plan()))
        kept = {"command": command, "config": config, "plan": self.plan}
        write_whole(record, (json.dumps(kept, indent=1) + "\n").encode())

    def done(self, name: str) -> bool:
        return (self.chunks / f"{name}.parquet").exists()

    def write(self, name: str, columns: Mapping[str, Any]) -> None:
        """A finished piece. OSError (a full disk): it is not there, the others are."""
        self.put(f"chunks/{name}.parquet", parquet(pa.table(dict(columns))))

    def read(self, name: str) -> pa.Table:
        """ValueError if the file is not what was written."""
        path = self.chunks / f"{name}.parquet"
        try:
            return pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and add --resume") from error

    def put(self, name: str, data: bytes) -> None:
        write_whole(self.path / name, data)

    def arrays(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Arrays that are made once and kept in `name`.npz."""
        path = self.path / f"{name}.npz"
        if not path.exists():
            file = io.BytesIO()
            np.savez(file, **make())
            self.put(path.name, file.getvalue())
        with np.load(path) as kept:
            return dict(kept)


def parquet(table: pa.Table) -> bytes:
    """The same bytes for the same table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _compared(config: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """What has to be the same for a run to go on: of versions not the patch, which is made to change no result."""
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
