"""A hard bound on the number of selected positions."""

from torch import Tensor

from flexkit.selection._ranking import cells_of, descending, mask_of
from flexkit.selection.resample import resample_nearest


def within_budget(selected: Tensor, scores: Tensor, budget: int | float) -> Tensor:
    """Keep at most ``budget`` selected positions of each map, those of the best-scored cells.

    Parameters
    ----------
    selected : torch.Tensor
        Shape (..., high-res rows, high-res columns), bool.
    scores : torch.Tensor
        Shape (..., rows, columns), floating; a position has the score of its low-res cell. Ties are decided
        in raster order, NaN comes last.
    budget : int or float
        A number of positions, or a share in (0, 1] of the high-res grid (rounded, at least one).

    Returns
    -------
    torch.Tensor
        A subset of ``selected``, same shape.

    Examples
    --------
    >>> import torch
    >>> within_budget(torch.tensor([[True, True, False, True]]), torch.tensor([[1.0, 2.0]]), 2).int().tolist()
    [[1, 0, 0, 1]]
    """
    rows, columns = selected.shape[-2:]
    bound = cells_of(budget, rows * columns)
    if bound == rows * columns:
        return selected
    order = descending(resample_nearest(scores, (rows, columns)).flatten(-2))
    chosen = selected.flatten(-2).gather(-1, order)
    return mask_of(order, chosen & (chosen.cumsum(-1) <= bound)).reshape(selected.shape)
