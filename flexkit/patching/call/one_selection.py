"""One selection for an answer: made once, from the maps of several layers, and read in all of them.

The first position of an answer, which is the last one of its prompt, selects; those that follow it without a gap read
the same, in this call and in later ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from flexkit.attention.ragged import RaggedIndex
from flexkit.attention.select import Selection
from flexkit.attention.visible import ImageGroup
from flexkit.patching.memory.high_res import Answer

__all__ = ["OneSelection"]


@dataclass
class OneSelection:
    """What the querying rows of a call read."""

    rows: RaggedIndex
    positions: Tensor
    """``(batch, queries)``, int64: of the rows in the sequence."""
    firsts: Tensor
    """``(batch, queries)``, int64: which row selects for each of them."""
    given: Tensor
    """``(batch, queries, tokens)``, bool: what each of them reads."""
    decided: Tensor
    """``(batch, queries)``, bool: whether that is known."""
    fresh: Tensor | None = None
    """``(batch, queries)``, bool: the rows of the answers that were decided last."""
    shut: Tensor | None = None
    """``(batch, queries)``, bool: the rows that a gate keeps from reading."""
    doubt: Tensor | None = None
    """``(batch,)``: entropy, in nats, of the low-res answer of the first row of each of these."""
    scores: tuple[Tensor, ...] = ()
    """The maps that were selected from last."""
    is_decided: bool = field(init=False, default=True)
    """Whether it is known of all."""
    reads: bool = field(init=False, default=True)
    """Whether any row reads anything."""

    def __post_init__(self) -> None:
        self._count()

    def _count(self) -> None:
        """Ask, once a change, what every layer wants to know."""
        if not torch.compiler.is_compiling():  # all is decided, and something is read
            self.is_decided, self.reads = bool(self.decided.all()), bool(self.given.any())

    @classmethod
    def begin(cls, rows: RaggedIndex, past: int | Tensor, tokens: int, answer: Answer | None, *, shared: bool) -> Self:
        """Rows that go on with an answer read what it does; nothing is known of the others.

        Where all rows of a sample share a selection (paper, Eq. 6-7) it is that of the last one.
        """
        positions = rows.index + past
        before = torch.full_like(positions[:, :1], -2) if answer is None else answer.end[:, None] - 1
        follows = positions == torch.cat([before, positions[:, :-1]], dim=1) + 1
        if torch.compiler.is_compiling():  # a graph is of a step in the middle of an answer, whose end it cannot note
            follows = torch.ones_like(follows)
        slots = torch.arange(rows.count, device=positions.device).expand_as(positions)
        firsts = rows.last[:, None].expand_as(slots) if shared else slots.masked_fill(follows, 0).cummax(-1).values
        decided = follows.cummin(-1).values | ~rows.valid
        given = torch.zeros(*positions.shape, tokens, dtype=torch.bool, device=positions.device)
        if answer is not None:
            given = answer.tokens[:, None] & (decided & rows.valid)[..., None]
        return cls(rows, positions, firsts, given, decided)

    @property
    def next(self) -> Tensor:
        """``(batch,)``, int64: the row that selects for the next answer, of those that are undecided."""
        return self.selecting(~self.decided)

    def selecting(self, rows: Tensor) -> Tensor:
        """``(batch,)``, int64: the row that selects for the first of some rows ``(batch, queries)``, bool."""
        return self.firsts.gather(-1, rows.int().argmax(-1, keepdim=True))[:, 0]

    def decide(self, selected: Tensor, behind: Tensor) -> Tensor:
        """Let the next answer of every batch row read what the row that selects for it has selected.

        Parameters
        ----------
        selected : torch.Tensor
            ``(batch, queries, tokens)``, bool.
        behind : torch.Tensor
            ``(batch, queries, tokens)``, bool: whether a row stands behind the image of a token.

        Returns
        -------
        torch.Tensor
            ``(batch, queries, tokens)``, bool: what rows read that did not read before.
        """
        first = self.next
        own = (self.firsts == first[:, None]) & ~self.decided
        picked = selected[torch.arange(len(selected), device=selected.device), first]
        new = own[..., None] & picked[:, None] & behind
        self.given, self.decided, self.fresh = self.given | new, self.decided | own, own
        self._count()
        return new

    def shut_out(self, samples: Tensor) -> None:
        """Let the answers that were decided last read nothing in some batch rows ``(batch,)``, bool."""
        if self.fresh is None:
            return
        rows = self.fresh & samples[:, None]
        self.shut = rows if self.shut is None else self.shut | rows
        self.given = self.given & ~rows[..., None]
        self._count()

    def selection(self, groups: Sequence[ImageGroup]) -> Selection:
        """The same image by image."""
        read = (self.given[group.rows[:, None], :, group.tokens].transpose(1, 2) for group in groups)
        masks = [mask.reshape(*mask.shape[:2], *group.size) for mask, group in zip(read, groups, strict=True)]
        unseen = [of.new_zeros(*of.shape[:2], *group.grid).float() for of, group in zip(masks, groups, strict=True)]
        return Selection(tuple(groups), tuple(masks), self.scores or tuple(unseen))

    def answer(self, before: Answer | None) -> Answer:
        """What the answer reads that the last row of every batch row belongs to; of others what was known before."""
        rows = torch.arange(len(self.given), device=self.given.device)
        last = self.rows.last
        start, end = self.positions[rows, self.firsts[rows, last]], self.positions[rows, last] + 1
        if before is None:
            return Answer(self.given[rows, last], start, end)
        start = torch.where(start == before.end, before.start, start)  # it goes on with that one
        return Answer(self.given[rows, last], start, end).where(self.rows.valid.any(-1), before)
