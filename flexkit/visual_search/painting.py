"""How scenes are painted: a cloudy ground, blotchy shapes, and digits of which nothing is left from afar."""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flexkit.visual_search.items import COLOURS, GRID, Item

__all__ = ["paint_ground", "paint_item"]

Array = np.ndarray

_TINT, _MOTTLE, _GRAIN = 9, 20, 4
"""Of 255: how far colours differ from item to item, within an item, and from pixel to pixel."""
_DARKEST, _LIGHTEST = 72, 183
"""Of the colours of items: room for the rim of a digit to be lighter, and for its strokes to be darker."""
_CONTRAST = 120
_DIGIT = 0.28
"""Height of a digit, as a share of its cell."""
_SHIFT = 0.06
"""How far from the middle it may stand."""
_RIM = 1 / 192
"""Width of the rim around a digit's strokes, as a share of the scene's side."""
_FINE = 1536
"""At least so many pixels along a scene's side are digits drawn in."""
_FONT = 0.72
"""Height of the font's digits, as a share of its size."""


def paint_ground(random: np.random.Generator, size: int) -> Array:
    """Clouds with some grain, ``(size, size, 3)``, float32.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    size : int
        Side in pixels.
    """
    colours = random.integers(95, 175, (7, 7, 1)) + random.integers(-14, 15, (7, 7, 3))
    clouds = Image.fromarray(colours.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    # Of a source of its own, since it takes more or less of it at other sizes.
    grain = np.random.default_rng(random.integers(2**32)).standard_normal((size, size, 1), dtype=np.float32)
    return np.asarray(clouds, dtype=np.float32) + _GRAIN * grain


def paint_item(random: np.random.Generator, pixels: Array, item: Item, *, digit: bool = True) -> None:
    """Paint an item over the ground.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    pixels : numpy.ndarray
        ``(size, size, 3)``, float32; changed.
    item : Item
        What to paint.
    digit : bool
        Whether its digit is seen.
    """
    size = len(pixels)
    left, top, right, bottom = (edge * size for edge in item.box)
    columns, rows = slice(int(left), int(np.ceil(right))), slice(int(top), int(np.ceil(bottom)))
    y, x = np.mgrid[rows, columns] + 0.5
    distance = _DISTANCES[item.shape](x - (left + right) / 2, y - (top + bottom) / 2, (right - left) / 2)
    covered = (0.5 - distance).clip(0, 1)[..., None]

    # Blotches about as large as a digit hide what little of it a low-res view keeps.
    mottle = Image.fromarray(random.normal(0, _MOTTLE, (9, 9)).astype(np.float32))
    blotches = np.asarray(mottle.resize(covered.shape[1::-1], Image.Resampling.BICUBIC))[..., None]
    tint = random.normal(0, _TINT, 3)
    colour = (np.asarray(COLOURS[item.colour]) + tint).clip(_DARKEST, _LIGHTEST) + blotches

    down, aside = random.uniform(-_SHIFT, _SHIFT, 2) / GRID
    if digit:
        across, below = item.digit_at
        centre = (across + aside) * size, (below + down) * size
        colour = colour - _CONTRAST * _seen(_digit(item.digit, _finer(size)), size, columns, rows, centre)[..., None]
    area = pixels[rows, columns]
    area += covered * (colour - area)


_DISTANCES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": lambda x, y, radius: np.hypot(x, y) - 0.95 * radius,
    "square": lambda x, y, radius: np.maximum(abs(x), abs(y)) - 0.82 * radius,
    "triangle": lambda x, y, radius: np.maximum(y - 0.8 * radius, (2 * abs(x) - y - radius) / 5**0.5),
    "cross": lambda x, y, radius: np.maximum(
        np.minimum(abs(x), abs(y)) - 0.42 * radius, np.maximum(abs(x), abs(y)) - radius
    ),
}
"""From a place relative to the centre to the distance from the outline, negative inside."""


def _finer(size: int) -> int:
    """The side of the scene in the pixels in which its digits are drawn, so that they look alike at every size."""
    return size * -(-_FINE // size)


def _seen(ink: Image.Image, size: int, columns: slice, rows: slice, centre: tuple[float, float]) -> Array:
    """What these pixels of a scene show of a digit whose centre is there."""
    scale = _finer(size) / size
    left, right = ((edge - centre[0]) * scale + ink.width / 2 for edge in (columns.start, columns.stop))
    top, bottom = ((edge - centre[1]) * scale + ink.height / 2 for edge in (rows.start, rows.stop))
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(ink.resize(shape, Image.Resampling.BICUBIC, box=(left, top, right, bottom)))


@cache
def _digit(digit: int, size: int) -> Image.Image:
    """The strokes of a digit, positive, with a rim that makes up for them: what a blur leaves of it is near nothing.

    In the middle of two cells of a scene of this size.
    """
    side, rim = 2 * size // GRID, _RIM * size
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(round(_DIGIT * size / GRID) / _FONT)
    ImageDraw.Draw(image).text((side / 2, side / 2), str(digit), fill=255, font=font, anchor="mm")
    ink: Array = np.asarray(image, dtype=np.float32) / 255
    for _ in range(2):  # once leaves more of what is coarse
        ink = ink - _blurred(ink, rim)
    return Image.fromarray(ink.astype(np.float32))


def _blurred(values: Array, width: float) -> Array:
    """By a Gaussian of this standard deviation in pixels."""
    reach = np.arange(-np.ceil(3 * width), np.ceil(3 * width) + 1)
    weights = np.exp(-(reach**2) / (2 * width**2))
    for axis in (0, 1):
        values = np.apply_along_axis(np.convolve, axis, values, weights / weights.sum(), mode="same")
    return values
