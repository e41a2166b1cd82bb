"""A scene to ask about: small shapes in a large picture, each with a digit too small for a low-res view."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Scene", "draw_scene"]

_SIZE = (1344, 1008)
_COLOURS = {  # Okabe and Ito's, told apart by colour-blind people too
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "red": "#D55E00",
    "pink": "#CC79A7",
}
_SIDES = {"circle": 0, "triangle": 3, "square": 4, "hexagon": 6}
_RADIUS = 36


@dataclass(frozen=True)
class Scene:
    """A picture, a question about it and, where it is known, what is true.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB.
    question : str
        About the picture.
    answer : str, optional
        The true one.
    box : tuple of int, optional
        Left, top, right and bottom of what the question is about, in pixels.
    """

    image: Image.Image
    question: str
    answer: str | None = None
    box: tuple[int, int, int, int] | None = None


def draw_scene(seed: int = 0, shapes: int = 14) -> Scene:
    """Draw a scene.

    Parameters
    ----------
    seed : int
        The same seed draws the same scene.
    shapes : int
        How many shapes to draw, 1 to 28; no two have both colour and form in common.

    Returns
    -------
    Scene
        1344 x 1008 pixels; the question asks for the digit on one of the shapes.

    Examples
    --------
    >>> scene = draw_scene()
    >>> scene.image.size, scene.question.startswith("Which digit is on the")
    ((1344, 1008), True)
    """
    random = np.random.default_rng(seed)
    image = _background(random)
    kinds = [(colour, form) for colour in _COLOURS for form in _SIDES]
    chosen = [kinds[index] for index in random.permutation(len(kinds))[:shapes]]
    centres = _places(random, shapes)
    digits = [str(digit) for digit in random.integers(0, 10, shapes)]
    for (colour, form), centre, digit in zip(chosen, centres, digits, strict=True):
        _draw_shape(image, colour, form, centre, digit)
    (colour, form), (x, y) = chosen[0], centres[0]
    return Scene(
        image=image,
        question=f"Which digit is on the {colour} {form}?",
        answer=digits[0],
        box=(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS),
    )


def _background(random: np.random.Generator) -> Image.Image:
    """Pale clouds with some grain."""
    colours = random.integers(130, 200, (6, 8, 1)) + random.integers(-16, 17, (6, 8, 3))
    clouds = Image.fromarray(colours.astype(np.uint8)).resize(_SIZE, Image.Resampling.BICUBIC)
    grain = random.normal(0, 7, (_SIZE[1], _SIZE[0], 1))
    return Image.fromarray((np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8))


def _places(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Centres that keep clear of each other: one for each of some fields, shaken a little."""
    columns, rows = 7, 4
    width, height = _SIZE[0] // columns, _SIZE[1] // rows
    room = (width // 2 - _RADIUS - 4, height // 2 - _RADIUS - 4)
    places = []
    for field in random.permutation(columns * rows)[:count].tolist():
        row, column = divmod(field, columns)
        x, y = (int(random.integers(-side, side + 1)) for side in room)
        places.append((column * width + width // 2 + x, row * height + height // 2 + y))
    return places


def _draw_shape(image: Image.Image, colour: str, form: str, centre: tuple[int, int], digit: str) -> None:
    draw = ImageDraw.Draw(image)
    x, y = centre
    line = {"fill": _COLOURS[colour], "outline": "black"}
    if sides := _SIDES[form]:
        turn = math.pi / 4 if sides == 4 else math.pi / 2
        angles = [turn + 2 * math.pi * corner / sides for corner in range(sides)]
        draw.polygon([(x + _RADIUS * math.cos(a), y - _RADIUS * math.sin(a)) for a in angles], width=2, **line)
    else:
        draw.ellipse((x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS), width=2, **line)
    draw.text((x, y), digit, fill="black", anchor="mm", font=ImageFont.load_default(34))
