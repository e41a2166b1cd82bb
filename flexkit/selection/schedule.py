"""A policy for each range of layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from flexkit.checks import is_int
from flexkit.errors import PolicyError
from flexkit.grids import Grid
from flexkit.selection.policy import Nothing, Policy, as_policy


@dataclass(frozen=True, init=False, repr=False)
class Schedule:
    """Policies by layer: each holds from its layer on, up to the next one's.

    In layers before the first, nothing is selected.

    Parameters
    ----------
    policies : collections.abc.Mapping
        From first layers (ints of at least 0) to policies, or functions from scores to a mask.

    Raises
    ------
    PolicyError
        If the mapping is empty, or holds anything else.

    Examples
    --------
    >>> from flexkit.selection import TopK
    >>> schedule = Schedule({8: TopK(16), 16: TopK(8)})
    >>> schedule.at(7), schedule.at(15), schedule.at(31)
    (Nothing(), TopK(k=16), TopK(k=8))
    """

    _items: tuple[tuple[int, Policy], ...]

    def __init__(self, policies: Mapping[int, Policy | Callable[[Tensor], Tensor]]) -> None:
        if not isinstance(policies, Mapping) or not policies:
            raise PolicyError(f"Schedule: expected a mapping from layers to policies, got {policies!r}")
        wrong = [layer for layer in policies if not is_int(layer, 0)]
        if wrong:
            raise PolicyError(f"Schedule: layers must be ints of at least 0, got {wrong}")
        items = tuple((layer, as_policy(policies[layer])) for layer in sorted(policies))
        object.__setattr__(self, "_items", items)

    @property
    def policies(self) -> dict[int, Policy]:
        """The policies by their first layers, in order; a copy."""
        return dict(self._items)

    @property
    def uses_scores(self) -> bool:
        """Whether any of the policies reads the scores."""
        return any(policy.uses_scores for _, policy in self._items)

    def most(self, grid: Grid) -> int:
        """How many cells of a grid any of the policies chooses at most."""
        return max(policy.most(grid) for _, policy in self._items)

    def at(self, layer: int) -> Policy:
        """Return the policy of a layer.

        Parameters
        ----------
        layer : int
            Index of the layer.

        Returns
        -------
        Policy
            The policy of the largest key that is not above ``layer``; :class:`Nothing` if there is none.

        Raises
        ------
        PolicyError
            If ``layer`` is no such int.
        """
        if not is_int(layer, 0):
            raise PolicyError(f"Schedule: layer must be an int of at least 0, got {layer!r}")
        return next((policy for first, policy in reversed(self._items) if first <= layer), Nothing())

    def __repr__(self) -> str:
        return f"Schedule({self.policies!r})"
