"""What an answer costs: counted and timed on real runs."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.cache_utils import Cache

from flexkit.patching.memory import cached_memory

__all__ = ["Cost", "kept_bytes", "measure"]


@dataclass(frozen=True)
class Cost:
    """Cost of one generation.

    Attributes
    ----------
    flops : int
        Floating-point operations of all matrix products: vision tower, prompt and decoded tokens.
    seconds : float
        Median wall time.
    kept_bytes : int
        What stays in memory from token to token, see :func:`kept_bytes`.
    """

    flops: int
    seconds: float
    kept_bytes: int


def measure(ways: Mapping[str, Callable[[], Any]], repeats: int = 3) -> dict[str, Cost]:
    """Run every way of answering once to count and then, in turns, ``repeats`` times to time.

    Parameters
    ----------
    ways : dict of str to callable
        Each generates and returns what ``generate(..., return_dict_in_generate=True)`` does.
    repeats : int
        Timed runs of each way.

    Returns
    -------
    dict of str to Cost
        For each way.
    """
    flops, kept = {}, {}
    for name, way in ways.items():
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            kept[name] = kept_bytes(way().past_key_values)
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: Cost(flops[name], statistics.median(seconds[name]), kept[name]) for name in ways}


def kept_bytes(cache: Cache) -> int:
    """Size of what a generation keeps between tokens: the KV cache and, with high-res tokens, F, K' and V'.

    Parameters
    ----------
    cache : transformers.Cache
        After the generation.
    """
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    memory = cached_memory(cache)
    if memory is not None:
        pairs += [(memory.features, None), *memory.projected.values()]
    tensors = [tensor for pair in pairs for tensor in pair if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# PyTorch counts the fused attention kernels of GPUs but not the CPU's.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
