"""Pictures and videos that are not decoded as a whole, on their way through a processor that knows no such thing."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from flexkit.encoding import ArraySource, FrameSource, TileSource
from flexkit.errors import HighResInputError

__all__ = ["as_source", "clips_of", "source_of", "with_overviews"]

_KEY = "flexkit_source"
_LONGEST = 2048
"""Longer side of an overview in pixels, which the image processor then makes its low-res view of."""


def with_overviews(value: Any) -> Any:
    """A value in which overviews that remember them have taken the place of sources, however nested.

    Parameters
    ----------
    value : object
        An argument of a processor: images, videos, or a conversation.
    """
    if isinstance(value, FrameSource):
        return _Clip(value)
    if isinstance(value, TileSource):
        overview = value.overview(_LONGEST).copy()
        overview.info[_KEY] = value  # which copies of the overview keep
        return overview
    if isinstance(value, dict):
        return {key: with_overviews(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_overviews(each) for each in value)
    return value


class _Clip(np.ndarray):
    """A pixel that passes for a video, and remembers the one that it stands for."""

    source: FrameSource

    def __new__(cls, source: FrameSource) -> "_Clip":
        pixel = np.zeros((1, 1, 1, 3), np.uint8).view(cls)
        pixel.source = source
        return pixel

    def __array_finalize__(self, other: Any) -> None:
        self.source = getattr(other, "source", None)  # type: ignore[assignment]


def clips_of(videos: Any) -> list[FrameSource]:
    """The sources that videos stand for, which may come in a list for each text; empty if they are none.

    Raises
    ------
    HighResInputError
        If some are and some are not.
    """
    flat = _flat(videos)
    sources = [video.source for video in flat if isinstance(video, _Clip)]
    if sources and len(sources) < len(flat):
        raise HighResInputError("some videos of a call are flexkit.FrameSource and some are not: make all of one kind.")
    return sources


def _flat(videos: Any) -> list[Any]:
    if isinstance(videos, list | tuple) and any(isinstance(each, list | tuple | _Clip) for each in videos):
        return [video for each in videos for video in (_flat(each) if isinstance(each, list | tuple) else [each])]
    return [videos]


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
