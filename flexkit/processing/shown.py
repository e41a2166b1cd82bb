"""Which part of a picture an image processor shows, found by showing it pictures that say where they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexkit.encoding import TileSource
from flexkit.encoding.sources import Box
from flexkit.zoom import Pair

__all__ = ["Shown", "find_shown", "probes"]

_MOST, _REST = 0.97, 0.02
"""Shares of a colour that say where a pixel is along one axis, and along the other."""
_SNAP = 1e-3
"""Edges this close to those of the picture are those of the picture, as shares of it."""


@dataclass(frozen=True)
class Shown:
    """A part of pictures of one size.

    Attributes
    ----------
    box : tuple of float
        Left, top, right and bottom as shares of the picture; below 0 and above 1 is padding.
    background : tuple of int
        The colour of the padding, RGB.
    """

    box: Box
    background: tuple[int, int, int]

    def read(self, source: TileSource, part: Box, size: Pair, resample: int) -> Image.Image:
        """A part of what is shown, padded where that is outside the picture.

        Parameters
        ----------
        source : TileSource
            The picture.
        part : tuple of float
            Left, top, right and bottom as shares of what is shown.
        size : tuple of int
            Height and width to resize to.
        resample : int
            A filter of PIL.
        """
        (left, right), (top, bottom) = (self._edges(part, axis, source.size[1 - axis]) for axis in (0, 1))
        canvas = Image.new("RGB", size[::-1], self.background)
        across, down = size[1] / (right - left), size[0] / (bottom - top)
        height, width = source.size
        inside = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
        x, y = round((inside[0] - left) * across), round((inside[1] - top) * down)
        ends = round((inside[2] - left) * across), round((inside[3] - top) * down)
        if x < ends[0] and y < ends[1]:
            canvas.paste(source.read(inside, (ends[1] - y, ends[0] - x), resample), (x, y))
        return canvas

    def size_of(self, source: TileSource) -> Pair:
        """Height and width of what is shown of a picture, in its own pixels."""
        left, top, right, bottom = self.box
        return max(1, round((bottom - top) * source.size[0])), max(1, round((right - left) * source.size[1]))

    def _edges(self, part: Box, axis: int, length: int) -> tuple[float, float]:
        """Where a part starts and ends along an axis, in pixels of the picture."""
        start, end = self.box[axis], self.box[axis + 2]
        first, last = (start + part[edge] * (end - start) for edge in (axis, axis + 2))
        return first * length, last * length


def probes(size: Pair) -> list[np.ndarray]:
    """A black and a white picture, and one whose colours rise from left to right and from top to bottom.

    Parameters
    ----------
    size : tuple of int
        Height and width.

    Returns
    -------
    list of numpy.ndarray
        Each ``(3, height, width)``, uint8.
    """
    return [np.full((3, *size), 0, np.uint8), np.full((3, *size), 255, np.uint8), _rising(size)]


def find_shown(made: Sequence[Tensor]) -> Shown:
    """What is shown of a picture, by what an image processor made of :func:`probes` in its size.

    Parameters
    ----------
    made : sequence of torch.Tensor
        For each of them ``(3, ...)``, however scaled.
    """
    black, white, rising = (picture.double() for picture in made)
    reach = (white - black).abs().amin(0)
    inside = reach > reach.max() / 2  # where both look alike is padding
    unit = (white - black)[:, inside].median(1).values  # at the edge of the padding filters mix it in
    shares = (rising - black) / torch.where(inside, white - black, 1.0)
    right, below = (_MOST * shares[0] - _REST * shares[1], _MOST * shares[1] - _REST * shares[0])
    whole = _MOST**2 - _REST**2
    across, down = _line(right / whole, inside, 1), _line(below / whole, inside, 0)
    outside = (
        (black[:, ~inside][:, 0] - black[:, inside].median(1).values) / unit if not inside.all() else torch.zeros(3)
    )
    red, green, blue = (round(255 * min(1.0, max(0.0, share))) for share in outside.tolist())
    return Shown((across[0], down[0], across[1], down[1]), (red, green, blue))


def _rising(size: Pair) -> np.ndarray:
    """Red says how far to the right a pixel is, green how far down, each with a little of the other.

    So the rounding of colours is not the same all along a row or column, and the mean over it knows places better.
    """
    height, width = size
    across, down = (np.arange(width) + 0.5)[None, :] / width, (np.arange(height) + 0.5)[:, None] / height
    rising = np.stack([_MOST * across + _REST * down, _MOST * down + _REST * across, 0 * across * down])
    return np.floor(255 * rising + np.random.default_rng(0).random(rising.shape)).astype(np.uint8)


def _line(shares: Tensor, inside: Tensor, axis: int) -> tuple[float, float]:
    """Where a line through the shares of the picture that are shown along an axis starts and ends."""
    places = inside.any(1 - axis).nonzero().flatten()
    means = (shares * inside).sum(1 - axis)[places] / inside.sum(1 - axis)[places]
    if len(places) > 8:  # filters see less at the edge
        places, means = places[2:-2], means[2:-2]
    x = (places.double() + 0.5) / shares.shape[axis]
    centred = x - x.mean()
    slope = float((centred * (means - means.mean())).sum() / (centred**2).sum().clamp_min(1e-12))
    start = float(means.mean()) - slope * float(x.mean())
    return _snapped(start, 0.0), _snapped(start + slope, 1.0)


def _snapped(edge: float, to: float) -> float:
    return to if abs(edge - to) < _SNAP else edge
