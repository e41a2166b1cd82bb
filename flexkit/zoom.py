"""How many high-res cells lie along each axis of a low-res cell."""

from flexkit.errors import ConfigError

__all__ = ["Pair", "zoom_pair"]

Pair = tuple[int, int]


def zoom_pair(zoom: int | Pair) -> Pair:
    """Zoom along rows and columns, from one int for both or a pair.

    Raises
    ------
    ConfigError
        If the zoom is not one or two positive ints.
    """
    pair = zoom if isinstance(zoom, tuple | list) else (zoom, zoom)
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise ConfigError(f"zoom must be a positive int or a pair of them (rows, columns), got {zoom!r}.")
    return pair[0], pair[1]
