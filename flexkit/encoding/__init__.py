"""Both resolutions of an image as tokens."""

from flexkit.encoding.dual_resolution import DualResolutionEncoder, DualResolutionOutput
from flexkit.encoding.sources import ArraySource, PictureSource, TileSource, open_tiff
from flexkit.encoding.tile_view import TileView
from flexkit.grids import pyramid, split_tiles, stitch_tiles

__all__ = [
    "ArraySource",
    "DualResolutionEncoder",
    "DualResolutionOutput",
    "PictureSource",
    "TileSource",
    "TileView",
    "open_tiff",
    "pyramid",
    "split_tiles",
    "stitch_tiles",
]
