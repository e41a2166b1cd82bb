"""Tiles of a picture that is read region by region, each made as the image processor makes its low-res view."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexkit.encoding import TileSource, TileView
from flexkit.processing.outputs import processed
from flexkit.processing.shown import Shown, find_shown
from flexkit.processing.views.fixed import PICTURES, overview
from flexkit.zoom import Pair

__all__ = ["SourceView"]


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
    low_res : mapping
        What it made of the overview.
    options : mapping
        The keyword arguments of that call.
    size : tuple of int
        Height and width of that overview.
    zooms : tuple of tuple of int
        Of each level.
    """

    def __init__(
        self,
        source: TileSource,
        image_processor: Any,
        low_res: Mapping[str, Any],
        options: Mapping[str, Any],
        size: Pair,
        zooms: tuple[Pair, ...],
    ) -> None:
        self.source = source
        self.zooms = zooms
        self._image_processor = image_processor
        self._options = options
        self._names = [name for name in PICTURES if name in low_res]
        black = self._made(np.zeros((3, *size), dtype=np.uint8))
        self._size = max((picture.shape[-2], picture.shape[-1]) for picture in black)
        self._shown: Shown = find_shown(lambda picture: self._made(picture)[0], size)

    def read(self, level: int, tiles: Sequence[int]) -> tuple[Tensor, ...]:
        columns = self.zooms[level][1]
        made = [self._made(self._tile(level, *divmod(tile, columns))) for tile in tiles]
        return tuple(torch.stack(pictures) for pictures in zip(*made, strict=True))

    def _made(self, picture: np.ndarray) -> list[Tensor]:
        """What the image processor makes of ``(3, height, width)``, in every size."""
        made = processed(self._image_processor, picture, self._options)
        return [overview(self._image_processor, made[name]) for name in self._names]

    def _tile(self, level: int, row: int, column: int) -> np.ndarray:
        """``(3, height, width)``, uint8; padded where nothing is shown."""
        height, width = self.source.size
        left, right = self._edges(column, self.zooms[level][1], 0, width)
        top, bottom = self._edges(row, self.zooms[level][0], 1, height)
        canvas = Image.new("RGB", self._size[::-1], self._shown.background)
        scale = self._size[1] / (right - left), self._size[0] / (bottom - top)
        inside = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
        x, y = round((inside[0] - left) * scale[0]), round((inside[1] - top) * scale[1])
        ends = round((inside[2] - left) * scale[0]), round((inside[3] - top) * scale[1])
        if x < ends[0] and y < ends[1]:
            canvas.paste(self.source.read(inside, (ends[1] - y, ends[0] - x), self._filter), (x, y))
        return np.asarray(canvas).transpose(2, 0, 1)

    def _edges(self, tile: int, tiles: int, axis: int, length: int) -> tuple[float, float]:
        """Where a tile starts and ends along an axis, in pixels of the picture."""
        start, end = self._shown.box[axis], self._shown.box[axis + 2]
        step = (end - start) / tiles
        return (start + tile * step) * length, (start + (tile + 1) * step) * length

    @property
    def _filter(self) -> int:
        resample = ChainMap(dict(self._options), vars(self._image_processor)).get("resample")
        return resample if isinstance(resample, int) else Image.Resampling.BICUBIC
