"""As many cells as it takes to hold a share of the attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.checks import is_number
from flexkit.errors import PolicyError
from flexkit.selection.policy import Policy
from flexkit.selection.ranking import descending, mask_of


@dataclass(frozen=True)
class TopP(Policy):
    """Select the smallest set of highest cells that holds a share of the map's total.

    Scores are masses: negative ones and NaN count as 0, infinite ones as the largest finite number. Cells
    without mass are never selected, so a map of zeros selects nothing. Ties are decided in raster order.

    Parameters
    ----------
    p : float
        The share, in (0, 1].

    Raises
    ------
    PolicyError
        If ``p`` is not in (0, 1].

    Examples
    --------
    >>> TopP(0.75)(torch.tensor([[4.0, 1.0], [2.0, 1.0]])).int().tolist()
    [[1, 0], [1, 0]]
    """

    p: float

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0.0 < self.p <= 1.0:
            raise PolicyError(f"TopP: p must be a number in (0, 1], got {self.p!r}")

    @override
    def mask(self, scores: Tensor) -> Tensor:
        masses = torch.nan_to_num(scores.flatten(-2), nan=0.0).clamp(min=0.0)
        # A power of two above the number of cells: exact, and the sum stays finite.
        masses = masses / 2 ** masses.shape[-1].bit_length()
        order = descending(masses)
        reached = masses.gather(-1, order).cumsum(-1)
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
        return mask_of(order, before < self.p * reached[..., -1:]).reshape(scores.shape)
