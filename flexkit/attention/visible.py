"""What querying rows see of the base keys, and of the images among them."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from flexkit.attention.ragged import RaggedIndex, take
from flexkit.grids import Grid, zoomed
from flexkit.selection import valid_cells

__all__ = [
    "ImageGroup",
    "Visibility",
    "VisibleImages",
    "and_itself",
    "behind_tokens",
    "hidden_keys",
    "key_mask",
    "rows_of_mask",
    "visibility",
    "without_keys",
]


@dataclass(frozen=True)
class ImageGroup:
    """Images, or videos, of a batch that have one grid and one zoom, so that their maps can be stacked."""

    grid: Grid
    """Rows and columns of the low-res cells of each image; of a video frames, rows and columns."""
    zoom: Grid
    """High-res tokens of a cell along the same axes."""
    rows: Tensor
    """``(images,)``, int64: batch row of each image."""
    columns: Tensor
    """``(images, cells)``, int64: positions of the low-res tokens in the sequence, in raster order."""
    starts: Tensor
    """``(images,)``, int64: index of the first high-res token of each image among those of its batch row."""
    margins: Tensor | None = None
    """``(images, 2)``, int64: padded cells on each side, along rows and columns; None where no image is padded."""
    level: int = 0
    """Of a pyramid of zooms."""
    is_batch: bool = False
    """Whether these are the images of a batch that has one in every row, in order."""
    begin: int | None = None
    """Position of the first low-res token of every image, where they stand one behind the other in the same places."""
    end: int = 0
    """Position behind the last low-res token of all images, where :attr:`begin` is known."""

    @classmethod
    def of_batch(cls, grid: Grid, zoom: Grid, columns: Tensor, margins: Tensor | None = None) -> Self:
        """One image in every batch row, and no other high-res tokens."""
        rows = torch.arange(len(columns), device=columns.device)
        return cls(grid, zoom, rows, columns, torch.zeros_like(rows), margins, is_batch=True)

    @property
    def size(self) -> Grid:
        """The high-res grid of each image."""
        return zoomed(self.grid, self.zoom)

    @property
    def tokens(self) -> Tensor:
        """``(images, tokens)``, int64: the high-res tokens of each image among those of its batch row."""
        return self.starts[:, None] + torch.arange(math.prod(self.size), device=self.starts.device)


@dataclass(frozen=True)
class VisibleImages:
    """The images of a group, as querying rows see them."""

    group: ImageGroup
    columns: Tensor
    """``(images, cells)``, int64: their low-res tokens among the base keys; any key for those that are not there."""
    begin: int | None = None
    """The first of these columns, where all follow it in the same places and nobody has to ask."""
    inside: Tensor | None = None
    """``(images, cells)``, bool: which are there; others have left a window, or are to come. None where all are."""
    behind: Tensor | None = None
    """``(images, queries)``, bool: whether the row stands behind the image, in sight or not; None where all do."""
    whole: Tensor | None = None
    """``(images, queries)``, bool: whether the map of the row covers the image; None where all do."""
    cells: Tensor | None = None
    """``(images, queries, rows, columns)``, bool: the cells that are no padding; None where none is."""

    def of_cells(self, states: Tensor, dim: int) -> Tensor:
        """``(images, ..., cells, ...)``: states ``(batch, ..., keys, ...)`` of the low-res tokens along an axis."""
        states = states if self.group.is_batch else states[self.group.rows]
        if self.begin is not None:
            return states.narrow(dim, self.begin, self.columns.shape[1])
        return take(states, self.columns, dim)


@dataclass(frozen=True)
class Visibility:
    """What the querying rows of a layer see."""

    mask: Tensor | None
    """Of these rows, broadcastable to ``(batch, heads, queries, keys)``; None if everything is seen."""
    images: tuple[VisibleImages, ...] = ()
    """Of every group of images."""


def hidden_keys(mask: Tensor) -> Tensor:
    """What a mask hides: False in a bool one, in an additive one the lowest finite number of its dtype, or infinity.

    Parameters
    ----------
    mask : torch.Tensor
        Of any shape, bool (True attends) or additive.

    Returns
    -------
    torch.Tensor
        Bool, of that shape.
    """
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2


def key_mask(
    positions: Tensor,
    keys: int,
    *,
    is_causal: bool = True,
    sliding_window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """Mask of the keys that some queries see: causal, in a window, and by a mask of the caller.

    Parameters
    ----------
    positions : torch.Tensor
        ``(batch or 1, queries)``, integer: where the queries stand in the sequence of keys.
    keys : int
        Length of that sequence.
    is_causal : bool
        Whether keys after a query are hidden.
    sliding_window : int, optional
        With ``is_causal``: a query sees the last so many keys, its own included.
    mask : torch.Tensor, optional
        ``(batch or 1, heads or 1, queries or 1, keys)``; bool (True attends) or additive.

    Returns
    -------
    torch.Tensor or None
        Broadcastable to ``(batch, heads, queries, keys)``, bool or additive as ``mask``; None if nothing is
        hidden.
    """
    if not is_causal:
        return mask
    distance = rearrange(positions, "b q -> b 1 q 1") - torch.arange(keys, device=positions.device)
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    if mask is None:
        return visible
    return visible & mask if mask.dtype == torch.bool else torch.where(visible, mask, -torch.inf)


def rows_of_mask(
    mask: Tensor | None,
    rows: RaggedIndex,
    *,
    keys: int,
    past: int | Tensor,
    is_causal: bool,
    sliding_window: int | None,
) -> Tensor | None:
    """The mask of the querying rows alone.

    Parameters
    ----------
    mask : torch.Tensor, optional
        None (the kernel is causal by itself), a padding mask ``(batch, keys)`` (FlashAttention, causal by itself
        too), or ``(batch or 1, heads or 1, length or 1, keys)``, bool or additive.
    rows : RaggedIndex
        The querying rows.
    keys : int
        Number of keys.
    past : int or torch.Tensor
        Index of the key that belongs to the first position of the call.
    is_causal : bool
        Whether a kernel without a mask is causal.
    sliding_window : int, optional
        The window of a kernel without a mask.

    Returns
    -------
    torch.Tensor or None
        Broadcastable to ``(batch, heads, queries, keys)``; None if everything is seen.
    """
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :keys]
        return rows.gather(mask.expand(-1, -1, rows.mask.shape[1], -1), dim=2)
    if mask is None and not is_causal:
        return None
    padding = None if mask is None else mask[:, None, None, :keys].bool()
    return key_mask(rows.index + past, keys, is_causal=is_causal, sliding_window=sliding_window, mask=padding)


def and_itself(visible: Tensor) -> Tensor:
    """The mask of high-res tokens that pass through a layer: each sees some keys, and behind them itself.

    Parameters
    ----------
    visible : torch.Tensor
        ``(batch, tokens, keys)``, bool.

    Returns
    -------
    torch.Tensor
        ``(batch, 1, tokens, keys + tokens)``, bool.
    """
    itself = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device).expand(len(visible), -1, -1)
    return torch.cat([visible, itself], dim=-1)[:, None]


def behind_tokens(reads: Tensor, mask: Tensor | None, keys: int) -> Tensor:
    """The mask of a kernel whose keys stand behind those of high-res tokens.

    Parameters
    ----------
    reads : torch.Tensor
        ``(batch, 1, queries, tokens)``, bool: the tokens that each position reads.
    mask : torch.Tensor, optional
        ``(batch or 1, heads or 1, queries, keys)``, of the others: bool, or what is added to logits. Without one all
        are seen.
    keys : int
        How many others there are.

    Returns
    -------
    torch.Tensor
        ``(batch, heads or 1, queries, tokens + keys)``, of the dtype of ``mask``.
    """
    if mask is None:
        return pad(reads, (0, keys), value=True)
    reads = reads.to(mask.device)
    if mask.dtype != torch.bool:
        reads = torch.full_like(reads, torch.finfo(mask.dtype).min, dtype=mask.dtype).masked_fill_(reads, 0.0)
    mask = mask.expand(len(reads), -1, reads.shape[2], -1)
    return torch.cat([reads.expand(-1, mask.shape[1], -1, -1), mask], dim=-1)


def without_keys(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask of a kernel that does not see some keys.

    Parameters
    ----------
    mask : torch.Tensor, optional
        ``(batch or 1, heads or 1, queries, keys)``: bool, or what is added to logits. Without one all are seen.
    hidden : torch.Tensor
        ``(batch, 1, queries, keys)``, bool.
    """
    if mask is None:
        return ~hidden
    return mask.masked_fill(hidden.to(mask.device), False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def visibility(
    mask: Tensor | None,
    groups: tuple[ImageGroup, ...],
    positions: Tensor,
    keys: int,
    *,
    offset: int | Tensor = 0,
    before: int | None = None,
    sparse: bool = False,
    beside: bool = False,
) -> Visibility:
    """What querying rows see.

    Parameters
    ----------
    mask : torch.Tensor, optional
        Of these rows, from :func:`rows_of_mask`.
    groups : tuple of ImageGroup
        The images.
    positions : torch.Tensor
        ``(batch, queries)``, int64: of the rows in the sequence.
    keys : int
        Number of keys.
    offset : int or torch.Tensor
        Position in the sequence of the first key.
    before : int, optional
        No row stands in front of this position; None where that is not known without asking.
    sparse : bool
        Whether the layer hides keys by choice: those have attention 0, and the map of what is behind a row counts.
    beside : bool
        Whether the images stand beside the sequence: the keys that a row does not see in one that it does see are
        padding, and nothing is selected there.
    """
    seen_keys = None if mask is None else (~hidden_keys(mask)).any(1)
    images = []
    for group in groups:
        begin = group.begin - offset if group.begin is not None and isinstance(offset, int) else None
        if begin is not None and not 0 <= begin <= keys - group.columns.shape[1]:
            begin = None
        if begin is not None and seen_keys is None and before is not None and group.end <= before:
            columns = group.columns - offset if offset else group.columns
            images.append(VisibleImages(group, columns, begin))  # nobody has to look
            continue
        columns = group.columns - offset
        inside, columns = (columns >= 0) & (columns < keys), columns.clamp(0, keys - 1)
        behind = positions[group.rows] >= group.columns.amax(-1, keepdim=True)
        if seen_keys is None:
            seen = behind.new_ones(*columns.shape, positions.shape[1])
        else:
            seen = seen_keys.expand(*positions.shape, keys)[group.rows[:, None], :, columns]
        shown = seen
        if group.margins is not None:  # cells of padding are no part of the image
            shown = seen | ~valid_cells(group.margins, group.grid[-2:]).flatten(1)[..., None]
        whole = (behind if sparse else seen.any(1) if beside else shown.all(1)) & inside.all(-1)[:, None]
        # Asked once, it spares every layer two masks.
        always = not torch.compiler.is_compiling() and bool(whole.all())
        cells = rearrange(seen, "i (r c) q -> i q r c", r=group.grid[0]) if beside else None
        known = begin if always and not beside else None
        images.append(VisibleImages(group, columns, known, inside, behind, None if always else whole, cells))
    return Visibility(mask, tuple(images))
