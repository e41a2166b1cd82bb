import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkit.errors import ConfigError, HighResInputError
from flexkit.selection import margin_cells, valid_cells

SIDES = st.integers(1, 4000)
GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 40))


@pytest.mark.parametrize(
    ("height", "width", "grid", "expected"),
    [
        (480, 640, (24, 24), (3, 0)),  # 80 / 640 * 24 = 3
        (640, 480, (24, 24), (0, 3)),
        (300, 400, (9, 9), (1, 0)),  # 50 / 400 * 9 = 1.125
        (100, 101, (24, 24), (0, 0)),  # floor(1 / 2) = 0
        (100, 103, (200, 1), (1, 0)),  # floor(3 / 2) / 103 * 200 = 1.94
        (500, 500, (24, 24), (0, 0)),
        (1, 4000, (24, 24), (11, 0)),  # 1999 / 4000 * 24 = 11.99
        (400, 800, (12, 24), (3, 0)),  # 200 / 800 * 12: the rows' own number
        (800, 400, (12, 24), (0, 6)),
    ],
)
def test_by_hand(height: int, width: int, grid: tuple[int, int], expected: tuple[int, int]) -> None:
    margins = margin_cells(torch.tensor([[height, width]]), grid)
    assert margins.dtype == torch.long and margins.tolist() == [list(expected)]


@given(st.lists(st.tuples(SIDES, SIDES), max_size=4), GRIDS)
def test_images_one_by_one_and_turned(sizes: list[tuple[int, int]], grid: tuple[int, int]) -> None:
    margins = margin_cells(torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2), grid)
    assert margins.shape == (len(sizes), 2)
    for (height, width), margin in zip(sizes, margins.tolist(), strict=True):
        assert margin_cells(torch.tensor([[height, width]]), grid).tolist() == [margin]
        assert margin_cells(torch.tensor([[width, height]]), grid[::-1]).tolist() == [margin[::-1]]
        assert 0 in margin and 2 * margin[0] < grid[0] and 2 * margin[1] < grid[1]


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), GRIDS)
def test_valid_cells_cell_by_cell(sizes: list[tuple[int, int]], grid: tuple[int, int]) -> None:
    margins = margin_cells(torch.tensor(sizes), grid)
    rows, columns = grid
    expected = [
        [[m <= i < rows - m and n <= j < columns - n for j in range(columns)] for i in range(rows)]
        for m, n in margins.tolist()
    ]
    assert valid_cells(margins, grid).tolist() == expected


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(1, 3).long(), torch.ones(1, 2), torch.ones(1, 2).bool()])
def test_wrong_tensors(wrong: torch.Tensor) -> None:
    with pytest.raises(HighResInputError, match=r"\(height, width\) of each original image"):
        margin_cells(wrong, (3, 3))
    with pytest.raises(ConfigError, match="pass what margin_cells returns"):
        valid_cells(wrong, (3, 3))


def test_sizes_must_be_positive() -> None:
    with pytest.raises(HighResInputError, match=r"positive, got \[\[3, 0\]\]"):
        margin_cells(torch.tensor([[3, 0]]), (3, 3))


@pytest.mark.parametrize("grid", [3, (3,), (3, 0), (3.0, 3)])
def test_wrong_grids(grid: object) -> None:
    for function in (margin_cells, valid_cells):
        with pytest.raises(ConfigError, match="grid must be two positive ints"):
            function(torch.tensor([[3, 3]]), grid)  # type: ignore[arg-type]
