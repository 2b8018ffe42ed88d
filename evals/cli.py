"""The command line: `jaxcomm demo | play | read | sweep | select | study | eval | report | cost | fit-map | monitor | lmnet | bridge | convert | train-pair`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from .commands.bridge import Bridge
from .commands.convert import Convert
from .commands.evaluate import Eval
from .commands.fit_map import FitMap
from .commands.lmnet import Lmnet
from .commands.monitor import Monitor
from .commands.pair import Demo, TrainPair
from .commands.play import Play
from .commands.read import Read
from .commands.report import Cost, Report
from .commands.select import Select
from .commands.study import Study
from .commands.sweep import Sweep

COMMANDS = (
    Demo,
    Play,
    Read,
    Sweep,
    Select,
    Study,
    Eval,
    Report,
    Cost,
    FitMap,
    Monitor,
    Lmnet,
    Bridge,
    Convert,
    TrainPair,
)

if TYPE_CHECKING:
    Command = Any
else:
    Command = Union[tuple(Annotated[kind, tyro.conf.subcommand(kind.typed)] for kind in COMMANDS)]  # noqa: UP007


def prepare(
    command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Command]],
    keep_programs: bool = True,
) -> Command:
    """Language models that communicate through activations.

    Args:
        command: What to do.
        keep_programs: Keep compiled programs for later commands, in the user's cache folder or in the folder that JAXCOMM_PROGRAMS names (JAXCOMM_PROGRAMS=off: do not keep them).
    """
    if keep_programs:
        from . import programs

        programs.keep()
    return command


def check_outputs(command: Any) -> None:
    """Checks that a command writes to local paths only.

    Args:
        command: The command.

    Raises:
        ValueError: A path is not local (`files.check_local`).
    """
    from .files import check_local

    asked = command.do if isinstance(command, Lmnet | Bridge) else command
    for name in ("out", "json", "items"):
        if (path := getattr(asked, name, None)) is not None:
            check_local(path)


def main() -> None:
    """Runs the command line.

    The exit status is 0. After an error it is 2, and one line on stderr says what is wrong and how to fix it.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else transformers advises to install torch
    command = tyro.cli(prepare, prog="jaxcomm")
    try:
        check_outputs(command)
        command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"jaxcomm: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
