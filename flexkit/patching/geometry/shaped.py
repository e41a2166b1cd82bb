"""Patches of images, with the rows and columns of each."""

import math
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.anysize import SIZES, AnySize, pairs

__all__ = ["ListedPatches", "PaddedPatches"]


class PaddedPatches(AnySize):
    """Patches ``(images, patches, width)`` padded to the longest, the shape of each image, and a mask (LFM2-VL)."""

    inputs = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    size_input = "spatial_shapes"

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {
            "pixel_values": Declared(("images", "patches", ...)),
            "spatial_shapes": SIZES,
            "pixel_attention_mask": Declared(("images", "length"), "mask"),
        }

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
        sizes = pairs(inputs["spatial_shapes"])
        counts = [math.prod(size) for size in sizes]
        if pixels.shape[:2] != mask.shape or mask.sum(-1).tolist() != counts:
            raise HighResInputError(
                f"{prefix}spatial_shapes {sizes} asks for {counts} patches; {prefix}pixel_values has shape "
                f"{tuple(pixels.shape)} and {prefix}pixel_attention_mask {tuple(mask.shape)} keeps "
                f"{mask.sum(-1).tolist()}."
            )
        return sizes


class ListedPatches(AnySize):
    """Patches ``(patches, width)`` of all images in one list, and the shape of each image (Nemotron-H Omni)."""

    inputs = ("pixel_values", "image_grid_hw")
    size_input = "image_grid_hw"

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {"pixel_values": Declared(("patches", ...)), "image_grid_hw": SIZES}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, sizes = inputs["pixel_values"], pairs(inputs["image_grid_hw"])
        if len(pixels) != sum(math.prod(size) for size in sizes):
            raise HighResInputError(
                f"{prefix}image_grid_hw {sizes} does not add up to the patches of {prefix}pixel_values, whose shape is "
                f"{tuple(pixels.shape)}."
            )
        return sizes
