"""Checks of parameters, shared by the policies, the selector, and whoever takes tensors."""

from typing import Any, TypeGuard

import torch

from flexkit.errors import ConfigError, PolicyError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which numbers are computed; those of 8 bits and fewer are only kept."""


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


def check_int(owner: object, name: str, value: object, minimum: int) -> None:
    """Raise :class:`PolicyError` unless ``value`` is an integer of at least ``minimum``."""
    if not is_int(value, minimum):
        owned = f"{type(owner).__name__}: {name}"
        raise PolicyError(f"{owned} must be an int of at least {minimum}, got {value!r}")


def check_count(owner: object, name: str, value: object) -> None:
    """Raise :class:`PolicyError` unless ``value`` counts cells."""
    if not is_count(value):
        raise PolicyError(
            f"{type(owner).__name__}: {name} must be an int of at least 1 (that many cells) "
            f"or a float in (0, 1] (a share of the cells), got {value!r}"
        )


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """Return ``value`` as two positive integers, rows first, or raise :class:`ConfigError`."""
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(is_int(side, 1) for side in pair):
        raise ConfigError(f"{name} must be two positive ints (rows, columns), got {value!r}")
    return pair
