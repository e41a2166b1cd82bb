"""Pictures resized as the image processor would resize them, and told where they lie on what it makes of them."""

import copy
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_transforms import resize
from transformers.image_utils import to_numpy_array

from flexkit.grids import Pair
from flexkit.processing.outputs import processed

__all__ = ["SmallImageWarning", "extent", "resized", "tell_enlarged"]

_TOLD: weakref.WeakSet[Any] = weakref.WeakSet()


class SmallImageWarning(UserWarning):
    """An image has fewer pixels than its high-res view: it is enlarged, and the view shows no more than is in it."""


def tell_enlarged(image_processor: Any, given: Sequence[int], made: Sequence[int]) -> None:
    """Warn of the first image that is smaller than its high-res view.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        The image processor, of which no other image is told.
    given, made : sequence of int
        Shapes of the image and of the view, height and width last.
    """
    (height, width), (rows, columns) = given[-2:], made[-2:]
    if height < rows and width < columns and image_processor not in _TOLD:
        _TOLD.add(image_processor)
        warnings.warn(
            f"an image of {height} x {width} pixels is enlarged to a high-res view of {rows} x {columns}, which shows "
            "no more than is in it. Give images in their original size; where there is no larger one, the low-res view "
            "alone may be enough: use the plain processor, or a smaller zoom. Others like it are not told.",
            SmallImageWarning,
            stacklevel=2,
        )


def resized(image: Any, size: Pair, settings: Mapping[str, Any], canvas: Pair | None = None) -> Any:
    """A picture in another size, in the upper left corner of a black canvas.

    Parameters
    ----------
    image : numpy.ndarray or torch.Tensor
        ``(channels, height, width)``.
    size : tuple of int
        Height and width to resize to.
    settings : mapping
        ``resample`` names the filter.
    canvas : tuple of int, optional
        Height and width of the canvas; by default ``size``.

    Returns
    -------
    numpy.ndarray
        ``(channels, *canvas)``, in the dtype of ``image``.
    """
    resample = settings.get("resample")
    pil_filter = resample if isinstance(resample, int) else None
    pixels = resize(to_numpy_array(image), size, pil_filter, input_data_format="channels_first")
    height, width = canvas or size
    return np.pad(pixels, ((0, 0), (0, height - size[0]), (0, width - size[1])))


def extent(image_processor: Any, image: Any, options: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], Pair | None]:
    """Process one image alone, and watch how much of the result its picture takes up.

    Parameters
    ----------
    image_processor : transformers.BaseImageProcessor
        An image processor that may pad at the bottom and at the right.
    image : numpy.ndarray or torch.Tensor
        ``(channels, height, width)``.
    options : mapping
        The keyword arguments of the low-res call.

    Returns
    -------
    outputs : mapping
        What the image processor made, as tensors.
    extent : tuple of int, optional
        Height and width of the picture in pixels, without the padding; None if it fills everything.
    """
    extents: list[Pair] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        white = image_processor.resize(*map(_whitened, args), **{name: _whitened(kwargs[name]) for name in kwargs})
        shown = torch.as_tensor(white).flatten(0, -3).any(0)
        extents.append((int(shown.any(1).sum()), int(shown.any(0).sum())))
        return image_processor.resize(*args, **kwargs)

    watcher = copy.copy(image_processor)
    watcher.resize = watched
    outputs = processed(watcher, image, options)
    if extents:
        return outputs, extents[-1]
    resizes = options.get("do_resize", getattr(image_processor, "do_resize", None))
    return outputs, None if resizes else (int(image.shape[-2]), int(image.shape[-1]))


def _whitened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ones_like(value)
    return np.ones_like(value) if isinstance(value, np.ndarray) else value
