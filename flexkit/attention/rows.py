"""The positions that read high-res keys, gathered out of a sequence and put back into it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexkit.lazy import lazy

__all__ = ["QueryRows"]


@dataclass(frozen=True)
class QueryRows:
    """The querying positions of a batch, which may differ in number from row to row.

    Parameters
    ----------
    mask : torch.Tensor
        ``(batch, length)``, bool: the positions that query.
    """

    mask: Tensor

    @lazy
    def count(self) -> int:
        """The largest number of querying positions in a batch row; shorter rows are padded to it."""
        if torch.compiler.is_compiling():
            return self.mask.shape[1]  # a bound that no data decides: decoding, all there is
        return int(self.mask.sum(-1).max())

    @lazy
    def whole(self) -> bool:
        """Whether all positions query, as in decoding, so that nothing needs to be gathered."""
        return not torch.compiler.is_compiling() and bool(self.mask.all())

    @lazy
    def index(self) -> Tensor:
        """``(batch, count)``, int64: the querying positions in order, then arbitrary other ones."""
        return torch.argsort(~self.mask, dim=-1, stable=True)[:, : self.count]

    @lazy
    def valid(self) -> Tensor:
        """``(batch, count)``, bool: which entries of :attr:`index` do query."""
        return self.mask.gather(1, self.index)

    def gather(self, states: Tensor) -> Tensor:
        """Take the querying positions of ``states`` ``(batch, length, ...)`` as ``(batch, count, ...)``."""
        return states if self.whole else _take(states, self.index)

    def scatter(self, rows: Tensor, states: Tensor) -> Tensor:
        """Put ``rows`` ``(batch, count, ...)`` in ``states`` ``(batch, length, ...)`` where they query."""
        if rows.shape[1] == 0:
            return states
        if self.whole:
            return rows.to(states.dtype)
        # A gather and a `where` instead of an indexed write: no duplicate index, so gradients are exact.
        slot = (self.mask.cumsum(-1) - 1).clamp_min(0)
        mask = self.mask.view(*self.mask.shape, *[1] * (states.ndim - 2))
        return torch.where(mask, _take(rows, slot).to(states.dtype), states)


def _take(states: Tensor, index: Tensor) -> Tensor:
    """``states[b, index[b, i]]`` for every b and i."""
    index = index.view(*index.shape, *[1] * (states.ndim - 2))
    return states.gather(1, index.expand(-1, -1, *states.shape[2:]))
