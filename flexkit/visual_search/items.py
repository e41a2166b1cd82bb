"""What is in a scene, and where."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

__all__ = [
    "COLOURS",
    "DIGITS",
    "GRID",
    "SHAPES",
    "Item",
    "draw_crowd",
    "draw_distinct",
    "draw_items",
    "named_by_both",
    "named_by_colour",
]

GRID = 6
"""Cells along a side; no cell holds more than one shape, and no shape leaves its cell."""
COLOURS = {
    "red": (222, 44, 44),
    "orange": (246, 146, 28),
    "yellow": (244, 230, 70),
    "green": (52, 172, 66),
    "cyan": (70, 216, 224),
    "blue": (48, 92, 236),
    "purple": (154, 66, 204),
    "pink": (250, 164, 208),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = 10

_FEWEST, _MOST = 6, 12
_LONE = 3
"""How many colours a single item has."""
_RADIUS = (0.38, 0.43)
"""Of a shape, as a share of its cell."""
_BELOW = {"triangle": 0.3}
"""How far below the centre the digit stands, as a share of the radius."""
_FILLED = 0.8
"""How many of the cells of a crowd hold an item."""


@dataclass(frozen=True)
class Item:
    """One shape of a scene.

    Attributes
    ----------
    colour : str
        Of eight.
    shape : str
        Of four; no two items to ask about have both colour and shape in common.
    digit : int
        0 to 9.
    row : int
        Of its cell, 0 to 5.
    column : int
        Likewise.
    box : tuple of float
        Left, top, right and bottom of the shape, as shares of the scene's side.
    """

    colour: str
    shape: str
    digit: int
    row: int
    column: int
    box: tuple[float, float, float, float]

    @property
    def digit_at(self) -> tuple[float, float]:
        """About where the digit stands, as x and y in shares of the scene's side."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom + _BELOW.get(self.shape, 0.0) * (bottom - top)) / 2

    def shifted(self, across: float, down: float) -> "Item":
        """The item with its box elsewhere.

        Parameters
        ----------
        across, down : float
            How far, in shares of the scene's side.
        """
        left, top, right, bottom = self.box
        return replace(self, box=(left + across, top + down, right + across, bottom + down))

    def within(self, tile: tuple[int, int], zoom: int) -> "Item":
        """The item with its box in shares of a tile's side.

        Parameters
        ----------
        tile : tuple of int
            Row and column of the tile.
        zoom : int
            Tiles along the scene's side.
        """
        left, top, right, bottom = (edge * zoom for edge in self.box)
        row, column = tile
        return replace(self, box=(left - column, top - row, right - column, bottom - row))


def draw_items(random: np.random.Generator) -> tuple[Item, ...]:
    """Draw 6 to 12 items; some are named by their colour alone, others by colour and shape only.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    """
    count = int(random.integers(_FEWEST, _MOST + 1))
    while True:
        colours = random.permutation(list(COLOURS)).tolist()
        lone = [(colour, str(random.choice(SHAPES))) for colour in colours[:_LONE]]
        others = random.permutation(list(product(colours[_LONE : 2 * _LONE], SHAPES))).tolist()
        cells = random.permutation(GRID * GRID)[:count].tolist()
        items = tuple(
            _item(random, colour, shape, *divmod(cell, GRID))
            for (colour, shape), cell in zip([*lone, *others[: count - _LONE]], cells, strict=True)
        )
        if named_by_both(items):
            return items


def draw_crowd(random: np.random.Generator) -> tuple[Item, ...]:
    """Draw items into most cells, each of any colour and shape.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    """
    cells = np.flatnonzero(random.random(GRID * GRID) < _FILLED).tolist()
    return tuple(
        _item(random, str(random.choice(list(COLOURS))), str(random.choice(SHAPES)), *divmod(cell, GRID))
        for cell in cells
    )


def draw_distinct(random: np.random.Generator, cells: Sequence[tuple[int, int]]) -> tuple[Item, ...]:
    """Draw an item into each of some cells, no two of one colour: every one is named by its colour.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    cells : sequence of tuple of int
        Rows and columns; no more than there are colours.
    """
    colours = random.permutation(list(COLOURS)).tolist()
    return tuple(
        _item(random, colour, str(random.choice(SHAPES)), *cell)
        for colour, cell in zip(colours[: len(cells)], cells, strict=True)
    )


def named_by_colour(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items whose colour no other has."""
    colours = [item.colour for item in items]
    return tuple(item for item in items if colours.count(item.colour) == 1)


def named_by_both(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The items of which others share the colour, and others the shape."""
    colours, shapes = [item.colour for item in items], [item.shape for item in items]
    return tuple(item for item in items if colours.count(item.colour) > 1 and shapes.count(item.shape) > 1)


def _item(random: np.random.Generator, colour: str, shape: str, row: int, column: int) -> Item:
    radius = float(random.uniform(*_RADIUS))
    x, y = (place + float(random.uniform(radius, 1 - radius)) for place in (column, row))
    box = ((x - radius) / GRID, (y - radius) / GRID, (x + radius) / GRID, (y + radius) / GRID)
    return Item(colour, shape, int(random.integers(DIGITS)), row, column, box)
