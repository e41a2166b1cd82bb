"""The command line: ``flexkit demo``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import flexkit
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
        _demo(options)
    except FlexkitError as error:
        if options.debug:
            raise
        print(f"flexkit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    from flexkit.demo.run import run

    run(options.image, options.question, options.output, options.new_tokens, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flexkit", description=flexkit.__doc__)
    parser.add_argument("--version", action="version", version=f"flexkit {flexkit.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    demo = commands.add_parser("demo", help="ask a small model about a picture, see where it looks and what that costs")
    demo.add_argument("--image", type=Path, metavar="PATH", help="a picture (default: one is drawn)")
    demo.add_argument("--question", metavar="TEXT", help="what to ask about it")
    demo.add_argument(
        "--output", type=Path, default=Path("flexkit-demo"), metavar="FOLDER", help="default: %(default)s"
    )
    demo.add_argument("--new-tokens", type=_whole(1, 512), default=8, metavar="N", help="length of the answer")
    demo.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, metavar="S", help="of weights and drawn picture")
    demo.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _whole(least: int, most: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return whole


if __name__ == "__main__":
    sys.exit(main())
