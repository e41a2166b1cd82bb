"""What several commands take, and how they print amounts."""

import argparse
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from flexkit.errors import FlexkitError

__all__ = [
    "BENCHMARKS",
    "BYTES",
    "COUNTS",
    "OPERATIONS",
    "Subparsers",
    "above_zero",
    "add_debug",
    "needs",
    "share",
    "unit_for",
    "whole",
]

Subparsers = Any
"""What ``argparse`` gives back for subcommands; its type has no public name."""
BENCHMARKS = ("visual-search",)
OPERATIONS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "FLOP": 1.0}
BYTES = {"MiB": 2**20, "KiB": 2**10, "B": 1}
COUNTS = {"M": 1e6, "k": 1e3, "": 1.0}


def unit_for(amount: float, units: Mapping[str, float]) -> tuple[str, float]:
    """The largest unit of which an amount is at least one, else the smallest.

    Parameters
    ----------
    amount : float
        In ones.
    units : mapping of str to float
        How much each is, the largest first.

    Examples
    --------
    >>> unit_for(3.2e9, OPERATIONS), unit_for(0, BYTES)
    (('GFLOP', 1000000000.0), ('B', 1))
    """
    return next((each for each in units.items() if amount >= each[1]), list(units.items())[-1])


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type of argument: whole numbers in a range.

    Parameters
    ----------
    least, most : int
        The range, both ends included.
    """

    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return number


def share(text: str) -> float:
    """A type of argument: numbers from 0 to 1.

    Parameters
    ----------
    text : str
        What was typed.
    """
    return _number(text, lambda value: 0.0 <= value <= 1.0, "from 0 to 1")


def above_zero(text: str) -> float:
    """A type of argument: finite numbers above 0.

    Parameters
    ----------
    text : str
        What was typed.
    """
    return _number(text, lambda value: 0.0 < value < math.inf, "above 0")


def _number(text: str, fits: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number {wanted}")
    return value


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Give a command the option ``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def needs(package: str) -> None:
    """Refuse a command that needs a package which is not installed.

    Parameters
    ----------
    package : str
        Of the extra ``train``.

    Raises
    ------
    FlexkitError
        If it is not installed.
    """
    if find_spec(package) is None:
        raise FlexkitError(f"this command needs {package}: pip install 'flexkit-vlm[train]'")
