"""How each kind of image processor is made to show the same images at a higher resolution."""

from collections.abc import Callable, Mapping
from typing import Any

from flexkit.errors import UnsupportedModelError
from flexkit.processing.views.fixed import fixed_view
from flexkit.processing.views.grid import grid_view
from flexkit.zoom import Pair

__all__ = ["View", "choose_view"]

View = Callable[[Any, list[Any], Mapping[str, Any], dict[str, Any], Pair], dict[str, Any]]
"""Image processor, images, its low-res output, its keyword arguments and the zoom, to the high-res inputs."""


def choose_view(image_processor: Any) -> View:
    """The kind of high-res view that an image processor can make, told by the names of its outputs.

    Raises
    ------
    UnsupportedModelError
        If it makes neither images of one size nor grids of patches.
    """
    names = set(getattr(image_processor, "model_input_names", ()))
    if hasattr(image_processor, "process_image"):
        if {"pixel_values", "image_grid_thw"} <= names:
            return grid_view
        if names in ({"pixel_values"}, {"pixel_values", "num_crops"}):
            return fixed_view
    raise UnsupportedModelError(
        f"{type(image_processor).__name__} makes {', '.join(sorted(names)) or 'no images'}; flexkit knows "
        "how to make a second view of images of one size (pixel_values alone) and of grids of patches "
        "(pixel_values with image_grid_thw). Prepare the hd_ inputs yourself, or use another model."
    )
