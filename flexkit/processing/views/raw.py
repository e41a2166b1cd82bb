"""Vision towers that take patches and nothing that says how they lie; the high-res view adds the size of each image."""

import math
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexkit.grids import Pair
from flexkit.processing.outputs import like, processed
from flexkit.processing.resizing import extent, resized, tell_enlarged

__all__ = ["fuyu_view", "inkling_view"]


def fuyu_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Patches of images that are padded to whole patches.

    Parameters are those of every :data:`~flexkit.processing.views.View`.

    Returns
    -------
    dict
        ``hd_pixel_values``, the patches of all images, and ``hd_image_sizes``, (height, width) of each in pixels.
    """
    settings = ChainMap(options, vars(image_processor))
    side = settings["patch_size"]["height"]
    views, sizes = [], []
    for image in images:
        _, shown = extent(image_processor, image, options)
        height, width = shown or image.shape[-2:]
        size = zoom[0] * math.ceil(height / side) * side, zoom[1] * math.ceil(width / side) * side
        tell_enlarged(image_processor, image.shape, (zoom[0] * height, zoom[1] * width))
        enlarged = resized(image, (zoom[0] * height, zoom[1] * width), settings, size)
        made = processed(image_processor, enlarged, options, do_resize=False, do_pad=False)
        views.append(_patches(made["images"][0], side))
        sizes.append(size)
    return _high_res(views, sizes, low_res["image_sizes"])


def inkling_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Patches of images whose last row and column of patches are filled up; a last column may hold filling alone.

    It returns what :func:`fuyu_view` does.
    """
    settings = ChainMap(options, vars(image_processor))
    side = settings["size"]["height"]
    views, sizes = [], []
    for image in images:
        _, shown = extent(image_processor, image, options)
        height, width = shown or image.shape[-2:]
        size = zoom[0] * math.ceil(height / side) * side, zoom[1] * (width // side + 1) * side
        tell_enlarged(image_processor, image.shape, (zoom[0] * height, zoom[1] * width))
        # One pixel less, for which the image processor would add a column.
        enlarged = resized(image, (zoom[0] * height, zoom[1] * width), settings, (size[0], size[1] - 1))
        made = processed(image_processor, enlarged, options, rescale_image_frac=None)
        views.append(made["pixel_values"])
        sizes.append(size)
    return _high_res(views, sizes, low_res["pixel_values"])


def _patches(picture: Any, side: int) -> Tensor:
    pixels = torch.as_tensor(picture[0])
    return rearrange(pixels, "c (h p) (w q) -> (h w) (p q c)", p=side, q=side)


def _high_res(views: list[Tensor], sizes: list[Pair], low_res: Any) -> dict[str, Any]:
    return {"hd_pixel_values": like(torch.cat(views), low_res), "hd_image_sizes": like(torch.tensor(sizes), low_res)}
