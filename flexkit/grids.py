"""A low-res grid of cells, and the finer grid of the high-res view."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flexkit.errors import ConfigError

__all__ = [
    "Pair",
    "check_pair",
    "fractional_positions",
    "interpolate_table",
    "pyramid",
    "resample_nearest",
    "split_tiles",
    "stitch_tiles",
    "zoom_pair",
]

Pair = tuple[int, int]
"""Something along rows, and along columns."""

_TAPS = 4
"""Of a bicubic filter along one axis."""


def check_pair(name: str, value: object, expected: str = "two positive ints (rows, columns)") -> Pair:
    """Return ``value`` as two positive integers, rows first, or raise :class:`ConfigError`."""
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    fits = len(pair) == 2 and all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in pair)
    if not fits:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")
    return pair


def zoom_pair(zoom: int | Pair) -> Pair:
    """How many high-res cells lie along each axis of a low-res cell, from one int for both or a pair.

    Raises
    ------
    ConfigError
        If the zoom is not one or two positive ints.
    """
    if isinstance(zoom, tuple | list):
        return check_pair("zoom", zoom, "a positive int or a pair of them (rows, columns)")
    return check_pair("zoom", (zoom, zoom), "a positive int or a pair of them (rows, columns)")


def pyramid(zoom: Pair, levels: int) -> tuple[Pair, ...]:
    """Zooms of the levels of a pyramid, each ``zoom`` times the one before: 3, 9, 27, ..."""
    return tuple((zoom[0] ** level, zoom[1] ** level) for level in range(1, levels + 1))


def resample_nearest(grid: Tensor, size: Pair) -> Tensor:
    """Resample the last two axes of a tensor by nearest neighbour.

    Row ``i`` of the result is row ``floor(i * rows / size[0])`` of ``grid``; columns alike. The new size need
    not be a multiple of the old one.

    Parameters
    ----------
    grid : torch.Tensor
        Shape (..., rows, columns), any dtype.
    size : tuple of int
        Rows and columns of the result.

    Returns
    -------
    torch.Tensor
        Shape (..., size[0], size[1]), dtype of ``grid``.

    Examples
    --------
    >>> resample_nearest(torch.tensor([[True, False]]), (1, 5)).int().tolist()
    [[1, 1, 1, 0, 0]]
    """
    rows, columns = grid.shape[-2:]
    if size[0] % rows == 0 and size[1] % columns == 0:  # a faster way to the same
        blocks = grid[..., :, None, :, None].expand(*grid.shape[:-1], size[0] // rows, columns, size[1] // columns)
        return blocks.reshape(*grid.shape[:-2], *size)
    row_of = torch.arange(size[0], device=grid.device) * rows // size[0]
    column_of = torch.arange(size[1], device=grid.device) * columns // size[1]
    return grid.index_select(-2, row_of).index_select(-1, column_of)


def split_tiles(images: Tensor, zoom: int | Pair) -> Tensor:
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
    rows, columns = zoom_pair(zoom)
    if images.ndim != 4 or images.shape[-2] % rows or images.shape[-1] % columns:
        raise ConfigError(
            f"images have shape {tuple(images.shape)}; expected (batch, channels, height, width) "
            f"with a height divisible by {rows} and a width by {columns}: resize to a multiple of the zoom."
        )
    return rearrange(images, "b c (r h) (s w) -> b (r s) c h w", r=rows, s=columns)


def stitch_tiles(features: Tensor, grid: Pair, zoom: int | Pair) -> Tensor:
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
    zoom_rows, zoom_columns = zoom_pair(zoom)
    rows, columns = grid
    if features.ndim != 4 or features.shape[1:3] != (zoom_rows * zoom_columns, rows * columns):
        raise ConfigError(
            f"features have shape {tuple(features.shape)}; expected "
            f"(batch, {zoom_rows * zoom_columns}, {rows * columns}, dim): "
            f"{zoom_rows} x {zoom_columns} tiles of {rows} x {columns} cells."
        )
    return rearrange(features, "b (y x) (r c) d -> b (y r) (x c) d", y=zoom_rows, r=rows, c=columns)


def interpolate_table(table: Tensor, grid: Pair, zoom: int | Pair, tokens: Tensor | None = None) -> Tensor:
    """Interpolate a cosine or sine table of the low-res image tokens to the high-res grid, as published.

    The *values* are interpolated, bicubically and with half-pixel centres, not the angles: the result is not
    a rotation, and projections trained with it expect exactly this.

    Parameters
    ----------
    table : torch.Tensor
        ``(..., rows * columns, dim)``, cells in raster order.
    grid : tuple of int
        Low-res ``(rows, columns)``.
    zoom : int or tuple of int
        High-res cells per low-res cell and axis.
    tokens : torch.Tensor, optional
        ``(tokens,)``, int64: the high-res tokens that are wanted, in raster order; all by default.

    Returns
    -------
    torch.Tensor
        ``(..., zoomed rows * zoomed columns, dim)``, or ``(..., tokens, dim)``, in the dtype of ``table``.
    """
    if table.is_complex():
        real, imaginary = (interpolate_table(part, grid, zoom, tokens) for part in (table.real, table.imag))
        return torch.complex(real, imaginary)
    rows, columns = grid
    zoom_rows, zoom_columns = zoom_pair(zoom)
    batch = table.shape[:-2]
    dtype = torch.promote_types(table.dtype, torch.float32)
    image = rearrange(table.reshape(-1, *table.shape[-2:]).to(dtype), "b (r c) d -> b d r c", r=rows)
    size = (rows * zoom_rows, columns * zoom_columns)
    if tokens is not None and len(tokens) * _TAPS**2 < size[0] * size[1]:
        row, down = _taps(rows, size[0], tokens // size[1], image)
        column, across = _taps(columns, size[1], tokens % size[1], image)
        around = image[:, :, row[:, :, None], column[:, None, :]] * (down[:, :, None] * across[:, None, :])
        some = around.sum((-1, -2)).transpose(1, 2)
        return some.reshape(*batch, *some.shape[1:]).to(table.dtype)
    image = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
    whole = rearrange(image, "b d r c -> b (r c) d")
    whole = whole if tokens is None else whole[:, tokens]
    return whole.reshape(*batch, *whole.shape[1:]).to(table.dtype)


def _taps(length: int, size: int, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Low-res rows, or columns, that count in high-res ones, and how much, each ``(places, taps)``."""
    rows = torch.eye(length, dtype=like.dtype, device=like.device)[None, :, :, None]
    weights = F.interpolate(rows, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T[places]
    taps = weights.abs().topk(min(_TAPS, length), dim=-1).indices
    return taps, weights.gather(-1, taps)


def fractional_positions(positions: Tensor, grid: Pair, zoom: int | Pair) -> Tensor:
    """Positions of high-res tokens between those of the low-res tokens, by linear inter- and extrapolation.

    A high-res cell whose centre lies a third of the way between two low-res centres gets the position a third
    of the way between theirs; cells outside the outermost centres continue the same step. Exact for raster
    positions (one axis) and for (time, row, column) positions alike.

    Parameters
    ----------
    positions : torch.Tensor
        ``(..., rows * columns)``: positions of the low-res tokens, any number of axes in front.
    grid : tuple of int
        Low-res ``(rows, columns)``.
    zoom : int or tuple of int
        High-res cells per low-res cell and axis.

    Returns
    -------
    torch.Tensor
        ``(..., zoomed rows * zoomed columns)``, float32 or wider.
    """
    zoom_rows, zoom_columns = zoom_pair(zoom)
    values = positions.to(torch.promote_types(positions.dtype, torch.float32))
    values = values.reshape(*positions.shape[:-1], *grid)
    values = _refine(values, zoom_columns)
    values = _refine(values.transpose(-1, -2), zoom_rows).transpose(-1, -2)
    return values.flatten(-2)


def _refine(values: Tensor, zoom: int) -> Tensor:
    """Refine the last axis by ``zoom``, linearly between half-pixel centres and beyond the ends."""
    length = values.shape[-1]
    if length == 1:
        return values.expand(*values.shape[:-1], zoom)
    centres = (torch.arange(length * zoom, dtype=values.dtype, device=values.device) + 0.5) / zoom - 0.5
    left = centres.floor().clamp(0, length - 2)
    weight = centres - left
    left = left.long()
    return values[..., left] * (1 - weight) + values[..., left + 1] * weight
