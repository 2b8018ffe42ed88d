"""Compiled programs are kept between processes, whatever becomes of the folder, and forgotten before a process holds too many."""

import os
import subprocess
import sys
import warnings

import jax
import pytest

from jaxcomm.evals import programs

RUN = """
import sys, warnings
import jax, jax.monitoring
warnings.simplefilter("error")
from jaxcomm.evals import programs
programs.keep()
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((3, 3)))), len(found))
"""


def run(folder, **environment):
    """What a new process prints, and how many programs it found."""
    env = {key: value for key, value in os.environ.items() if key not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu", programs.VARIABLE: str(folder)} | environment
    done = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    value, found = done.stdout.split()
    assert value == "27.0"
    return int(found)


def test_the_next_process_finds_them_and_a_damaged_folder_is_mended(tmp_path):
    assert run(tmp_path) == 0
    every = run(tmp_path)
    assert every >= 1
    entries = sorted(tmp_path.rglob("*-cache"))
    entries[0].write_bytes(entries[0].read_bytes()[:50])
    (entries[0].parent / "checked.json").write_text("{half")
    assert run(tmp_path) == every - 1, "compiled anew, without a word"
    assert run(tmp_path) == every, "and kept again"
    assert run(tmp_path, XLA_FLAGS="--xla_backend_optimization_level=0") == 0, "other flags, other programs"
    assert run("off") == 0


@pytest.fixture
def forget():
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_dir", before)


def test_entries_are_checked_once_and_the_oldest_go_beyond_the_limit(tmp_path, forget, monkeypatch):
    # With zlib, or with zstandard where that is installed.
    from jax._src.compilation_cache import compress_executable

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv(programs.VARIABLE, "here")
    here = programs.keep(tmp_path)
    assert here is not None and here.parent == tmp_path, "what is asked for goes before the variable"
    for age in range(4):
        entry = here / f"program-{age}-cache"
        entry.write_bytes(compress_executable(bytes(range(256)) * 4))
        os.utime(entry, (1e9 - age, 1e9 - age))
    (here / "broken-cache").write_bytes(b"\x78\x9c half")
    size = (here / "program-0-cache").stat().st_size
    monkeypatch.setattr(programs, "LIMIT", 3 * size + 10)
    forget()
    programs.keep(tmp_path)
    assert sorted(path.name for path in here.glob("*-cache")) == [f"program-{n}-cache" for n in range(3)]
    monkeypatch.setattr(programs, "_whole", lambda entry: pytest.fail(f"{entry} was checked twice"))
    forget()
    programs.keep(tmp_path)


def test_where_nothing_can_be_kept_a_command_says_so_and_goes_on(tmp_path, forget, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="compiled programs are not kept: .*file"):
        assert programs.keep(tmp_path / "file") is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert programs.keep(tmp_path) is None, "the user's own choice stays"


def test_programs_are_forgotten_before_they_use_up_the_memory_maps_of_a_process():
    double = jax.jit(lambda x: 2 * x)
    double(1.0)
    programs.release(share=1.0)
    assert double._cache_size() == 1
    programs.release(share=0.0)
    assert double._cache_size() == 0 and double(2.0) == 4.0
