"""The selection of the authors' code: margin, min-max, threshold, 9 x 9 blocks, nearest."""

import pytest
import torch
from torch import Tensor

from flexkit.selection import PUBLISHED_POLICY, AttentionMapSelector, Pooled, Threshold
from tests.selection import reference


def selected(scores: Tensor, zoom: tuple[int, int]) -> Tensor:
    """One map at a time, cell by cell."""
    rows, columns = scores.shape
    low, high = scores.min(), scores.max()
    kept = [[bool(255 * (scores[i, j] - low) / (high - low) > 48) for j in range(columns)] for i in range(rows)]
    return torch.tensor(reference.nearest(reference.pool(kept, 9), (zoom[0] * rows, zoom[1] * columns)))


@pytest.mark.parametrize("grid", [(9, 9), (12, 12), (24, 24), (12, 24), (7, 20), (3, 5)])
@pytest.mark.parametrize("zoom", [(3, 3), (2, 3)])
def test_every_step_cell_by_cell(grid: tuple[int, int], zoom: tuple[int, int]) -> None:
    rows, columns = grid
    attention = (2 * torch.randn(2, 4, 3, rows * columns, dtype=torch.float64)).softmax(-1)
    margins = torch.tensor([[1, 0], [0, 2]])
    maps = attention.sum(1).reshape(2, 3, rows, columns)
    maps[0, :, :1] = maps[0, :, rows - 1 :] = 0
    maps[1, :, :, :2] = maps[1, :, :, columns - 2 :] = 0
    expected = torch.stack([torch.stack([selected(scores, zoom) for scores in batch]) for batch in maps])
    assert torch.equal(AttentionMapSelector()(attention, grid, zoom, margins=margins), expected)
    assert expected.any() and (min(grid) < 9 or not expected.all())


@pytest.mark.parametrize("side", [12, 24])
def test_blocks_go_to_the_high_res_grid_in_one_step(side: int) -> None:
    scores = torch.rand(side, side) ** 8
    direct = PUBLISHED_POLICY.select(scores, (3 * side, 3 * side))
    two_steps = PUBLISHED_POLICY(scores).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert not torch.equal(direct, two_steps)


def test_the_default_of_the_selector() -> None:
    assert AttentionMapSelector().policy == PUBLISHED_POLICY == Pooled(Threshold(48 / 255), 9)
