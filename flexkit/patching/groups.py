"""Images of a batch that have one grid, stacked."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexkit.grids import Pair
from flexkit.lazy import lazy
from flexkit.patching.memory import ImageSpan

__all__ = ["ImageGroup", "group_images", "within"]


@dataclass(frozen=True)
class ImageGroup:
    """Images of a batch that have one grid, so that their maps can be stacked."""

    images: tuple[ImageSpan, ...]

    @property
    def grid(self) -> Pair:
        """Low-res grid of each image."""
        return self.images[0].grid

    @property
    def zoom(self) -> Pair:
        """Zoom of each image."""
        return self.images[0].zoom

    @property
    def level(self) -> int:
        """Level of the pyramid of zooms."""
        return self.images[0].level

    @lazy
    def rows(self) -> Tensor:
        """``(images,)``: batch row of each image."""
        return torch.tensor([span.row for span in self.images], device=self.columns.device)

    @lazy
    def columns(self) -> Tensor:
        """``(images, cells)``: positions of the low-res tokens in the sequence."""
        return torch.stack([span.columns for span in self.images])

    @lazy
    def margins(self) -> Tensor | None:
        """``(images, 2)``: padded cells on each side; None where no image is padded."""
        margins = [span.margins for span in self.images]
        padded = next((each for each in margins if each is not None), None)
        if padded is None:
            return None
        return torch.stack([torch.zeros_like(padded) if each is None else each for each in margins])

    @lazy
    def tokens(self) -> Tensor:
        """``(images, tokens)``: indices of the high-res tokens in the memory."""
        starts = torch.tensor([span.start for span in self.images], device=self.columns.device)
        return starts[:, None] + torch.arange(self.images[0].tokens, device=self.columns.device)

    def is_batch(self, batch: int) -> bool:
        """Whether these are the images of a batch that has one in every row, in order."""
        return len(self.images) == batch and all(span.row == row for row, span in enumerate(self.images))


def group_images(images: Iterable[ImageSpan]) -> tuple[ImageGroup, ...]:
    """Group images by grid and zoom: on every level of a pyramid the same groups, in the same order."""
    groups: dict[tuple[Pair, Pair], list[ImageSpan]] = {}
    for span in images:
        groups.setdefault((span.grid, span.zoom), []).append(span)
    return tuple(ImageGroup(tuple(spans)) for spans in groups.values())


def within(columns: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Indices that may be used on ``keys`` keys, and which of them were inside."""
    return columns.clamp(0, keys - 1), (columns >= 0) & (columns < keys)
