"""Vision towers that take images of any size, with a size for each: Qwen-VL, GLM-V, Pixtral, LFM2-VL, ..."""

import math
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.grids import Pair
from flexkit.processing.outputs import joined, like, processed
from flexkit.processing.resizing import extent, resized, tell_enlarged

__all__ = ["SIZES", "grid_view"]

SIZES = ("image_grid_thw", "image_grid_hw", "image_position_ids", "image_sizes", "spatial_shapes", "target_sizes")
"""Outputs that say how large each image is."""
_CHANNELS = 4
"""How many an image may have."""
_KEPT = ("pixel_values", "pixel_attention_mask", "image_merge_sizes", *SIZES)


def grid_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Resize each image to exactly ``zoom`` times its low-res view, and process it without further resizing.

    Parameters are those of every :data:`~flexkit.processing.views.View`.

    Returns
    -------
    dict
        The outputs of the image processor for the high-res view, prefixed with ``hd_``. The rows and columns
        of every image are exactly ``zoom`` times those of the low-res view.

    Raises
    ------
    UnsupportedModelError
        If the image processor does not keep to that.
    HighResInputError
        If it does not because it takes the few rows of an image for its channels.
    """
    names = [name for name in image_processor.model_input_names if name in _KEPT and name in low_res]
    name = next(name for name in names if name in SIZES)
    views = [_view(image_processor, image, options, zoom, name) for image in images]
    axes = {"pixel_values": -1} if name == "target_sizes" else {}  # patches side by side
    fillers = {"image_position_ids": -1}
    whole = {
        key: joined([view[key] for view in views], axis=axes.get(key, 0), filler=fillers.get(key, 0)) for key in names
    }
    expected = [(zoom[0] * rows, zoom[1] * columns) for rows, columns in _sizes(name, low_res[name])]
    if _sizes(name, whole[name]) != expected:
        thin = [tuple(image.shape[-2:]) for image in images if image.shape[-2] <= _CHANNELS]
        if thin:
            raise HighResInputError(
                f"{type(image_processor).__name__} takes the rows of images of {thin} pixels for their channels; give "
                f"images that are more than {_CHANNELS} pixels high."
            )
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} made a high-res view with {name} {_sizes(name, whole[name])}, where "
            f"zoom {zoom} asks for {expected}: it resizes what is not to be resized."
        )
    return {f"hd_{key}": like(value, low_res[key]) for key, value in whole.items()}


def _view(image_processor: Any, image: Any, options: dict[str, Any], zoom: Pair, name: str) -> Mapping[str, Tensor]:
    """The high-res view of one image."""
    settings = ChainMap(options, vars(image_processor))
    alone, shown = extent(image_processor, image, options)
    ((rows, columns),) = _sizes(name, alone[name])
    side = _side(name, alone["pixel_values"], settings)
    canvas = zoom[0] * rows * side, zoom[1] * columns * side
    size = canvas if shown is None else (zoom[0] * shown[0], zoom[1] * shown[1])
    tell_enlarged(image_processor, image.shape, size)
    enlarged = resized(image, size, settings, canvas)
    return processed(image_processor, enlarged, options, **_as_it_is(canvas, settings))


def _sizes(name: str, values: Any) -> list[Pair]:
    """Rows and columns of every image."""
    sizes = torch.as_tensor(values)
    if name == "image_position_ids":
        sizes = sizes.amax(-2).flip(-1) + 1
    return [(rows, columns) for rows, columns in sizes[:, -2:].tolist()]


def _side(name: str, pixels: Tensor, settings: Mapping[str, Any]) -> int:
    """How many pixels a side the unit of these sizes has."""
    if name == "image_sizes":
        return 1
    if name == "image_position_ids":
        return math.isqrt(pixels.shape[-1] // 3)
    side = settings.get("encoder_patch_size") or settings.get("patch_size") or settings["size"]["height"]
    return int(side)


def _as_it_is(canvas: Pair, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options that leave a picture of this size as it is."""
    options: dict[str, Any] = {"do_resize": False}
    if "encoder_patch_size" in settings:  # LFM2-VL resizes whatever it is told
        cells = canvas[0] * canvas[1] // (settings["encoder_patch_size"] * settings["downsample_factor"]) ** 2
        options |= {"min_image_tokens": cells, "max_image_tokens": cells}
    if "min_num_patches" in settings:  # Nemotron, too
        patches = canvas[0] * canvas[1] // settings["patch_size"] ** 2
        options |= {"min_num_patches": patches, "max_num_patches": patches}
    if "scale_resolution" in settings:  # MiniCPM, to an area
        options |= {"do_resize": True, "scale_resolution": math.isqrt(canvas[0] * canvas[1] - 1) + 1}
    return options
