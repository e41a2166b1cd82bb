"""What real runs cost: operations and seconds."""

from flexkit.measuring.flops import count_flops
from flexkit.measuring.timing import alternate, time_in_turns

__all__ = ["alternate", "count_flops", "time_in_turns"]
