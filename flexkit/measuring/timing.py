"""Timing several ways of doing something on a machine that does other things too."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["alternate", "time_in_turns"]


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run ways in turns, so that what slows the machine down for a while slows down all of them.

    Parameters
    ----------
    ways : mapping of str to callable
        What to run.
    rounds : int
        How often.

    Returns
    -------
    dict of str to list of float
        Seconds of each in every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def time_in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of ways that are run in turns, see :func:`alternate`.

    Parameters
    ----------
    ways : mapping of str to callable
        What to run.
    repeats : int
        How often.

    Returns
    -------
    dict of str to float
        Of each.
    """
    return {name: statistics.median(seconds) for name, seconds in alternate(ways, repeats).items()}
