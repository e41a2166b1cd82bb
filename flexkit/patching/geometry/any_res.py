"""Towers that cut an image into an overview and tiles of its own, and count both by the image's size."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkit.patching.geometry.fixed import FixedGrid

__all__ = ["AnyRes"]


class AnyRes(FixedGrid):
    """An overview, tiles, and a newline token behind (LLaVA-NeXT); the prompt carries the overview only.

    While it is patched, the model takes overviews without tiles, too: ``pixel_values`` ``(images, 1, channels, height,
    width)``, whatever ``image_sizes`` say.
    """

    def methods(self, model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
        yield model.model, "get_image_features", get_image_features


def get_image_features(self: Any, pixel_values: Tensor, *args: Any, **options: Any) -> Any:
    """``get_image_features`` of a patched model, which takes overviews too."""
    if pixel_values.ndim == 5 and pixel_values.shape[1] == 1:
        self, config = copy.copy(self), copy.copy(self.config)
        config.image_grid_pinpoints = [[0, 0]]  # the model counts an overview, and the tiles that fit in here
        self.config = config
    return type(self).get_image_features(self, pixel_values, *args, **options)
