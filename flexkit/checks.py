"""What counts as a number, of which kind."""

from typing import TypeGuard

import torch

__all__ = ["FLOATS", "INTEGERS", "WIDE_FLOATS", "is_count", "is_int", "is_integer", "is_number"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which numbers are computed; those of 8 bits and fewer are only kept."""
WIDE_FLOATS = (torch.float32, torch.float64)
"""Those in which scores are summed and compared."""
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes of whole numbers."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_int(value: object, minimum: int) -> bool:
    """Whether ``value`` is an integer (not a bool) of at least ``minimum``."""
    return is_integer(value) and value >= minimum


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether ``value`` counts cells: an int of at least 1, or a float in (0, 1] that is a share of them."""
    return is_int(value, 1) or (isinstance(value, float) and 0.0 < value <= 1.0)
