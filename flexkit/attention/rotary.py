"""Rotary positions of high-res keys: interpolated tables and fractional positions."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flexkit.errors import ConfigError
from flexkit.zoom import Pair, zoom_pair

__all__ = ["fractional_positions", "interpolate_table", "rotary_tables", "rotate"]

_TAPS = 4
"""Of a bicubic filter."""


def rotary_tables(
    positions: Tensor, dim: int, *, base: float = 10000.0, sections: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of rotary embeddings, for one position axis or several.

    Parameters
    ----------
    positions : torch.Tensor
        ``(..., length)``; with ``sections``, ``(axes, ..., length)``. Integer or fractional.
    dim : int
        Rotated width of a head, even.
    base : float
        Period of the slowest frequency, in positions over 2 pi.
    sections : sequence of int, optional
        How many of the ``dim / 2`` frequencies each axis gets, in order (multi-axis rotary, as in Qwen2-VL).

    Returns
    -------
    cos, sin : torch.Tensor
        Each ``(..., length, dim)``, in float32 or the positions' dtype if that is wider; the halves are
        equal.

    Raises
    ------
    ConfigError
        If ``dim`` is odd, or the sections do not cover ``dim / 2`` frequencies of as many axes as given.
    """
    if dim % 2:
        raise ConfigError(f"rotary embeddings rotate pairs: dim must be even, got {dim}.")
    dtype = torch.promote_types(positions.dtype, torch.float32)
    exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
    angles = positions.to(dtype)[..., None] * base**-exponent
    if sections is not None:
        if sum(sections) != dim // 2 or len(sections) != positions.shape[0]:
            raise ConfigError(
                f"sections {tuple(sections)} must share out dim / 2 = {dim // 2} frequencies among the "
                f"{positions.shape[0]} axes of positions {tuple(positions.shape)}."
            )
        parts = torch.split(angles, list(sections), dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables to the first ``cos.shape[-1]`` channels of each head.

    Parameters
    ----------
    states : torch.Tensor
        ``(batch, heads, length, head_dim)``.
    cos, sin : torch.Tensor
        ``(batch or 1, length, dim)`` with ``dim <= head_dim``.

    Returns
    -------
    torch.Tensor
        Rotated states, same shape and dtype as ``states``.
    """
    turned, plain = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat([-second, first], dim=-1)
    turned = turned * cos[:, None].to(states.dtype) + half * sin[:, None].to(states.dtype)
    return torch.cat([turned, plain], dim=-1)


def interpolate_table(table: Tensor, grid: tuple[int, int], zoom: int | Pair, tokens: Tensor | None = None) -> Tensor:
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


def fractional_positions(positions: Tensor, grid: tuple[int, int], zoom: int | Pair) -> Tensor:
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


def _taps(length: int, size: int, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Low-res rows, or columns, that count in high-res ones, and how much, each ``(places, taps)``."""
    rows = torch.eye(length, dtype=like.dtype, device=like.device)[None, :, :, None]
    weights = F.interpolate(rows, size=(size, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T[places]
    taps = weights.abs().topk(min(_TAPS, length), dim=-1).indices
    return taps, weights.gather(-1, taps)


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
