"""Training a model on conversations, by transformers' Trainer."""

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from flexkit.errors import ConfigError
from flexkit.patching import FlexConfig, flex_parameters, is_patched, patch_model
from flexkit.processing import FlexProcessor
from flexkit.training.collator import ConversationCollator
from flexkit.training.dataset import ConversationDataset
from flexkit.training.processes import alone, processes
from flexkit.training.ramp import AlphaRamp
from flexkit.training.weights import trainable
from flexkit.writing import writing

__all__ = ["train"]

CHECKPOINTS = "checkpoints"
_RATES = {"added": 1e-4, "lora": 1e-4, "all": 2e-5}


def train(
    model: Any,
    processor: Any,
    dataset: ConversationDataset,
    output: str | PathLike[str],
    *,
    weights: Literal["added", "lora", "all"] = "added",
    rank: int = 16,
    config: FlexConfig | None = None,
    eval_dataset: ConversationDataset | None = None,
    chat_template: str | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Any:
    """Train a model on conversations, and save it with its processor.

    Several processes (``accelerate launch``) share each batch. A training that was stopped goes on from its last
    checkpoint as if it had not been.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Is patched if it is not yet; projections that this adds are moved to within the first tenth of the steps
        (:class:`AlphaRamp`).
    processor : transformers.ProcessorMixin
        Of the model.
    dataset : ConversationDataset
        What to train on.
    output : str or os.PathLike
        A folder, for checkpoints and for the trained model, which :func:`flexkit.from_pretrained` loads.
    weights, rank
        As for :func:`trainable`.
    config : FlexConfig, optional
        How a model that is not patched yet selects and reads; by default ``FlexConfig.published()``.
    eval_dataset : ConversationDataset, optional
        Its loss is noted on the way.
    chat_template : str, optional
        As for :class:`ConversationCollator`.
    resume : bool
        Go on from the last checkpoint in the folder, if there is one.
    callbacks : sequence of transformers.TrainerCallback
        Besides the usual ones.
    **arguments
        Of :class:`transformers.TrainingArguments`, in the place of the defaults here: one epoch, a cosine schedule with
        a warm-up of 3 %, and a learning rate of 1e-4, or 2e-5 for all weights.

    Returns
    -------
    transformers.PreTrainedModel
        The patched model, in eval mode, with adapters merged.

    Raises
    ------
    ConfigError
        If the folder cannot be written, another training writes to it, it has checkpoints and nobody asked to resume,
        or settings contradict each other.
    DataError
        If a sample cannot be used, and the dataset does not skip such samples.
    """
    output = Path(output)
    checkpoints = output / CHECKPOINTS
    _check_reports(arguments.get("report_to"))
    state = processes()
    with writing(output):
        checkpoints.mkdir(parents=True, exist_ok=True)
    last = get_last_checkpoint(str(checkpoints))
    if last is not None and not resume:
        raise ConfigError(f"{output} has checkpoints of a training: resume it, or give another folder.")
    with alone(checkpoints):  # the output itself is held while it is written
        ramp = not is_patched(model)
        if ramp:
            patch_model(model, config or FlexConfig.published(), trained=True)
        elif config is not None:
            raise ConfigError("config is of models that are not patched; this one keeps its own settings.")
        dtype = model.dtype
        added = ramp and any(True for _ in flex_parameters(model))
        wrapped = trainable(model, weights, rank=rank)
        both = FlexProcessor(processor, model)
        trainer = Trainer(
            wrapped.train(),
            TrainingArguments(str(checkpoints), **_defaults(weights, eval_dataset is not None) | arguments),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=ConversationCollator(both, chat_template=chat_template),
            callbacks=[*([AlphaRamp()] if added else []), *callbacks],
        )
        trainer.train(resume_from_checkpoint=last)
        trained = wrapped.merge_and_unload() if weights == "lora" else model
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        trained.eval().save_pretrained(output, is_main_process=state.is_main_process)
        if state.is_main_process:
            both.save_pretrained(output)
        for part in filter(None, (dataset, eval_dataset)):
            _share_counts(trainer, part)
        state.wait_for_everyone()
    return trained


def _defaults(weights: str, evaluates: bool) -> dict[str, Any]:
    return {
        "num_train_epochs": 1,
        "learning_rate": _RATES[weights],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 1,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": 500,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "ddp_find_unused_parameters": weights == "all",  # many a base model has layers that it does not use
        "use_cpu": not torch.accelerator.is_available(),  # bfloat16 is refused there, unless it is meant
        "remove_unused_columns": False,  # the collator reads what no forward takes
        "label_names": ["labels"],
        "report_to": [],
    }


def _share_counts(trainer: Trainer, dataset: ConversationDataset) -> None:
    """What any process found to be unusable, all know."""
    found = trainer.accelerator.reduce(dataset.unusable.to(trainer.accelerator.device, torch.int32), "sum")
    dataset.unusable.copy_((found > 0).cpu())


def _check_reports(names: Any) -> None:
    wanted = [names] if isinstance(names, str) else names or []
    if "tensorboard" in wanted and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise ConfigError("report_to tensorboard needs it: pip install 'flexkit-vlm[tensorboard]'")
