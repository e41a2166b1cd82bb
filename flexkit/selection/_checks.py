"""Checks of the parameters that policies have."""

from flexkit.checks import is_count, is_int
from flexkit.errors import PolicyError


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
