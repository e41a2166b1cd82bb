"""Counting floating-point operations of real runs."""

from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["count_flops", "count_flops_of"]

Key = TypeVar("Key", bound=Hashable)


def count_flops(run: Callable[[], Any], *, without: Collection[str] = ()) -> int:
    """Floating-point operations of all matrix products in a run: a multiplication and an addition are two.

    Parameters
    ----------
    run : callable
        What to count.
    without : collection of str
        Names of modules that do not count, such as ``"vision_tower"``.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    left_out = [counts for name, counts in counter.get_flop_counts().items() if name.split(".")[-1] in without]
    return int(counter.get_total_flops() - sum(sum(counts.values()) for counts in left_out))


def count_flops_of(run: Callable[[], Any], modules: Mapping[Key, nn.Module]) -> tuple[int, dict[Key, int]]:
    """The same, and of these how many are inside of some modules.

    Parameters
    ----------
    run : callable
        What to count.
    modules : mapping
        Modules that run at most once, none inside of another.
    """
    inside = dict.fromkeys(modules, 0)
    with ExitStack() as stack, FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        for key, module in modules.items():

            def begin(*_: object, key: Key = key) -> None:
                inside[key] -= counter.get_total_flops()

            def end(*_: object, key: Key = key) -> None:
                inside[key] += counter.get_total_flops()

            stack.enter_context(module.register_forward_pre_hook(begin))
            stack.enter_context(module.register_forward_hook(end))
        run()
    return int(counter.get_total_flops()), inside


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# PyTorch counts the fused attention kernels of GPUs but not the CPU's.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
