"""Clips to search: scenes whose items drift, and show their digits for a moment that sampled frames miss."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from flexkit.encoding import FrameSource
from flexkit.grids import Pair
from flexkit.visual_search.items import COLOURS, GRID, Item, draw_distinct
from flexkit.visual_search.painting import paint_ground, paint_item
from flexkit.visual_search.scene import SIZE

__all__ = ["FRAMES", "SAMPLED", "Clip", "draw_clip"]

FRAMES = 32
"""Of a clip."""
SAMPLED = (4, 12, 20, 28)
"""Those that a model samples."""

_FPS = 8.0
_FEWEST = 6
_SHOWN = 3
"""For how many frames, one behind the other, a digit is seen."""


class Clip(FrameSource):
    """A video of a scene, whose frames are painted when they are read.

    :func:`draw_clip` draws them.

    Parameters
    ----------
    items : tuple of Item
        As they are in the first frame, 6 to 8, no two of one colour.
    later : tuple of Item
        The same in the last one: each has moved to a cell beside its own, which nothing else ever enters.
    shown : tuple of range
        For each item the frames that show its digit. In all others it has none.
    looks : sequence of int
        Seeds of how the ground, and each item, is painted.
    side : int
        Of the frames, in pixels.
    """

    fps = _FPS

    def __init__(
        self,
        items: tuple[Item, ...],
        later: tuple[Item, ...],
        shown: tuple[range, ...],
        looks: Sequence[int],
        side: int,
    ) -> None:
        self.items, self.later, self.shown = items, later, shown
        self.looks, self._side = looks, side

    def __len__(self) -> int:
        return FRAMES

    @property
    def size(self) -> Pair:
        return self._side, self._side

    def at(self, frame: int) -> tuple[Item, ...]:
        """The items with their boxes where they are in a frame, and rows and columns of the first one.

        Parameters
        ----------
        frame : int
            Index of the frame.
        """
        gone = frame / (FRAMES - 1)
        each = zip(self.items, self.later, strict=True)
        return tuple(
            item.shifted(gone * (later.box[0] - item.box[0]), gone * (later.box[1] - item.box[1]))
            for item, later in each
        )

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        ground, *looks = self.looks
        for frame in indices:
            pixels = paint_ground(np.random.default_rng(ground), self._side)
            for item, look, shown in zip(self.at(frame), looks, self.shown, strict=True):
                # From the same source of chance in each frame: an item goes on looking as it did.
                paint_item(np.random.default_rng(look), pixels, item, digit=frame in shown)
            self.decoded += 1
            yield pixels.clip(0, 255).astype(np.uint8)


def draw_clip(seed: int | Sequence[int] = 0, size: int = SIZE) -> Clip:
    """Draw a clip of 32 frames, 8 a second; at any size it is the same clip, in finer or coarser pixels.

    Its digits are those of :func:`draw_scene`: too small for a view of a third of the size. Each is seen in three
    frames, one behind the other, none of which is one of the four that a model samples (4, 12, 20 and 28): these are
    the same to the bit whatever the digits are.

    Parameters
    ----------
    seed : int or sequence of int
        The same seed draws the same clip.
    size : int
        Side in pixels, from 168 on.

    Returns
    -------
    Clip
        ``size`` x ``size`` pixels.

    Examples
    --------
    >>> from flexkit.visual_search import draw_clip, questions
    >>> clip = draw_clip(seed=7)
    >>> len(clip), clip.size, questions(clip, "attribute")[0].text
    (32, (192, 192), 'Which digit is on the object that is orange?')
    """
    random = np.random.default_rng(seed)
    paths = _paths(random)[: int(random.integers(_FEWEST, len(COLOURS) + 1))]
    items = draw_distinct(random, [begin for begin, _ in paths])
    later = tuple(
        replace(item.shifted((column - item.column) / GRID, (row - item.row) / GRID), row=row, column=column)
        for item, (_, (row, column)) in zip(items, paths, strict=True)
    )
    moments = [range(begin, begin + _SHOWN) for begin in range(FRAMES - _SHOWN + 1)]
    unseen = [moment for moment in moments if not set(moment) & set(SAMPLED)]
    shown = tuple(unseen[int(random.integers(len(unseen)))] for _ in items)
    return Clip(items, later, shown, random.integers(2**32, size=len(items) + 1).tolist(), size)


def _paths(random: np.random.Generator) -> list[tuple[Pair, Pair]]:
    """Pairs of cells side by side, in any order; no cell is in two of them."""
    paths: list[tuple[Pair, Pair]] = []
    for row, column in product(range(0, GRID, 2), repeat=2):  # blocks of four cells, cut across or down
        near, far = (row, column), (row + 1, column + 1)
        right, below = (row, column + 1), (row + 1, column)
        paths += [(near, right), (below, far)] if random.random() < 0.5 else [(near, below), (right, far)]
    turned = [path if random.random() < 0.5 else path[::-1] for path in paths]
    return [turned[index] for index in random.permutation(len(turned))]
