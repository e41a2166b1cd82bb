"""Growing a mask: to whole blocks, or by a margin of cells."""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from flexkit.selection._checks import check_int, check_pair
from flexkit.selection.policy import Policy, as_policy
from flexkit.selection.resample import resample_nearest


@dataclass(frozen=True)
class Pooled(Policy):
    """Select every block in which a policy keeps a cell; written ``policy.pooled(size)``.

    The mask is adaptively max-pooled to ``size`` × ``size`` blocks (fewer on an axis that has fewer cells)
    and upsampled by nearest neighbour. To the high-res grid it goes in one step from the blocks, as in the
    authors' code; by way of the low-res grid the outcome differs where ``size`` does not divide that grid.

    Parameters
    ----------
    policy : Policy
        A policy, or a function from scores to a mask.
    size : int
        Blocks to a side, at least 1; the authors' code has 9.

    Raises
    ------
    PolicyError
        If a parameter is none of these.
    """

    policy: Policy
    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        check_int(self, "size", self.size, minimum=1)

    @property
    @override
    def uses_scores(self) -> bool:
        return self.policy.uses_scores

    @override
    def mask(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        return resample_nearest(self._blocks(scores), (rows, columns))

    @override
    def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return resample_nearest(self._blocks(scores), check_pair("size", size))

    def _blocks(self, scores: Tensor) -> Tensor:
        kept = self.policy(scores)
        size = [min(self.size, side) for side in kept.shape[-2:]]
        blocks = F.adaptive_max_pool2d(_as_images(kept), size)
        return blocks.bool().reshape(*kept.shape[:-2], *size)


@dataclass(frozen=True)
class Dilated(Policy):
    """Select what a policy keeps and all cells near it; written ``policy.dilated(cells)``.

    Near is at most ``cells`` away along both axes: the mask is dilated by a square.

    Parameters
    ----------
    policy : Policy
        A policy, or a function from scores to a mask.
    cells : int
        Width of the added margin in low-res cells, at least 1.

    Raises
    ------
    PolicyError
        If a parameter is none of these.
    """

    policy: Policy
    cells: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        check_int(self, "cells", self.cells, minimum=1)

    @property
    @override
    def uses_scores(self) -> bool:
        return self.policy.uses_scores

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return dilate(self.policy(scores), self.cells)


def dilate(mask: Tensor, cells: int) -> Tensor:
    """Dilate a mask by a square of ``2 * cells + 1`` to a side.

    Parameters
    ----------
    mask : torch.Tensor
        Shape (..., rows, columns), bool.
    cells : int
        At least 0.

    Returns
    -------
    torch.Tensor
        Shape (..., rows, columns), bool.
    """
    reach = min(cells, max(mask.shape[-2:]))
    grown = F.max_pool2d(_as_images(mask), kernel_size=2 * reach + 1, stride=1, padding=reach)
    return grown.bool().reshape(mask.shape)


def _as_images(mask: Tensor) -> Tensor:
    return rearrange(mask.float(), "... rows columns -> (...) 1 rows columns")
