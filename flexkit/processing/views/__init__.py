"""How each kind of image processor is made to show the same images at a higher resolution."""

from collections.abc import Callable, Mapping
from typing import Any

from flexkit.errors import UnsupportedModelError
from flexkit.grids import Pair
from flexkit.processing.views.fixed import fixed_view
from flexkit.processing.views.grid import SIZES, grid_view
from flexkit.processing.views.numbered import numbered_view
from flexkit.processing.views.raw import fuyu_view, inkling_view
from flexkit.processing.views.shaped import shaped_view
from flexkit.processing.views.tiled import tiled_view

__all__ = ["View", "choose_tiled_view", "choose_view", "has_one_size"]

View = Callable[[Any, list[Any], Mapping[str, Any], dict[str, Any], Pair], dict[str, Any]]
"""What a high-res view is made of, and what comes of it:

* the image processor of the low-res view,
* the images before any resizing, each ``(channels, height, width)``, arrays or tensors,
* what the image processor made of them,
* the keyword arguments of that call,
* the zoom along rows and columns,
* returned: the high-res inputs by their names, ``hd_pixel_values`` among others.
"""

_MASKS = {"pixel_mask", "pixel_attention_mask"}
"""Outputs that say where an image is, and where it is padded."""
_OF_SQUARES = ("crop_to_patches", "return_row_col_info")
"""Settings of image processors that have them and make squares, however."""


def choose_view(image_processor: Any) -> View:
    """The kind of high-res view that an image processor can make, told by the names of its outputs and settings.

    Raises
    ------
    UnsupportedModelError
        If it makes neither pictures nor patches of them.
    """
    names = set(getattr(image_processor, "model_input_names", ()))
    if hasattr(image_processor, "patchify_image"):
        return fuyu_view
    if hasattr(image_processor, "rescale_image_frac"):
        return inkling_view
    if hasattr(image_processor, "extract_flattened_patches"):
        return numbered_view
    if names & set(SIZES) and not hasattr(image_processor, "image_grid_pinpoints"):  # there sizes are of originals
        return grid_view
    if names & _MASKS and not any(hasattr(image_processor, name) for name in _OF_SQUARES):
        return shaped_view
    if "pixel_values" in names:
        return fixed_view
    raise UnsupportedModelError(
        f"{type(image_processor).__name__} makes {', '.join(sorted(names)) or 'no images'}; flexkit knows how to make "
        f"a second view of pixel_values, alone or with {', '.join(SIZES)}. Prepare the hd_ inputs yourself, or use "
        "another model."
    )


def has_one_size(image_processor: Any) -> bool:
    """Whether an image processor makes pictures of one size, so that each tile of an image passes as an image does."""
    return choose_view(image_processor) is fixed_view


def choose_tiled_view(image_processor: Any) -> Callable[..., dict[str, Any]]:
    """The high-res view in tiles that are read one by one.

    Raises
    ------
    UnsupportedModelError
        If the tiles of an image do not each pass the image processor as an image does.
    """
    if hasattr(image_processor, "overlap_margins"):  # Molmo 2
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} shrinks pictures without smoothing them, which no tiles read one by one "
            "would look like. Give a PIL image instead of a flexkit.TileSource, and set levels to 1."
        )
    if not has_one_size(image_processor):
        raise UnsupportedModelError(
            f"{type(image_processor).__name__} makes images of any size, which its model encodes as a whole: there are "
            "no tiles to read one by one. Give a PIL image instead of a flexkit.TileSource, and set levels to 1."
        )
    return tiled_view
