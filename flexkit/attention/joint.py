"""High-res tokens beside the low-res keys of the querying rows, or in the place of some of them."""

import torch
from einops import rearrange, reduce
from torch import Tensor

from flexkit.attention.core import attend, log_normaliser, merge_high_res
from flexkit.grids import Pair, zoom_pair
from flexkit.selection import dilate

__all__ = ["joint_attention", "replaced_keys", "selected_cells"]


def selected_cells(selected: Tensor, zoom: Pair, *, dilation: int = 0) -> Tensor:
    """Low-res cells that hold a selected high-res token, and those around them.

    Parameters
    ----------
    selected : torch.Tensor
        ``(batch, queries, zoomed rows, zoomed columns)``, bool.
    zoom : tuple of int
        High-res cells per low-res cell, along rows and columns.
    dilation : int
        How many cells around the selected ones count with them.

    Returns
    -------
    torch.Tensor
        ``(batch, queries, rows, columns)``, bool.
    """
    cells = reduce(selected, "b q (r zr) (c zc) -> b q r c", "any", zr=zoom[0], zc=zoom[1])
    return dilate(cells, dilation)


def replaced_keys(
    selected: Tensor,
    grid: tuple[int, int],
    zoom: int | Pair,
    image_positions: Tensor,
    keys: int,
    *,
    dilation: int = 0,
) -> Tensor:
    """Mask of the low-res keys whose cells hold a selected high-res token.

    Appended high-res keys compete with the low-res keys of the same place; hiding those ends it.

    Parameters
    ----------
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the high-res tokens that each querying row reads, in raster order.
    grid : tuple of int
        Low-res ``(rows, columns)``.
    zoom : int or tuple of int
        High-res cells per low-res cell and axis.
    image_positions : torch.Tensor
        ``(batch, rows * columns)``, int64: where the low-res image tokens stand in the sequence of keys.
    keys : int
        Length of that sequence.
    dilation : int
        How many cells around the selected ones are hidden with them.

    Returns
    -------
    torch.Tensor
        ``(batch, queries, keys)``, bool, True where a key is to be hidden.

    Examples
    --------
    >>> selected = torch.tensor([[[False, False, False, True]]])
    >>> replaced_keys(selected, (1, 2), (1, 2), torch.tensor([[0, 1]]), 3).int().tolist()
    [[[0, 1, 0]]]
    """
    zoom = zoom_pair(zoom)
    on_grid = rearrange(selected, "b q (r c) -> b q r c", r=grid[0] * zoom[0], c=grid[1] * zoom[1])
    cells = selected_cells(on_grid, zoom, dilation=dilation).flatten(2)
    hidden = torch.zeros(*selected.shape[:2], keys, dtype=torch.bool, device=selected.device)
    return hidden.scatter(-1, image_positions[:, None].expand_as(cells), cells)


def joint_attention(
    base: Tensor,
    base_logits: Tensor,
    base_value: Tensor,
    logits: Tensor,
    value: Tensor,
    selected: Tensor,
    *,
    replaced: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Attention of the querying rows over base keys and selected high-res keys (paper, section 3.2).

    Parameters
    ----------
    base : torch.Tensor
        ``(batch, heads, queries, value_dim)``: their attention over the base keys alone, from any kernel.
    base_logits : torch.Tensor
        ``(batch, heads, queries, keys)``: the logits of that attention.
    base_value : torch.Tensor
        ``(batch, key_heads, keys, value_dim)``.
    logits : torch.Tensor
        ``(batch, heads, queries, tokens)``: logits of the high-res tokens.
    value : torch.Tensor
        ``(batch, key_heads, tokens, value_dim)``: V' of the high-res tokens.
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the tokens that each querying row reads.
    replaced : torch.Tensor, optional
        ``(batch, queries, keys)``, bool: base keys that a row gives up, if it selects anything.
    sinks : torch.Tensor, optional
        ``(heads,)`` logits of attention sinks.
    dropout : float
        Probability with which an attention weight is dropped.
    normaliser : torch.Tensor, optional
        ``(batch, heads, queries, 1)``: what :func:`log_normaliser` gives for the base logits and sinks, where it is
        known.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, value_dim)`` in the dtype of ``base``. Rows that select nothing keep the
        bits of ``base``.
    """
    if replaced is None:
        normaliser = log_normaliser(base_logits, sinks) if normaliser is None else normaliser
    else:
        left = base_logits.masked_fill(replaced[:, None], -torch.inf)
        rest, normaliser = attend(left, base_value, sinks, dropout=dropout)
        base = torch.where(selected.any(-1)[:, None, :, None], rest.to(base.dtype), base)
    return merge_high_res(base, normaliser, logits, value, selected, dropout=dropout)
