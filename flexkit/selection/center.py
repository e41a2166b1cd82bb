"""A control: the middle of the image (paper, figure 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.grids import Grid, frames_and_cells
from flexkit.selection._checks import check_count
from flexkit.selection.policy import Policy
from flexkit.selection.ranking import cells_of, fixed_mask


@dataclass(frozen=True)
class Center(Policy):
    """Select the ``k`` cells nearest to the grid's centre, ties in raster order.

    Distances are in units of the grid's height and width, so that the selection has the image's proportions.

    Parameters
    ----------
    k : int or float
        As in :class:`TopK`: a number of cells, or a share of them.

    Raises
    ------
    PolicyError
        If ``k`` is neither.

    Examples
    --------
    >>> Center(2)(torch.zeros(3, 4)).int().tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """

    k: int | float
    uses_scores = False

    def __post_init__(self) -> None:
        check_count(self, "k", self.k)

    @override
    def most(self, grid: Grid) -> int:
        frames, cells = frames_and_cells(grid)
        return frames * cells_of(self.k, cells)

    @override
    def mask(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        kept = fixed_mask(_outwards, scores, cells_of(self.k, rows * columns), rows, columns)
        return kept.reshape(rows, columns).expand(scores.shape)


def _outwards(rows: int, columns: int) -> Tensor:
    # Offsets times 2 * rows * columns are integers: equal distances compare equal.
    down = (2 * torch.arange(rows) + 1 - rows) * columns
    across = (2 * torch.arange(columns) + 1 - columns) * rows
    return torch.argsort((down[:, None] ** 2 + across**2).flatten(), stable=True)
