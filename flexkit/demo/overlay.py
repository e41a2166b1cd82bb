"""Where a layer looked, drawn over the picture."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

__all__ = ["Box", "draw_box", "overlay", "padded_square", "view_of"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of a square's side."""

_EDGE = (255, 176, 0)
_DARKEST, _LIGHTEST = 0.4, 1.0


def padded_square(image: Image.Image, side: int) -> Image.Image:
    """An image as the model's processor pads it to a square, at a size of choice.

    Parameters
    ----------
    image : PIL.Image.Image
        RGB.
    side : int
        Of the result, in pixels.
    """
    return ImageOps.pad(image, (side, side), color=(122, 116, 104))


def view_of(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture that a model is given, from its normalised pixels.

    Parameters
    ----------
    pixel_values : torch.Tensor
        ``(3, height, width)``, floating.
    mean, std : sequence of float
        Of the normalisation, one a channel.
    """
    pixels = np.asarray(pixel_values.permute(1, 2, 0)) * np.asarray(std) + np.asarray(mean)
    return Image.fromarray((255 * pixels).round().clip(0, 255).astype(np.uint8))


def overlay(square: Image.Image, mask: Tensor, scores: Tensor) -> Image.Image:
    """Show selected tokens in colour, with a rim, and the rest grey: the lighter, the more attention it got.

    Parameters
    ----------
    square : PIL.Image.Image
        The padded picture.
    mask : torch.Tensor
        ``(rows, columns)``, bool: the selected high-res tokens.
    scores : torch.Tensor
        ``(rows, columns)`` of the low-res grid, floating: the attention that was selected by.

    Returns
    -------
    PIL.Image.Image
        RGB, of the size of ``square``.
    """
    pixels = np.asarray(square, dtype=np.float32)
    attention = scores.float().numpy()
    attention = attention / max(float(attention.max()), 1e-12)
    light = _stretched(_DARKEST + (_LIGHTEST - _DARKEST) * attention, square.size)[..., None]
    grey = np.asarray(square.convert("L"), dtype=np.float32)[..., None]
    selected = _stretched(mask.numpy().astype(np.float32), square.size) > 0.5
    shown = np.where(selected[..., None], pixels, grey * light)
    shown[_rim(selected)] = _EDGE
    return Image.fromarray(shown.round().astype(np.uint8))


def draw_box(square: Image.Image, box: Box) -> Image.Image:
    """A copy with a frame around a part of it.

    Parameters
    ----------
    square : PIL.Image.Image
        The padded picture.
    box : tuple of float
        Shares of the side.
    """
    framed = square.copy()
    left, top, right, bottom = (round(share * (side - 1)) for share, side in zip(box, 2 * square.size, strict=True))
    draw = ImageDraw.Draw(framed)
    for inset, colour, width in ((0, "black", 7), (2, "white", 3)):
        draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=colour, width=width)
    return framed


def _stretched(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(cells.astype(np.float32)).resize(size, Image.Resampling.NEAREST))


def _rim(selected: np.ndarray, width: int = 3) -> np.ndarray:
    """The outermost pixels of what is selected."""
    inner = np.pad(selected, width)
    for axis in (0, 1):
        inner = np.logical_and.reduce([np.roll(inner, shift, axis) for shift in range(-width, width + 1)])
    rim: np.ndarray = selected & ~inner[width:-width, width:-width]
    return rim
