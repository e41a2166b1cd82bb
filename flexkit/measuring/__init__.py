"""What real runs cost: operations, launches, seconds and bytes."""

from flexkit.measuring.flops import count_flops, count_flops_of
from flexkit.measuring.launches import Launches, count_launches
from flexkit.measuring.memory import kept_bytes, peak_bytes
from flexkit.measuring.timing import alternate, time_in_turns

__all__ = [
    "Launches",
    "alternate",
    "count_flops",
    "count_flops_of",
    "count_launches",
    "kept_bytes",
    "peak_bytes",
    "time_in_turns",
]
