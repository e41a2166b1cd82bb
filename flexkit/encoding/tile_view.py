"""An image or a video that a model is given in tiles, each read when it is wanted."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor

from flexkit.grids import Pair

__all__ = ["TileView"]


class TileView(ABC):
    """The tiles of one image, at one zoom or at those of a pyramid; or those of the frames of one video.

    :class:`flexkit.FlexProcessor` makes them of a :class:`flexkit.TileSource` or a :class:`flexkit.FrameSource`; the
    model asks for those that it reads.

    Attributes
    ----------
    zooms : tuple of tuple of int
        Of each level: tiles along rows and columns.
    frames : int
        How many there are of a video, in the high-res view; 1 of an image.
    """

    zooms: tuple[Pair, ...]
    frames: int = 1

    def __deepcopy__(self, memo: object) -> Self:
        return self  # with a copied KV cache a generation goes on reading the same picture

    @abstractmethod
    def read(self, level: int, tiles: Sequence[int]) -> tuple[Tensor, ...]:
        """Some tiles of one level.

        Parameters
        ----------
        level : int
            Index in ``zooms``.
        tiles : sequence of int
            In raster order, frame by frame.

        Returns
        -------
        tuple of torch.Tensor
            Each ``(tiles, channels, height, width)``, floating: one for every size that the model takes a tile in.
        """
