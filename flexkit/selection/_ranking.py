"""Ordering cells by score, and keeping the first of an order."""

import torch
from torch import Tensor


def cells_of(count: int | float, cells: int) -> int:
    """Cells that ``count`` means on a grid of ``cells``: itself, or as a share rounded, at least one."""
    wanted = max(1, round(count * cells)) if isinstance(count, float) else count
    return min(wanted, cells)


def descending(scores: Tensor) -> Tensor:
    """Indices along the last axis, best score first, NaN last, ties in their given order."""
    # Ascending, as that puts positive NaN last; without negative zeros, as radix sorts tell them apart.
    keys = (0.0 - scores).masked_fill(scores.isnan(), torch.nan)
    return torch.argsort(keys, dim=-1, stable=True)


def mask_of(order: Tensor, kept: Tensor) -> Tensor:
    """Mask along the last axis: at ``order[..., i]`` stands ``kept[..., i]``."""
    return torch.zeros_like(kept).scatter(-1, order, kept)


def first_of(order: Tensor, count: int) -> Tensor:
    """Mask along the last axis of the first ``count`` indices in ``order``."""
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., :count], True)
