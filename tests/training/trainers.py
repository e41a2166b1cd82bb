"""Trainers with the settings that the tests of this folder share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.training.stripes import joined


def trainer_for(model: Any, rows: Any, folder: Path, **settings: Any) -> Trainer:
    """A Trainer that runs on the CPU and tells nobody; its arguments may be changed by name."""
    callbacks = settings.pop("callbacks", None)
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "adam_beta2": 0.95,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(**(arguments | settings)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=joined,
        callbacks=callbacks,
    )


def losses_of(trainer: Trainer) -> Tensor:
    """The loss of every step."""
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
