"""Patches of all images in one list, with the time, rows and columns of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.anysize import AnySize
from flexkit.patching.geometry.features import image_features

__all__ = ["DynamicGrid", "LinedGrid", "MergedGrid"]


def _merge_size(config: Any) -> int:
    return int(config.vision_config.spatial_merge_size)


class DynamicGrid(AnySize):
    """Patches of all images in one list; some of them, a square, become one cell (Qwen2-VL, GLM-V, Kimi, ...).

    Parameters
    ----------
    cell : callable
        From the model's config to the side of one cell in patches.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    size_input = "image_grid_thw"

    def __init__(self, cell: Callable[[Any], int] = _merge_size) -> None:
        super().__init__(cell)

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {
            "pixel_values": Declared(("patches", ...)),
            "image_grid_thw": Declared(("images", 3), "sizes", "(time, rows, columns) each"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        patches, grids = inputs["pixel_values"], inputs["image_grid_thw"].tolist()
        if sum(math.prod(grid) for grid in grids) != len(patches):
            raise HighResInputError(
                f"{prefix}image_grid_thw {grids} does not add up to the patches of {prefix}pixel_values, whose shape "
                f"is {tuple(patches.shape)}."
            )
        if any(frames > 1 for frames, _, _ in grids):
            raise HighResInputError(f"{prefix}image_grid_thw is {grids}; expected one frame in time for each image.")
        return [(rows, columns) for _, rows, columns in grids]

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        # One tensor for all images, or one for each: that depends on the family.
        tokens = torch.cat(image_features(model, **{name: inputs[name] for name in self.inputs}))
        cells = [self.layout(model, (rows * zoom[0], columns * zoom[1])) for rows, columns in grids]
        features = torch.split(tokens, [len(kept) for kept in cells])
        return [image[kept.to(image.device)] for image, kept in zip(features, cells, strict=True)]


class LinedGrid(DynamicGrid):
    """A dynamic grid whose features, and image tokens, have one before the cells, one behind, one after each line."""

    def layout(self, model: PreTrainedModel, grid: Pair) -> Tensor:
        lines = (torch.arange(grid[1] + 1) < grid[1]).repeat(grid[0])
        return torch.nn.functional.pad(lines, (1, 1))


class MergedGrid(DynamicGrid):
    """A dynamic grid that says for each image how many patches a side become one cell (VideoLLaMA 3)."""

    inputs = ("pixel_values", "image_grid_thw", "image_merge_sizes")

    def __init__(self) -> None:
        super().__init__(lambda config: 1)

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {
            **super().declared(model, zoom),
            "image_merge_sizes": Declared(("images",), "sizes", "one for each image"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        """``(rows, columns)`` of every image, in cells."""
        patches, merges = super().sizes(model, inputs, prefix), inputs["image_merge_sizes"].tolist()
        divides = [
            not rows % side and not columns % side for (rows, columns), side in zip(patches, merges, strict=False)
        ]
        if len(merges) != len(patches) or not all(divides):
            raise HighResInputError(
                f"{prefix}image_merge_sizes is {merges}; expected one number for each image that divides its rows and "
                f"columns, {patches} patches."
            )
        return [(rows // side, columns // side) for (rows, columns), side in zip(patches, merges, strict=True)]
