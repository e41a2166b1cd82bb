import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexkit.attention import fractional_positions, interpolate_table, rotary_tables, rotate
from flexkit.errors import ConfigError

SEEDS = st.integers(0, 2**31).map(torch.manual_seed)
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
ZOOMS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def centre(index: int, zoom: int) -> float:
    """Where the centre of a high-res cell lies among the centres of low-res cells."""
    return (index + 0.5) / zoom - 0.5


def cubic(distance: float, a: float = -0.75) -> float:
    """The cubic convolution kernel with torch's coefficient."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(image: Tensor, zoom: tuple[int, int]) -> Tensor:
    rows, columns = image.shape
    enlarged = torch.zeros(rows * zoom[0], columns * zoom[1], dtype=image.dtype)
    for i in range(enlarged.shape[0]):
        for j in range(enlarged.shape[1]):
            y, x = centre(i, zoom[0]), centre(j, zoom[1])
            for r in range(math.floor(y) - 1, math.floor(y) + 3):
                for c in range(math.floor(x) - 1, math.floor(x) + 3):
                    pixel = image[min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)]
                    enlarged[i, j] += cubic(y - r) * cubic(x - c) * pixel
    return enlarged


@given(GRIDS, ZOOMS, SEEDS)
def test_tables_are_interpolated_bicubically(grid: tuple[int, int], zoom: tuple[int, int], seed: object) -> None:
    table = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    enlarged = interpolate_table(table, grid, zoom)
    for b in range(2):
        for d in range(3):
            expected = bicubic(table[b, :, d].reshape(grid), zoom).flatten()
            torch.testing.assert_close(enlarged[b, :, d], expected, rtol=1e-9, atol=1e-9)


@given(GRIDS, ZOOMS, SEEDS, st.data())
def test_tables_of_some_tokens_are_those_of_all(
    grid: tuple[int, int], zoom: tuple[int, int], seed: object, data: st.DataObject
) -> None:
    table = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    count = table.shape[1] * zoom[0] * zoom[1]
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=5)), dtype=torch.long)
    some = interpolate_table(table, grid, zoom, tokens)
    torch.testing.assert_close(some, interpolate_table(table, grid, zoom)[:, tokens], rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), GRIDS, st.integers(1, 3), ZOOMS, SEEDS, st.data())
def test_tables_of_videos(
    frames: int, grid: tuple[int, int], factor: int, zoom: tuple[int, int], seed: object, data: st.DataObject
) -> None:
    """Every frame is interpolated as a picture is, and between frames by the same filter."""
    table = torch.randn(2, frames, grid[0] * grid[1], 3, dtype=torch.float64)
    found = interpolate_table(table.flatten(1, 2), (frames, *grid), (factor, *zoom))
    pictures = interpolate_table(table, grid, zoom)
    in_time = pictures.movedim(1, -2).contiguous()  # cells, frames, dim
    expected = interpolate_table(in_time, (frames, 1), (factor, 1)).movedim(-2, 1)
    torch.testing.assert_close(found, expected.flatten(1, 2), rtol=1e-9, atol=1e-9)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, found.shape[1] - 1), max_size=3)), dtype=torch.long)
    some = interpolate_table(table.flatten(1, 2), (frames, *grid), (factor, *zoom), tokens)
    torch.testing.assert_close(some, found[:, tokens], rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), GRIDS, st.integers(1, 3), ZOOMS, SEEDS)
def test_positions_of_videos(
    frames: int, grid: tuple[int, int], factor: int, zoom: tuple[int, int], seed: object
) -> None:
    """Refined along time as along rows and columns, each on its own."""
    positions = torch.randn(2, frames, grid[0] * grid[1], dtype=torch.float64)
    found = fractional_positions(positions.flatten(1), (frames, *grid), (factor, *zoom))
    in_space = fractional_positions(positions, grid, zoom).transpose(1, 2)
    expected = fractional_positions(in_space, (frames, 1), (factor, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected.flatten(1))
    assert torch.equal(found, fractional_positions(positions.flatten(1), (frames, *grid), (factor, *zoom)))


def test_interpolated_tables_are_no_rotation_and_keep_dtype_and_axes() -> None:
    cos, sin = rotary_tables(torch.arange(16), 8)
    assert torch.equal(interpolate_table(cos, (4, 4), 1), cos)
    cos, sin = interpolate_table(cos, (4, 4), 3), interpolate_table(sin, (4, 4), 3)
    norms = (cos**2 + sin**2).sqrt()
    assert norms.min() < 0.6, "values are interpolated, not angles"
    half = interpolate_table(torch.randn(2, 1, 6, 4).bfloat16(), (2, 3), (1, 2))
    assert half.shape == (2, 1, 12, 4) and half.dtype == torch.bfloat16


@given(GRIDS, ZOOMS, st.integers(0, 1000), SEEDS)
def test_raster_positions_between_cells_are_exact(
    grid: tuple[int, int], zoom: tuple[int, int], start: int, seed: object
) -> None:
    rows, columns = grid
    positions = start + torch.arange(rows * columns)
    ours = fractional_positions(positions, grid, zoom).reshape(rows * zoom[0], columns * zoom[1])
    for i in range(rows * zoom[0]):
        for j in range(columns * zoom[1]):
            down = centre(i, zoom[0]) if rows > 1 else 0.0
            across = centre(j, zoom[1]) if columns > 1 else 0.0
            assert ours[i, j].item() == pytest.approx(start + down * columns + across, abs=1e-3)


@given(GRIDS, ZOOMS, SEEDS)
def test_axes_of_positions_are_refined_each_on_its_own(
    grid: tuple[int, int], zoom: tuple[int, int], seed: object
) -> None:
    time = torch.full(grid, 7.0, dtype=torch.float64)
    row = torch.arange(grid[0], dtype=torch.float64)[:, None].expand(grid)
    column = torch.arange(grid[1], dtype=torch.float64).expand(grid)
    positions = torch.stack([time, row, column]).flatten(1)[:, None]
    ours = fractional_positions(positions, grid, zoom)
    assert ours.shape == (3, 1, grid[0] * zoom[0] * grid[1] * zoom[1]) and ours.dtype == torch.float64
    time, row, column = ours.reshape(3, grid[0] * zoom[0], grid[1] * zoom[1])
    assert torch.allclose(time, torch.tensor(7.0).double())
    for i in range(grid[0] * zoom[0]):
        assert torch.allclose(row[i], torch.tensor(centre(i, zoom[0]) if grid[0] > 1 else 0.0).double())
    for j in range(grid[1] * zoom[1]):
        assert torch.allclose(column[:, j], torch.tensor(centre(j, zoom[1]) if grid[1] > 1 else 0.0).double())


def test_an_odd_zoom_keeps_the_positions_of_the_cells_at_their_centres() -> None:
    positions = torch.tensor([3, 4, 5, 20, 21, 22])
    fine = fractional_positions(positions, (2, 3), 3).reshape(6, 9)
    assert fine[1::3, 1::3].flatten().tolist() == positions.tolist()
    assert fine[1, :3].tolist() == pytest.approx([3 - 1 / 3, 3, 3 + 1 / 3])


@given(st.integers(1, 4), st.floats(2, 1e4), st.integers(0, 1), SEEDS)
def test_rotation_is_a_complex_product(half: int, base: float, plain: int, seed: object) -> None:
    states = torch.randn(2, 3, 5, 2 * half + plain, dtype=torch.float64)
    positions = 10 * torch.randn(2, 5, dtype=torch.float64)
    turned = rotate(states, *rotary_tables(positions, 2 * half, base=base))
    for i in range(half):
        number = torch.complex(states[..., i], states[..., half + i])
        angle = positions[:, None] * base ** (-i / half)
        expected = number * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(torch.complex(turned[..., i], turned[..., half + i]), expected)
    assert torch.equal(turned[..., 2 * half :], states[..., 2 * half :])


def test_rotation_keeps_the_dtype_of_the_states() -> None:
    cos, sin = rotary_tables(torch.arange(3)[None], 4)
    assert cos.dtype == torch.float32 and rotate(torch.randn(2, 1, 3, 4).half(), cos, sin).dtype == torch.float16


def test_logits_depend_on_distances_only() -> None:
    query, key = torch.randn(1, 1, 1, 6).double(), torch.randn(1, 1, 1, 6).double()

    def logit(place: float, other: float) -> Tensor:
        tables = [rotary_tables(torch.tensor([[where]]).double(), 6) for where in (place, other)]
        return (rotate(query, *tables[0]) * rotate(key, *tables[1])).sum()

    torch.testing.assert_close(logit(5.25, 2.0), logit(103.25, 100.0))
    assert (logit(5.25, 2.0) - logit(5.25, 3.0)).abs() > 1e-3


def test_sections_share_out_the_frequencies() -> None:
    positions = torch.randn(3, 1, 4, dtype=torch.float64)
    cos, sin = rotary_tables(positions, 12, sections=(1, 3, 2))
    axis_of = [0, 1, 1, 1, 2, 2]
    for i in range(12):
        plain_cos, plain_sin = rotary_tables(positions[axis_of[i % 6]], 12)
        assert torch.equal(cos[..., i], plain_cos[..., i]) and torch.equal(sin[..., i], plain_sin[..., i])


@pytest.mark.parametrize(
    ("dim", "sections", "message"),
    [(5, None, "must be even, got 5"), (8, (1, 1, 1), "dim / 2 = 4"), (8, (2, 2), "3 axes")],
)
def test_tables_that_cannot_be(dim: int, sections: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rotary_tables(torch.zeros(3, 2), dim, sections=sections)
