"""Both resolutions of an image as tokens."""

from flexkit.encoding.dual_resolution import DualResolutionEncoder, DualResolutionOutput
from flexkit.encoding.tiling import split_tiles, stitch_tiles

__all__ = ["DualResolutionEncoder", "DualResolutionOutput", "split_tiles", "stitch_tiles"]
