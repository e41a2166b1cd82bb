"""The frame of the image, mostly to be excluded: ``& ~Border()``."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.selection._checks import check_int
from flexkit.selection.policy import Policy


@dataclass(frozen=True)
class Border(Policy):
    """Select the outermost rows and columns.

    Parameters
    ----------
    width : int
        Width of the frame in low-res cells, at least 1.

    Raises
    ------
    PolicyError
        If ``width`` is not such an int.

    Examples
    --------
    >>> Border()(torch.zeros(3, 4)).int().tolist()
    [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """

    width: int = 1
    uses_scores = False

    def __post_init__(self) -> None:
        check_int(self, "width", self.width, minimum=1)

    @override
    def mask(self, scores: Tensor) -> Tensor:
        frame = torch.ones_like(scores, dtype=torch.bool)
        width = min(self.width, max(scores.shape[-2:]))
        frame[..., width:-width, width:-width] = False
        return frame
