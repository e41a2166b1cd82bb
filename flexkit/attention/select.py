"""From the attention of a layer to the high-res tokens that are read: image by image, level by level."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.visible import ImageGroup, VisibleImages, visibility
from flexkit.grids import Pair, resample_nearest, zoom_pair
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
    """For each group ``(images, queries, high-res rows, high-res columns)``, bool."""
    scores: tuple[Tensor, ...]
    """For each group ``(images, queries, rows, columns)``: the maps that were selected from; behind the first level
    those over the tokens of the level above."""

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
        if first.is_batch and mask.shape[-2] * mask.shape[-1] == tokens:
            return mask.flatten(2)
        selected = mask.new_zeros(batch, tokens, mask.shape[1])
        for group, mask in zip(self.groups, self.masks, strict=True):
            selected[group.rows[:, None], group.tokens] = rearrange(mask, "i q r c -> i (r c) q")
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
            mask = torch.where(seen.whole[:, :, None, None], mask, older)
        elif seen.whole is not None and seen.behind is not None:
            mask = mask & (seen.whole | seen.behind)[:, :, None, None]
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
    shares = [
        [scores / scores.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny) for scores in of.scores]
        for of in selections
    ]
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
            read = rearrange(selected[rows, :, tokens], "i (r c) q -> i q r c", r=coarse.size[0])
            zoom = fine.zoom[0] // coarse.zoom[0], fine.zoom[1] // coarse.zoom[1]
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
        (rows, columns), (zoom_rows, zoom_columns) = group.grid, group.zoom
        cells = reduce(read, "i (r y c x) q -> i q r c", "any", r=rows, y=zoom_rows, c=columns, x=zoom_columns)
        places = seen.columns if seen.inside is None else seen.columns.masked_fill(~seen.inside, keys)
        hidden[group.rows[:, None], places] = rearrange(dilate(cells, dilation), "i q r c -> i (r c) q")
    return hidden[:, :keys].transpose(1, 2)


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
    image = ImageGroup.of_batch(grid, zoom_pair(zoom), image_positions)
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
        rows, (zoom_rows, zoom_columns) = group.grid[0], group.zoom
        whole[group.rows[:, None], group.tokens] = repeat(
            cells, "i (r c) h q -> i (r y c x) h q", r=rows, y=zoom_rows, x=zoom_columns
        )
    return rearrange(whole, "b n h q -> b h q n")


def _of_shared_row(mask: Tensor, group: ImageGroup, shared_from: Tensor) -> Tensor:
    """A mask ``(images, queries, rows, columns)`` in which all rows of a sample have that of the one they share."""
    return mask.gather(1, shared_from[group.rows].view(-1, 1, 1, 1).expand_as(mask))
