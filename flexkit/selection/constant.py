"""The two ends: every cell, and none."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.selection.policy import Policy


@dataclass(frozen=True)
class Everything(Policy):
    """Select every cell: full attention over the high-res view."""

    uses_scores = False

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)


@dataclass(frozen=True)
class Nothing(Policy):
    """Select no cell: the base model."""

    uses_scores = False

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool)
