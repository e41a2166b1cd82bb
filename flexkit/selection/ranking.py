"""Ordering cells by score, and keeping the first of an order: so many, or as many as a budget allows."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from flexkit.grids import resample_nearest


def cells_of(count: int | float, cells: int) -> int:
    """Cells that ``count`` means on a grid of ``cells``: itself, or as a share rounded, at least one."""
    wanted = max(1, round(count * cells)) if isinstance(count, float) else count
    return min(wanted, cells)


def descending(scores: Tensor) -> Tensor:
    """Indices along the last axis, best score first, NaN last, ties in their given order."""
    # Ascending, as that puts positive NaN last; without negative zeros, as radix sorts tell them apart.
    keys = torch.rsub(scores, 0.0).nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)
    return torch.argsort(keys, dim=-1, stable=True)


def mask_of(order: Tensor, kept: Tensor) -> Tensor:
    """Mask along the last axis: at ``order[..., i]`` stands ``kept[..., i]``."""
    return torch.zeros_like(kept).scatter(-1, order, kept)


def first_of(order: Tensor, count: int) -> Tensor:
    """Mask along the last axis of the first ``count`` indices in ``order``."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def fixed_mask(order: Callable[..., Tensor], scores: Tensor, count: int, *key: int) -> Tensor:
    """Mask ``(cells,)`` of the first of an order that no score decides, for the device of ``scores``.

    Parameters
    ----------
    order : callable
        From ``key`` to indices of all cells, first the first.
    scores : torch.Tensor
        Whose cells these are.
    count : int
        How many.
    *key : int
        What decides.
    """
    # Made once and not for every map; but a trace, or a tensor that only pretends, gets its own.
    if type(scores) is not Tensor or torch.compiler.is_compiling():
        return first_of(order(*key).to(scores.device), count)
    return _fixed_mask(order, scores.device, count, *key).clone()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _fixed_mask(order: Callable[..., Tensor], device: torch.device, count: int, *key: int) -> Tensor:
    return first_of(order(*key), count).to(device)


def within_budget(selected: Tensor, scores: Tensor, budget: int | float, *, axes: int = 2) -> Tensor:
    """Keep at most ``budget`` selected positions of each map, those of the best-scored cells.

    Parameters
    ----------
    selected : torch.Tensor
        Shape (..., high-res rows, high-res columns), bool; of videos with frames in front of rows.
    scores : torch.Tensor
        Shape (..., rows, columns), floating; a position has the score of its low-res cell. Ties are decided
        in raster order, NaN comes last.
    budget : int or float
        A number of positions, or a share in (0, 1] of the high-res grid (rounded, at least one).
    axes : int
        How many of the last axes are of one map: 2, or 3 to share the budget among the frames of a video.

    Returns
    -------
    torch.Tensor
        A subset of ``selected``, same shape.

    Examples
    --------
    >>> within_budget(torch.tensor([[True, True, False, True]]), torch.tensor([[1.0, 2.0]]), 2).int().tolist()
    [[1, 0, 0, 1]]
    """
    size = selected.shape[-axes:]
    bound = cells_of(budget, math.prod(size))
    if bound == math.prod(size):
        return selected
    order = descending(resample_nearest(scores, size).flatten(-axes))
    chosen = selected.flatten(-axes).gather(-1, order)
    return mask_of(order, chosen & (chosen.cumsum(-1) <= bound)).reshape(selected.shape)
