"""Scenes to search: small coloured shapes on a cloudy ground, each with a digit too small for a low-res view."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flexkit.visual_search.items import COLOURS, GRID, Item, draw_crowd, draw_distinct, draw_items, named_by_colour
from flexkit.visual_search.painting import paint_ground, paint_item

__all__ = ["SIZE", "Scene", "draw_close_up", "draw_distinct_scene", "draw_scene", "paint_scene"]

SIZE = 192
"""Side of a scene in pixels, unless another is asked for."""


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB, square.
    items : tuple of Item
        What the picture shows; of :func:`draw_scene` 6 to 12.
    """

    image: Image.Image
    items: tuple[Item, ...]


def draw_scene(seed: int | Sequence[int] = 0, size: int = SIZE) -> Scene:
    """Draw a scene; at any size it is the same scene, in finer or coarser pixels.

    A digit is about a twentieth of the scene high. Its strokes have a rim that makes up for them, so that a view of
    a third of the size shows where digits are, at most, but not which; a test proves it.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed draws the same scene.
    size : int
        Side in pixels, from 168 on: below that, digits are hardly to be read in the scene itself.

    Returns
    -------
    Scene
        ``size`` x ``size`` pixels, with items that their colour alone names, and items that it takes both colour and
        shape to name.

    Examples
    --------
    >>> from flexkit.visual_search import draw_scene
    >>> scene = draw_scene(seed=7)
    >>> scene.image.size, 6 <= len(scene.items) <= 12
    ((192, 192), True)
    """
    random = np.random.default_rng(seed)
    return paint_scene(random, draw_items(random), size)


def draw_distinct_scene(seed: int | Sequence[int]) -> Scene:
    """Draw a scene of 6 to 8 items, no two of one colour: there is more to ask about it than about others.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed draws the same scene.
    """
    random = np.random.default_rng(seed)
    count = int(random.integers(6, len(COLOURS) + 1))
    cells = random.permutation(GRID * GRID)[:count].tolist()
    return paint_scene(random, draw_distinct(random, [divmod(cell, GRID) for cell in cells]))


def draw_close_up(seed: int | Sequence[int], zoom: int, *, distinct: bool = False) -> Scene:
    """Draw one tile of a crowded scene, as large as in a scene of the usual size.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed draws the same tile.
    zoom : int
        Tiles along the scene's side.
    distinct : bool
        Whether no two items are of one colour.

    Returns
    -------
    Scene
        With items that their colour alone names, of the tile; their rows and columns are those in the whole scene.
    """
    random = np.random.default_rng(seed)
    while True:
        tile = row, column = tuple(random.integers(zoom, size=2).tolist())
        inside = tuple(
            item for item in draw_crowd(random) if (item.row * zoom // GRID, item.column * zoom // GRID) == tile
        )
        if distinct:
            inside = draw_distinct(random, [(item.row, item.column) for item in inside])
        if named_by_colour(inside):
            break
    side = SIZE // zoom
    left, top = column * side, row * side
    image = paint_scene(random, inside).image.crop((left, top, left + side, top + side))
    return Scene(image, tuple(item.within(tile, zoom) for item in inside))


def paint_scene(random: np.random.Generator, items: tuple[Item, ...], size: int = SIZE) -> Scene:
    """Paint a scene of these items.

    Parameters
    ----------
    random : numpy.random.Generator
        Source of chance.
    items : tuple of Item
        No more than one in a cell.
    size : int
        Side in pixels.
    """
    pixels = paint_ground(random, size)
    for item in items:
        paint_item(random, pixels, item)
    return Scene(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), items)
