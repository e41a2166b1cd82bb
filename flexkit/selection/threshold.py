"""The paper's policy: cells above a share of the map's range."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.checks import is_number
from flexkit.errors import PolicyError
from flexkit.selection.policy import Policy


@dataclass(frozen=True)
class Threshold(Policy):
    """Select cells whose min-max normalised score is above a value, as the paper does.

    Each map is normalised to [0, 1] on its own. A constant map selects nothing. NaN is left out of the range
    and never selected; infinite scores count as the largest finite ones.

    Parameters
    ----------
    value : float
        In [0, 1). The authors' code keeps ``255 * normalised > 48``: ``Threshold(48 / 255)``.

    Raises
    ------
    PolicyError
        If ``value`` is not in [0, 1).

    Examples
    --------
    >>> Threshold(0.5)(torch.tensor([[0.0, 1.0], [1.5, 2.0]])).int().tolist()
    [[0, 0], [1, 1]]
    """

    value: float

    def __post_init__(self) -> None:
        if not is_number(self.value) or not 0.0 <= self.value < 1.0:
            raise PolicyError(f"Threshold: value must be a number in [0, 1), got {self.value!r}")

    @override
    def mask(self, scores: Tensor) -> Tensor:
        limits = torch.finfo(scores.dtype)
        # Half of each: the range of the largest finite numbers is itself not finite.
        halves = scores.clamp(limits.min, limits.max) / 2
        low = halves.nan_to_num(nan=torch.inf).amin((-2, -1), keepdim=True)
        high = halves.nan_to_num(nan=-torch.inf).amax((-2, -1), keepdim=True)
        # Multiplied out, so that a constant map needs no division by its range of 0.
        return halves - low > self.value * (high - low)


PUBLISHED_THRESHOLD = Threshold(48 / 255)
"""Of the authors' code."""

PUBLISHED_POLICY = PUBLISHED_THRESHOLD.pooled(9)
"""The selection of the authors' code."""
