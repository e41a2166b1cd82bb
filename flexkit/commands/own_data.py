"""What ``flexkit train --data`` takes and does: any model, trained on conversations of one's own."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from flexkit.commands.options import above_zero, needs, whole
from flexkit.errors import ConfigError

__all__ = ["add_own_data", "train_own_data"]


def add_own_data(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser; all but ``--data`` are None or False where they are not given.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Or a group of one.
    """
    add = parser.add_argument
    add("--data", type=Path, nargs="+", metavar="FILE", help="conversations as LLaVA has them, JSON or JSON lines")
    add("--repeats", type=above_zero, nargs="+", metavar="N", help="how often an epoch has each file; default: 1")
    add("--images", type=Path, metavar="DIR", help="where paths of images start; default: the folder of each file")
    add("--eval-data", type=Path, nargs="+", metavar="FILE", help="whose loss is noted on the way")
    add("--on-broken", choices=("raise", "skip"), help="what to do with samples that cannot be used; default: raise")
    add("--model", metavar="NAME", help="a folder or hub id; a patched model that was saved keeps its settings")
    add("--train", choices=("added", "lora", "all"), help="the added projections alone (default), LoRA, or everything")
    add("--rank", type=whole(1, 4096), metavar="R", help="of LoRA; default: 16")
    add("--preset", choices=("published", "training-free"), help="how it selects and reads; default: published")
    add("--start-layer", type=_layer, metavar="N", help="the first layer that reads; probe: ask the model and the data")
    add("--zoom", type=whole(1, 64), metavar="N", help="side of the high-res view over the low-res view")
    add("--added", metavar="NAME", help="go on from what flexkit.save_flex wrote, with its settings")
    add("--chat-template", type=Path, metavar="FILE", help="in the place of the processor's")
    add("--max-length", type=whole(1, 10**7), metavar="N", help="tokens of a sample, without the turns behind that")
    add("--epochs", type=above_zero, metavar="N", help="default: 1")
    add("--max-steps", type=whole(1, 10**9), metavar="N", help="in the place of epochs")
    add("--batch", type=whole(1, 10**6), metavar="N", help="samples a step and process; default: 8")
    add("--accumulate", type=whole(1, 10**6), metavar="N", help="batches a step; default: 1")
    add("--learning-rate", type=above_zero, metavar="RATE", help="default: 1e-4, and 2e-5 for all")
    add("--save-steps", type=whole(1, 10**9), metavar="N", help="steps between checkpoints; default: 500")
    add("--eval-steps", type=whole(1, 10**9), metavar="N", help="steps between evaluations; default: 500")
    add("--bf16", action="store_true", help="compute in bfloat16; what is trained stays in float32")
    add("--gradient-checkpointing", action="store_true", help="trade time for memory")
    add("--report-to", metavar="NAME", help="tensorboard, wandb and others; default: nobody")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output, if there is one")


def train_own_data(options: argparse.Namespace) -> None:
    """Train, and print what came of it.

    Parameters
    ----------
    options : argparse.Namespace
        As they were parsed.

    Raises
    ------
    FlexkitError
        If options do not go together, or a model or data cannot be used.
    """
    if options.model is None:
        raise ConfigError("--data goes with --model: say which model is to be trained.")
    if options.train == "lora":
        needs("peft")
    import torch

    import flexkit
    from flexkit.checkpoints.pretrained import load_as_saved
    from flexkit.training import ConversationCollator, ConversationDataset, train
    from flexkit.training.processes import processes

    template = None if options.chat_template is None else _text(options.chat_template)
    on_error: Any = options.on_broken or "raise"
    dataset = ConversationDataset(
        options.data, options.images, repeats=options.repeats, on_error=on_error, seed=options.seed
    )
    evaluated = None
    if options.eval_data is not None:
        evaluated = ConversationDataset(options.eval_data, options.images, on_error=on_error)
    model, processor = load_as_saved(options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    if options.max_length is not None:
        collator = ConversationCollator(processor, chat_template=template)
        fits = partial(collator.shorten, max_length=options.max_length)
        dataset, evaluated = dataset.map(fits), evaluated and evaluated.map(fits)
    if options.added is not None:
        flexkit.load_flex(model, options.added)
    config = None if flexkit.is_patched(model) else _config(options, model, processor, dataset, template)
    for name in ("preset", "start_layer", "zoom"):
        if config is None and getattr(options, name) is not None:
            source = "--model" if options.added is None else "--added"
            raise ConfigError(f"{name}= stands in what {source} names, which is patched; leave it out.")
    train(
        model,
        processor,
        dataset,
        options.output,
        weights=options.train or "added",
        rank=options.rank or 16,
        config=config,
        eval_dataset=evaluated,
        chat_template=template,
        resume=options.resume,
        **_arguments(options),
    )
    if processes().is_main_process:
        for name, part in (("", dataset), ("of --eval-data ", evaluated)):
            if part is not None and part.skipped:
                print(f"samples {name}left out: {len(part.skipped)}", *part.skipped, sep="\n  ", file=sys.stderr)
        print(f"flexkit.from_pretrained({str(options.output)!r}) loads what was trained.")


def _config(options: argparse.Namespace, model: Any, processor: Any, dataset: Any, template: str | None) -> Any:
    """How a base model is to be patched."""
    from accelerate.utils import broadcast_object_list

    import flexkit
    from flexkit.training import choose_start_layer
    from flexkit.training.processes import processes

    preset = flexkit.FlexConfig.published
    if options.preset == "training-free":
        preset = flexkit.FlexConfig.training_free
    asked = options.start_layer == "probe"
    given = {"zoom": options.zoom, "start_layer": None if asked else options.start_layer}
    config = preset(**{name: value for name, value in given.items() if value is not None})
    if asked:
        model.to(processes().device)
        config, probe = choose_start_layer(model, processor, dataset, config, chat_template=template)
        # Rounding may tip the scales on one of several devices.
        [layer] = broadcast_object_list([config.start_layer])
        config = config.replace(start_layer=layer)
        if processes().is_main_process:
            _tell(probe, config)
    return config


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Of Trainer; what is not given keeps its default."""
    arguments = {
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": options.learning_rate,
        "save_steps": options.save_steps,
        "eval_steps": options.eval_steps,
        "bf16": options.bf16,
        "gradient_checkpointing": options.gradient_checkpointing or None,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "report_to": options.report_to,
        "seed": options.seed,
        "data_seed": options.seed,
        "dataloader_num_workers": options.workers,
        "disable_tqdm": options.quiet,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _tell(probe: Any, config: Any) -> None:
    from flexkit.training.start_layer import is_sure

    error = probe.gain_standard_errors[probe.layer]
    gain = probe.base_loss - probe.losses[probe.layer]
    found = f"layer {probe.layer} alone lowers the loss by {gain:.3g} ± {error:.2g} nats a label"
    if is_sure(probe):
        print(f"{found}: layers read from {config.start_layer} on.")
    else:
        print(
            f"{found}, which may be chance: the start layer stays the preset's. A few dozen samples about details help."
        )


def _layer(text: str) -> int | str:
    return text if text == "probe" else whole(0, 10**4)(text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
