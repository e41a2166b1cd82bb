"""Patches of images, with the place of each patch."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.patching.geometry.anysize import AnySize
from flexkit.zoom import Pair

__all__ = ["PositionedPatches"]


class PositionedPatches(AnySize):
    """Patches ``(images, patches, width)`` padded to the longest, with (column, row) of each patch (Gemma 4)."""

    inputs = ("pixel_values", "image_position_ids")
    size_input = "image_position_ids"

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Pair]:
        pixels, places = inputs["pixel_values"], inputs["image_position_ids"]
        if pixels.ndim != 3 or places.shape != (*pixels.shape[:2], 2):
            raise HighResInputError(
                f"hd_pixel_values has shape {tuple(pixels.shape)} and hd_image_position_ids {tuple(places.shape)}; "
                "expected (images, patches, width) and (images, patches, 2)."
            )
        return [_size(image) for image in places]


def _size(places: Tensor) -> Pair:
    """Rows and columns of patches that lie row by row, in front of padding at (-1, -1)."""
    count = int((places >= 0).all(-1).sum())
    columns, rows = (places.amax(0) + 1).tolist()
    raster = torch.arange(count, device=places.device)
    expected = torch.stack([raster % max(columns, 1), raster // max(columns, 1)], dim=-1)
    if not count or count != rows * columns or not torch.equal(places[:count].long(), expected):
        raise HighResInputError(
            f"hd_image_position_ids has an image of {count} patches in {rows} rows and {columns} columns; expected "
            "(column, row) of every patch, row by row, and (-1, -1) for the padding behind them."
        )
    return rows, columns
