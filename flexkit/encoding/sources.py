"""Pictures that are read region by region, in the size that is wanted, without ever being decoded as a whole."""

from abc import ABC, abstractmethod
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image

from flexkit.errors import ConfigError
from flexkit.zoom import Pair

__all__ = ["ArraySource", "Box", "PictureSource", "TileSource", "at_most", "open_tiff"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture; not necessarily whole ones."""

_REACH = 3
"""Of the widest filter of PIL, Lanczos, in pixels of what is read or of what is made, whichever are larger."""
_GAP = 3
"""Regions that are shrunk by more than twice this are first averaged to so many times the size that is wanted."""
_STRIP = 2**24
"""How many pixels are held at a time of a region that is averaged."""


def at_most(size: Pair, longest: int) -> Pair:
    """A size of the same shape whose longer side is no longer than asked for."""
    shrink = max(1.0, max(size) / longest)
    return max(1, round(size[0] / shrink)), max(1, round(size[1] / shrink))


class TileSource(ABC):
    """A picture that gives regions of itself.

    A subclass says how large it is and reads regions of whole pixels; :meth:`read` does the rest.

    Examples
    --------
    >>> import numpy as np
    >>> source = ArraySource(np.zeros((600, 900, 3), dtype=np.uint8))
    >>> source.size, source.read((0, 0, 300, 300), (64, 64)).size
    ((600, 900), (64, 64))
    """

    @property
    @abstractmethod
    def size(self) -> Pair:
        """Height and width in pixels."""

    @abstractmethod
    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """The pixels of a region inside the picture.

        Parameters
        ----------
        top, left, bottom, right : int
            Its first row and column, and those behind its last.

        Returns
        -------
        numpy.ndarray
            ``(bottom - top, right - left, 3)``, uint8, RGB.
        """

    def read(self, box: Box, size: Pair, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
        """A region in another size: what is cut out of the whole picture resized by the same factor.

        Parameters
        ----------
        box : tuple of float
            Left, top, right and bottom, inside the picture.
        size : tuple of int
            Height and width to resize to.
        resample : int
            A filter of PIL. What is shrunk by more than six is averaged first, strip by strip.

        Returns
        -------
        PIL.Image.Image
            In RGB.

        Raises
        ------
        ConfigError
            If the box is empty, or not inside the picture.
        """
        left, top, right, bottom = box
        height, width = self.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ConfigError(f"box {box} is no region of a picture of {height} x {width} pixels.")
        shrinks = (right - left) / size[1], (bottom - top) / size[0]
        # Filters reach over the edge of the region, and further the more they shrink.
        across, down = (_REACH * max(1.0, shrink) + 2 for shrink in shrinks)
        x, y = max(0, int(left - across)), max(0, int(top - down))
        ends = min(width, int(right + across) + 1), min(height, int(bottom + down) + 1)
        factor = int(min(shrinks) / _GAP) if min(shrinks) >= 2 * _GAP else 1
        pixels = self.region(y, x, ends[1], ends[0]) if factor == 1 else self._averaged(y, x, ends[1], ends[0], factor)
        inside = (left - x) / factor, (top - y) / factor, (right - x) / factor, (bottom - y) / factor
        limits = pixels.shape[1], pixels.shape[0]
        fitting = tuple(min(edge, limits[axis % 2]) for axis, edge in enumerate(inside))
        return Image.fromarray(pixels).resize((size[1], size[0]), resample, box=fitting)

    def overview(self, longest: int) -> Image.Image:
        """The whole picture, its longer side no longer than asked for.

        Parameters
        ----------
        longest : int
            In pixels.

        Returns
        -------
        PIL.Image.Image
            In RGB.
        """
        height, width = self.size
        return self.read((0, 0, width, height), at_most(self.size, longest))

    def _averaged(self, top: int, left: int, bottom: int, right: int, factor: int) -> np.ndarray:
        """A region of which squares of pixels have become one; those at its end may be smaller."""
        rows = max(1, _STRIP // ((right - left) * factor)) * factor
        strips = (self.region(row, left, min(bottom, row + rows), right) for row in range(top, bottom, rows))
        return np.concatenate([np.asarray(Image.fromarray(strip).reduce(factor)) for strip in strips])


class PictureSource(TileSource):
    """A PIL image, which PIL decodes as a whole when it is first read.

    Parameters
    ----------
    image : PIL.Image.Image
        In any mode.
    """

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @property
    def size(self) -> Pair:
        return self.image.height, self.image.width

    def overview(self, longest: int) -> Image.Image:
        return self.image  # as it is: the image processor shrinks it as any other

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        return np.asarray(self.image.crop((left, top, right, bottom)).convert("RGB"))


class ArraySource(TileSource):
    """An array, or a memory map or zarr array of which only what is looked at is read from disk.

    Parameters
    ----------
    array : numpy.ndarray
        ``(height, width, 3)``, uint8, RGB; an array of zarr will do.

    Raises
    ------
    ConfigError
        If it is of another shape or dtype.
    """

    def __init__(self, array: Any) -> None:
        if getattr(array, "ndim", 0) != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
            raise ConfigError(
                f"an array of pictures is uint8 of shape (height, width, 3), got {getattr(array, 'dtype', None)} of "
                f"shape {getattr(array, 'shape', None)}."
            )
        self.array = array

    @property
    def size(self) -> Pair:
        return int(self.array.shape[0]), int(self.array.shape[1])

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        return np.ascontiguousarray(self.array[top:bottom, left:right])


def open_tiff(path: str | PathLike[str]) -> ArraySource:
    """A TIFF of which only the tiles or strips are decoded that are looked at; its first series is the picture.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Reading it needs tifffile and zarr (``pip install 'flexkit-vlm[tiff]'``).

    Returns
    -------
    ArraySource
        Which keeps the file open.

    Raises
    ------
    ConfigError
        If it is no RGB picture of 8 bits a channel.
    """
    import tifffile
    import zarr

    store = zarr.open(tifffile.imread(path, aszarr=True), mode="r")
    # A pyramid of sizes is a group, whose first array is the full one.
    return ArraySource(store["0"] if isinstance(store, zarr.Group) else store)
