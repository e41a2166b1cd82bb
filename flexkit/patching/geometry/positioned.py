"""Patches of images, with the place of each patch."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.anysize import AnySize

__all__ = ["PositionedPatches"]


class PositionedPatches(AnySize):
    """Patches ``(images, patches, width)`` padded to the longest, with (column, row) of each patch (Gemma 4)."""

    inputs = ("pixel_values", "image_position_ids")
    size_input = "image_position_ids"

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {
            "pixel_values": Declared(("images", "patches", ...)),
            "image_position_ids": Declared(("images", "places", 2), "integers", "(column, row) of each patch"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, places = inputs["pixel_values"], inputs["image_position_ids"]
        if places.shape[1] != pixels.shape[1]:
            raise HighResInputError(
                f"{prefix}pixel_values has shape {tuple(pixels.shape)} and {prefix}image_position_ids "
                f"{tuple(places.shape)}; expected (images, patches, width) and (images, patches, 2)."
            )
        return [_size(f"{prefix}image_position_ids", image) for image in places]


def _size(name: str, places: Tensor) -> Pair:
    """Rows and columns of patches that lie row by row, in front of padding at (-1, -1)."""
    count = int((places >= 0).all(-1).sum())
    columns, rows = (places.amax(0) + 1).tolist()
    raster = torch.arange(count, device=places.device)
    expected = torch.stack([raster % max(columns, 1), raster // max(columns, 1)], dim=-1)
    if not count or count != rows * columns or not torch.equal(places[:count].long(), expected):
        raise HighResInputError(
            f"{name} has an image of {count} patches in {rows} rows and {columns} columns; expected "
            "(column, row) of every patch, row by row, and (-1, -1) for the padding behind them."
        )
    return rows, columns
