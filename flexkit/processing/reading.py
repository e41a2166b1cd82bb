"""Images as people give them, read before anything is made of them."""

from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from flexkit.encoding.sources import loaded
from flexkit.errors import HighResInputError

__all__ = ["read_images", "read_pixels"]


def read_images(images: Any, image_processor: Any, place: str = "") -> Any:
    """Fetch what is given as a path, an address or base64, and check that every image can be read.

    Parameters
    ----------
    images : PIL.Image.Image or numpy.ndarray or torch.Tensor or str or list
        One image, or lists of them, nested to any depth.
    image_processor : transformers.BaseImageProcessor
        Its ``fetch_images`` does the fetching.
    place : str
        Where in the outermost list the images are, for the error message.

    Returns
    -------
    PIL.Image.Image or numpy.ndarray or torch.Tensor or list
        The images, nested as they were given.

    Raises
    ------
    HighResInputError
        If an image cannot be read, has no pixels, or holds values that are not finite.
    """
    if isinstance(images, list | tuple):
        return [read_images(each, image_processor, f"{place}[{index}]") for index, each in enumerate(images)]
    try:
        image = image_processor.fetch_images(images)
        if isinstance(image, Image):
            loaded(image)
    except Exception as error:
        given = f"{images[:60]!r}" if isinstance(images, str) else f"a {type(images).__name__}"
        raise HighResInputError(
            f"images{place} cannot be read: {error} Given was {given}; give a PIL image, an array, a tensor, "
            "a path or an address."
        ) from error
    if not isinstance(image, Image):
        _check_values(image, place)
    return image


def read_pixels(image: Any, image_processor: Any, **settings: Any) -> Any:
    """An image before any resizing, ``(channels, height, width)``, as the image processor reads it.

    Parameters
    ----------
    image : PIL.Image.Image or numpy.ndarray or torch.Tensor
        One image.
    image_processor : transformers.BaseImageProcessor
        The image processor; one without a backend reads as those of PIL do.
    **settings
        ``do_convert_rgb`` and ``input_data_format``.

    Returns
    -------
    numpy.ndarray or torch.Tensor
        Which of them depends on the backend.
    """
    has_backend = isinstance(image_processor, PilBackend | TorchvisionBackend)
    reader = image_processor if has_backend else PilBackend()
    return reader.process_image(image, **settings)


def _check_values(pixels: np.ndarray | torch.Tensor, place: str) -> None:
    if 0 in pixels.shape:
        raise HighResInputError(f"images{place} has no pixels: its shape is {tuple(pixels.shape)}.")
    if not _is_finite(pixels):
        raise HighResInputError(f"images{place} holds values that are not finite; check how it was made.")


def _is_finite(pixels: np.ndarray | torch.Tensor) -> bool:
    if isinstance(pixels, torch.Tensor):
        return bool(pixels.isfinite().all())
    return pixels.dtype.kind != "f" or bool(np.isfinite(pixels).all())
