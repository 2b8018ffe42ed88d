"""The command `jaxcomm`, also as `python -m jaxcomm.evals`."""

import sys


def main() -> None:
    """Runs a command; without what commands need beside the library, says in one line how to get it."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxcomm"):
            raise
        print(f"jaxcomm: the command line needs {error.name}: pip install 'jaxcomm[cli]'", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
