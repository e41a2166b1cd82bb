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


def paint_item(random: np.random.Generator, pixels: Array, item: Item) -> None:
    """Paint an item over the ground.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    pixels : numpy.ndarray
        ``(size, size, 3)``, float32; changed.
    item : Item
        What to paint.
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

    down, aside = random.uniform(-_SHIFT, _SHIFT, 2) * size / GRID
    centre, middle = (share * size for share in item.digit_at)
    ink = _placed(
        _digit(item.digit, size), covered.shape[:2], middle + down - rows.start, centre + aside - columns.start
    )
    area = pixels[rows, columns]
    area += covered * (colour - _CONTRAST * ink[..., None] - area)


_DISTANCES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": lambda x, y, radius: np.hypot(x, y) - 0.95 * radius,
    "square": lambda x, y, radius: np.maximum(abs(x), abs(y)) - 0.82 * radius,
    "triangle": lambda x, y, radius: np.maximum(y - 0.8 * radius, (2 * abs(x) - y - radius) / 5**0.5),
    "cross": lambda x, y, radius: np.maximum(
        np.minimum(abs(x), abs(y)) - 0.42 * radius, np.maximum(abs(x), abs(y)) - radius
    ),
}
"""From a place relative to the centre to the distance from the outline, negative inside."""


def _placed(ink: Array, shape: tuple[int, ...], middle: float, centre: float) -> Array:
    """Ink around a place of an otherwise empty area; what would lie outside is cut off."""
    area = np.zeros(shape)
    row, column = round(middle - ink.shape[0] / 2), round(centre - ink.shape[1] / 2)
    top, left = max(row, 0), max(column, 0)
    inside = ink[top - row : shape[0] - row, left - column : shape[1] - column]
    area[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return area


@cache
def _digit(digit: int, size: int) -> Array:
    """The strokes of a digit, positive, with a rim that makes up for them: what a blur leaves of it is near nothing."""
    height, rim = round(_DIGIT * size / GRID), _RIM * size
    side = height + 2 * round(6 * rim)
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(height / _FONT)
    ImageDraw.Draw(image).text((side / 2, side / 2), str(digit), fill=255, font=font, anchor="mm")
    ink: Array = np.asarray(image, dtype=np.float64) / 255
    for _ in range(2):  # once leaves more of what is coarse
        ink = ink - _blurred(ink, rim)
    return ink


def _blurred(values: Array, width: float) -> Array:
    """By a Gaussian of this standard deviation in pixels."""
    reach = np.arange(-np.ceil(3 * width), np.ceil(3 * width) + 1)
    weights = np.exp(-(reach**2) / (2 * width**2))
    for axis in (0, 1):
        values = np.apply_along_axis(np.convolve, axis, values, weights / weights.sum(), mode="same")
    return values
