"""A control: cells drawn by chance (paper, figure 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.errors import PolicyError
from flexkit.grids import Grid, frames_and_cells
from flexkit.selection._checks import check_count, check_int
from flexkit.selection.policy import Policy
from flexkit.selection.ranking import cells_of, fixed_mask


@dataclass(frozen=True)
class Random(Policy):
    """Select ``k`` cells by chance, the same ones for every map of a grid's shape.

    So a batch selects what its rows would alone, on any device, and a larger ``k`` selects a superset.

    Parameters
    ----------
    k : int or float
        As in :class:`TopK`: a number of cells, or a share of them.
    seed : int
        Seed of the draw, at least 0 and below 2**64.

    Raises
    ------
    PolicyError
        If a parameter is none of these.
    """

    k: int | float
    seed: int = 0
    uses_scores = False

    def __post_init__(self) -> None:
        check_count(self, "k", self.k)
        check_int(self, "seed", self.seed, minimum=0)
        if self.seed >= 2**64:
            raise PolicyError(f"Random: seed must be below 2**64, got {self.seed!r}")

    @override
    def most(self, grid: Grid) -> int:
        frames, cells = frames_and_cells(grid)
        return frames * cells_of(self.k, cells)

    @override
    def mask(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        kept = fixed_mask(_shuffled, scores, cells_of(self.k, rows * columns), rows * columns, self.seed)
        return kept.reshape(rows, columns).expand(scores.shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shuffled(cells: int, seed: int) -> Tensor:
    return torch.randperm(cells, generator=torch.Generator().manual_seed(seed))
