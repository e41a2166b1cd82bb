"""What an answer costs: counted and timed on real runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexkit.measuring import count_flops, kept_bytes, time_in_turns

__all__ = ["Cost", "measure"]


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
        What stays in memory from token to token, see :func:`~flexkit.measuring.kept_bytes`.
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
