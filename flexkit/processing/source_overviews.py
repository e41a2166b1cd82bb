"""Pictures that are not decoded as a whole, on their way through a processor that knows pictures only."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from flexkit.encoding import ArraySource, TileSource
from flexkit.errors import HighResInputError

__all__ = ["as_source", "source_of", "with_overviews"]

_KEY = "flexkit_source"
_LONGEST = 2048
"""Longer side of an overview in pixels, which the image processor then makes its low-res view of."""


def with_overviews(value: Any) -> Any:
    """A value in which overviews that remember them have taken the place of sources, however nested.

    Parameters
    ----------
    value : object
        An argument of a processor: images, or a conversation.
    """
    if isinstance(value, TileSource):
        overview = value.overview(_LONGEST).copy()
        overview.info[_KEY] = value  # which copies of the overview keep
        return overview
    if isinstance(value, dict):
        return {key: with_overviews(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_overviews(each) for each in value)
    return value


def source_of(image: Any) -> TileSource | None:
    """The source of which an image is the overview, if it is one.

    Parameters
    ----------
    image : PIL.Image.Image or numpy.ndarray or torch.Tensor
        As it reaches the image processor.
    """
    return image.info.get(_KEY) if isinstance(image, Image.Image) else None


def as_source(pixels: Any) -> TileSource:
    """A picture that is in memory already.

    Parameters
    ----------
    pixels : numpy.ndarray or torch.Tensor
        ``(channels, height, width)``.

    Raises
    ------
    HighResInputError
        If it is not 8 bits of red, green and blue.
    """
    array = np.moveaxis(pixels.numpy() if isinstance(pixels, torch.Tensor) else np.asarray(pixels), 0, -1)
    if array.dtype != np.uint8 or array.shape[-1] != 3:
        raise HighResInputError(
            f"tiles are cut from pictures of uint8 in RGB, got {array.dtype} of shape {array.shape}; give a PIL image."
        )
    return ArraySource(array)
