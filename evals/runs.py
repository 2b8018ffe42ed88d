"""Run folders: what was asked, and what is done of it, each piece whole or not there.

    run.json           the command that runs it again, and what makes this run this run: settings, seeds, versions,
                       fingerprints of the models
    chunks/*.parquet   finished pieces, each written at once when it is done
    results.parquet    all of them
    *.npz              what all pieces need and is costly to make (the maps W)

A run that was stopped, by whatever, goes on where it was; the same bytes come out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcomm.agent import Agent
from jaxcomm.fingerprint import fingerprint

from .play import write_whole


def agent_fingerprint(agent: Agent) -> str:
    """Of the model, and of how its agent reads and stops: tokenizer, chat template, stop tokens."""
    kept = (agent.tokenizer.backend_tokenizer.to_str(), agent.tokenizer.chat_template, agent.stop_tokens, agent.chat)
    return hashlib.sha256(repr((fingerprint(agent.params), kept)).encode()).hexdigest()[:16]


def surroundings(*others: str) -> dict[str, Any]:
    """Versions, of other packages too, and devices: what may change the last bits of a result."""
    names = ("jaxcomm", "jax", "jaxlib", "transformers", "numpy", *others)
    versions = {name: importlib.metadata.version(name) for name in names}
    devices = jax.local_devices()
    return {"python": platform.python_version(), **versions, "device": devices[0].device_kind, "devices": len(devices)}


class RunFolder:
    """A folder that belongs to one run.

    config: JSON; a folder that holds another is refused. command: what to type to run it again. plan: made once, when the run begins, and the same when it
    goes on (what depends on the machine's state of that hour, such as chunk sizes).
    ValueError: the folder is of a different run, or of this one and `resume` was not asked for. OSError: not writable.
    """

    def __init__(self, path: Path, config: dict[str, Any], plan: Callable[[], Any], *, command: str, resume: bool):
        self.path, self.chunks = path, path / "chunks"
        config = json.loads(json.dumps(config))
        if path.is_file():
            raise NotADirectoryError(f"{path} is a file: name a folder")
        record = path / "run.json"
        if record.exists():
            kept = json.loads(record.read_text())
            if different := _differences(kept["config"], config):
                raise ValueError(f"{path} holds a different run ({'; '.join(different)}): choose another folder")
            if not resume:
                raise ValueError(f"{path} holds this run already: add --resume to go on, or choose another folder")
            self.plan = kept["plan"]
            for leftover in [*path.glob(".*.*"), *self.chunks.glob(".*.*")]:  # of a write that was killed
                leftover.unlink()
            return
        if any(p.is_file() and not p.name.startswith(".") for p in path.rglob("*")):
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
