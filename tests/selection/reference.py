"""Slow and obvious: one map at a time, as lists of Python numbers, with exact fractions."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Grid = list[list[Any]]

NUMBERS = st.integers(-6, 6).map(lambda n: n / 4)
MASSES = st.integers(0, 9).map(float)
WILD = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0, 3.4e38, -3.4e38, 1e-30])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@st.composite
def maps(draw: st.DrawFn, numbers: st.SearchStrategy[float] = NUMBERS, largest: int = 7) -> Tensor:
    """Scores of shape (maps, rows, columns), float64, with many ties."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, largest)), draw(st.integers(1, largest)))
    values = draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def each_map(reference: Callable[[Grid], Grid], scores: Tensor) -> Tensor:
    return torch.tensor([reference(grid) for grid in scores.tolist()], dtype=torch.bool)


def shape_of(grid: Grid) -> tuple[int, int]:
    return len(grid), len(grid[0])


def cells_of(k: int | float, cells: int) -> int:
    return min(k, cells) if isinstance(k, int) else max(1, round(k * cells))


def top_k(grid: Grid, k: int | float) -> Grid:
    rows, columns = shape_of(grid)
    places = [(i, j) for i in range(rows) for j in range(columns)]
    rank = {place: (math.isnan(grid[place[0]][place[1]]), -grid[place[0]][place[1]], place) for place in places}
    order = sorted((p for p in places if not rank[p][0]), key=lambda p: rank[p][1:])
    order += [p for p in places if rank[p][0]]
    chosen = set(order[: cells_of(k, len(places))])
    return [[(i, j) in chosen for j in range(columns)] for i in range(rows)]


def threshold(grid: Grid, value: float) -> Grid:
    numbers = [Fraction(x) for row in grid for x in row if not math.isnan(x)]
    if not numbers or min(numbers) == max(numbers):
        return [[False for _ in row] for row in grid]
    low, high = min(numbers), max(numbers)
    return [[not math.isnan(x) and (Fraction(x) - low) / (high - low) > Fraction(value) for x in row] for row in grid]


def top_p(grid: Grid, p: float) -> Grid:
    rows, columns = shape_of(grid)
    total = sum(Fraction(x) for row in grid for x in row)
    chosen: set[tuple[int, int]] = set()
    held = Fraction(0)
    for i, j in sorted(((i, j) for i in range(rows) for j in range(columns)), key=lambda q: (-grid[q[0]][q[1]], q)):
        if held < Fraction(p) * total:
            chosen.add((i, j))
            held += Fraction(grid[i][j])
    return [[(i, j) in chosen for j in range(columns)] for i in range(rows)]


def center(grid: Grid, k: int | float) -> Grid:
    rows, columns = shape_of(grid)

    def nearness(i: int, j: int) -> Fraction:
        down = Fraction(2 * i + 1, 2 * rows) - Fraction(1, 2)
        across = Fraction(2 * j + 1, 2 * columns) - Fraction(1, 2)
        return -(down**2 + across**2)

    closeness = [[nearness(i, j) for j in range(columns)] for i in range(rows)]
    return top_k(closeness, k)


def border(grid: Grid, width: int) -> Grid:
    rows, columns = shape_of(grid)
    return [[min(i, j, rows - 1 - i, columns - 1 - j) < width for j in range(columns)] for i in range(rows)]


def pool(mask: Grid, size: int) -> Grid:
    rows, columns = shape_of(mask)
    down, across = min(size, rows), min(size, columns)

    def block(index: int, blocks: int, cells: int) -> range:
        return range(index * cells // blocks, math.ceil(Fraction((index + 1) * cells, blocks)))

    return [
        [any(mask[i][j] for i in block(p, down, rows) for j in block(q, across, columns)) for q in range(across)]
        for p in range(down)
    ]


def nearest(grid: Grid, size: tuple[int, int]) -> Grid:
    rows, columns = shape_of(grid)
    return [
        [
            grid[math.floor(Fraction(i * rows, size[0]))][math.floor(Fraction(j * columns, size[1]))]
            for j in range(size[1])
        ]
        for i in range(size[0])
    ]


def dilate(mask: Grid, cells: int) -> Grid:
    rows, columns = shape_of(mask)
    kept = [(i, j) for i in range(rows) for j in range(columns) if mask[i][j]]
    return [
        [any(abs(i - a) <= cells and abs(j - b) <= cells for a, b in kept) for j in range(columns)] for i in range(rows)
    ]


def capped(selected: Grid, scores: Grid, budget: int | float) -> Grid:
    rows, columns = shape_of(selected)
    fine = nearest(scores, (rows, columns))
    places = [(i, j) for i in range(rows) for j in range(columns) if selected[i][j]]
    best = sorted(places, key=lambda p: (-fine[p[0]][p[1]], p))[: cells_of(budget, rows * columns)]
    return [[(i, j) in best for j in range(columns)] for i in range(rows)]
