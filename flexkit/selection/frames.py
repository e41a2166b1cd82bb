"""The best frames of a video."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from flexkit.errors import PolicyError
from flexkit.grids import Grid, frames_and_cells
from flexkit.selection._checks import check_count
from flexkit.selection.policy import Policy
from flexkit.selection.ranking import cells_of, descending, first_of


@dataclass(frozen=True)
class Frames(Policy):
    """Select all cells of the ``k`` frames whose scores add up to most, the earlier ones of equals.

    With ``&`` it says where another policy may select: ``Frames(2) & TopK(8)``. A picture is one frame, and selected as
    a whole.

    Parameters
    ----------
    k : int or float
        An int of at least 1 counts frames (more than there are: all of them); a float in (0, 1] is a share of the
        frames, rounded, at least one.

    Raises
    ------
    PolicyError
        If ``k`` is neither, or scores have no axis of frames.

    Examples
    --------
    >>> import torch
    >>> Frames(1)(torch.tensor([[[1.0, 2.0]], [[4.0, 0.0]]])).int().tolist()
    [[[0, 0]], [[1, 1]]]
    """

    k: int | float
    sees_frames = True

    def __post_init__(self) -> None:
        check_count(self, "k", self.k)

    @override
    def most(self, grid: Grid) -> int:
        frames, cells = frames_and_cells(grid)
        return cells_of(self.k, frames) * cells

    @override
    def mask(self, scores: Tensor) -> Tensor:
        if scores.ndim < 3:
            raise PolicyError(f"{self!r} was given scores {tuple(scores.shape)}, expected (..., frames, rows, columns)")
        best = descending(scores.sum((-2, -1)))
        chosen = first_of(best, cells_of(self.k, best.shape[-1]))
        return chosen[..., None, None].expand(scores.shape)
