"""Towers of a fixed input size: the high-res view is cut into tiles of that size."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.encoding import split_tiles, stitch_tiles
from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.features import image_features
from flexkit.zoom import Pair

__all__ = ["FixedGrid"]


class FixedGrid(Geometry):
    """One square grid of tokens for every image, from a tower that takes one size (LLaVA, Gemma 3).

    Parameters
    ----------
    tokens : callable
        From the model's config to the number of image tokens of one image.
    """

    inputs = ("pixel_values",)
    default_zoom = 3

    def __init__(self, tokens: Any) -> None:
        self._tokens = tokens

    def check_model(self, model: PreTrainedModel) -> None:
        vision = getattr(model.config, "vision_config", None)
        if not isinstance(getattr(vision, "image_size", None), int):
            raise UnsupportedModelError(
                f"the vision tower of {type(model).__name__} ({type(vision).__name__}) has no single `image_size`."
            )
        if getattr(vision, "model_type", None) == "pixtral":
            raise UnsupportedModelError(
                "a Pixtral tower takes images of any size; this family is read as one fixed size."
            )
        self._side(model)

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
        pixels = inputs["pixel_values"]
        size = model.config.vision_config.image_size
        channels = getattr(model.config.vision_config, "num_channels", 3)
        expected = (channels, zoom[0] * size, zoom[1] * size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise HighResInputError(
                f"hd_pixel_values has shape {tuple(pixels.shape)}; expected (images, {', '.join(map(str, expected))}): "
                f"zoom {zoom} times the tower's {size} pixels."
            )
        side = self._side(model)
        return [(side, side)] * len(pixels)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        features = []
        for image, grid in zip(inputs["pixel_values"], grids, strict=True):
            tiles = split_tiles(image[None], zoom)[0]
            encoded = torch.stack(image_features(model, pixel_values=tiles))
            features.append(rearrange(stitch_tiles(encoded[None], grid, zoom), "1 r c d -> (r c) d"))
        return features

    def _side(self, model: PreTrainedModel) -> int:
        tokens = self._tokens(model.config)
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {tokens} tokens an image, which is no square grid."
            )
        return side
