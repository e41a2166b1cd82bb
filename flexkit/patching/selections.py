"""From the attention of a layer to the high-res tokens that the next reads, image by image."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from flexkit.attention.joint import selected_cells
from flexkit.grids import resample_nearest
from flexkit.patching.groups import ImageGroup, within
from flexkit.patching.memory import HighResMemory
from flexkit.patching.sight import SeenImages
from flexkit.selection import AttentionMapSelector

__all__ = ["Selection", "bias_of_tokens", "of_shared_row", "select_tokens"]


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

    def and_then(self, deeper: "Selection | None") -> "Selection":
        """This selection, and one on the levels below."""
        if deeper is None:
            return self
        return Selection(self.groups + deeper.groups, self.masks + deeper.masks, self.scores + deeper.scores)

    def at(self, level: int) -> "Selection":
        """What was selected on one level."""
        own = [index for index, group in enumerate(self.groups) if group.level == level]
        groups = tuple(self.groups[index] for index in own)
        masks, scores = (tuple(each[index] for index in own) for each in (self.masks, self.scores))
        return Selection(groups, masks, scores)

    def tokens(self, memory: HighResMemory) -> Tensor:
        """``(batch, queries, tokens)``, bool: the selected tokens of the memory."""
        first = self.groups[0]
        if first.is_batch(memory.batch) and first.images[0].tokens == memory.tokens:
            return self.masks[0].flatten(2)
        queries = self.masks[0].shape[1]
        selected = self.masks[0].new_zeros(memory.batch, memory.tokens, queries)
        for group, mask in zip(self.groups, self.masks, strict=True):
            selected[group.rows[:, None], group.tokens] = rearrange(mask, "i q r c -> i (r c) q")
        return selected.transpose(1, 2)

    def low_res_keys(self, batch: int, length: int, offset: int | Tensor, dilation: int) -> Tensor:
        """``(batch, queries, length)``, bool: keys of the selected cells, in a sequence that starts at ``offset``."""
        queries = self.masks[0].shape[1]
        # One column more takes the cells that have left the key sequence, or are still to come.
        hidden = self.masks[0].new_zeros(batch, length + 1, queries)
        first = self.at(0)  # what lies below was selected in the cells of some earlier layer
        for group, mask in zip(first.groups, first.masks, strict=True):
            cells = selected_cells(mask, group.zoom, dilation=dilation)
            columns, inside = within(group.columns - offset, length)
            columns = columns.masked_fill(~inside, length)
            hidden[group.rows[:, None], columns] = rearrange(cells, "i q r c -> i (r c) q")
        return hidden[:, :length].transpose(1, 2)


def bias_of_tokens(bias: Tensor, groups: tuple[ImageGroup, ...], memory: HighResMemory, offset: int | Tensor) -> Tensor:
    """Position bias of the high-res tokens: that of the cells in which they lie, 0 for cells behind the window.

    Parameters
    ----------
    bias : torch.Tensor
        ``(batch, heads, queries, keys)``: what the model adds to the logits of its base keys.
    groups : tuple of ImageGroup
        The images.
    memory : HighResMemory
        The high-res tokens.
    offset : int or torch.Tensor
        Position in the sequence of the first key.

    Returns
    -------
    torch.Tensor
        ``(batch, heads, queries, tokens)``.
    """
    batch, heads, queries, _ = bias.shape
    whole = bias.new_zeros(batch, memory.tokens, heads, queries)
    for group in groups:
        columns, inside = within(group.columns - offset, bias.shape[-1])
        cells = bias[group.rows[:, None], :, :, columns] * inside[..., None, None]
        rows, (zoom_rows, zoom_columns) = group.grid[0], group.zoom
        whole[group.rows[:, None], group.tokens] = repeat(
            cells, "i (r c) h q -> i (r y c x) h q", r=rows, y=zoom_rows, x=zoom_columns
        )
    return rearrange(whole, "b n h q -> b h q n")


@torch.no_grad()
def select_tokens(
    selector: AttentionMapSelector,
    images: Iterable[SeenImages],
    attention: Tensor,
    before: Selection | None,
    *,
    layer: int,
    shared_from: Tensor | None = None,
) -> Selection:
    """Select by the maps of one layer.

    A map counts only where its row sees the whole image: a row in front of an image, or a window that has left the
    image behind, keeps what was selected ``before``. Where no map is read, a row selects in the images that it sees
    or has behind it.

    Parameters
    ----------
    selector : AttentionMapSelector
        The selector.
    images : iterable of SeenImages
        The images, as the rows see them in this layer.
    attention : torch.Tensor
        ``(batch, heads, queries, keys)``: softmax attention over the base keys.
    before : Selection, optional
        The selection of the layer before.
    layer : int
        The layer that will read, for schedules.
    shared_from : torch.Tensor, optional
        ``(batch,)``: the querying row whose selection all rows of a sample share.
    """
    groups, masks, maps = [], [], []
    for index, seen in enumerate(images):
        group = seen.group
        own = attention if group.is_batch(len(attention)) else attention[group.rows]
        looked = own.gather(-1, seen.columns[:, None, None].expand(-1, *own.shape[1:3], -1))
        scores = selector.scores(looked, group.grid, group.margins)
        mask = selector.select(scores, group.zoom, layer=layer)
        if seen.cells is not None:
            mask = mask & resample_nearest(seen.cells, (mask.shape[-2], mask.shape[-1]))
        if not selector.uses_scores:
            mask = mask & (seen.whole | seen.behind)[:, :, None, None]
        elif not seen.always_whole:
            older = before.masks[index] if before is not None else torch.zeros_like(mask)
            mask = torch.where(seen.whole[:, :, None, None], mask, older)
        groups.append(group)
        masks.append(of_shared_row(mask, group, shared_from))
        maps.append(scores)
    return Selection(tuple(groups), tuple(masks), tuple(maps))


def of_shared_row(mask: Tensor, group: ImageGroup, shared_from: Tensor | None) -> Tensor:
    """A mask ``(images, queries, rows, columns)`` in which all rows of a sample have that of the one they share."""
    if shared_from is None:
        return mask
    return mask.gather(1, shared_from[group.rows].view(-1, 1, 1, 1).expand_as(mask))
