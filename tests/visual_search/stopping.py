"""Trainings that are cut off."""

from typing import Any

import pytest
import torch
from transformers import Trainer


class StoppedError(Exception):
    """A training was cut off."""


def stop_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that trainings take from now on; the first is cut off by :class:`StoppedError` in its third."""
    taken: list[int] = []
    training_step = Trainer.training_step

    def step(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        taken.append(self.state.global_step)
        if taken == [0, 1, 2]:
            raise StoppedError
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", step)
    return taken
