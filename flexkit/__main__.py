"""The command line: ``flexkit``."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

import flexkit
from flexkit.commands import COMMANDS
from flexkit.errors import FlexkitError

__all__ = ["main"]

_INTERRUPTED, _NOBODY_READS = 130, 141
"""What a shell gives for a process that Ctrl-C, or a pipe that nobody reads from any more, has ended."""


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
        0, or 2 if what was asked for cannot be done; 130 if Ctrl-C ended it, 141 if what reads its output did.

    Raises
    ------
    SystemExit
        For ``--help``, ``--version`` and arguments that cannot be parsed.
    FlexkitError or OSError
        With ``--debug``, in place of the exit code 2.
    """
    options = argparse.Namespace(debug=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files need be no text, and terminals cannot show all there is
            stream.reconfigure(errors="backslashreplace")
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be told as an error when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS
    except (FlexkitError, OSError) as error:
        if options.debug:
            raise
        print(f"flexkit: {_in_options(' '.join(str(error).split()), options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flexkit", description=flexkit.__doc__)
    parser.add_argument("--version", action="version", version=f"flexkit {flexkit.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for add in COMMANDS:
        add(commands)
    return parser


def _in_options(message: str, options: argparse.Namespace) -> str:
    """What a function calls ``image_size``, or ``selected=``, as it is typed: ``--image-size``, ``--selected``."""
    for name in vars(options):
        end = r"(?!\w|\.\w)" if "_" in name else "="
        message = re.sub(rf"(?<![\w./'\"-]){name}{end}", f"--{name.replace('_', '-')}", message)
    return message


if __name__ == "__main__":
    sys.exit(main())
