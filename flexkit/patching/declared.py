"""What an input of a view must be: geometries declare it, and one check holds for all of them."""

from dataclasses import dataclass
from types import EllipsisType
from typing import Literal

import torch
from torch import Tensor

from flexkit.checks import FLOATS
from flexkit.errors import HighResInputError
from flexkit.grids import Pair

__all__ = ["Axis", "Declared", "check_readable"]

Axis = int | str
"""A size, or a name for any size but 0: the same one in all inputs that have it."""

_SHOWN = 32
"""How many numbers an error shows."""
_WORDS = {"integers": "integers", "sizes": "positive integers", "mask": "a mask of bools"}


@dataclass(frozen=True)
class Declared:
    """Axes and numbers of one input."""

    axes: tuple[Axis | EllipsisType, ...]
    """An ellipsis at the end stands for one axis or more: those of the base model's own input."""
    numbers: Literal["floating", "integers", "sizes", "mask"] = "floating"
    """Sizes are positive integers; a mask is bool, or 0 and 1."""
    meaning: str = ""
    """What the sizes of the axes say, for errors."""
    zoom: Pair = (1, 1)
    """How many times as large as the base model's own the last two of those are."""

    def check_axes(self, name: str, value: Tensor, known: dict[str, int], base: object = None) -> None:
        """Raise :class:`~flexkit.errors.HighResInputError` unless an input has these axes.

        Parameters
        ----------
        name : str
            Of the input.
        value : torch.Tensor
            The input.
        known : dict
            Sizes of the axes that other inputs have named; new ones are added.
        base : object
            The base model's own input of this name, if it is a tensor.
        """
        axes: list[Axis] = [axis for axis in self.axes if isinstance(axis, Axis)]
        if len(axes) < len(self.axes):
            if isinstance(base, Tensor) and base.ndim > len(axes):
                rest = list(base.shape[len(axes) :])
                rest[-2:] = [size * zoom for size, zoom in zip(rest[-2:], self.zoom, strict=False)]
            else:
                rest = list(value.shape[len(axes) :])
            axes += rest or ["..."]
        wanted = [known.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
        if value.ndim != len(axes) or not all(
            got > 0 and (isinstance(want, str) or got == want) for got, want in zip(value.shape, wanted, strict=True)
        ):
            raise HighResInputError(self._message(name, value, f"({', '.join(map(str, wanted))})"))
        known.update((axis, got) for axis, got in zip(axes, value.shape, strict=True) if isinstance(axis, str))

    def checked(self, name: str, value: Tensor, base: object = None) -> Tensor:
        """The input: integers as int64, floating numbers in the dtype and on the device of the base model's own.

        Raises :class:`~flexkit.errors.HighResInputError` if its numbers are not what is declared.
        """
        if self.numbers == "floating":
            if not value.is_floating_point():
                raise HighResInputError(
                    f"{name} is {value.dtype}; expected floating numbers: normalised pixels, as an image processor "
                    "gives them."
                )
            own = isinstance(base, Tensor) and base.is_floating_point()
            return value.to(base.device, base.dtype) if own else value  # type: ignore[attr-defined]
        fits = not value.is_floating_point() and (value.dtype != torch.bool or self.numbers == "mask")
        if fits and self.numbers == "mask":
            fits = bool(((value == 0) | (value == 1)).all())
        elif fits and self.numbers == "sizes":
            fits = bool((value > 0).all())
        if not fits:
            raise HighResInputError(self._message(name, value))
        return value if self.numbers == "mask" else value.long()

    def _message(self, name: str, value: Tensor, shape: str = "") -> str:
        if self.numbers == "floating":
            meaning = f": {self.meaning}" if self.meaning else ""
            return f"{name} has shape {tuple(value.shape)}; expected {shape}{meaning}."
        given = str(value.tolist()) if value.numel() <= _SHOWN else f"{value.dtype} of shape {tuple(value.shape)}"
        expected = [_WORDS[self.numbers], self.meaning, f"of shape {shape}" if shape else ""]
        return f"{name} is {given}; expected {', '.join(filter(None, expected))}."


def check_readable(name: str, value: Tensor) -> None:
    """Raise :class:`~flexkit.errors.HighResInputError` for a tensor without plain numbers, or with NaN or infinity."""
    is_plain = value.dtype in FLOATS if value.is_floating_point() else not (value.is_complex() or value.is_quantized)
    if not is_plain or value.layout is not torch.strided or value.is_meta:
        raise HighResInputError(
            f"{name} is a tensor of {value.dtype}, {value.layout}, on {value.device}; expected a dense one of plain "
            "numbers, on a device that holds them."
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise HighResInputError(f"{name} holds NaN or infinite values.")
