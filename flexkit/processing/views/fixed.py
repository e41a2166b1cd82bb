"""Vision towers that take images of one size: LLaVA, SigLIP, Gemma 3, ..."""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from transformers.image_processing_utils import get_size_dict

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.zoom import Pair

__all__ = ["fixed_view"]

_CUTTING = ("do_pan_and_scan", "crop_to_patches", "do_image_splitting")


def fixed_view(
    image_processor: Any, images: list[Any], low_res: Mapping[str, Any], options: dict[str, Any], zoom: Pair
) -> dict[str, Any]:
    """Run the image processor with every size scaled by the zoom, so that both views show the same region.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor of the low-res view.
    images : list of numpy.ndarray or torch.Tensor
        The images before any resizing, each ``(channels, height, width)``.
    low_res : dict
        What the image processor made of them: ``pixel_values`` ``(images, channels, h, w)``.
    options : dict
        The keyword arguments of that call.
    zoom : tuple of int
        Along rows and columns.

    Returns
    -------
    dict
        ``hd_pixel_values``, one ``(channels, zoom_rows * h, zoom_columns * w)`` for each image, and, where
        the image processor pads to squares, ``hd_image_sizes``, the (height, width) of each before padding.

    Raises
    ------
    HighResInputError
        If the image processor is told to cut images into several.
    UnsupportedModelError
        If it does so unasked, does not resize to one size, or does not scale with that size.
    """
    settings = ChainMap(options, vars(image_processor))
    for name in _CUTTING:
        if settings.get(name):
            raise HighResInputError(
                f"{name} cuts images into several, which a high-res view replaces: "
                f"call the processor with {name}=False."
            )
    if len(low_res["pixel_values"]) != len(images):
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} made {len(low_res['pixel_values'])} low-res views of "
            f"{len(images)} images; a high-res view needs one for each."
        )
    pads = bool(settings.get("do_pad")) and hasattr(image_processor, "pad_to_square")
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    crop = _scaled_crop(settings, zoom)
    pixel_values: list[Any] = []
    for image, size in zip(images, sizes, strict=True):
        height, width = _resized((max(size), max(size)) if pads else size, settings, zoom)
        scaled = {"do_resize": True, "size": {"height": height, "width": width}, **crop}
        pixel_values.extend(image_processor.preprocess([image], **{**options, **scaled})["pixel_values"])
    _check_shapes(image_processor, low_res["pixel_values"], pixel_values, zoom)
    high_res: dict[str, Any] = {"hd_pixel_values": pixel_values}
    return high_res | {"hd_image_sizes": sizes} if pads else high_res


def _resized(image: Pair, settings: Mapping[str, Any], zoom: Pair) -> Pair:
    """Height and width to which the high-res view of an image of this height and width is resized."""
    rows, columns = zoom
    if not settings.get("do_resize"):
        return rows * image[0], columns * image[1]
    size = _size(settings["size"], bool(settings.get("default_to_square", True)))
    if size.keys() == {"height", "width"}:
        return rows * size["height"], columns * size["width"]
    if size.keys() == {"shortest_edge"}:
        edge, shortest = size["shortest_edge"], min(image)
        return rows * edge * image[0] // shortest, columns * edge * image[1] // shortest
    raise UnsupportedModelError(
        f"The image processor resizes to size={size}; flexkit needs height and width, or shortest_edge."
    )


def _scaled_crop(settings: Mapping[str, Any], zoom: Pair) -> dict[str, dict[str, int]]:
    if not settings.get("do_center_crop"):
        return {}
    crop = _size(settings["crop_size"], True)
    return {"crop_size": {"height": zoom[0] * crop["height"], "width": zoom[1] * crop["width"]}}


def _size(size: Any, square: bool) -> dict[str, int]:
    given = size if isinstance(size, int | list | tuple) else dict(size)
    sides: dict[str, int] = get_size_dict(given, default_to_square=square)
    return sides


def _check_shapes(image_processor: Any, low_res: Any, high_res: list[Any], zoom: Pair) -> None:
    for low, high in zip(low_res, high_res, strict=True):
        *_, height, width = low.shape
        expected = zoom[0] * height, zoom[1] * width
        if tuple(high.shape[-2:]) != expected:
            raise UnsupportedModelError(
                f"{type(image_processor).__name__} made a high-res view of {tuple(high.shape[-2:])} pixels "
                f"where zoom {zoom} asks for {expected}: its output does not scale with its `size`."
            )
