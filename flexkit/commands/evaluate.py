"""``flexkit eval``."""

import argparse
import json
from pathlib import Path

from flexkit.commands.options import BENCHMARKS, Subparsers, add_debug, needs, whole
from flexkit.visual_search.questions import TRACKS
from flexkit.visual_search.scene import SIZE
from flexkit.visual_search.weights import READERS, WEIGHTS

__all__ = ["add_eval"]


def add_eval(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="score the small model on fresh scenes, by every way of looking",
        description="Rows of the table: low_res, the base model; flexkit, as it was trained; topk to center, other "
        "policies; everything selected; oracle, the cells around the digit; all_in_sequence, all high-res tokens in "
        "the prompt.",
        epilog="examples: flexkit eval visual-search --questions 200; flexkit eval visual-search --json",
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="S", help="of the scenes")
    parser.add_argument(
        "--questions", type=whole(1, 10**6), default=500, metavar="N", help="of each track; default: %(default)s"
    )
    parser.add_argument(
        "--track",
        action="append",
        choices=READERS,
        help="only this one; may be given several times; default: all but choices, which asks for letters of options",
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, metavar="FOLDER", help="default: those of flexkit")
    parser.add_argument(
        "--size", type=whole(168, 4032), default=SIZE, metavar="PX", help="side of the pictures; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but an object by track and way")
    add_debug(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    needs("accelerate")
    from flexkit.visual_search.evaluation import evaluate
    from flexkit.visual_search.report import table

    scores = evaluate(
        options.seed,
        options.questions,
        weights=options.weights,
        tracks=options.track or TRACKS,
        size=options.size,
        quiet=options.json,
    )
    if scores is not None:
        print(json.dumps(scores, indent=2) if options.json else table(scores))
