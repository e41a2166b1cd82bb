"""``flexkit trace``."""

import argparse
from pathlib import Path

from flexkit.commands.options import Subparsers, above_zero, add_debug, whole
from flexkit.commands.waiting import waiting
from flexkit.errors import ConfigError

__all__ = ["add_trace"]


def add_trace(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "trace",
        help="ask a model about a picture or a video, and write a page that shows where it looked for each word",
        epilog='examples: flexkit trace photo.jpg "What does the sign say?" --model llava-hf/llava-1.5-7b-hf; '
        'flexkit trace scene.png "Which digit is on the object that is yellow?"; '
        'flexkit trace holiday.mp4 "Who waves?" --model Qwen/Qwen2.5-VL-3B-Instruct --num-frames 16',
    )
    parser.add_argument("file", type=Path, help="a picture, a video, or a folder of pictures that are its frames")
    parser.add_argument("question", help="about it")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a folder or hub id, of a base model or a patched one that was saved; default: the small model that "
        "flexkit is shipped with",
    )
    parser.add_argument(
        "--added",
        metavar="NAME",
        help="what flexkit.save_flex wrote for --model; default: a base model reads without trained projections",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("flexkit-trace.html"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--new-tokens", type=whole(1, 10**4), default=32, metavar="N", help="default: %(default)s")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--num-frames", type=whole(1, 10**6), metavar="N", help="of a video, at most in the sequence; default: 8"
    )
    frames.add_argument("--fps", type=above_zero, metavar="N", help="as many a second, if the model's processor can")
    parser.add_argument("--frame-rate", type=above_zero, metavar="N", help="of a folder: frames a second")
    add_debug(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.added is not None and options.model is None:
        raise ConfigError("--added goes with --model: say to which model it was added.")
    from flexkit.demo.looking import look

    with waiting("looking"):
        answer, shut = look(
            options.file,
            options.question,
            options.output,
            options.model,
            options.added,
            options.new_tokens,
            num_frames=options.num_frames,
            fps=options.fps,
            frame_rate=options.frame_rate,
        )
    print(f"{answer}\n")
    if shut:
        print(f"Nothing was read for {shut} tokens: the low-res answer was certain, and the gate stayed shut.\n")
    print(f"Where it looked: {options.output}")
