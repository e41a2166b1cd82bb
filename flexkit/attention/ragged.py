"""Some entries of every batch row: the positions that read high-res tokens, or the tokens that are read."""

from typing import Self

import torch
from torch import Tensor

__all__ = ["RaggedIndex", "take"]


class RaggedIndex:
    """Entries along an axis, in numbers that may differ from batch row to batch row, padded to the longest.

    Parameters
    ----------
    mask : torch.Tensor
        ``(batch, length)``, bool: which entries these are.
    order : tuple of torch.Tensor, optional
        ``index`` and ``valid`` of the same entries in another order than that of the mask.
    in_place, full : bool
        What is known of that order, as below.

    Attributes
    ----------
    index : torch.Tensor
        ``(batch, count)``, int64: where the entries are; 0 where a row has fewer.
    valid : torch.Tensor
        ``(batch, count)``, bool: which entries of ``index`` mean something.
    count : int
        The largest number of entries in a batch row.
    in_place : bool
        Whether there is an entry for every place, in order, as in decoding: nothing needs to be gathered.
    full : bool
        Whether all batch rows are known to have as many, so that all entries mean something.
    whole : bool
        Both.
    """

    def __init__(
        self, mask: Tensor, *, order: tuple[Tensor, Tensor] | None = None, in_place: bool = False, full: bool = False
    ) -> None:
        self.mask, self.in_place, self.full = mask, in_place, full
        if order is None:
            entries = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
            order = entries, mask
            if not in_place:
                counts, most = mask.sum(-1), mask.shape[1]  # while compiling, a bound that no data decides
                if not torch.compiler.is_compiling():
                    least, most = torch.stack([counts.amin(), counts.amax()]).tolist()
                    self.in_place, self.full = least == mask.shape[1], least == most
                if not self.in_place:
                    # One column more takes what is not among these.
                    place = (mask.cumsum(-1) - 1).masked_fill(~mask, most)
                    index = entries.new_zeros(len(mask), most + 1).scatter(1, place, entries)[:, :most]
                    order = index, entries[:, :most] < counts[:, None]
        self.index, self.valid = order
        self.count = self.index.shape[1]
        self.whole = self.in_place and self.full

    @classmethod
    def all(cls, mask: Tensor) -> Self:
        """All entries in order, where a mask is True throughout: nobody has to look."""
        return cls(mask, in_place=True, full=True)

    @classmethod
    def bounded(cls, mask: Tensor, most: int) -> Self:
        """The entries of a mask, of which no batch row has more than so many: nobody has to count."""
        valid, index = mask.sort(dim=-1, descending=True, stable=True)
        return cls(mask, order=(index[:, :most], valid[:, :most]))

    @property
    def last(self) -> Tensor:
        """``(batch,)``, int64: the place among entries in order of the last one that a row has; 0 where it has none."""
        return (self.mask.sum(-1) - 1).clamp_min(0)

    def gather(self, states: Tensor, dim: int = 1) -> Tensor:
        """Take these entries of ``states`` ``(batch or 1, ..., length, ...)`` along the axis ``dim``."""
        batch = self.index.shape[0]  # asked in every layer, where len() of a tensor is slow
        if states.shape[0] != batch:
            states = states.expand(batch, *states.shape[1:])
        return states if self.in_place else take(states, self.index, dim)

    def scatter(self, part: Tensor, states: Tensor) -> Tensor:
        """Put ``part`` ``(batch, count, ...)`` in ``states`` ``(batch, length, ...)`` where these entries are."""
        if not self.count:
            return states
        if self.whole:
            return part.to(states.dtype)
        mask = self.mask.view(*self.mask.shape, *[1] * (states.ndim - 2))
        if self.in_place:
            return torch.where(mask, part.to(states.dtype), states)
        # A gather and a `where` instead of an indexed write: no duplicate index, so gradients are exact.
        length = self.mask.shape[1]
        places = torch.arange(self.count, device=self.index.device).expand_as(self.index)
        slots = self.index.new_zeros(len(self.index), length + 1)
        slots = slots.scatter(1, self.index.masked_fill(~self.valid, length), places)[:, :-1]
        return torch.where(mask, take(part, slots, 1).to(states.dtype), states)

    def among(self, mask: Tensor) -> Tensor:
        """``(batch, ..., count)``, bool: which of these entries a mask ``(batch, ..., length)`` names."""
        found = self.gather(mask, -1)
        return found if self.full else found & self.valid.view(len(self.valid), *[1] * (mask.ndim - 2), -1)

    def and_then(self, later: "RaggedIndex") -> "RaggedIndex":
        """These entries, followed by others, none of which is among these."""
        index, valid = torch.cat([self.index, later.index], dim=1), torch.cat([self.valid, later.valid], dim=1)
        return RaggedIndex(self.mask | later.mask, order=(index, valid), full=self.full and later.full)

    def of_rows(self, rows: Tensor) -> "RaggedIndex":
        """Those of other batch rows."""
        order = self.index[rows], self.valid[rows]
        return RaggedIndex(self.mask[rows], order=order, in_place=self.in_place, full=self.full)


def take(states: Tensor, index: Tensor, dim: int) -> Tensor:
    """``states[b, ..., index[b, i], ...]`` for every b and i."""
    dim %= states.ndim
    if index.shape[0] == 1:  # an index for every number would be most of what is moved
        return states.index_select(dim, index[0])
    index = index.view(len(index), *[1] * (dim - 1), -1, *[1] * (states.ndim - dim - 1))
    return states.gather(dim, index.expand(*states.shape[:dim], -1, *states.shape[dim + 1 :]))
