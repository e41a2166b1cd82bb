"""Memory that a run takes up, and that a generation keeps."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import Cache

from flexkit.patching.memory import cached_memory

__all__ = ["kept_bytes", "peak_bytes"]


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """The most that tensors take up during a run, beyond what there was before.

    Parameters
    ----------
    run : callable
        What to watch.
    device : str
        ``"cpu"`` or ``"cuda"``: where.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    recorded: Any = watched.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kept_bytes(cache: Cache) -> int:
    """Size of what a generation keeps between tokens: the KV cache and, with high-res tokens, F, K' and V'.

    Parameters
    ----------
    cache : transformers.Cache
        After the generation.
    """
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    tensors = [tensor for pair in pairs for tensor in pair if tensor is not None]
    memory = cached_memory(cache)
    return sum(int(tensor.nbytes) for tensor in tensors) + (memory.bytes if memory else 0)
