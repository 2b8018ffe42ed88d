"""Compiled programs: cached between runs in the user's cache folder, and released before a process holds too many.

The cache is JAX's persistent compilation cache. JAX names an entry by the program, the compiler's options and jaxlib's
version. The folder's name adds everything else that decides whether an entry can run on this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path

import jax

VARIABLE = "JAXCOMM_PROGRAMS"
"""Environment variable: folder of the cache, or `off`."""
LIMIT = 4 << 30
"""Largest size of the cache in bytes. The oldest programs are removed first."""
_CHECKED = "checked.json"


def keep(folder: str | Path | None = None) -> Path | None:
    """Turns on the cache of compiled programs. Call it before anything is compiled.

    Args:
        folder: Folder of the cache. Default: the environment variable JAXCOMM_PROGRAMS, else `jaxcomm` in the user's cache
            folder (XDG_CACHE_HOME, or ~/.cache).

    Returns:
        The folder of this machine's programs; None if JAXCOMM_PROGRAMS is `off`, if JAX_COMPILATION_CACHE_DIR already
        names another, or if the folder cannot be written.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or os.environ.get(VARIABLE) == "off":
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    here = Path(folder or os.environ.get(VARIABLE) or cache / "jaxcomm") / f"programs-{_surroundings()}"
    if getattr(jax.config, "jax_compilation_cache_dir", None) == str(here):
        return here
    try:
        here.mkdir(parents=True, exist_ok=True)
        _tidy(here)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept: {error}", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(here))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # If JAX cannot read or write an entry, it compiles the program again. The user need not do anything.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    return here


def _surroundings() -> str:
    """Everything that an entry depends on besides its program: versions, flags, and processor features."""
    info = Path("/proc/cpuinfo")
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    processor = sorted({line for line in lines if line.startswith(wanted)}) or [platform.processor()]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    facts = [jax.__version__, metadata.version("jaxlib"), platform.machine(), *flags, *processor]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _tidy(folder: Path) -> None:
    """Removes incomplete and damaged entries, and the oldest programs beyond LIMIT.

    JAX never overwrites an existing entry, so a damaged one would be compiled at every start. Each is checked once."""
    record = folder / _CHECKED
    try:
        checked = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        checked = {}
    known, room = {}, LIMIT
    entries = [(entry.stat(), entry.name) for entry in os.scandir(folder) if entry.name.endswith("-cache")]
    for stat, name in sorted(entries, key=lambda entry: -entry[0].st_mtime_ns):
        mark = [stat.st_size, stat.st_mtime_ns]
        room -= stat.st_size
        if room > 0 and (checked.get(name) == mark or _whole(folder / name)):
            known[name] = mark
        else:
            (folder / name).unlink(missing_ok=True)
    if known != checked:
        written = record.with_name(f".{_CHECKED}.{os.getpid()}")
        written.write_text(json.dumps(known), encoding="utf-8")
        written.replace(record)


def _whole(entry: Path) -> bool:
    """Whether JAX can decompress an entry."""
    from jax._src.compilation_cache import decompress_executable

    try:
        return len(decompress_executable(entry.read_bytes())) > 0
    except Exception:  # zlib's or zstandard's error, depending on the compression
        return False


def release(share: float = 0.5) -> None:
    """Releases all compiled programs if they hold too many memory maps. Does nothing on systems without /proc.

    On CPU a program holds some hundreds of memory maps. Linux limits their number for each process, and the compiler
    crashes when none is left. Tasks with prompts of many lengths reach this limit.

    Args:
        share: Release the programs at this share of the limit.
    """
    held, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if limit.exists() and held.read_bytes().count(b"\n") > share * int(limit.read_text()):
        jax.clear_caches()
