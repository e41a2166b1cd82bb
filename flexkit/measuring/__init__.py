"""What real runs cost: operations and seconds."""

from flexkit.measuring.flops import count_flops
from flexkit.measuring.timing import time_in_turns

__all__ = ["count_flops", "time_in_turns"]
