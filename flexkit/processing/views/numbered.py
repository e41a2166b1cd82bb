"""Vision towers that take flattened patches with their row and column: Pix2Struct, KOSMOS-2.5."""

import copy
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from flexkit.grids import Pair
from flexkit.processing.outputs import joined, like, processed
from flexkit.processing.resizing import tell_enlarged

__all__ = ["numbered_view"]


def numbered_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Enlarge the pictures that patches are cut from: normalized, and with their header if they have one.

    Parameters are those of every :data:`~flexkit.processing.views.View`.

    Returns
    -------
    dict
        ``hd_flattened_patches``, ``(images, patches, 2 + width)``: row and column from 1, then pixels. The rows and
        columns of every image are exactly ``zoom`` times those of the low-res view; behind the last patch is padding.
    """
    side = ChainMap(options, vars(image_processor))["patch_size"]
    headers = options.get("header_text")
    views = []
    for index, (image, low) in enumerate(zip(images, low_res["flattened_patches"], strict=True)):
        header = {"header_text": headers[index]} if isinstance(headers, list) else {}
        picture = _cut_up(image_processor, image, options | header)
        rows, columns = (times * int(count) for times, count in zip(zoom, torch.as_tensor(low).amax(0), strict=False))
        tell_enlarged(image_processor, image.shape, (rows * side["height"], columns * side["width"]))
        views.append(_patches(picture, (rows, columns), (side["height"], side["width"])))
    return {"hd_flattened_patches": like(joined(views), low_res["flattened_patches"])}


def _cut_up(image_processor: Any, image: Any, options: Mapping[str, Any]) -> Tensor:
    """``(channels, height, width)``: what the image processor cuts patches from."""
    pictures: list[Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        picture = next(iter((*args, *(kwargs[name] for name in ("image", "images") if name in kwargs))))
        pictures.append(torch.as_tensor(picture))
        return image_processor.extract_flattened_patches(*args, **kwargs)

    watcher = copy.copy(image_processor)
    watcher.extract_flattened_patches = watched
    processed(watcher, image, options)
    return pictures[0].flatten(0, -3)


def _patches(picture: Tensor, grid: Pair, side: Pair) -> Tensor:
    """``(1, patches, 2 + width)`` of a picture in so many rows and columns."""
    size = grid[0] * side[0], grid[1] * side[1]
    pixels = interpolate(picture[None].float(), size, mode="bilinear", antialias=True)
    numbers = torch.cartesian_prod(torch.arange(1.0, grid[0] + 1), torch.arange(1.0, grid[1] + 1))
    patches = rearrange(pixels, "1 c (r h) (q w) -> (r q) (h w c)", h=side[0], w=side[1])
    return torch.cat([numbers, patches], dim=1)[None]
