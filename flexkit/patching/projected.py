"""K' and V' of the high-res tokens that one layer has read so far."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from flexkit.lazy import lazy

__all__ = ["Projected", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """Some tokens of every batch row, which may differ in number from row to row."""

    index: Tensor
    """``(batch, held)``, int64."""
    valid: Tensor
    """``(batch, held)``, bool: False where a row has fewer."""
    total: int
    """Of how many tokens in every batch row these are some."""

    @classmethod
    def where(cls, mask: Tensor) -> Self:
        """The tokens where a mask ``(batch, tokens)`` is True, at least one entry wide."""
        rows, tokens = mask.nonzero(as_tuple=True)
        counts = mask.sum(-1)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(rows), device=mask.device) - first[rows]
        width = max(1, int(place.max()) + 1) if len(rows) else 1
        index = mask.new_zeros(len(mask), width, dtype=torch.long)
        index[rows, place] = tokens
        return cls(index, torch.arange(width, device=mask.device) < counts[:, None], mask.shape[1])

    @lazy
    def others(self) -> Tensor:
        """``(batch, total)``, bool: which tokens are not among these."""
        left = self.valid.new_ones(len(self.index), self.total + 1)
        # One column more takes what fills up the rows that hold fewer.
        return left.scatter(1, self.index.masked_fill(~self.valid, self.total), False)[:, :-1]

    def mask_of(self, wanted: Tensor) -> Tensor:
        """``(batch, held)``, bool: which of these ``wanted`` ``(batch, tokens)`` names."""
        return wanted.gather(1, self.index) & self.valid

    def of(self, states: Tensor) -> Tensor:
        """Their entries in ``states`` ``(..., batch, tokens, dim)``."""
        index = self.index[..., None].expand(*states.shape[:-2], -1, states.shape[-1])
        return states.gather(-2, index)

    def rows(self, index: Tensor) -> "Tokens":
        """Those of other batch rows."""
        return Tokens(self.index[index], self.valid[index], self.total)

    def and_then(self, later: "Tokens") -> "Tokens":
        """These, followed by others."""
        index, valid = torch.cat([self.index, later.index], dim=1), torch.cat([self.valid, later.valid], dim=1)
        return Tokens(index, valid, self.total)


@dataclass(frozen=True)
class Projected:
    """Keys and values in the head layout of a layer's attention."""

    key: Tensor
    """``(batch, key_heads, held, head_dim)``."""
    value: Tensor
    """``(batch, key_heads, held, value_dim)``."""
    tokens: Tokens | None = None
    """Whose they are; None: of all tokens of the memory, in order."""

    @property
    def bytes(self) -> int:
        """What they take up."""
        return int(self.key.nbytes + self.value.nbytes)

    def of(self, states: Tensor) -> Tensor:
        """The entries of these tokens in ``states`` ``(batch, ..., tokens)``."""
        if self.tokens is None:
            return states
        index = self.tokens.index.view(len(states), *[1] * (states.ndim - 2), -1)
        return states.gather(-1, index.expand(*states.shape[:-1], -1))

    def among(self, selected: Tensor) -> Tensor:
        """``(batch, queries, held)``, bool: which of these tokens ``selected`` ``(batch, queries, tokens)`` names."""
        return selected if self.tokens is None else self.of(selected) & self.tokens.valid[:, None]

    def missing(self, wanted: Tensor) -> Tensor:
        """``(batch, tokens)``, bool: the wanted tokens that are not among these."""
        return wanted & False if self.tokens is None else wanted & self.tokens.others

    def and_then(self, later: "Projected") -> "Projected":
        """These, followed by those of other tokens."""
        if self.tokens is None or later.tokens is None:
            return self if self.tokens is None else later
        key, value = torch.cat([self.key, later.key], dim=2), torch.cat([self.value, later.value], dim=2)
        return Projected(key, value, self.tokens.and_then(later.tokens))

    def only(self, wanted: Tensor) -> "Projected":
        """Those of the wanted tokens ``(batch, tokens)`` among these."""
        if self.tokens is None:
            return self
        places = Tokens.where(self.tokens.mask_of(wanted))
        key, value = (places.of(part.transpose(0, 1)).transpose(0, 1) for part in (self.key, self.value))
        return Projected(key, value, Tokens(self.tokens.index.gather(1, places.index), places.valid, wanted.shape[1]))

    def rows(self, index: Tensor) -> "Projected":
        """Those of other batch rows."""
        tokens = None if self.tokens is None else self.tokens.rows(index)
        return Projected(self.key[index], self.value[index], tokens)
