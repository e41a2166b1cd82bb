"""High-res views in the forms that kinds of vision towers take them, filled with noise."""

from typing import Any

import torch
from torch import Tensor

from tests.zoo.family import Grid


def square(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """One picture of the tower's size times the zoom: ``(1, 3, height, width)``."""
    size = config.vision_config.image_size
    return {"pixel_values": torch.randn(1, 3, size * zoom[0], size * zoom[1])}


def patches(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Flattened patches and their number in time, rows and columns; four patches make one cell."""
    vision = config.vision_config
    size = torch.tensor([[1, 2 * grid[0] * zoom[0], 2 * grid[1] * zoom[1]]])
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.randn(int(size.prod()), width), "image_grid_thw": size}
