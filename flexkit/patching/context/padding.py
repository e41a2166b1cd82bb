"""Pictures of several sizes, padded at their bottom and right to one, with a mask of their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from flexkit.grids import Pair, split_tiles, stitch_tiles

__all__ = ["Padding", "cut", "stitched"]


@dataclass(frozen=True)
class Padding:
    """How a family says where its pictures are padded."""

    mask: str
    """The input, True or 1 where there is a picture."""
    whole_cells: bool
    """Whether a cell with some padding in it counts as padding."""

    def grids(self, mask: Tensor, cell: int) -> list[Pair]:
        """Rows and columns of the cells that are a picture, of masks ``(images, height, width)``."""
        rest = 0 if self.whole_cells else cell - 1
        heights, widths = mask[:, :, 0].long().sum(1), mask[:, 0].long().sum(1)
        return [(rows, columns) for rows, columns in ((torch.stack([heights, widths], 1) + rest) // cell).tolist()]


def cut(view: Tensor, grids: Sequence[Pair], zoom: Pair, cell: int, size: Pair) -> Tensor:
    """Tiles of high-res views, each in the corner where its low-res picture is.

    Parameters
    ----------
    view : torch.Tensor
        ``(images, channels, height, width)``; what is behind the last whole cell is not looked at.
    grids : sequence of tuple of int
        Rows and columns of the cells of each low-res picture, without padding.
    zoom : tuple of int
        Tiles along rows and columns.
    cell : int
        Side of a cell in pixels.
    size : tuple of int
        Height and width of a low-res picture with its padding.

    Returns
    -------
    torch.Tensor
        ``(images, tiles, channels, *size)``.
    """
    tiles = []
    for picture, (rows, columns) in zip(view, grids, strict=True):
        height, width = rows * cell, columns * cell
        parts = split_tiles(picture[None, :, : zoom[0] * height, : zoom[1] * width], zoom)
        tiles.append(pad(parts, (0, size[1] - width, 0, size[0] - height)))
    return torch.cat(tiles)


def stitched(tiles: Tensor, own: Pair, grid: Pair, zoom: Pair) -> Tensor:
    """Features of an image from those of its tiles; zero where it is padded.

    Parameters
    ----------
    tiles : torch.Tensor
        ``(tiles, rows * columns, dim)``.
    own : tuple of int
        Rows and columns of the low-res picture without padding.
    grid : tuple of int
        The same with it.
    zoom : tuple of int
        Tiles along rows and columns.

    Returns
    -------
    torch.Tensor
        ``(zoom_rows * rows * zoom_columns * columns, dim)``, of the grid with padding.
    """
    cells = rearrange(tiles, "t (r c) d -> t r c d", r=grid[0])[:, : own[0], : own[1]]
    whole = stitch_tiles(cells.flatten(1, 2)[None], own, zoom)[0]
    rows, columns = (times * (full - part) for times, full, part in zip(zoom, grid, own, strict=True))
    return pad(whole, (0, 0, 0, columns, 0, rows)).flatten(0, 1)
