"""How the images of a batch lie in ``pixel_values``, and where their cells stand in the context."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexkit.errors import HighResInputError
from flexkit.patching.context.beside import Places

__all__ = ["Arrangement", "AtTokens", "ByRow", "Frames", "OneARow", "RealOnes", "WithQueries"]


class Arrangement(ABC):
    """How the images of a batch lie in ``pixel_values``, and their cells in the context."""

    axes: ClassVar[tuple[int, ...]] = (4,)
    """How many ``pixel_values`` may have."""
    view_axes: ClassVar[tuple[str, ...]] = ("images",)
    """What the high-res view has in front of channels, height and width."""

    def pictures(self, pixels: Tensor) -> int:
        """How many images ``pixel_values`` show."""
        return len(pixels.flatten(0, -4))

    def put(self, tiles: Tensor, pixels: Tensor) -> Tensor:
        """One tile of every image, ``(images, 3, height, width)``, in the place of the images."""
        return tiles.view(pixels.shape)

    def masks(self, mask: Tensor, pixels: Tensor) -> Tensor:
        """``(images, height, width)`` of a mask of pixels."""
        return mask.flatten(0, -3)

    @abstractmethod
    def places(self, config: Any, inputs: Mapping[str, Any], prefix: int, cells: int) -> Places:
        """Where the cells of every image stand, behind a prefix of columns of its own."""


class OneARow(Arrangement):
    """A row of the context for every image."""

    def places(self, config: Any, inputs: Mapping[str, Any], prefix: int, cells: int) -> Places:
        images = self.pictures(inputs["pixel_values"])
        return Places(images, list(range(images)), [prefix + torch.arange(cells)] * images)


class WithQueries(OneARow):
    """A row for every image, in one sequence with queries behind it, which counts positions."""

    def places(self, config: Any, inputs: Mapping[str, Any], prefix: int, cells: int) -> Places:
        places = super().places(config, inputs, prefix, cells)
        return replace(places, positions=[columns[None] for columns in places.columns])


class Frames(OneARow):
    """A row of the context for every frame of a video, ``(videos, frames, 3, height, width)``."""

    axes = (5,)
    view_axes = ("videos", "frames")


class ByRow(Arrangement):
    """Images of a batch row behind one another; ``pixel_values`` are black where a row has fewer.

    ``(batch, images, 3, height, width)``, or with slots for several tiles of an image, of which the first is taken.
    """

    axes = (5, 6)

    def pictures(self, pixels: Tensor) -> int:
        return int(_real(pixels).sum())

    def put(self, tiles: Tensor, pixels: Tensor) -> Tensor:
        placed = torch.zeros_like(pixels)
        first = placed[:, :, 0] if pixels.ndim == 6 else placed
        blank = (tiles == 0).flatten(1).all(1)  # models drop black images; a tile may be part of a black margin
        tiles = tiles.masked_fill(blank[:, None, None, None], torch.finfo(tiles.dtype).tiny)
        first[_real(pixels)] = tiles.to(pixels.dtype)
        return placed

    def masks(self, mask: Tensor, pixels: Tensor) -> Tensor:
        return mask[_real(pixels)]

    def places(self, config: Any, inputs: Mapping[str, Any], prefix: int, cells: int) -> Places:
        pixels, ratios = inputs["pixel_values"], inputs.get("aspect_ratio_ids")
        if ratios is not None and bool((ratios > 1).any()):
            raise HighResInputError(
                "the prompt holds images of several tiles; the high-res view takes their place: prepare the prompt "
                "with flexkit.FlexProcessor."
            )
        slots = pixels.shape[2] if pixels.ndim == 6 else 1
        rows, images = (each.tolist() for each in _real(pixels).nonzero(as_tuple=True))
        columns = [image * slots * (prefix + cells) + prefix + torch.arange(cells) for image in images]
        return Places(len(pixels), rows, columns)


class RealOnes(ByRow):
    """The same pictures, and a row of the context for every one that is an image, or for all."""

    def __init__(self, *, black_too: bool = False) -> None:
        self._black_too = black_too

    def places(self, config: Any, inputs: Mapping[str, Any], prefix: int, cells: int) -> Places:
        real = _real(inputs["pixel_values"]).flatten()
        rows = real.nonzero().flatten().tolist() if self._black_too else list(range(int(real.sum())))
        batch = len(real) if self._black_too else len(rows)
        return Places(batch, rows, [prefix + torch.arange(cells)] * len(rows))


class AtTokens(Arrangement):
    """At the image tokens of the prompt that an encoder reads, and a decoder its output.

    Parameters
    ----------
    token : callable
        From the model's config to the id of the image token.
    from_end : bool
        Whether columns count from the end.
    """

    def __init__(self, token: Callable[[Any], int], *, from_end: bool = False) -> None:
        self._token = token
        self._from_end = from_end

    def places(self, config: Any, inputs: Mapping[str, Any], prefix: int, cells: int) -> Places:
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None:
            raise HighResInputError(
                "a high-res view needs the prompt's input_ids, which say where its images stand; pass them in place of "
                "inputs_embeds."
            )
        places = Places(len(ids), [], [])
        for row, tokens in enumerate(ids == self._token(config)):
            left = tokens.nonzero().flatten() - (ids.shape[1] if self._from_end else 0)
            if len(left) % (prefix + cells):
                raise HighResInputError(
                    f"row {row} of the prompt holds {len(left)} image tokens; an image has {prefix + cells}."
                )
            for image in left.split(prefix + cells) if len(left) else ():
                places.rows.append(row)
                places.columns.append(image[prefix:])
        return places


def _real(pixels: Tensor) -> Tensor:
    """``(batch, images)``, bool: which are images, and not black to fill a row up."""
    return pixels.flatten(2).any(-1)
