"""Patches of all images in one list, with the time, rows and columns of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.patching.geometry.anysize import AnySize
from flexkit.patching.geometry.features import image_features
from flexkit.zoom import Pair

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

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Pair]:
        patches, grids = inputs["pixel_values"], inputs["image_grid_thw"]
        if grids.ndim != 2 or grids.shape[-1] != 3 or grids.is_floating_point() or bool((grids < 1).any()):
            raise HighResInputError(
                f"hd_image_grid_thw is {grids.tolist()}; expected positive integers, (time, rows, columns) each."
            )
        if patches.ndim < 2 or int(grids.prod(-1).sum()) != len(patches):
            raise HighResInputError(
                f"hd_image_grid_thw {grids.tolist()} does not add up to the patches of hd_pixel_values, whose shape is "
                f"{tuple(patches.shape)}."
            )
        if bool((grids[:, 0] > 1).any()):
            raise HighResInputError(
                f"hd_image_grid_thw is {grids.tolist()}; expected one frame in time for each image."
            )
        return [(rows, columns) for _, rows, columns in grids.tolist()]

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

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Pair]:
        """``(rows, columns)`` of every image, in cells."""
        patches, merges = super().sizes(model, inputs), inputs["image_merge_sizes"].flatten().tolist()
        divides = [
            not rows % side and not columns % side for (rows, columns), side in zip(patches, merges, strict=False)
        ]
        if len(merges) != len(patches) or not all(divides):
            raise HighResInputError(
                f"hd_image_merge_sizes is {merges}; expected one number for each image that divides its rows and "
                f"columns, {patches} patches."
            )
        return [(rows // side, columns // side) for (rows, columns), side in zip(patches, merges, strict=True)]
