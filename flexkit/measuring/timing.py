"""Timing several ways of doing something on a machine that does other things too."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["time_in_turns"]


def time_in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """Run ways in turns, so that what slows the machine down for a while slows down all of them.

    Parameters
    ----------
    ways : mapping of str to callable
        What to run.
    repeats : int
        How often.

    Returns
    -------
    dict of str to float
        Median seconds of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
