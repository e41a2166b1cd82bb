"""Counting floating-point operations of real runs."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["count_flops"]


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


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# PyTorch counts the fused attention kernels of GPUs but not the CPU's.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
