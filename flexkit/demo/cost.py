"""What an answer costs: counted and timed on real runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from flexkit.measuring import count_flops, time_in_turns
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
    kept: dict[str, int] = {}

    def counted(name: str) -> int:
        return count_flops(lambda: kept.update({name: kept_bytes(ways[name]().past_key_values)}))

    flops = {name: counted(name) for name in ways}
    seconds = time_in_turns(ways, repeats)
    return {name: Cost(flops[name], seconds[name], kept[name]) for name in ways}


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
