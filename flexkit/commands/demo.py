"""``flexkit demo``."""

import argparse
from pathlib import Path

from flexkit.commands.options import Subparsers, add_debug, whole

__all__ = ["add_demo"]


def add_demo(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="ask a small model about a picture, see where it looks and what that costs",
        epilog='examples: flexkit demo; flexkit demo --image photo.jpg --question "In which row is it?"',
    )
    parser.add_argument("--image", type=Path, metavar="PATH", help="a picture (default: one is drawn)")
    parser.add_argument("--question", metavar="TEXT", help="what to ask about it")
    parser.add_argument(
        "--output", type=Path, default=Path("flexkit-demo"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="S", help="of the drawn picture")
    add_debug(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from flexkit.demo.run import run

    run(options.image, options.question, options.output, options.seed)
