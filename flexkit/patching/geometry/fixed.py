"""Towers of a fixed input size: the high-res view is cut into tiles of that size."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Pair, split_tiles, stitch_tiles
from flexkit.patching.declared import Declared
from flexkit.patching.geometry.base import Geometry
from flexkit.patching.geometry.layouts import cells_alone
from flexkit.patching.geometry.patches import sides, vision_size
from flexkit.patching.geometry.tiles import TileEncoder, encode_images

__all__ = ["FixedGrid"]


class FixedGrid(Geometry):
    """One square grid of tokens for every image, from a tower that takes one size (LLaVA, Gemma 3, InternVL).

    Where a family cuts large images into tiles of its own, the high-res view takes their place: the prompt holds the
    overview only.

    Parameters
    ----------
    tokens : callable
        From the model's config to the number of cells of one image's grid.
    size : callable, optional
        From the model's config to the side, or height and width, of the pictures that the tower takes. None where the
        config does not say: the view is ``zoom`` times whatever size the tower gets.
    encode : callable
        How tiles are handed to the tower.
    layout : callable
        From a grid to the mask of the image tokens of one image that are its cells.
    overview_only : str
        What makes the family's prompts carry overviews only, for errors; empty if they carry nothing else anyway.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    default_zoom = 3

    def __init__(
        self,
        tokens: Callable[[Any], int],
        *,
        size: Callable[[Any], object] | None = vision_size,
        encode: TileEncoder = encode_images,
        layout: Callable[[Pair], Tensor] = cells_alone,
        overview_only: str = "",
    ) -> None:
        self._tokens = tokens
        self._size = size
        self._encode = encode
        self._layout = layout
        self.overview_only = overview_only

    def check_model(self, model: PreTrainedModel) -> None:
        if self._size is not None and sides(self._size(model.config)) is None:
            vision = getattr(model.config, "vision_config", None)
            raise UnsupportedModelError(
                f"the vision tower of {type(model).__name__} ({type(vision).__name__}) has no single `image_size`."
            )
        self.grid(model)

    def declared(self, model: PreTrainedModel, zoom: Pair) -> Mapping[str, Declared]:
        channels = getattr(getattr(model.config, "vision_config", None), "num_channels", 3)
        size = self.tower_size(model)
        if size is None:
            view = Declared(("images", channels, ...), meaning=f"zoom {zoom} times those of pixel_values", zoom=zoom)
        else:
            meaning = f"zoom {zoom} times the tower's {size[0]} x {size[1]} pixels"
            view = Declared(("images", channels, zoom[0] * size[0], zoom[1] * size[1]), meaning=meaning)
        return {"pixel_values": view}

    def grids(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], zoom: Pair) -> list[Pair]:
        pixels = inputs["pixel_values"]
        if pixels.shape[-2] % zoom[0] or pixels.shape[-1] % zoom[1]:
            raise HighResInputError(
                f"hd_pixel_values has shape {tuple(pixels.shape)}; expected a height divisible by {zoom[0]} and a "
                f"width by {zoom[1]}."
            )
        return [self.grid(model)] * len(pixels)

    def layout(self, model: PreTrainedModel, grid: Pair) -> Tensor:
        return self._layout(grid)

    def encode(
        self, model: PreTrainedModel, inputs: Mapping[str, Tensor], grids: Sequence[Pair], zoom: Pair
    ) -> list[Tensor]:
        tiles = (self.encode_tiles(model, image)[None] for image in self.cut(inputs, zoom))
        stitched = (stitch_tiles(image, grid, zoom) for image, grid in zip(tiles, grids, strict=True))
        return [rearrange(image, "1 r c d -> (r c) d") for image in stitched]

    def cut(self, inputs: Mapping[str, Tensor], zoom: Pair) -> list[tuple[Tensor, ...]]:
        tiles = (split_tiles(inputs[name], zoom) for name in self.inputs)
        return list(zip(*tiles, strict=True))

    def tile_grid(self, model: PreTrainedModel) -> Pair:
        return self.grid(model)

    def encode_tiles(self, model: PreTrainedModel, tiles: Sequence[Tensor]) -> Tensor:
        cells = self.layout(model, self.grid(model)).nonzero().flatten()
        return torch.stack([tile[cells.to(tile.device)] for tile in self._encode(model, *tiles)])

    def grid(self, model: PreTrainedModel) -> Pair:
        """Rows and columns of every image."""
        tokens = self._tokens(model.config)
        side = math.isqrt(tokens)
        if not tokens or side * side != tokens:
            raise UnsupportedModelError(
                f"{type(model).__name__} has {tokens} tokens an image, which is no square grid."
            )
        return side, side

    def tower_size(self, model: PreTrainedModel) -> Pair | None:
        """Height and width of the pictures that the tower takes, if the config says them."""
        return sides(self._size(model.config)) if self._size is not None else None
