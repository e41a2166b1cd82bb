"""What a run asks of a GPU, counted on any machine: kernels, bytes, and waits of the host.

A decoded token costs a GPU what it launches and what it moves, hardly ever what it computes. And while the host waits
for a number or a shape, nothing is launched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

__all__ = ["Launches", "count_launches"]

_NO_KERNELS = {"_fused_sdp_choice", "_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty"}
"""Operators that launch nothing, though they are no views."""
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
_PICKING = {"embedding", "gather", "index", "index_select"}
"""Operators that read of their first argument as much as they give."""


@dataclass
class Launches:
    """What was counted.

    Attributes
    ----------
    kernels : int
        Operators that are no views.
    bytes : int
        What these read and write.
    waits : int
        How often the host needed a number or a shape that the device computes.
    """

    kernels: int = 0
    bytes: int = 0
    waits: int = 0


def count_launches(run: Callable[[], Any]) -> Launches:
    """Count what a run asks of a device. What a compiler would fuse is not seen: eager operators are counted.

    Parameters
    ----------
    run : callable
        What to count.
    """
    counter = _Counter()
    with counter:
        run()
    return counter.launches


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = Launches()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        indices = args[1] if name == "index" else ()
        by_mask = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)
        self.launches.waits += name in _WAITS or by_mask
        if not func.is_view and name not in _NO_KERNELS and name != "_local_scalar_dense":
            self.launches.kernels += 1
            read = (output, *args[1:]) if name in _PICKING else args
            self.launches.bytes += _bytes((read, kwargs, output))
        return output


def _bytes(values: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
