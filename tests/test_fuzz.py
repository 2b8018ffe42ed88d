"""500 damaged checkpoints: each is refused by one clear line, and costs neither the memory nor the time it lies about."""

import gc
import json
import shutil
import time
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.converters import from_hf, to_hf

from conftest import make_checkpoint

MOST = 40 * 2**20
"""Bytes; the checkpoint has 0.3 million."""
LONGEST = 5.0
"""Seconds of this thread on a processor, without the garbage of other tests; the slowest takes 0.4, most take 0.01. A loop
over a number of ``HUGE`` takes minutes."""
HUGE = (2**31, 2**40, 2**62, 10**30, -1, 0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of three config classes, in shards; the second makes lists of its layers."""
    made = []
    for name in ("llama", "gemma3_text", "gpt2"):
        pair = make_checkpoint(tmp_path_factory.mktemp(name), name, seed=4)
        out = to_hf(pair.params, tmp_path_factory.mktemp("shards") / name, family=name, shard_bytes=60_000)
        made.append((out, pair.params))
    return made


def flip(data: bytes, draw) -> bytes:
    """One to three bits."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        damaged[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


def cut(data: bytes, draw) -> bytes:
    return data[: draw(st.integers(0, len(data) - 1))]


def lie(data: bytes, draw) -> bytes:
    """A number of a JSON text, nested or not, becomes another, huge or of another kind."""
    tree = json.loads(data)
    places = []

    def walk(node, path):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((*path, key))
            if isinstance(value, dict | list):
                walk(value, (*path, key))

    walk(tree, ())
    *path, last = draw(st.sampled_from(places))
    node = tree
    for key in path:
        node = node[key]
    node[last] = draw(
        st.sampled_from([*HUGE, 1.5, "F64", "I8", "BF16", "F8_E4M3", None, True, [], {}, [HUGE[0]], float("nan")])
    )
    return json.dumps(tree).encode()


def in_header(change):
    """Of a safetensors file, its header; the length that is written before it follows, or does not."""

    def changed(data: bytes, draw) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = change(data[8 : 8 + size], draw)
        told = draw(st.sampled_from([len(header)] * 6 + [abs(h) % 2**64 for h in HUGE]))
        return told.to_bytes(8, "little") + header + data[8 + size :]

    return changed


DAMAGES = [
    ("config.json", flip), ("config.json", cut), ("config.json", lie), ("*.safetensors", in_header(flip)),
    ("*.safetensors", cut), ("*.safetensors", in_header(lie)), ("*.index.json", flip), ("*.index.json", lie),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*are not read, as in transformers")  # a key that became another
@settings(max_examples=500)
@given(data=st.data())
def test_damage_is_refused_in_one_line_and_costs_little(checkpoints, tmp_path_factory, data):
    """Damage that leaves the meaning (a bit of a version number) is loaded, and then it is the same model, or the one that
    a changed setting describes."""
    folder, params = data.draw(st.sampled_from(checkpoints))
    pattern, damage = data.draw(st.sampled_from(DAMAGES))
    copy = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(folder, copy)
    path = data.draw(st.sampled_from(sorted(copy.glob(pattern))))
    before = path.read_bytes()
    path.write_bytes(damage(before, data.draw))
    gc.disable()
    tracemalloc.start()
    start = time.thread_time()
    try:
        loaded = from_hf(copy, unroll=False)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 2000
        assert "Traceback" not in said and not isinstance(error, UnicodeError | json.JSONDecodeError)
    else:
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), loaded.blocks, params.blocks)
        assert all(jax.tree.leaves(same)) or "header" in str(damage), path.name
        if pattern != "config.json":
            assert loaded.config == params.config
    finally:
        seconds, (_, most) = time.thread_time() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.enable()
        shutil.rmtree(copy.parent)
    assert most < MOST and seconds < LONGEST, f"{seconds:.2f} s, {most / 2**20:.0f} MiB"
