"""The command line in process: what it says, and what it refuses."""

import sys

import pytest

from jaxcomm.evals import cli


def jaxcomm(*words) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxcomm", *map(str, words)])
        cli.main()


def refused(capsys, *words) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stopped:
        jaxcomm(*words)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("jaxcomm: ") and line.count("\n") == 1, line
    return line
