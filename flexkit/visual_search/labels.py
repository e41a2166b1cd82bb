"""What every token of a view shows: what a vision tower is taught."""

import numpy as np

from flexkit.visual_search.items import COLOURS, GRID, SHAPES, Item
from flexkit.visual_search.questions import VALUES

__all__ = ["CLASSES", "CLASS_WORDS", "SHOWN", "UNKNOWN", "covered_tokens", "token_labels"]

CLASS_WORDS = {"colour": tuple(COLOURS), **VALUES}
"""What a token tells of the item that it shows, by the words of the answers."""
CLASSES = {name: len(words) + (name == "colour") for name, words in CLASS_WORDS.items()}
"""How many there are of each; the last colour is that of the ground."""
UNKNOWN = -100
"""Label of what a token need not tell."""

SHOWN, _HINTED = 0.2, 0.02
"""How much of a token an item covers that it is taught to tell, and one that it may leave out."""
_REACH = 0.17 / GRID
"""How far from its place a digit reaches, as a share of the scene's side."""

Array = np.ndarray


def token_labels(items: tuple[Item, ...], tile: tuple[int, int], zoom: int, side: int) -> Array:
    """Label the tokens of one tile of a scene, or of the whole.

    Parameters
    ----------
    items : tuple of Item
        Of the scene.
    tile : tuple of int
        Row and column of the tile.
    zoom : int
        Tiles along the scene's side. From afar (1) digits are unknown; from close by rows and columns are.
    side : int
        Tokens along the tile's side.

    Returns
    -------
    numpy.ndarray
        ``(5, side²)``, int64, in the order of :data:`CLASSES`; :data:`UNKNOWN` where a token need not tell.
    """
    labels = np.full((len(CLASSES), side, side), UNKNOWN)
    labels[0] = len(COLOURS)
    most = np.zeros((side, side))
    for item in items:
        seen = item.within(tile, zoom)
        left, top, right, bottom = seen.box
        if max(left, top) >= 1 or min(right, bottom) <= 0:
            continue
        covered = covered_tokens(seen.box, side)
        x, y = seen.digit_at
        under_digit = np.outer(*(_covered(at - _REACH * zoom, at + _REACH * zoom, side) > 0 for at in (y, x)))
        told = np.where(under_digit | (covered > SHOWN), np.array(_told(item))[:, None, None], UNKNOWN)
        told[[2] if zoom == 1 else [3, 4]] = UNKNOWN
        told[2, ~np.outer(*(_is_near(at, side) for at in (y, x)))] = UNKNOWN
        covered += under_digit
        here = (covered > _HINTED) & (covered > most)
        labels[:, here] = told[:, here]
        most = np.maximum(most, covered)
    return labels.reshape(len(CLASSES), -1)


def covered_tokens(box: tuple[float, float, float, float], side: int) -> Array:
    """How much of each token a box covers, ``(side, side)``.

    Parameters
    ----------
    box : tuple of float
        Left, top, right and bottom, in shares of the view's side.
    side : int
        Tokens along the view's side.
    """
    left, top, right, bottom = box
    return np.outer(_covered(top, bottom, side), _covered(left, right, side))


def _told(item: Item) -> tuple[int, ...]:
    return list(COLOURS).index(item.colour), SHAPES.index(item.shape), item.digit, item.row, item.column


def _covered(low: float, high: float, side: int) -> Array:
    """How much of each token a stretch covers, in one direction."""
    edges = np.arange(side + 1) / side
    return side * (np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(0)


def _is_near(place: float, side: int) -> Array:
    """Which tokens have their centre less than a token away from a place, in one direction."""
    centres = (np.arange(side) + 0.5) / side
    return abs(centres - place) < 1 / side
