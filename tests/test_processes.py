"""Two processes with two devices each, on loopback: the results of one."""

import json
import os
import socket
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from jaxcomm.evals import processes
from jaxcomm.evals.commands.play import Play
from jaxcomm.evals.commands.sweep import Sweep
from jaxcomm.evals.sweeps.fitting import own_statements

from conftest import QUICK

RUN = """
import sys
from pathlib import Path
from jaxcomm.evals import programs
from jaxcomm.evals.commands.play import Play
from jaxcomm.evals.commands.sweep import Sweep

programs.keep()
cluster, out = sys.argv[1] or None, Path(sys.argv[2])
to = dict(json=out / "play.jsonl", items=out / "items.jsonl")
Play(a="pair:b", b="pair:b", k=4, j=1, n=9, cluster=cluster, control=("other", "zero"), **to).run()
how = dict(games=("countries",), ks=(2, 4), js=(1, 3), n=8, memory=0.0015, text=str(out.parent / "text.txt"), into=4)
Sweep(a="pair:b", b="pair:b", out=out / "sweep", **how).run()
try:
    Sweep(a="pair:b", b="pair:b", out=out / "sweep", **how).run()
except ValueError as error:  # the first process', which all end with
    print("REFUSED", error, flush=True)
"""


def test_two_processes_play_and_sweep_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count=2 {QUICK}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    start = lambda cluster, out: subprocess.Popen(
        [sys.executable, "-c", RUN, cluster, str(out)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "text.txt").write_text("\n".join(own_statements("countries")[:60]))
    with start("", one) as alone:
        assert alone.wait() == 0, alone.stdout.read()
    pair = [start(f"localhost:{port},2,{i}", two) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert "Best cells (chosen and scored" in said[0] and "Best cells" not in said[1], "one report"

    assert all("REFUSED" in text and "holds this run already: add --resume" in text for text in said), said

    read = lambda folder, name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for was, now in zip(read(one, "items.jsonl"), read(two, "items.jsonl"), strict=True):
        assert (was["index"], was["prompt_a"], was.get("control")) == (
            now["index"],
            now["prompt_a"],
            now.get("control"),
        )
        # Another item is one of the same process.
        assert was.get("control") == "other" or was["written"] == now["written"]
    was, now = read(one, "play.jsonl")[1], read(two, "play.jsonl")[1]
    assert (was["protocol"], was["control"], now.pop("processes")) == ("activation", None, 2)
    del was["seconds"], now["seconds"]
    assert was.keys() == now.keys() and was["choice_accuracy"] > 0.2
    for key, value in was.items():
        assert now[key] == (pytest.approx(value, rel=1e-4, abs=5e-4) if isinstance(value, float) else value), key
    assert pq.read_table(one / "sweep" / "results.parquet") == pq.read_table(two / "sweep" / "results.parquet")
    assert (one / "sweep" / "report.txt").read_text() == (two / "sweep" / "report.txt").read_text()
    assert len(list((two / "sweep" / "chunks").iterdir())) > 2, "several chunks, or nothing was shared"


@pytest.mark.parametrize("cluster", ["here", "localhost:1", "localhost,2,0", "localhost:1,2,2", "localhost:1,x,0"])
def test_a_cluster_that_is_none_is_one_clear_line(cluster, tmp_path):
    for command in (
        Play(a="pair:b", b="pair:b", k=4, j=1, cluster=cluster),
        Sweep(a="pair:b", b="pair:b", out=tmp_path, cluster=cluster),
    ):
        with pytest.raises(ValueError, match="give auto, or HOST:PORT,COUNT,INDEX"):
            command.run()


def test_where_one_process_fails_all_end_with_its_line(monkeypatch):
    def fail():
        raise NotADirectoryError("runs is a file")

    with pytest.raises(NotADirectoryError, match="runs is a file"):
        processes.agreed(fail)
    assert processes.agreed(lambda: 3) == 3
    monkeypatch.setattr(processes, "together", lambda own: ["runs is a file", *own])
    with pytest.raises(ValueError, match="runs is a file"):
        processes.agreed(lambda: 3)


def test_one_process_alone_does_everything():
    assert processes.first() and processes.mine([3, 1, 2]) == [3, 1, 2] == processes.together([3, 1, 2])
