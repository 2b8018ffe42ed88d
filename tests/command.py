"""The command line in process: what it says, and what it refuses."""

import pytest

from jaxcomm.evals import cli


def jaxcomm(*words) -> None:
    cli.main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stopped:
        jaxcomm(*words)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("jaxcomm: ") and line.count("\n") == 1, line
    return line
