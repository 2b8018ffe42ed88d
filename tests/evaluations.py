"""Evaluations in process: local records, runs, and the answers that runs keep."""

import pyarrow.parquet as pq

from jaxcomm.evals.evaluation.arms import Team
from jaxcomm.evals.evaluation.run import run as evaluate
from jaxcomm.evals.tasks import HERE

SAMPLE = HERE / "sample"


def run(asked, b, out, a=None, **how):
    how = dict(resume=False, command="jaxcomm eval", recorded={}) | how
    return evaluate(asked, Team(b if a is None else a, b), out, **how)


def items(path):
    return pq.read_table(path / "items.parquet").to_pylist()
