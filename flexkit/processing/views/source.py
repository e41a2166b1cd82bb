"""Tiles of a picture that is read region by region, each made as the image processor makes its low-res view."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexkit.encoding import TileSource, TileView
from flexkit.encoding.sources import at_most
from flexkit.processing.outputs import processed
from flexkit.processing.shown import find_shown, probes
from flexkit.processing.views.fixed import PICTURES, overview
from flexkit.zoom import Pair

__all__ = ["SourceView"]

_LONGEST = 2048
"""Longer side in pixels of the pictures by which is found what is shown."""


class SourceView(TileView):
    """The tiles of one picture.

    Every tile passes the image processor as if it were an image of its own, in the size in which that leaves it as it
    is.

    Parameters
    ----------
    source : TileSource
        The picture.
    image_processor : transformers.BaseImageProcessor
        One that makes pictures of one size.
    options : mapping
        The keyword arguments of the low-res call.
    zooms : tuple of tuple of int
        Of each level.
    """

    def __init__(
        self, source: TileSource, image_processor: Any, options: Mapping[str, Any], zooms: tuple[Pair, ...]
    ) -> None:
        self.source = source
        self.zooms = zooms
        self._image_processor = image_processor
        self._options = options
        made = [self._made(probe) for probe in probes(at_most(source.size, _LONGEST))]
        self._size = max((picture.shape[-2], picture.shape[-1]) for picture in made[0])
        self._shown = find_shown([pictures[0] for pictures in made])

    def read(self, level: int, tiles: Sequence[int]) -> tuple[Tensor, ...]:
        columns = self.zooms[level][1]
        made = [self._made(self._tile(level, *divmod(tile, columns))) for tile in tiles]
        return tuple(torch.stack(pictures) for pictures in zip(*made, strict=True))

    def _made(self, picture: np.ndarray) -> list[Tensor]:
        """What the image processor makes of ``(3, height, width)``, in every size."""
        made = processed(self._image_processor, picture, self._options)
        return [overview(self._image_processor, made[name]) for name in PICTURES if name in made]

    def whole(self) -> Image.Image:
        """All that is shown of the picture, in its own pixels."""
        return self._shown.read(self.source, (0.0, 0.0, 1.0, 1.0), self._shown.size_of(self.source), self._filter)

    def _tile(self, level: int, row: int, column: int) -> np.ndarray:
        """``(3, height, width)``, uint8."""
        rows, columns = self.zooms[level]
        part = column / columns, row / rows, (column + 1) / columns, (row + 1) / rows
        tile = self._shown.read(self.source, part, self._size, self._filter)
        return np.asarray(tile).transpose(2, 0, 1)

    @property
    def _filter(self) -> int:
        resample = ChainMap(dict(self._options), vars(self._image_processor)).get("resample")
        return resample if isinstance(resample, int) else Image.Resampling.BICUBIC
