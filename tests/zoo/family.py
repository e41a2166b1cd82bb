"""What the zoo says of a kind of model: how a tiny one is built, and how images enter its prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as HEADS

VOCABULARY, PAD = 96, 0
IMAGE, VIDEO, START, END = 90, 91, 92, 93
"""Ids of the special tokens: a placeholder for one image or video token, and what stands around an image."""

Grid = tuple[int, int]
Views = Callable[[Any, Grid, Grid], dict[str, Tensor]]
"""Config, low-res grid and zoom of one image, to the inputs that show it; images are joined along the first axis."""


def bare(grid: Grid) -> list[int]:
    """One token for each cell, between the marks of an image."""
    return [START, *[IMAGE] * (grid[0] * grid[1]), END]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    ``name`` is its model type, or that and what is special, behind a hyphen.
    """

    name: str
    config: Callable[[], tf.PreTrainedConfig]
    high_res: Views
    """The high-res view, without the prefix of its names."""
    low_res: Views | None = None
    """What the base model gets; by default the high-res view at zoom 1."""
    grid: Grid = (3, 3)
    """Low-res cells of an image, unless a prompt says otherwise."""
    any_grid: bool = False
    """Whether a prompt may say otherwise."""
    tokens: Callable[[Grid], list[int]] = bare
    """The ids that stand for one image in a prompt."""

    def model(self, seed: int = 0) -> tf.PreTrainedModel:
        """A model in eval mode, float64: exact enough to compare different orders of summation."""
        torch.manual_seed(seed)
        model = self.model_class(self.config()).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # the default initialisation hardly attends to anything
                    parameter.normal_(0, 0.3)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
        return model

    @property
    def model_class(self) -> Any:
        """The class with the head that generates."""
        return getattr(tf, HEADS[self.config().model_type])

    def views(self, config: Any, grids: Sequence[Grid], zoom: Grid | None = None) -> dict[str, Tensor]:
        """Inputs of all images: those of the base model, or with a zoom those of the high-res view."""
        make = self.high_res if zoom or self.low_res is None else self.low_res
        parts = [make(config, grid, zoom or (1, 1)) for grid in grids]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
