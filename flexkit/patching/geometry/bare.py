"""Patches of images and nothing that says how they lie: the high-res view adds the size of each image."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError
from flexkit.grids import Pair
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.anysize import SIZES, AnySize, pairs
from flexkit.patching.geometry.features import image_features

__all__ = ["BarePatches"]


class BarePatches(AnySize):
    """Patches of all images in one list, row by row, one for each image token (Fuyu, Inkling).

    Their models take the patches alone; ``image_sizes``, ``(height, width)`` of each image in pixels, comes with the
    high-res view only.
    """

    inputs = ("pixel_values", "image_sizes")
    size_input = "image_sizes"

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        return {"pixel_values": Declared(("patches", ...)), "image_sizes": SIZES}

    def sizes(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], prefix: str) -> list[Pair]:
        pixels, sizes = inputs["pixel_values"], pairs(inputs["image_sizes"])
        expected = sum(self._patches(model, sizes))
        if len(pixels) != expected:
            raise HighResInputError(
                f"{prefix}image_sizes {sizes} asks for {expected} patches of {self._cell(model.config)} pixels a side; "
                f"{prefix}pixel_values has shape {tuple(pixels.shape)}, expected (patches, ...)."
            )
        return sizes

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        features = torch.cat(image_features(model, pixel_values=inputs["pixel_values"]))
        return list(torch.split(features, self._patches(model, pairs(inputs["image_sizes"]))))

    def _patches(self, model: PreTrainedModel, sizes: Sequence[Pair]) -> list[int]:
        side = self._cell(model.config)
        return [math.prod(length // side for length in size) for size in sizes]
