"""What a selection policy is: scores on the low-res grid in, a mask out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from flexkit.errors import FlexkitError, PolicyError
from flexkit.selection._checks import FLOATS, check_pair
from flexkit.selection.resample import resample_nearest


class Policy(ABC):
    """Decide from a map of scores which cells are worth a closer look.

    A subclass overrides :meth:`mask`; make it a frozen dataclass. Policies compose with ``|``, ``&`` and
    ``~``, :meth:`pooled` and :meth:`dilated`. A plain function does for a policy without parameters: see
    :func:`as_policy`.

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
        with named_failures(self, scores):
            mask: object = self.mask(at_least_float32(scores))
        return check_mask(self, mask, scores.shape, scores.device)

    def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Choose positions on the high-res grid: the low-res mask, upsampled by nearest neighbour.

        Parameters
        ----------
        scores : torch.Tensor
            Shape (..., rows, columns), floating.
        size : tuple of int
            Rows and columns of the high-res grid; not necessarily multiples of the low-res ones.

        Returns
        -------
        torch.Tensor
            The selected positions, bool, shape (..., size[0], size[1]).

        Raises
        ------
        ConfigError
            If ``size`` is not two positive ints.
        PolicyError
            As for calling the policy.
        """
        return resample_nearest(self(scores), check_pair("size", size))

    def pooled(self, size: int) -> "Policy":
        """Keep whole blocks: :class:`Pooled` with this policy, ``size`` blocks to a side."""
        from flexkit.selection.morphology import Pooled

        return Pooled(self, size)

    def dilated(self, cells: int) -> "Policy":
        """Keep the neighbourhood too: :class:`Dilated` with this policy, by ``cells`` low-res cells."""
        from flexkit.selection.morphology import Dilated

        return Dilated(self, cells)

    def __or__(self, other: "Policy | Callable[[Tensor], Tensor]") -> "Policy":
        from flexkit.selection.compose import Union

        return Union(self, as_policy(other))

    def __ror__(self, other: Callable[[Tensor], Tensor]) -> "Policy":
        return as_policy(other) | self

    def __and__(self, other: "Policy | Callable[[Tensor], Tensor]") -> "Policy":
        from flexkit.selection.compose import Intersection

        return Intersection(self, as_policy(other))

    def __rand__(self, other: Callable[[Tensor], Tensor]) -> "Policy":
        return as_policy(other) & self

    def __invert__(self) -> "Policy":
        from flexkit.selection.compose import Complement

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


def at_least_float32(scores: Tensor) -> Tensor:
    """Return half precisions as float32, others as they are."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@contextmanager
def named_failures(policy: Policy, scores: Tensor) -> Iterator[None]:
    """Raise :class:`PolicyError` where a policy, which may be anybody's, fails in this block."""
    try:
        yield
    except (FlexkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PolicyError(
            f"{policy!r} failed on scores of shape {tuple(scores.shape)} with {type(error).__name__}: {error}. A "
            "policy maps scores (..., rows, columns) to a bool mask of that shape, for any number of maps, also none."
        ) from error


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
