"""Tiles of a picture that is read region by region: those that its whole high-res view would be cut into."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend

from flexkit.encoding import ArraySource, TileSource, TileView
from flexkit.errors import UnsupportedModelError
from flexkit.grids import Pair
from flexkit.processing.canvas import Framed, Resized, canvas_of, extent_of
from flexkit.processing.outputs import processed
from flexkit.processing.overviews import to_square
from flexkit.processing.views.fixed import overview, scaled_sizes, shrunk

__all__ = ["SourceView", "check_arithmetic"]

_PROBES = ((5, 9), (9, 5))
_REACH = 2
"""Of the filter by which a view is shrunk along the axis of the smaller zoom, in pixels of what is made."""
_TOLERANCE = 0.01
"""Share of the range of colours by which torchvision's resizing differs from PIL's, on the mean, and more."""


class SourceView(TileView):
    """The tiles of one picture.

    They are what the image processor makes of the whole picture with every size scaled by the zoom, cut: to the bit
    where it resizes by PIL and :meth:`flexkit.TileSource.read` is exact. Torchvision rounds and clips in another order;
    of noise, it makes less than one grey level of difference on the mean.

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
    names : tuple of str
        The outputs of the image processor that are pictures.
    """

    def __init__(
        self,
        source: TileSource,
        image_processor: Any,
        options: Mapping[str, Any],
        zooms: tuple[Pair, ...],
        names: tuple[str, ...] = ("pixel_values",),
    ) -> None:
        self.source = source
        self.zooms = zooms
        self._image_processor = image_processor
        self._settings = ChainMap(dict(options), vars(image_processor))
        self._names = names

    def read(self, level: int, tiles: Sequence[int]) -> tuple[Tensor, ...]:
        columns = self.zooms[level][1]
        places = [divmod(tile, columns) for tile in tiles]
        return tuple(torch.stack([self._tile(name, level, *place) for place in places]) for name in self._names)

    @property
    def size(self) -> Pair:
        """Height and width of the high-res view of the first level."""
        rows, columns = self._canvas(self._names[0], max(self.zooms[0])).size
        times = max(self.zooms[0])
        return rows // times * self.zooms[0][0], columns // times * self.zooms[0][1]

    def whole(self) -> Image.Image:
        """All that is shown of the picture, in its own pixels."""
        canvas = self._canvas(self._names[0], max(self.zooms[0]))
        box, colour = extent_of(canvas, self.source)
        left, top, right, bottom = map(round, box)
        size = max(1, bottom - top), max(1, right - left)
        return Image.fromarray(Framed(self.source, -top, -left, size, colour).region(0, 0, *size))

    def _canvas(self, name: str, times: int) -> TileSource:
        settings, source = self._settings, self.source
        if settings.get("do_resize") is False:
            height, width = source.size
            source = Resized(source, (times * height, times * width), Image.Resampling.BICUBIC)
        return canvas_of(self._image_processor, source, settings.new_child(scaled_sizes(settings, times)), name)

    def _tile(self, name: str, level: int, row: int, column: int) -> Tensor:
        zoom = self.zooms[level]
        times = max(zoom)
        canvas = self._canvas(name, times)
        spans, cuts = [], []
        for length, side, index in zip(canvas.size, zoom, (row, column), strict=True):
            made = length // times  # of a tile
            start, end = index * made, (index + 1) * made
            if side != times:  # a little more, from where the coarser pixels begin with finer ones
                start = max(0, start - _REACH) // side * side
                end = min(side * made, -(-(end + _REACH) // side) * side)
            spans.append((start * times // side, end * times // side))
            cuts.append(slice(index * made - start, (index + 1) * made - start))
        (top, bottom), (left, right) = spans
        pixels = canvas.region(top, left, bottom, right)
        return shrunk(_coloured(self._image_processor, pixels, self._settings, name), zoom)[:, cuts[0], cuts[1]]


def check_arithmetic(image_processor: Any, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check on pictures of a few pixels that an image processor does what is expected of its kind.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        One that makes pictures of one size.
    options : mapping
        The keyword arguments of the low-res call.
    names : sequence of str
        Its outputs that are pictures.

    Raises
    ------
    UnsupportedModelError
        If it does something else.
    """
    for seed, size in enumerate(_PROBES):
        probe = np.random.default_rng(seed).integers(0, 256, (3, *size), dtype=np.uint8)
        made = processed(image_processor, to_square(image_processor, probe), options)
        view = SourceView(ArraySource(probe.transpose(1, 2, 0)), image_processor, options, ((1, 1),), tuple(names))
        for name, (expected,) in zip(names, view.read(0, [0]), strict=True):
            own = overview(image_processor, made[name]).double()
            if own.shape != expected.shape or (own - expected).abs().mean() > _TOLERANCE * (own.max() - own.min()):
                raise UnsupportedModelError(
                    f"{type(image_processor).__name__} does something else with pictures than to resize, pad and crop "
                    "them as its settings say, so that no tiles can be read one by one. Give a PIL image instead of a "
                    "flexkit.TileSource, and set levels to 1."
                )


def _coloured(image_processor: Any, pixels: np.ndarray, settings: Mapping[str, Any], name: str) -> Tensor:
    """Pixels, ``(height, width, 3)``, with their colours scaled, channels first."""
    planes = pixels.transpose(2, 0, 1)
    prefix = "high_res_" if name == "high_res_pixel_values" else ""
    rescales, normalizes, factor = (settings.get(key) for key in ("do_rescale", "do_normalize", "rescale_factor"))
    mean, std = settings.get(f"{prefix}image_mean"), settings.get(f"{prefix}image_std")
    if isinstance(image_processor, TorchvisionBackend):
        batch = torch.from_numpy(np.ascontiguousarray(planes))[None]
        scaled: Tensor = image_processor.rescale_and_normalize(
            batch,
            rescales,
            factor,
            normalizes,
            *(tuple(each) if isinstance(each, list) else each for each in (mean, std)),
        )
        return scaled[0]
    if rescales:
        planes = image_processor.rescale(planes, factor, input_data_format="channels_first")
    if normalizes:
        planes = image_processor.normalize(planes, mean, std, input_data_format="channels_first")
    return torch.from_numpy(np.ascontiguousarray(planes))
