"""A fixed number of cells: the best-scored ones."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from flexkit.grids import Grid, frames_and_cells
from flexkit.selection._checks import check_count
from flexkit.selection.policy import Policy
from flexkit.selection.ranking import cells_of, descending, first_of


@dataclass(frozen=True)
class TopK(Policy):
    """Select the ``k`` cells of the highest scores, always exactly that many.

    Ties are decided in raster order. NaN ranks below every number. With this policy all shapes that follow
    from the selection are static.

    Parameters
    ----------
    k : int or float
        An int of at least 1 counts cells (more than there are: all of them); a float in (0, 1] is a share of
        the cells, rounded, at least one cell.

    Raises
    ------
    PolicyError
        If ``k`` is neither.

    Examples
    --------
    >>> import torch
    >>> TopK(2)(torch.tensor([[1.0, 3.0], [3.0, 3.0]])).int().tolist()
    [[0, 1], [1, 0]]
    """

    k: int | float

    def __post_init__(self) -> None:
        check_count(self, "k", self.k)

    @override
    def most(self, grid: Grid) -> int:
        frames, cells = frames_and_cells(grid)
        return frames * cells_of(self.k, cells)

    @override
    def mask(self, scores: Tensor) -> Tensor:
        cells = scores.flatten(-2)
        return first_of(descending(cells), cells_of(self.k, cells.shape[-1])).reshape(scores.shape)
