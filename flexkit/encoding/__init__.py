"""Both resolutions of an image as tokens."""

from flexkit.encoding.clips import BrokenVideoWarning, FrameArray, FramePictures, FrameSource, VideoFile, open_video
from flexkit.encoding.dual_resolution import DualResolutionEncoder, DualResolutionOutput
from flexkit.encoding.sources import ArraySource, PictureSource, TileSource, open_tiff
from flexkit.encoding.tile_view import TileView
from flexkit.grids import pyramid, split_tiles, stitch_tiles

__all__ = [
    "ArraySource",
    "BrokenVideoWarning",
    "DualResolutionEncoder",
    "DualResolutionOutput",
    "FrameArray",
    "FramePictures",
    "FrameSource",
    "PictureSource",
    "TileSource",
    "TileView",
    "VideoFile",
    "open_tiff",
    "open_video",
    "pyramid",
    "split_tiles",
    "stitch_tiles",
]
