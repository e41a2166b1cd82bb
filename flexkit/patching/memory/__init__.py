"""What a generation keeps: the high-res tokens of its images, and K' and V' of those that were read."""

from flexkit.patching.memory.high_res import (
    HighResMemory,
    MemoryLayer,
    attach_memory,
    cached_length,
    cached_memory,
)
from flexkit.patching.memory.tokens import Encode, Encoded, ImageSpan, Prefix, ReadTiles, Tiled, TiledImage, no_tiles

__all__ = [
    "Encode",
    "Encoded",
    "HighResMemory",
    "ImageSpan",
    "MemoryLayer",
    "Prefix",
    "ReadTiles",
    "Tiled",
    "TiledImage",
    "attach_memory",
    "cached_length",
    "cached_memory",
    "no_tiles",
]
