"""Set algebra of policies; on the high-res grid it acts on what each part selects there."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from flexkit.selection.policy import Policy, as_policy


@dataclass(frozen=True)
class _Pair(Policy):
    left: Policy
    right: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", as_policy(self.left))
        object.__setattr__(self, "right", as_policy(self.right))

    @property
    @override
    def uses_scores(self) -> bool:
        return self.left.uses_scores or self.right.uses_scores


@dataclass(frozen=True)
class Union(_Pair):
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
    def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return self.left.select(scores, size) | self.right.select(scores, size)


@dataclass(frozen=True)
class Intersection(_Pair):
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
    def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return self.left.select(scores, size) & self.right.select(scores, size)


@dataclass(frozen=True)
class Complement(Policy):
    """Select what a policy does not select; written ``~policy``.

    Parameters
    ----------
    policy : Policy
        A policy, or a function from scores to a mask.
    """

    policy: Policy

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))

    @property
    @override
    def uses_scores(self) -> bool:
        return self.policy.uses_scores

    @override
    def mask(self, scores: Tensor) -> Tensor:
        return ~self.policy(scores)

    @override
    def select(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return ~self.policy.select(scores, size)
