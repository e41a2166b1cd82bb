"""Patches of images, with the rows and columns of each."""

import math
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.patching.geometry.anysize import AnySize, read_sizes
from flexkit.zoom import Pair

__all__ = ["ListedPatches", "PaddedPatches"]


class PaddedPatches(AnySize):
    """Patches ``(images, patches, width)`` padded to the longest, the shape of each image, and a mask (LFM2-VL)."""

    inputs = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    size_input = "spatial_shapes"

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Pair]:
        pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
        sizes = read_sizes(self.size_input, inputs["spatial_shapes"])
        counts = [math.prod(size) for size in sizes]
        if pixels.ndim != 3 or pixels.shape[:2] != mask.shape or mask.sum(-1).tolist() != counts:
            raise HighResInputError(
                f"hd_spatial_shapes {sizes} asks for {counts} patches; hd_pixel_values has shape {tuple(pixels.shape)} "
                f"and hd_pixel_attention_mask {tuple(mask.shape)} keeps {mask.sum(-1).tolist()}."
            )
        return sizes


class ListedPatches(AnySize):
    """Patches ``(patches, width)`` of all images in one list, and the shape of each image (Nemotron-H Omni)."""

    inputs = ("pixel_values", "image_grid_hw")
    size_input = "image_grid_hw"

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Pair]:
        pixels, sizes = inputs["pixel_values"], read_sizes(self.size_input, inputs["image_grid_hw"])
        if pixels.ndim != 2 or len(pixels) != sum(math.prod(size) for size in sizes):
            raise HighResInputError(
                f"hd_image_grid_hw {sizes} does not add up to the patches of hd_pixel_values, whose shape is "
                f"{tuple(pixels.shape)}."
            )
        return sizes
