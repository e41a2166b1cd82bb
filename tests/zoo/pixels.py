"""High-res views in the forms that kinds of vision towers take them, filled with noise."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.zoo.family import IMAGE, Grid, Views


def square(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """One picture of the tower's size times the zoom: ``(1, 3, height, width)``."""
    size = config.vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(1, 3, height * zoom[0], width * zoom[1])}


def patches(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Flattened patches and their number in time, rows and columns; four patches make one cell."""
    vision = config.vision_config
    size = torch.tensor([[1, 2 * grid[0] * zoom[0], 2 * grid[1] * zoom[1]]])
    width = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {"pixel_values": torch.randn(int(size.prod()), width), "image_grid_thw": size}


def clip(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Flattened patches of all frames, and their number in time, rows and columns."""
    frames, rows, columns = (cells * factor for cells, factor in zip(grid, zoom, strict=True))
    size = torch.tensor([[frames, 2 * rows, 2 * columns]])
    vision = config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {"pixel_values_videos": torch.randn(int(size.prod()), width), "video_grid_thw": size}


def frames(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Frames of the tower's size times the zoom: ``(1, frames, 3, height, width)``."""
    pixels = torch.cat([square(config, grid[1:], zoom[1:])["pixel_values"] for _ in range(grid[0] * zoom[0])])
    return {"pixel_values_videos": pixels[None]}


def picture(height: int, width: int) -> Views:
    """One picture of a fixed size times the zoom: ``(1, 3, height, width)``."""

    def view(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(1, 3, height * zoom[0], width * zoom[1])}

    return view


def numbered_patches(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Flattened patches with their row and column, counted from 1, in front: ``(1, patches, 2 + width)``."""
    rows, columns = grid[0] * zoom[0], grid[1] * zoom[1]
    numbers = torch.cartesian_prod(torch.arange(1.0, rows + 1), torch.arange(1.0, columns + 1))
    patches = torch.randn(rows * columns, config.vision_config.patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([numbers, patches], dim=1)[None]}


def stacked(values: Tensor, images: Sequence[int]) -> Tensor:
    """``(images, ...)`` as ``(batch, images of the row with most, ...)``, zero where a row has fewer."""
    rows = values.new_zeros(len(images), max(images), *values.shape[1:])
    for row, own in zip(rows, values.split(list(images)), strict=True):
        row[: len(own)] = own
    return rows


def positions_of_images(ids: Tensor) -> list[list[int]]:
    """For every batch row the positions of its placeholders."""
    return [row.eq(IMAGE).nonzero().flatten().tolist() for row in ids]
