"""Both resolutions of an image as tokens."""

from flexkit.encoding.tiling import split_tiles, stitch_tiles

__all__ = ["split_tiles", "stitch_tiles"]
