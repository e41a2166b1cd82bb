"""Which part of a picture an image processor shows, found by showing it pictures that say where they are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexkit.encoding.sources import Box
from flexkit.zoom import Pair

__all__ = ["Shown", "find_shown"]

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


def find_shown(process: Callable[[np.ndarray], Tensor], size: Pair) -> Shown:
    """Process a black and a white picture, and one whose colours rise from left to right and from top to bottom.

    Parameters
    ----------
    process : callable
        From a picture ``(3, height, width)``, uint8, to what is made of it, ``(3, ...)``, however scaled.
    size : tuple of int
        Height and width of the pictures.
    """
    black, white, rising = (process(picture).double() for picture in (_flat(size, 0), _flat(size, 255), _rising(size)))
    reach = (white - black).abs().amin(0)
    inside = reach > reach.max() / 2  # where both look alike is padding
    unit = (white - black)[:, inside].mean(1)
    shares = (rising - black) / unit[:, None, None]
    across, down = _line(shares[0], inside, 1), _line(shares[1], inside, 0)
    outside = (black[:, ~inside][:, 0] - black[:, inside].mean(1)) / unit if not inside.all() else torch.zeros(3)
    red, green, blue = (round(255 * min(1.0, max(0.0, share))) for share in outside.tolist())
    return Shown((across[0], down[0], across[1], down[1]), (red, green, blue))


def _flat(size: Pair, value: int) -> np.ndarray:
    return np.full((3, *size), value, dtype=np.uint8)


def _rising(size: Pair) -> np.ndarray:
    """Red says how far to the right a pixel is, green how far down, finer than 255 steps in the mean over the other."""
    height, width = size
    across, down = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    dither = np.random.default_rng(0).random((2, height, width))
    red = np.floor(255 * across[None, :] + dither[0])
    green = np.floor(255 * down[:, None] + dither[1])
    return np.stack([red, green, np.zeros(size)]).astype(np.uint8)


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
