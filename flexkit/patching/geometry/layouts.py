"""Which of the image tokens of one image are the cells of its grid; the others separate rows and images."""

import torch
from torch import Tensor

from flexkit.grids import Pair

__all__ = ["cells_alone", "line_ends", "newline_after_all", "newline_after_rows"]


def cells_alone(grid: Pair) -> Tensor:
    """Nothing but cells: ``(rows * columns,)``, all True."""
    return torch.ones(grid[0] * grid[1], dtype=torch.bool)


def newline_after_all(grid: Pair) -> Tensor:
    """The cells and one newline (LLaVA-NeXT)."""
    return torch.cat([cells_alone(grid), torch.zeros(1, dtype=torch.bool)])


def line_ends(grid: Pair) -> Tensor:
    """A line end after every row of cells (Emu3)."""
    return (torch.arange(grid[1] + 1) < grid[1]).repeat(grid[0])


def newline_after_rows(grid: Pair) -> Tensor:
    """A newline after every row, and a separator after the image (Unlimited-OCR)."""
    return torch.cat([line_ends(grid), torch.zeros(1, dtype=torch.bool)])
