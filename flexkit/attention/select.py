"""From the attention of a layer to the high-res tokens that are read: image by image, level by level."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.visible import ImageGroup, VisibleImages, visibility
from flexkit.grids import Grid, any_in_cells, resample_nearest, zoom_along
from flexkit.selection import AttentionMapSelector, dilate
from flexkit.selection.ranking import cells_of

__all__ = [
    "Selection",
    "bias_of_tokens",
    "hidden_cells",
    "open_tokens",
    "replaced_keys",
    "select_once",
    "select_tokens",
]


@dataclass(frozen=True, repr=False)
class Selection:
    """What the map of one layer selected, for every image and querying row."""

    groups: tuple[ImageGroup, ...]
    masks: tuple[Tensor, ...]
    """For each group ``(images, queries, [high-res frames,] high-res rows, high-res columns)``, bool."""
    scores: tuple[Tensor, ...]
    """For each group ``(images, queries, [frames,] rows, columns)``: the maps that were selected from; behind the first
    level those over the tokens of the level above."""

    def __repr__(self) -> str:
        masks = ", ".join(f"{int(mask.sum())} of {mask.numel()}" for mask in self.masks)
        return f"Selection({masks})"

    def and_then(self, deeper: "Selection") -> "Selection":
        """This selection, and one on the levels below."""
        return Selection(self.groups + deeper.groups, self.masks + deeper.masks, self.scores + deeper.scores)

    def at(self, level: int) -> "Selection":
        """What was selected on one level."""
        own = [index for index, group in enumerate(self.groups) if group.level == level]
        groups = tuple(self.groups[index] for index in own)
        masks, scores = (tuple(each[index] for index in own) for each in (self.masks, self.scores))
        return Selection(groups, masks, scores)

    def tokens(self, batch: int, tokens: int) -> Tensor:
        """``(batch, queries, tokens)``, bool: the selected ones of so many high-res tokens in every batch row."""
        first, mask = self.groups[0], self.masks[0]
        if first.is_batch and math.prod(mask.shape[2:]) == tokens:
            return mask.flatten(2)
        selected = mask.new_zeros(batch, tokens, mask.shape[1])
        for group, mask in zip(self.groups, self.masks, strict=True):
            selected[group.rows[:, None], group.tokens] = mask.flatten(2).transpose(1, 2)
        return selected.transpose(1, 2)


@torch.no_grad()
def select_tokens(
    selector: AttentionMapSelector,
    images: Sequence[VisibleImages],
    map_of: Callable[[VisibleImages], Tensor],
    *,
    before: Selection | None = None,
    layer: int | None = None,
    shared_from: Tensor | None = None,
    processes: Any = None,
) -> Selection:
    """Select by the maps of one layer.

    A map counts only where its row sees the whole image: a row in front of an image, or a window that has left the
    image behind, keeps what was selected ``before``. Where no map is read, a row selects in the images that it sees
    or has behind it.

    Parameters
    ----------
    selector : AttentionMapSelector
        The selector.
    images : sequence of VisibleImages
        The images, as the rows see them in this layer.
    map_of : callable
        From images to softmax attention ``(images, heads, queries, cells)`` over their low-res tokens.
    before : Selection, optional
        The selection of the layer before.
    layer : int, optional
        The layer that will read, for schedules.
    shared_from : torch.Tensor, optional
        ``(batch,)``: the querying row whose selection all rows of a sample share.
    processes : torch.distributed.ProcessGroup, optional
        Those among which the heads are shared out.
    """
    groups, masks, maps = [], [], []
    for index, seen in enumerate(images):
        group = seen.group
        scores = selector.scores(map_of(seen), group.grid, group.margins, processes=processes)
        mask = selector.select(scores, group.zoom, layer=layer)
        if seen.cells is not None:
            mask = mask & resample_nearest(seen.cells, group.size)
        if seen.whole is not None and selector.uses_scores:
            older = before.masks[index] if before is not None else torch.zeros_like(mask)
            mask = torch.where(_on_grid(seen.whole, mask), mask, older)
        elif seen.whole is not None and seen.behind is not None:
            mask = mask & _on_grid(seen.whole | seen.behind, mask)
        groups.append(group)
        masks.append(mask if shared_from is None else _of_shared_row(mask, group, shared_from))
        maps.append(scores)
    return Selection(tuple(groups), tuple(masks), tuple(maps))


@torch.no_grad()
def select_once(selector: AttentionMapSelector, selections: Sequence[Selection]) -> Selection:
    """One selection from the mean of the maps of several layers, each of which counts as much as it has of an image.

    Parameters
    ----------
    selector : AttentionMapSelector
        The selector.
    selections : sequence of Selection
        What the layers selected, from the same images.
    """
    groups = selections[0].groups
    shares = [[_shares(scores) for scores in of.scores] for of in selections]
    maps = tuple(torch.stack(of_group).mean(0) for of_group in zip(*shares, strict=True))
    masks = tuple(selector.select(scores, group.zoom) for scores, group in zip(maps, groups, strict=True))
    return Selection(groups, masks, maps)


@torch.no_grad()
def open_tokens(
    selector: AttentionMapSelector,
    levels: Sequence[Sequence[ImageGroup]],
    attention: Tensor,
    held: RaggedIndex,
    selected: Tensor,
    *,
    layer: int | None = None,
    shared_from: Tensor | None = None,
    processes: Any = None,
) -> Selection:
    """Select on all levels of a pyramid but the first, by the attention over the tokens of the level above.

    Only tokens that a row reads can be opened.

    Parameters
    ----------
    selector : AttentionMapSelector
        The selector; a token of one level is to the level below what a low-res cell is to the first.
    levels : sequence of sequence of ImageGroup
        On each level the same groups of images.
    attention : torch.Tensor
        ``(batch, heads, queries, held)``: joint attention over the high-res tokens that are held.
    held : RaggedIndex
        Which these are.
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the high-res tokens that the layer read.
    layer : int, optional
        The layer that will read, for schedules.
    shared_from : torch.Tensor, optional
        ``(batch,)``: the querying row whose selection all rows of a sample share.
    processes : torch.distributed.ProcessGroup, optional
        Those among which the heads are shared out.
    """
    if levels[0] and isinstance(selector.budget, float):
        # A share is one of the first level's tokens: a budget does not grow with the levels.
        budget = cells_of(selector.budget, levels[0][0].tokens.shape[1])
        selector = AttentionMapSelector(selector.policy, reduce=selector.reduce, heads=selector.heads, budget=budget)
    if not held.whole:
        whole = attention.new_zeros(*attention.shape[:-1], selected.shape[-1])
        index = held.index[:, None, None].expand_as(attention)
        attention = whole.scatter_add(-1, index, attention.masked_fill(~held.valid[:, None, None], 0.0))
    groups, masks, maps = [], [], []
    for above, below in itertools.pairwise(levels):
        for coarse, fine in zip(above, below, strict=True):
            rows, tokens, margins = coarse.rows[:, None], coarse.tokens, coarse.margins
            if margins is not None:
                margins = margins * torch.tensor(coarse.zoom, device=margins.device)
            looked = rearrange(attention[rows, :, :, tokens], "i n h q -> i h q n")
            scores = selector.scores(looked, coarse.size, margins, processes=processes)
            read = selected[rows, :, tokens].transpose(1, 2)
            read = read.reshape(*read.shape[:2], *coarse.size)
            zoom = tuple(new // old for new, old in zip(fine.zoom, coarse.zoom, strict=True))
            mask = selector.select(scores, zoom, layer=layer) & resample_nearest(read, fine.size)
            groups.append(fine)
            masks.append(mask if shared_from is None else _of_shared_row(mask, fine, shared_from))
            maps.append(scores)
    return Selection(tuple(groups), tuple(masks), tuple(maps))


def hidden_cells(selected: Tensor, images: Sequence[VisibleImages], keys: int, *, dilation: int = 0) -> Tensor:
    """Mask of the low-res keys whose cells hold a selected high-res token, and of those around them.

    Parameters
    ----------
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the high-res tokens that each querying row reads.
    images : sequence of VisibleImages
        The images; of a pyramid, those of the first level.
    keys : int
        Number of base keys.
    dilation : int
        How many cells around the selected ones are hidden with them.

    Returns
    -------
    torch.Tensor
        ``(batch, queries, keys)``, bool, True where a key is to be hidden.
    """
    batch, queries, _ = selected.shape
    # One column more takes the cells that have left the key sequence, or are still to come.
    hidden = selected.new_zeros(batch, keys + 1, queries)
    for seen in images:
        group = seen.group
        read = selected[group.rows[:, None], :, group.tokens]
        cells = dilate(any_in_cells(read.transpose(1, 2), group.grid, group.zoom), dilation)
        places = seen.columns if seen.inside is None else seen.columns.masked_fill(~seen.inside, keys)
        hidden[group.rows[:, None], places] = cells.flatten(2).transpose(1, 2)
    return hidden[:, :keys].transpose(1, 2)


def replaced_keys(
    selected: Tensor,
    grid: Grid,
    zoom: int | Grid,
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
        Low-res ``(rows, columns)``, of a video ``(frames, rows, columns)``.
    zoom : int or tuple of int
        High-res cells per low-res cell and axis; one int, or two, for rows and columns.
    image_positions : torch.Tensor
        ``(batch, cells)``, int64: where the low-res image tokens stand in the sequence of keys.
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
    image = ImageGroup.of_batch(grid, zoom_along(zoom, len(grid)), image_positions)
    seen = visibility(None, (image,), image_positions[:, :0], keys)  # by no row: it is only asked where the cells are
    return hidden_cells(selected, seen.images, keys, dilation=dilation)


def bias_of_tokens(
    bias: Tensor, images: Sequence[VisibleImages], levels: Sequence[Sequence[ImageGroup]], tokens: int
) -> Tensor:
    """Position bias of the high-res tokens: that of the cells in which they lie, 0 for cells behind the window.

    Parameters
    ----------
    bias : torch.Tensor
        ``(batch, heads, queries, keys)``: what the model adds to the logits of its base keys.
    images : sequence of VisibleImages
        The images, on the first level of a pyramid.
    levels : sequence of sequence of ImageGroup
        On each level the same images.
    tokens : int
        Number of high-res tokens in every batch row.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, tokens)``.
    """
    batch, heads, queries, _ = bias.shape
    whole = bias.new_zeros(batch, tokens, heads, queries)
    for seen, group in ((seen, group) for level in levels for seen, group in zip(images, level, strict=True)):
        cells = bias[group.rows[:, None], :, :, seen.columns]
        if seen.inside is not None:
            cells = cells * seen.inside[..., None, None]
        cells = cells.movedim(1, -1)
        of_tokens = resample_nearest(cells.reshape(*cells.shape[:-1], *group.grid), group.size)
        whole[group.rows[:, None], group.tokens] = of_tokens.flatten(3).movedim(-1, 1)
    return rearrange(whole, "b n h q -> b h q n")


def _of_shared_row(mask: Tensor, group: ImageGroup, shared_from: Tensor) -> Tensor:
    """A mask ``(images, queries, *size)`` in which all rows of a sample have that of the one they share."""
    return mask.gather(1, _on_grid(shared_from[group.rows, None], mask).expand_as(mask))


def _shares(scores: Tensor) -> Tensor:
    """Maps ``(images, queries, *grid)`` that add up to one each, but for those of nothing."""
    sums = scores.flatten(2).sum(-1).clamp_min(torch.finfo(scores.dtype).tiny)
    return scores / _on_grid(sums, scores)


def _on_grid(of_queries: Tensor, maps: Tensor) -> Tensor:
    """``(images, queries)`` with axes of size 1 for those of the grids of some maps."""
    return of_queries[(..., *[None] * (maps.ndim - 2))]
