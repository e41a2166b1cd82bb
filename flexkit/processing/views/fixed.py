"""Vision towers that take images of one size: LLaVA, SigLIP, Gemma 3, InternVL, ..."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from flexkit.errors import UnsupportedModelError
from flexkit.grids import Pair
from flexkit.processing.outputs import like, processed
from flexkit.processing.overviews import to_square
from flexkit.processing.resizing import resized, tell_enlarged

__all__ = ["PICTURES", "fixed_view", "original_sizes", "overview", "scaled_sizes", "shrunk"]

_LENGTHS = ("size", "crop_size", "high_res_size", "max_image_size", "tile_size", "min_size", "maximum_pad_value")
"""Settings of image processors that count pixels of what they make."""
PICTURES = {
    "pixel_values": "pixel_values",
    "pixel_values_images": "pixel_values",  # Video-LLaVA, in earlier versions of transformers
    "high_res_pixel_values": "high_res_pixel_values",
}


def fixed_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Run the image processor with every size scaled by the zoom, so that both views show the same region.

    Parameters are those of every :data:`~flexkit.processing.views.View`.

    Returns
    -------
    dict
        ``hd_pixel_values``, one ``(channels, zoom_rows * h, zoom_columns * w)`` for each image, and, where
        the image processor pads to squares, ``hd_image_sizes``, the (height, width) of each before padding.

    Raises
    ------
    UnsupportedModelError
        If the image processor cuts images into several, or does not scale with its sizes.
    """
    settings = ChainMap(options, vars(image_processor))
    times = max(zoom)
    scaled = scaled_sizes(settings, times)
    views: dict[str, list[Tensor]] = {name: [] for name in PICTURES if name in low_res}
    for image in images:
        given = image.shape
        if settings.get("do_resize") is False:
            height, width = image.shape[-2:]
            image = resized(image, (times * height, times * width), settings)
        made = processed(image_processor, to_square(image_processor, image, times), options, **scaled)
        for name, pictures in views.items():
            pictures.append(shrunk(overview(image_processor, made[name]), zoom))
            tell_enlarged(image_processor, given, pictures[-1].shape)
    for name, pictures in views.items():
        _check_sizes(image_processor, low_res[name], pictures, zoom)
    high_res = {f"hd_{PICTURES[name]}": like(pictures, low_res[name]) for name, pictures in views.items()}
    first = next(low_res[name] for name in views)
    return high_res | original_sizes(image_processor, settings, [image.shape[-2:] for image in images], first)


def scaled_sizes(settings: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The settings of an image processor that count pixels of what it makes, so many times as large."""
    return {name: _times(settings[name], times) for name in _LENGTHS if settings.get(name)}


def _times(length: Any, times: int) -> Any:
    if isinstance(length, int):
        return times * length
    if isinstance(length, list | tuple):
        return [times * each for each in length]
    return {name: times * each for name, each in dict(length).items() if each}


def _pictures(image_processor: Any, entry: Any) -> Tensor:
    """``(pictures, channels, height, width)`` of what an image processor gives for one image or tile."""
    pixels = torch.as_tensor(entry)
    if pixels.ndim == 2:  # in patches, of square pictures
        side = image_processor.patch_size
        rows = round(len(pixels) ** 0.5)
        return rearrange(pixels, "(h w) (p q c) -> 1 c (h p) (w q)", h=rows, p=side, q=side)
    return pixels.reshape(-1, *pixels.shape[-3:])


def overview(image_processor: Any, entries: Any) -> Tensor:
    """The one picture that an image processor made of an image, or the first where tiles follow it.

    Raises
    ------
    UnsupportedModelError
        If it made several that are no tiles.
    """
    pictures: list[Tensor] = [picture for entry in entries for picture in _pictures(image_processor, entry)]
    has_tiles = hasattr(image_processor, "image_grid_pinpoints") or hasattr(image_processor, "overlap_margins")
    if len(pictures) != 1 and not has_tiles:
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} made {len(pictures)} pictures of one image; a high-res view is one."
        )
    return pictures[0]


def shrunk(picture: Tensor, zoom: Pair) -> Tensor:
    """A picture whose longer zoom went into both axes, in its own zoom."""
    rows, columns = zoom
    if rows == columns:
        return picture
    height, width = (length * side // max(zoom) for length, side in zip(picture.shape[-2:], zoom, strict=True))
    smaller = interpolate(picture[None].float(), (height, width), mode="bilinear", antialias=True)
    return smaller[0].to(picture.dtype)


def original_sizes(
    image_processor: Any, settings: Mapping[str, Any], sizes: Sequence[Sequence[int]], low_res: Any
) -> dict[str, Any]:
    """``hd_image_sizes``, in the form of ``low_res``, where an image processor shows images in squares with margins."""
    # Where there are tiles, do_pad fills up a batch with them.
    has_tiles = hasattr(image_processor, "image_grid_pinpoints")
    if not settings.get("do_pad") or not hasattr(image_processor, "pad_to_square") or has_tiles:
        return {}
    return {"hd_image_sizes": like(torch.tensor([list(size) for size in sizes]), low_res)}


def _check_sizes(image_processor: Any, low_res: Any, high_res: Sequence[Tensor], zoom: Pair) -> None:
    low = {picture.shape[-2:] for entry in low_res for picture in _pictures(image_processor, entry)}
    expected = {(zoom[0] * height, zoom[1] * width) for height, width in low}
    for picture in high_res:
        if tuple(picture.shape[-2:]) not in expected:
            raise UnsupportedModelError(
                f"{type(image_processor).__name__} made a high-res view of {tuple(picture.shape[-2:])} pixels "
                f"where zoom {zoom} asks for {sorted(expected)}: its output does not scale with its `size`."
            )
