"""A pyramid of zooms: where a layer looks in the tokens of one level, the next layer reads on the level below."""

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from flexkit.grids import resample_nearest
from flexkit.patching.groups import ImageGroup
from flexkit.patching.projected import Tokens
from flexkit.patching.selections import Selection, of_shared_row
from flexkit.selection import AttentionMapSelector
from flexkit.selection.ranking import cells_of

__all__ = ["open_tokens"]


@torch.no_grad()
def open_tokens(
    selector: AttentionMapSelector,
    levels: Sequence[Sequence[ImageGroup]],
    attention: Tensor,
    held: Tokens | None,
    selected: Tensor,
    *,
    layer: int,
    shared_from: Tensor | None = None,
) -> Selection:
    """Select on all levels but the first, by the attention over the tokens of the level above.

    Only tokens that a row reads can be opened.

    Parameters
    ----------
    selector : AttentionMapSelector
        The selector; a token of one level is to the level below what a low-res cell is to the first.
    levels : sequence of sequence of ImageGroup
        On each level the same groups of images.
    attention : torch.Tensor
        ``(batch, heads, queries, held)``: joint attention over the high-res tokens that are held.
    held : Tokens, optional
        Which these are; None for all.
    selected : torch.Tensor
        ``(batch, queries, tokens)``, bool: the high-res tokens that the layer read.
    layer : int
        The layer that will read, for schedules.
    shared_from : torch.Tensor, optional
        ``(batch,)``: the querying row whose selection all rows of a sample share.
    """
    if levels[0]:
        selector = _counted(selector, levels[0][0].images[0].tokens)
    attention = _of_all(attention, held, selected)
    groups, masks, maps = [], [], []
    for above, below in itertools.pairwise(levels):
        for coarse, fine in zip(above, below, strict=True):
            grid = coarse.grid[0] * coarse.zoom[0], coarse.grid[1] * coarse.zoom[1]
            rows, tokens = coarse.rows[:, None], coarse.tokens
            margins = coarse.margins
            if margins is not None:
                margins = margins * torch.tensor(coarse.zoom, device=margins.device)
            looked = rearrange(attention[rows, :, :, tokens], "i n h q -> i h q n")
            scores = selector.scores(looked, grid, margins)
            read = rearrange(selected[rows, :, tokens], "i (r c) q -> i q r c", r=grid[0])
            zoom = fine.zoom[0] // coarse.zoom[0], fine.zoom[1] // coarse.zoom[1]
            mask = selector.select(scores, zoom, layer=layer)
            mask = mask & resample_nearest(read, (mask.shape[-2], mask.shape[-1]))
            groups.append(fine)
            masks.append(of_shared_row(mask, fine, shared_from))
            maps.append(scores)
    return Selection(tuple(groups), tuple(masks), tuple(maps))


def _counted(selector: AttentionMapSelector, tokens: int) -> AttentionMapSelector:
    """The selector with a budget that does not grow with the levels: a share is one of the first's tokens."""
    if not isinstance(selector.budget, float):
        return selector
    budget = cells_of(selector.budget, tokens)
    return AttentionMapSelector(selector.policy, reduce=selector.reduce, heads=selector.heads, budget=budget)


def _of_all(attention: Tensor, held: Tokens | None, selected: Tensor) -> Tensor:
    """``(batch, heads, queries, tokens)``: attention over all tokens, 0 over those that are not held."""
    if held is None:
        return attention
    whole = attention.new_zeros(*attention.shape[:-1], selected.shape[-1])
    index = held.index[:, None, None].expand_as(attention)
    return whole.scatter_add(-1, index, attention.masked_fill(~held.valid[:, None, None], 0.0))
