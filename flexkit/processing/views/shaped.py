"""Image processors that keep the shape of an image, within limits of their own: Idefics 2, Aria."""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexkit.grids import Pair
from flexkit.processing.outputs import joined, like, processed
from flexkit.processing.resizing import extent, resized, tell_enlarged

__all__ = ["shaped_view"]


def shaped_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Resize each image to exactly ``zoom`` times its low-res view, and process it tile by tile.

    A tile has the size of the low-res view, which the image processor leaves as it is, whatever its limits.

    Parameters are those of every :data:`~flexkit.processing.views.View`.

    Returns
    -------
    dict
        ``hd_pixel_values``, one ``(channels, zoom_rows * h, zoom_columns * w)`` for each image, padded as the low-res
        views are, at the bottom and at the right to the largest.
    """
    views = joined([_view(image_processor, image, options, zoom)[None] for image in images])
    return {"hd_pixel_values": like(views, low_res["pixel_values"])}


def _view(image_processor: Any, image: Any, options: dict[str, Any], zoom: Pair) -> Tensor:
    """The high-res view of one image."""
    alone, shown = extent(image_processor, image, options)
    height, width = alone["pixel_values"].shape[-2:]
    rows, columns = zoom
    size = shown or (height, width)
    settings = ChainMap(options, vars(image_processor))
    size = rows * size[0], columns * size[1]
    tell_enlarged(image_processor, image.shape, size)
    enlarged = resized(image, size, settings, (rows * height, columns * width))
    tiles = rearrange(enlarged, "c (r h) (q w) -> (r q) c h w", h=height, w=width)
    made = [processed(image_processor, tile, options)["pixel_values"].flatten(0, -4) for tile in tiles]
    return rearrange(torch.cat(made), "(r q) c h w -> c (r h) (q w)", r=rows)
