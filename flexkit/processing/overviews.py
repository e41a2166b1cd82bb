"""Where an image processor cuts large images into tiles, the low-res view is made to be the overview alone."""

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch

from flexkit.errors import HighResInputError
from flexkit.processing.outputs import like
from flexkit.processing.resizing import resized

__all__ = ["check_options", "counting_overviews", "keep_overviews", "to_one_tile", "to_square", "without_tiles"]

_SWITCHES = {
    "crop_to_patches": False,
    "do_image_splitting": False,
    "do_pan_and_scan": False,
    "max_image_tiles": 1,
    "slice_mode": False,
    "split_image": False,
    "vision_input_type": "vanilla",
}
"""What turns tiles off, in image processors that have the setting."""


def without_tiles(image_processor: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that make an image processor give overviews alone, or as few tiles as it can.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        Any image processor.
    given : mapping, optional
        The keyword arguments of the call.
    """
    options = {name: value for name, value in _SWITCHES.items() if hasattr(image_processor, name)}
    if hasattr(image_processor, "resize_to_max_canvas"):  # others mean patches of the tower by max_patches
        options["max_patches"] = 1
    if hasattr(image_processor, "overlap_margins"):
        options["max_crops"] = 1
    if hasattr(image_processor, "crop_to_patches") and hasattr(image_processor, "tile_size"):
        size = (given or {}).get("size") or image_processor.size
        options["tile_size"] = size["height"]  # of DeepSeek-OCR 2's overview, when there are no tiles
    if hasattr(image_processor, "image_grid_pinpoints"):
        side = max(length for length in dict(image_processor.size).values() if length)
        options["image_grid_pinpoints"] = [[side, side]]
    return options


def check_options(options: Mapping[str, Any], image_processor: Any) -> None:
    """Check the keyword arguments of a call, however nested.

    Parameters
    ----------
    options : mapping
        The keyword arguments.
    image_processor : transformers.BaseImageProcessor
        The image processor that they reach.

    Raises
    ------
    HighResInputError
        If they ask for tiles.
    """
    for name, value in without_tiles(image_processor, options).items():
        if options.get(name) not in (None, value):
            raise HighResInputError(
                f"{name}={options[name]!r} cuts images into several, which a high-res view replaces: leave it out, "
                f"{name}={value!r} is set for you."
            )
    for nested in options.values():
        if isinstance(nested, Mapping):
            check_options(nested, image_processor)


def to_one_tile(image_processor: Any, images: Any, pixels: list[Any]) -> Any:
    """The images as the image processor must get them, so that it makes as few tiles as it can.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor.
    images : PIL.Image.Image or numpy.ndarray or torch.Tensor or list
        The images of a call.
    pixels : list of numpy.ndarray or torch.Tensor
        The same, in one list, as the image processor reads them.
    """
    if hasattr(image_processor, "image_grid_pinpoints"):  # LLaVA-OneVision pads the images of a list in a list
        return pixels
    squares = [to_square(image_processor, image) for image in pixels]
    return images if all(map(operator.is_, squares, pixels)) else squares


def to_square(image_processor: Any, image: Any, times: int = 1) -> Any:
    """A picture in the size of the tower, if that alone keeps the image processor from cutting it.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor.
    image : numpy.ndarray or torch.Tensor
        ``(channels, height, width)``.
    times : int
        How many times the tower's size.
    """
    if not hasattr(image_processor, "downsampler_stride"):  # of Step 3
        return image
    size = times * image_processor.size["height"], times * image_processor.size["width"]
    return resized(image, size, vars(image_processor))


def keep_overviews(image_processor: Any, low_res: Any) -> None:
    """Take away the tiles that an image processor makes whatever it is told, in its outputs themselves.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor.
    low_res : transformers.BatchFeature
        Its outputs, without tiles where that can be had.
    """
    pixels = low_res.get("pixel_values")
    if "image_token_pooling" in low_res:  # Molmo2
        _keep_first_crops(low_res)
    elif "aspect_ratio_mask" in low_res:  # Mllama
        for name in ("pixel_values", "aspect_ratio_mask"):
            low_res[name] = _in_slots(low_res[name], image_processor.max_image_tiles)
    elif pixels is not None and len(pixels) and pixels[0].ndim == 4 and "image_sizes" in low_res:  # LLaVA-NeXT
        low_res["pixel_values"] = [image[:1] for image in pixels] if isinstance(pixels, list) else pixels[:, :1]


def counting_overviews(processor: Any) -> Any:
    """A copy of a processor and its image processor, which counts image tokens of overviews alone.

    Parameters
    ----------
    processor : transformers.ProcessorMixin
        The processor; most count what their image processor gave.
    """
    twin = copy.copy(processor)
    twin.image_processor = copy.copy(processor.image_processor)
    if hasattr(twin.image_processor, "do_image_splitting"):  # Idefics 2 looks there, not at what it was told
        twin.image_processor.do_image_splitting = False
    if hasattr(processor, "_get_unpadded_features"):  # LLaVA-NeXT: tokens of the tiles, and newlines
        twin._get_unpadded_features = lambda *args, **kwargs: (0, 1)
    return twin


def _keep_first_crops(low_res: Any) -> None:
    crops, grids = torch.as_tensor(low_res["image_num_crops"]), torch.as_tensor(low_res["image_grids"])
    first = crops.cumsum(0) - crops
    pixels, pooling = torch.as_tensor(low_res["pixel_values"]), torch.as_tensor(low_res["image_token_pooling"])
    places = pooling[: int(grids[0, :2].prod())]
    offsets = torch.arange(len(crops)).view(-1, 1, 1) * pixels.shape[1]
    kept = {
        "pixel_values": pixels[first],
        "image_token_pooling": torch.where(places < 0, places, places + offsets).flatten(0, 1),
        "image_grids": grids * torch.tensor([1, 1, 0, 0]),
        "image_num_crops": torch.ones_like(crops),
    }
    low_res.update({name: like(value, low_res[name]) for name, value in kept.items()})


def _in_slots(tiles: Any, slots: int) -> Any:
    """``(batch, images, tiles, ...)`` with as many slots for tiles as the model has embeddings of places."""
    filled = torch.as_tensor(tiles)
    missing = filled.new_zeros(*filled.shape[:2], slots - filled.shape[2], *filled.shape[3:])
    return like(torch.cat([filled, missing], dim=2), tiles)
