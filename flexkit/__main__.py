"""The command line: ``flexkit``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import flexkit
from flexkit.commands import COMMANDS
from flexkit.errors import FlexkitError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of ``flexkit``.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0, or 2 if what was asked for cannot be done.

    Raises
    ------
    SystemExit
        For ``--help``, ``--version`` and arguments that cannot be parsed.
    FlexkitError
        With ``--debug``, in place of the exit code 2.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except FlexkitError as error:
        if options.debug:
            raise
        print(f"flexkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flexkit", description=flexkit.__doc__)
    parser.add_argument("--version", action="version", version=f"flexkit {flexkit.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
