"""The command `jaxcomm`, also as `python -m jaxcomm.evals`."""

import sys


def main() -> None:
    """Runs the command line. If a package is missing, one line on stderr says how to install it."""
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
