"""A stage of training: by transformers' Trainer, gone on with where it was cut off, and logged."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import flexkit
from flexkit.patching import get_patch
from flexkit.training.processes import processes
from flexkit.visual_search.recipe import Stage

__all__ = ["Budgets", "Run"]


@dataclass(frozen=True)
class Run:
    """One stage, as it is trained.

    Attributes
    ----------
    folder : pathlib.Path
        Gets a folder of this stage's name.
    name : str
        Of the stage.
    stage : Stage
        How it is trained.
    seed : int
        Of weights, scenes and questions.
    workers : int
        Processes that draw scenes; 0 draws in between.
    quiet : bool
        Without progress bars.
    """

    folder: Path
    name: str
    stage: Stage
    seed: int
    workers: int
    quiet: bool

    @property
    def own(self) -> Path:
        """The folder of the stage."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """Written last: a stage with a log is done."""
        return self.own / "log.json"

    def fit(
        self,
        model: nn.Module,
        dataset: Any,
        collator: Any,
        *callbacks: TrainerCallback,
        trainer: Callable[..., Trainer] = Trainer,
        **settings: Any,
    ) -> list[dict[str, float]]:
        """Train what in a model wants a gradient.

        Parameters
        ----------
        model : torch.nn.Module
            Whose call gives a loss, or of which the trainer knows one.
        dataset, collator
            Of its inputs.
        *callbacks : transformers.TrainerCallback
            Besides the usual ones.
        trainer : callable
            Makes the trainer.
        **settings
            Of :class:`transformers.TrainingArguments`, in place of what all stages have in common.

        Returns
        -------
        list of dict
            The losses on the way.
        """
        states = self.own / "checkpoints"
        arguments: dict[str, Any] = {
            "max_steps": self.stage.steps,
            "per_device_train_batch_size": max(1, self.stage.batch // processes().num_processes),
            "learning_rate": self.stage.learning_rate,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": self.stage.steps // 2},
            "warmup_steps": self.stage.steps // 10,
            "weight_decay": 0.05,
            "adam_beta2": 0.95,
            "logging_steps": 50,
            "save_steps": self.stage.save_steps,
            "save_total_limit": 1,
            "seed": self.seed,
            "data_seed": self.seed,
            "dataloader_num_workers": self.workers,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "disable_tqdm": self.quiet,
            "report_to": [],
        }
        training = trainer(
            model.train(),
            TrainingArguments(str(states), **arguments | settings),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=list(callbacks),
        )
        last = get_last_checkpoint(str(states)) if states.exists() else None
        if last is not None and isinstance(model, PreTrainedModel) and not flexkit.is_patched(model):
            # A Trainer takes tensors by their names in the file, which are those of older versions for many models.
            model.load_state_dict(type(model).from_pretrained(last).state_dict())
        training.train(resume_from_checkpoint=last)
        model.eval().cpu()
        return [entry for entry in training.state.log_history if "loss" in entry]

    def finish(self, write: Callable[[Path], None], history: list[dict[str, float]]) -> None:
        """Write what was trained, and then the log.

        Parameters
        ----------
        write : callable
            Takes the folder of the stage.
        history : list of dict
            What :meth:`fit` gave.
        """
        state = processes()
        if state.is_main_process:
            write(self.own)
            shutil.rmtree(self.own / "checkpoints", ignore_errors=True)
            log = {"seed": self.seed, **asdict(self.stage), "history": history}
            self.log.write_text(json.dumps(log, indent=1) + "\n")
        state.wait_for_everyone()


@dataclass
class Budgets(TrainerCallback):
    """Read more or less from step to step: a model that always read as much is lost when that changes.

    Attributes
    ----------
    budgets : sequence of int
        For each step, one is drawn of these: how many cells a layer reads.
    seed : int
        Of the draws.
    """

    budgets: Sequence[int]
    seed: int

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.own: Any = get_patch(model).config.policy

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        budget = np.random.default_rng([self.seed, state.global_step]).choice(self.budgets)
        flexkit.set_policy(model, flexkit.TopK(int(budget)))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        flexkit.set_policy(model, self.own)
