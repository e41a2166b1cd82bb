"""Pictures that are read tile by tile, at one zoom or several."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

from flexkit.encoding import TileSource
from flexkit.grids import Pair
from flexkit.processing.resizing import tell_enlarged
from flexkit.processing.views.fixed import PICTURES, original_sizes
from flexkit.processing.views.source import SourceView, check_arithmetic

__all__ = ["tiled_view"]


def tiled_view(
    image_processor: Any,
    sources: Sequence[TileSource],
    low_res: Mapping[str, Any],
    options: Mapping[str, Any],
    zooms: tuple[Pair, ...],
) -> dict[str, Any]:
    """Views that read the tiles of each image when they are wanted.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        One that makes pictures of one size.
    sources : sequence of TileSource
        The images.
    low_res : mapping
        What the image processor made of the overviews.
    options : mapping
        The keyword arguments of that call.
    zooms : tuple of tuple of int
        Of each level.

    Returns
    -------
    dict
        ``hd_tiles``, one :class:`~flexkit.TileView` for each image; ``hd_image_sizes`` as in
        :func:`~flexkit.processing.views.fixed.fixed_view`.

    Raises
    ------
    UnsupportedModelError
        If the image processor does more than to resize, pad and crop.
    """
    names = tuple(name for name in PICTURES if name in low_res)
    check_arithmetic(image_processor, options, names)
    views = [SourceView(source, image_processor, options, zooms, names) for source in sources]
    for view in views:
        tell_enlarged(image_processor, view.source.size, view.size)
    settings = ChainMap(dict(options), vars(image_processor))
    first = low_res[names[0]]
    sizes = original_sizes(image_processor, settings, [source.size for source in sources], first)
    return {"hd_tiles": views, **sizes}
