"""What a selection policy is: scores on the low-res grid in, a mask out; and the algebra of policies."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from flexkit.checks import FLOATS, WIDE_FLOATS
from flexkit.errors import FlexkitError, PolicyError
from flexkit.grids import Grid, check_grid, frames_and_cells, resample_nearest
from flexkit.selection._checks import check_int


class Policy(ABC):
    """Decide from a map of scores which cells are worth a closer look.

    A subclass overrides :meth:`mask`; make it a frozen dataclass. Policies compose with ``|``, ``&`` and
    ``~``, :meth:`pooled`, :meth:`dilated` and :meth:`over_frames`. A plain function does for a policy without
    parameters: see :func:`as_policy`.

    Maps of videos have frames in front of rows: a policy that knows rows and columns judges every frame on its own. One
    that is to see them sets :attr:`sees_frames`, and a picture is one frame to it.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class AboveMean(Policy):
    ...     factor: float = 1.0
    ...     def mask(self, scores):
    ...         return scores > self.factor * scores.mean((-2, -1), keepdim=True)
    >>> scores = torch.tensor([[0.0, 1.0], [2.0, 9.0]])
    >>> AboveMean()(scores).int().tolist()
    [[0, 0], [0, 1]]
    >>> (~AboveMean()).select(scores, (2, 4)).int().tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    """

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Choose cells. Overridden by every policy; callers use the policy itself, which checks the result.

        Parameters
        ----------
        scores : torch.Tensor
            Shape (..., rows, columns), float32 or float64. Every map is judged on its own. There may be no
            maps (an empty leading axis), and scores may be NaN or infinite.

        Returns
        -------
        torch.Tensor
            The chosen cells, bool, of the same shape and on the same device.
        """

    @property
    def uses_scores(self) -> bool:
        """Whether the mask depends on the scores; False means that only their shape is read."""
        return True

    sees_frames: bool = False
    """Whether it is given all frames together, scores (..., frames, rows, columns); a picture is one frame then."""

    def most(self, grid: Grid) -> int:
        """How many cells of a grid it chooses at most; by default all. What is bounded can be read by static shapes.

        Parameters
        ----------
        grid : tuple of int
            Low-res rows and columns, or frames, rows and columns.
        """
        return math.prod(grid)

    def __call__(self, scores: Tensor) -> Tensor:
        """Choose cells on the low-res grid.

        Parameters
        ----------
        scores : torch.Tensor
            Shape (..., rows, columns), floating; half precisions are promoted to float32.

        Returns
        -------
        torch.Tensor
            The chosen cells, bool, of the same shape.

        Raises
        ------
        PolicyError
            If the scores are not such a tensor, or :meth:`mask` failed or returned anything but such a mask.
        """
        check_scores(self, scores)
        wide = scores if scores.dtype in WIDE_FLOATS else scores.float()
        try:
            mask: object = self.mask(wide)
        except NAMED:
            raise
        except Exception as error:
            raise failure(self, scores, error) from error
        return check_mask(self, mask, scores.shape, scores.device)

    def select(self, scores: Tensor, size: Grid) -> Tensor:
        """Choose positions on the high-res grid: the low-res mask, upsampled by nearest neighbour.

        Parameters
        ----------
        scores : torch.Tensor
            Shape (..., rows, columns) or (..., frames, rows, columns), floating.
        size : tuple of int
            Rows and columns of the high-res grid, or frames, rows and columns; not necessarily multiples of the low-res
            ones.

        Returns
        -------
        torch.Tensor
            The selected positions, bool, shape (...) + size.

        Raises
        ------
        ConfigError
            If ``size`` is not two or three positive ints.
        PolicyError
            As for calling the policy.
        """
        return resample_nearest(self(scores), check_grid("size", size, most=scores.ndim))

    def pooled(self, size: int) -> "Policy":
        """Keep whole blocks: :class:`Pooled` with this policy, ``size`` blocks to a side."""
        return Pooled(self, size)

    def dilated(self, cells: int) -> "Policy":
        """Keep the neighbourhood too: :class:`Dilated` with this policy, by ``cells`` low-res cells."""
        return Dilated(self, cells)

    def over_frames(self) -> "Policy":
        """Judge all frames of a video as one map: :class:`OverFrames` with this policy."""
        return OverFrames(self)

    def __or__(self, other: "Policy | Callable[[Tensor], Tensor]") -> "Policy":
        return Union(self, as_policy(other))

    def __ror__(self, other: Callable[[Tensor], Tensor]) -> "Policy":
        return as_policy(other) | self

    def __and__(self, other: "Policy | Callable[[Tensor], Tensor]") -> "Policy":
        return Intersection(self, as_policy(other))

    def __rand__(self, other: Callable[[Tensor], Tensor]) -> "Policy":
        return as_policy(other) & self

    def __invert__(self) -> "Policy":
        return Complement(self)


@dataclass(frozen=True, repr=False)
class FunctionPolicy(Policy):
    """A policy made of a function from scores to a mask; what :func:`as_policy` makes of a callable.

    Parameters
    ----------
    function : collections.abc.Callable
        Takes scores (..., rows, columns), returns a bool mask of that shape.
    """

    function: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:
        """Name of the function, or of the class of a callable object."""
        return str(getattr(self.function, "__qualname__", type(self.function).__qualname__))

    def __repr__(self) -> str:
        return f"FunctionPolicy({self.name})"

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return self.function(scores)


def as_policy(policy: Any) -> Policy:
    """Return a policy as it is, and a function from scores to a mask as a :class:`FunctionPolicy`.

    Parameters
    ----------
    policy : Policy or collections.abc.Callable
        A callable takes scores (..., rows, columns) and returns a bool mask of that shape.

    Returns
    -------
    Policy

    Raises
    ------
    PolicyError
        If ``policy`` is neither, or is a class where an instance is meant.

    Examples
    --------
    >>> def positive(scores):
    ...     return scores > 0
    >>> as_policy(positive)
    FunctionPolicy(positive)
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, type):
        name = policy.__name__
        raise PolicyError(f"got the class {name}, expected an instance of a policy: pass {name}(...)")
    if callable(policy):
        return FunctionPolicy(policy)
    raise PolicyError(
        f"got {type(policy).__name__} {policy!r}, expected a policy: pass a flexkit policy such as TopK(16), "
        "or a function from scores (..., rows, columns) to a bool mask of that shape"
    )


@dataclass(frozen=True)
class Everything(Policy):
    """Select every cell: full attention over the high-res view."""

    uses_scores = False

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)


@dataclass(frozen=True)
class Nothing(Policy):
    """Select no cell: the base model."""

    uses_scores = False

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool)

    @override
    def most(self, grid: Grid) -> int:
        return 0


@dataclass(frozen=True)
class _OfTwo(Policy):
    left: Policy
    right: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", as_policy(self.left))
        object.__setattr__(self, "right", as_policy(self.right))
        object.__setattr__(self, "sees_frames", self.left.sees_frames or self.right.sees_frames)

    @property
    @override
    def uses_scores(self) -> bool:
        return self.left.uses_scores or self.right.uses_scores


@dataclass(frozen=True)
class Union(_OfTwo):
    """Select what either policy selects; written ``left | right``.

    Parameters
    ----------
    left, right : Policy
        Policies, or functions from scores to a mask.
    """

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return self.left(scores) | self.right(scores)

    @override
    def most(self, grid: Grid) -> int:
        return min(math.prod(grid), self.left.most(grid) + self.right.most(grid))

    @override
    def select(self, scores: Tensor, size: Grid) -> Tensor:
        return self.left.select(scores, size) | self.right.select(scores, size)


@dataclass(frozen=True)
class Intersection(_OfTwo):
    """Select what both policies select; written ``left & right``.

    Parameters
    ----------
    left, right : Policy
        Policies, or functions from scores to a mask.
    """

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return self.left(scores) & self.right(scores)

    @override
    def most(self, grid: Grid) -> int:
        return min(self.left.most(grid), self.right.most(grid))

    @override
    def select(self, scores: Tensor, size: Grid) -> Tensor:
        return self.left.select(scores, size) & self.right.select(scores, size)


@dataclass(frozen=True)
class _OfOne(Policy):
    policy: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        object.__setattr__(self, "sees_frames", self.policy.sees_frames or type(self).sees_frames)

    @property
    @override
    def uses_scores(self) -> bool:
        return self.policy.uses_scores


@dataclass(frozen=True)
class Complement(_OfOne):
    """Select what a policy does not select; written ``~policy``.

    Parameters
    ----------
    policy : Policy
        A policy, or a function from scores to a mask.
    """

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return ~self.policy(scores)

    @override
    def select(self, scores: Tensor, size: Grid) -> Tensor:
        return ~self.policy.select(scores, size)


@dataclass(frozen=True)
class Pooled(_OfOne):
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

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "size", self.size, minimum=1)

    @override
    def mask(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape[-2:]
        return self.select(scores, (rows, columns))

    @override
    def select(self, scores: Tensor, size: Grid) -> Tensor:
        kept = self.policy(scores)
        blocks = [min(self.size, side) for side in kept.shape[-2:]]
        pooled = F.adaptive_max_pool2d(rearrange(kept.float(), "... r c -> (...) 1 r c"), blocks)
        return resample_nearest(
            pooled.bool().reshape(*kept.shape[:-2], *blocks), check_grid("size", size, most=scores.ndim)
        )


@dataclass(frozen=True)
class Dilated(_OfOne):
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

    cells: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "cells", self.cells, minimum=1)

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return dilate(self.policy(scores), self.cells)


@dataclass(frozen=True)
class OverFrames(_OfOne):
    """Judge all frames of a video as one map; written ``policy.over_frames()``.

    The frames lie one below the other in a single map of ``frames * rows`` rows: so ``TopK(16).over_frames()`` selects
    16 cells of a video, ``TopK(16)`` 16 of every frame. Of a picture both select the same. Neighbours are those in that
    map, so widen afterwards: ``policy.over_frames().dilated(1)``.

    Parameters
    ----------
    policy : Policy
        A policy, or a function from scores to a mask.

    Examples
    --------
    >>> from flexkit.selection import TopK
    >>> scores = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # two frames of one row
    >>> TopK(1)(scores).int().tolist(), TopK(1).over_frames()(scores).int().tolist()
    ([[[0, 1]], [[0, 1]]], [[[0, 0]], [[0, 1]]])
    """

    sees_frames = True

    @override
    def mask(self, scores: Tensor) -> Tensor:
        if scores.ndim == 2:
            return self.policy(scores)
        return self.policy(scores.flatten(-3, -2)).reshape(scores.shape)

    @override
    def most(self, grid: Grid) -> int:
        frames, cells = frames_and_cells(grid)
        return self.policy.most((frames * grid[-2], cells // grid[-2]))


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
    grown = F.max_pool2d(
        rearrange(mask.float(), "... r c -> (...) 1 r c"), kernel_size=2 * reach + 1, stride=1, padding=reach
    )
    return grown.bool().reshape(mask.shape)


NAMED = (FlexkitError, torch.OutOfMemoryError)
"""What a policy may raise that says by itself what is wrong."""


def failure(policy: Policy, scores: Tensor, error: Exception) -> PolicyError:
    """The error to raise from any other, where a policy, which may be anybody's, fails on scores."""
    return PolicyError(
        f"{policy!r} failed on scores of shape {tuple(scores.shape)} with {type(error).__name__}: {error}. A "
        "policy maps scores (..., rows, columns) to a bool mask of that shape, for any number of maps, also none."
    )


def check_mask(policy: Policy, mask: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return ``mask`` if it is a bool tensor of ``shape`` on ``device``; else raise :class:`PolicyError`."""
    if not isinstance(mask, Tensor):
        got = type(mask).__name__
    elif mask.dtype != torch.bool or mask.shape != shape or mask.device != device:
        got = f"a {mask.dtype} tensor of shape {tuple(mask.shape)} on {mask.device}"
    else:
        return mask
    raise PolicyError(
        f"{policy!r} returned {got}, expected a torch.bool tensor of shape {tuple(shape)} on {device}: "
        "return one bool for each position of the grid"
    )


def check_scores(policy: Policy, scores: object) -> None:
    """Raise :class:`PolicyError` unless ``scores`` are maps of at least one cell."""
    if not isinstance(scores, Tensor):
        got = type(scores).__name__
    elif scores.ndim < 2 or 0 in scores.shape[-2:] or scores.dtype not in FLOATS:
        got = f"a {scores.dtype} tensor of shape {tuple(scores.shape)}"
    else:
        return
    raise PolicyError(f"{policy!r} was given {got}, expected floating scores (..., rows, columns) of at least one cell")
