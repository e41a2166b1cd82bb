"""A low-res grid of cells, and the finer grid of the high-res view: of a picture, or of the frames of a video."""

import math
from itertools import chain
from operator import mul

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flexkit.errors import ConfigError

__all__ = [
    "Grid",
    "Pair",
    "any_in_cells",
    "check_grid",
    "fractional_positions",
    "frames_and_cells",
    "interpolate_table",
    "pyramid",
    "resample_nearest",
    "split_tiles",
    "stitch_tiles",
    "zoom_along",
    "zoomed",
]

Pair = tuple[int, int]
"""Something along rows, and along columns."""

Grid = tuple[int, ...]
"""Something along rows and columns; of a video along frames, rows and columns."""

_TAPS = 4
"""Of a bicubic filter along one axis."""


def check_grid(name: str, value: object, most: int = 3) -> Grid:
    """Return ``value`` as two positive integers, or if there may be as many as three, or raise :class:`ConfigError`."""
    grid = tuple(value) if isinstance(value, tuple | list) else ()
    if len(grid) not in (2, 3)[: most - 1] or {*map(type, grid)} != {int} or min(grid) < 1:
        expected = "two positive ints (rows, columns)" + ", or three (frames, rows, columns)" * (most > 2)
        raise ConfigError(f"{name} must be {expected}, got {value!r}")
    return grid


def frames_and_cells(grid: Grid) -> Pair:
    """How many frames a grid has, one if it is that of a picture, and how many cells each."""
    *frames, rows, columns = grid
    return math.prod(frames), rows * columns


def zoom_along(zoom: int | Grid, axes: int | None = None) -> Grid:
    """How many high-res cells lie along each of two or three axes of a low-res cell; by default along those given.

    One int is for rows and columns, as a pair is: frames are then those of the low-res view. Of three, frames first, a
    picture, which has two axes, takes the last two.

    Raises
    ------
    ConfigError
        If the zoom is not one, two or three positive ints.
    """
    given = zoom if isinstance(zoom, tuple | list) else (zoom, zoom)
    if len(given) not in (2, 3) or {*map(type, given)} != {int} or min(given) < 1:
        expected = "a positive int, a pair of them (rows, columns) or three (frames, rows, columns)"
        raise ConfigError(f"zoom must be {expected}, got {zoom!r}")
    return tuple(given) if axes is None else (1, *given)[-axes:]


def zoomed(grid: Grid, zoom: Grid) -> Grid:
    """The high-res grid of a low-res one, of as many axes."""
    return tuple(map(mul, grid, zoom))


def pyramid(zoom: Pair, levels: int) -> tuple[Pair, ...]:
    """Zooms of the levels of a pyramid, each ``zoom`` times the one before: 3, 9, 27, ..."""
    return tuple((zoom[0] ** level, zoom[1] ** level) for level in range(1, levels + 1))


def resample_nearest(grid: Tensor, size: Grid) -> Tensor:
    """Resample the last axes of a tensor by nearest neighbour.

    Row ``i`` of the result is row ``floor(i * rows / new rows)`` of ``grid``; columns and frames alike. The new size
    need not be a multiple of the old one.

    Parameters
    ----------
    grid : torch.Tensor
        Shape (..., rows, columns) or (..., frames, rows, columns), any dtype.
    size : tuple of int
        Rows and columns of the result; or frames, rows and columns.

    Returns
    -------
    torch.Tensor
        Shape (...) + size, dtype of ``grid``.

    Examples
    --------
    >>> resample_nearest(torch.tensor([[True, False]]), (1, 5)).int().tolist()
    [[1, 1, 1, 0, 0]]
    """
    axes = len(size)
    front, lengths = grid.shape[:-axes], grid.shape[-axes:]
    blocks, repeated = [*front], [*front]
    for new, old in zip(size, lengths, strict=True):
        if new % old:
            break
        blocks += old, 1
        repeated += old, new // old
    else:  # a faster way to the same
        return grid.reshape(blocks).expand(repeated).reshape(*front, *size)
    for axis, (new, old) in enumerate(zip(size, lengths, strict=True), start=len(front)):
        grid = grid.index_select(axis, torch.arange(new, device=grid.device) * old // new)
    return grid


def any_in_cells(tokens: Tensor, grid: Grid, zoom: Grid) -> Tensor:
    """Low-res cells that hold a high-res token of a mask.

    Parameters
    ----------
    tokens : torch.Tensor
        Shape (..., tokens), bool, in raster order of the high-res grid.
    grid, zoom : tuple of int
        Low-res cells, and high-res tokens of a cell, along the same axes.

    Returns
    -------
    torch.Tensor
        Shape (...) + grid, bool.
    """
    blocks = tokens.reshape(*tokens.shape[:-1], *chain.from_iterable(zip(grid, zoom, strict=True)))
    return blocks.any(dim=tuple(range(-1, -2 * len(grid), -2)))


def split_tiles(images: Tensor, zoom: int | Grid) -> Tensor:
    """Cut images into ``zoom`` tiles along each axis, in raster order (paper, section 3.1).

    Parameters
    ----------
    images : torch.Tensor
        ``(batch, channels, zoom_rows * height, zoom_columns * width)``, any dtype.
    zoom : int or tuple of int
        Tiles along rows and columns.

    Returns
    -------
    torch.Tensor
        ``(batch, zoom_rows * zoom_columns, channels, height, width)``.

    Raises
    ------
    ConfigError
        If the sides of the images are no multiples of the zoom.
    """
    rows, columns = zoom_along(zoom, 2)
    if images.ndim != 4 or images.shape[-2] % rows or images.shape[-1] % columns:
        raise ConfigError(
            f"images have shape {tuple(images.shape)}; expected (batch, channels, height, width) "
            f"with a height divisible by {rows} and a width by {columns}: resize to a multiple of the zoom."
        )
    return rearrange(images, "b c (r h) (s w) -> b (r s) c h w", r=rows, s=columns)


def stitch_tiles(features: Tensor, grid: Grid, zoom: int | Grid) -> Tensor:
    """Stitch the features of tiles into one grid; the inverse of cutting.

    Parameters
    ----------
    features : torch.Tensor
        ``(batch, zoom_rows * zoom_columns, rows * columns, dim)``: tiles, and cells of each, in raster order.
    grid : tuple of int
        Rows and columns of one tile.
    zoom : int or tuple of int
        Tiles along rows and columns.

    Returns
    -------
    torch.Tensor
        ``(batch, zoom_rows * rows, zoom_columns * columns, dim)``.

    Raises
    ------
    ConfigError
        If there are not that many tiles, or cells in a tile.
    """
    zoom_rows, zoom_columns = zoom_along(zoom, 2)
    rows, columns = grid
    if features.ndim != 4 or features.shape[1:3] != (zoom_rows * zoom_columns, rows * columns):
        raise ConfigError(
            f"features have shape {tuple(features.shape)}; expected "
            f"(batch, {zoom_rows * zoom_columns}, {rows * columns}, dim): "
            f"{zoom_rows} x {zoom_columns} tiles of {rows} x {columns} cells."
        )
    return rearrange(features, "b (y x) (r c) d -> b (y r) (x c) d", y=zoom_rows, r=rows, c=columns)


def interpolate_table(table: Tensor, grid: Grid, zoom: int | Grid, tokens: Tensor | None = None) -> Tensor:
    """Interpolate a cosine or sine table of the low-res image tokens to the high-res grid, as published.

    The *values* are interpolated, bicubically and with half-pixel centres, not the angles: the result is not
    a rotation, and projections trained with it expect exactly this. Between frames of a video they are alike.

    Parameters
    ----------
    table : torch.Tensor
        ``(..., cells, dim)``, cells in raster order, frame by frame.
    grid : tuple of int
        Low-res ``(rows, columns)``, or ``(frames, rows, columns)``.
    zoom : int or tuple of int
        High-res cells per low-res cell and axis; one int, or two, for rows and columns.
    tokens : torch.Tensor, optional
        ``(tokens,)``, int64: the high-res tokens that are wanted, in raster order; all by default.

    Returns
    -------
    torch.Tensor
        ``(..., high-res cells, dim)``, or ``(..., tokens, dim)``, in the dtype of ``table``.
    """
    if table.is_complex():
        real, imaginary = (interpolate_table(part, grid, zoom, tokens) for part in (table.real, table.imag))
        return torch.complex(real, imaginary)
    factors, batch = zoom_along(zoom, len(grid)), table.shape[:-2]
    size = tuple(cells * factor for cells, factor in zip(grid, factors, strict=True))
    cells = table.reshape(-1, *table.shape[-2:]).to(torch.promote_types(table.dtype, torch.float32))
    if tokens is not None and len(tokens) * _TAPS ** len(grid) < math.prod(size):
        index, weight = _around(grid, size, tokens, cells)
        whole = (cells[:, index] * weight[..., None]).sum(-2)
    else:
        rows, columns = grid[-2:]
        pictures = rearrange(cells, "b (f r c) d -> (b f) d r c", r=rows, c=columns)
        pictures = F.interpolate(pictures, size=size[-2:], mode="bicubic", align_corners=False)
        whole = rearrange(pictures, "(b f) d r c -> b f (r c) d", b=len(cells))
        if whole.shape[1] != math.prod(size[:-2]):
            whole = torch.einsum("gf,bfnd->bgnd", _weights(grid[0], size[0], cells), whole)
        whole = whole.flatten(1, 2)
        whole = whole if tokens is None else whole[:, tokens]
    return whole.reshape(*batch, *whole.shape[1:]).to(table.dtype)


def _around(grid: Grid, size: Grid, tokens: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Low-res cells that count in high-res tokens, and how much, each ``(tokens, taps)``."""
    index, weight = tokens.new_zeros(len(tokens), 1), like.new_ones(len(tokens), 1)
    for length, new, places in zip(grid, size, torch.unravel_index(tokens, size), strict=True):
        along = _weights(length, new, like)[places]
        taps = along.abs().topk(min(_TAPS, length), dim=-1).indices
        index = (index[..., None] * length + taps[:, None]).flatten(1)
        weight = (weight[..., None] * along.gather(-1, taps)[:, None]).flatten(1)
    return index, weight


def _weights(length: int, size: int, like: Tensor) -> Tensor:
    """``(size, length)``: how much each low-res place counts in a high-res one, along one axis."""
    places = torch.eye(length, dtype=like.dtype, device=like.device)[None, :, :, None]
    return F.interpolate(places, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T


def fractional_positions(positions: Tensor, grid: Grid, zoom: int | Grid) -> Tensor:
    """Positions of high-res tokens between those of the low-res tokens, by linear inter- and extrapolation.

    A high-res cell whose centre lies a third of the way between two low-res centres gets the position a third
    of the way between theirs; cells outside the outermost centres continue the same step. Frames between frames lie
    between them in time. Exact for raster positions (one axis) and for (time, row, column) positions alike.

    Parameters
    ----------
    positions : torch.Tensor
        ``(..., cells)``: positions of the low-res tokens, any number of axes in front.
    grid : tuple of int
        Low-res ``(rows, columns)``, or ``(frames, rows, columns)``.
    zoom : int or tuple of int
        High-res cells per low-res cell and axis; one int, or two, for rows and columns.

    Returns
    -------
    torch.Tensor
        ``(..., high-res cells)``, float32 or wider.
    """
    axes = len(grid)
    values = positions.to(torch.promote_types(positions.dtype, torch.float32))
    values = values.reshape(*positions.shape[:-1], *grid)
    for axis, factor in zip(range(-1, -axes - 1, -1), reversed(zoom_along(zoom, axes)), strict=True):
        values = _refine(values.transpose(axis, -1), factor).transpose(axis, -1)
    return values.flatten(-axes)


def _refine(values: Tensor, zoom: int) -> Tensor:
    """Refine the last axis by ``zoom``, linearly between half-pixel centres and beyond the ends."""
    length = values.shape[-1]
    if zoom == 1:
        return values
    if length == 1:
        return values.expand(*values.shape[:-1], zoom)
    centres = (torch.arange(length * zoom, dtype=values.dtype, device=values.device) + 0.5) / zoom - 0.5
    left = centres.floor().clamp(0, length - 2)
    weight = centres - left
    left = left.long()
    return values[..., left] * (1 - weight) + values[..., left + 1] * weight
