"""Pictures that are read region by region, in the size that is wanted, without ever being decoded as a whole."""

from abc import ABC, abstractmethod
from functools import cached_property
from math import gcd
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import PIL
from PIL import Image

from flexkit.errors import ConfigError, HighResInputError
from flexkit.grids import Pair

__all__ = ["ArraySource", "Box", "PictureSource", "TileSource", "loaded", "open_tiff"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture; not necessarily whole ones."""

_REACH = 3
"""Of the widest filter of PIL, Lanczos, in pixels of what is read or of what is made, whichever are larger."""
_GAP = 3
"""Regions that are shrunk by more than twice this are first averaged to so many times the size that is wanted."""
_STRIP = 2**25
"""How many pixels are held at a time; regions of more are averaged."""
_MOST, _SMALL = 10, 2**22
"""Times a region, and pixels whatever the region, that are resized beside it so that edges are whole numbers."""
_ON = 1e-6
"""Regions that begin so close to the edge of a pixel begin there."""
_PIL = tuple(map(int, PIL.__version__.split(".")[:2]))
_LOADING = Lock()


def loaded(image: Image.Image) -> Image.Image:
    """The image, decoded by one thread alone: PIL decodes wrongly in several at once."""
    with _LOADING:
        image.load()
    return image


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

        It is that to the bit where the region begins and ends between pixels of the resized picture, and is a tenth of
        it or more in height and width, or what lies beside it is of 4 megapixels at most. Elsewhere two grey levels may
        be between them, in few places: PIL takes edges in 32 bits, and either of its two passes may then round the
        other way.

        Parameters
        ----------
        box : tuple of float
            Left, top, right and bottom, inside the picture.
        size : tuple of int
            Height and width to resize to.
        resample : int
            A filter of PIL. Regions of more than 2²⁵ pixels that are shrunk by more than six are averaged first,
            strip by strip, which is not the same to the bit either.

        Returns
        -------
        PIL.Image.Image
            In RGB.

        Raises
        ------
        ConfigError
            If the box is empty, or not inside the picture; if the size is not two positive ints, or the filter none
            of PIL's; or if :meth:`region` of a source of your own gives something else than it should.
        """
        rows, columns = _checked_size(size)
        left, top, right, bottom = self._checked_box(box)
        height, width = self.size
        across, down = _Axis(0, (left, right), width, columns), _Axis(1, (top, bottom), height, rows)
        (x, end), (y, below) = across.reach, down.reach
        shrink = min(across.shrink, down.shrink)
        large = (end - x) * (below - y) > _STRIP and shrink >= 2 * _GAP
        factor = int(shrink / _GAP) if large else 1
        pixels = self._averaged(y, x, below, end, factor) if large else self._pixels(y, x, below, end)
        axes = (down, across) if _rows_first((height, width), (down.wanted, across.wanted)) else (across, down)
        picture = Image.fromarray(pixels)
        try:
            for axis in axes:
                picture = axis.resized(picture, factor, resample)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a region of {box} cannot be resized to {size} by filter {resample!r}: {error}"
            ) from error
        return picture

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
        shrink = max(1.0, max(height, width) / longest)
        return self.read((0, 0, width, height), (max(1, round(height / shrink)), max(1, round(width / shrink))))

    def _averaged(self, top: int, left: int, bottom: int, right: int, factor: int) -> np.ndarray:
        """A region of which squares of pixels have become one; those at its end may be smaller."""
        rows = max(1, _STRIP // ((right - left) * factor)) * factor
        strips = (self._pixels(row, left, min(bottom, row + rows), right) for row in range(top, bottom, rows))
        return np.concatenate([np.asarray(Image.fromarray(strip).reduce(factor)) for strip in strips])

    def _pixels(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        pixels = self.region(top, left, bottom, right)
        shape = (bottom - top, right - left, 3)
        if not isinstance(pixels, np.ndarray) or pixels.shape != shape or pixels.dtype != np.uint8:
            raise ConfigError(
                f"{type(self).__name__}.region gave {getattr(pixels, 'dtype', type(pixels).__name__)} of shape "
                f"{getattr(pixels, 'shape', None)} where a numpy array of uint8 and {shape} is expected."
            )
        return np.ascontiguousarray(pixels)

    def _checked_box(self, box: Box) -> Box:
        try:
            left, top, right, bottom = map(float, box)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"box {box!r} is not four numbers: left, top, right and bottom.") from error
        height, width = self.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ConfigError(f"box {box} is no region of a picture of {height} x {width} pixels.")
        return left, top, right, bottom


class PictureSource(TileSource):
    """A PIL image, which PIL decodes as a whole when it is first read.

    Parameters
    ----------
    image : PIL.Image.Image
        In any mode.

    Raises
    ------
    ConfigError
        If it is no PIL image, or has no pixels.
    """

    def __init__(self, image: Image.Image) -> None:
        if not isinstance(image, Image.Image):
            raise ConfigError(f"a PictureSource is made of a PIL image, got a {type(image).__name__}.")
        if 0 in image.size:
            raise ConfigError(f"the image has no pixels: its size is {image.size}.")
        self.image = image

    @property
    def size(self) -> Pair:
        return self.image.height, self.image.width

    def overview(self, longest: int) -> Image.Image:
        return self._decoded  # as it is: the image processor shrinks it as any other

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        return np.asarray(self._decoded.crop((left, top, right, bottom)).convert("RGB"))

    @cached_property
    def _decoded(self) -> Image.Image:
        try:
            return loaded(self.image)
        except Exception as error:  # whatever a decoder of PIL meets in a damaged file
            raise HighResInputError(
                f"the image cannot be read: {error} Check the file that it was opened from."
            ) from error


class ArraySource(TileSource):
    """An array, or a memory map or zarr array of which only what is looked at is read from disk.

    Parameters
    ----------
    array : numpy.ndarray
        ``(height, width, 3)``, uint8, RGB; an array of zarr will do.

    Raises
    ------
    ConfigError
        If it is of another shape or dtype, or has no pixels.
    """

    def __init__(self, array: Any) -> None:
        shape: tuple[int, ...] = getattr(array, "shape", ())
        if len(shape) != 3 or shape[-1] != 3 or 0 in shape or getattr(array, "dtype", None) != np.uint8:
            raise ConfigError(
                f"an array of pictures is uint8 of shape (height, width, 3), got {getattr(array, 'dtype', None)} of "
                f"shape {shape}."
            )
        self.array = array

    @property
    def size(self) -> Pair:
        return int(self.array.shape[0]), int(self.array.shape[1])

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        try:
            return np.asarray(self.array[top:bottom, left:right])
        except Exception as error:  # whatever a decoder or a disk meets on the way
            raise HighResInputError(
                f"rows {top} to {bottom} and columns {left} to {right} of the array cannot be read: {error}"
            ) from error


def open_tiff(path: str | PathLike[str]) -> ArraySource:
    """A TIFF of which only the tiles or strips are decoded that are looked at; its first series is the picture.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Reading it needs tifffile and zarr (``pip install 'flexkit-vlm[tiff]'``).

    Returns
    -------
    ArraySource
        Which keeps the file open. What is damaged further in is met when it is read, by a
        :class:`~flexkit.errors.HighResInputError`.

    Raises
    ------
    HighResInputError
        If there is no such file, or it cannot be read as a TIFF.
    ConfigError
        If it is no RGB picture of 8 bits a channel, or tifffile or zarr is missing.
    """
    try:
        import tifffile
        import zarr
    except ImportError as error:
        raise ConfigError(f"TIFFs are read by tifffile and zarr: pip install 'flexkit-vlm[tiff]' ({error}).") from error
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file.")
        file = tifffile.TiffFile(path)
        page = file.series[0].keyframe
        colours, compression = (getattr(tag, "name", str(tag)) for tag in (page.photometric, page.compression))
        store = zarr.open(file.series[0].aszarr(), mode="r")
        # A pyramid of sizes is a group, whose first array is the full one.
        array = store["0"] if isinstance(store, zarr.Group) else store
    except Exception as error:  # whatever the two meet in a damaged file
        raise HighResInputError(f"{path} cannot be read as a TIFF: {error}") from error
    source = _Tiff(array, path)
    # What is compressed as JPEG becomes RGB when it is decoded.
    if colours != "RGB" and not (colours == "YCBCR" and "JP" in compression):
        raise ConfigError(f"{path} holds colours as {colours}; convert it to RGB.")
    return source


class _Tiff(ArraySource):
    """An array in a file, which copies in other processes open again."""

    def __init__(self, array: Any, path: str | PathLike[str]) -> None:
        super().__init__(array)
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open_tiff, (self._path,)


class _Axis:
    """What a region is along one axis, and what is made of it.

    Parameters
    ----------
    axis : int
        0 for what lies beside each other, 1 for what lies below.
    region : tuple of float
        Where the region starts and ends.
    given : int
        Pixels of the whole picture.
    made : int
        Pixels that the region is resized to.
    """

    def __init__(self, axis: int, region: tuple[float, float], given: int, made: int) -> None:
        self.axis, self.region, self.given, self.made = axis, region, given, made
        self.shrink = (region[1] - region[0]) / made
        self.wanted = round(given / self.shrink)  # of the whole picture
        # Filters reach over the edge of the region, and further the more they shrink.
        beyond = _REACH * max(1.0, self.shrink) + 2
        self.reach = max(0, int(region[0] - beyond)), min(given, int(region[1] + beyond) + 1)

    def resized(self, picture: Image.Image, factor: int, resample: int) -> Image.Image:
        """The region, of a picture of what it reaches that has been averaged by a factor."""
        low, edges, made, cut = self.reach[0], self.region, self.made, 0
        block = self._block(picture.size[1 - self.axis]) if factor == 1 else None
        if block:
            # PIL takes edges in 32 bits, which whole numbers fit in: black pixels go where it need not look.
            first, last = (pixel * self.given // self.wanted for pixel in block)
            low, high = min(low, first), max(self.reach[1], last)
            wide = Image.new("RGB", self._with(picture.size, high - low))
            wide.paste(picture, self._with((0, 0), self.reach[0] - low))
            picture, edges = wide, (first, last)
            made, cut = block[1] - block[0], round(self.region[0] / self.shrink) - block[0]
        start, end = (min((edge - low) / factor, picture.size[self.axis]) for edge in edges)
        box = *self._with((0, 0), start), *self._with(picture.size, end)
        whole = picture.resize(self._with(picture.size, made), resample, box)
        return whole.crop((*self._with((0, 0), cut), *self._with(whole.size, cut + self.made)))

    def _block(self, across: int) -> Pair | None:
        """The pixels around the region, of the resized picture, that begin and end where pixels of the picture do.

        None if there are none, or too many in a picture of so many pixels across.
        """
        begin = self.region[0] / self.shrink
        if max(abs(begin - round(begin)), abs(self.given / self.shrink - self.wanted)) > _ON:
            return None
        step = self.wanted // gcd(self.given, self.wanted)
        first, last = round(begin) // step * step, -(-(round(begin) + self.made) // step) * step
        few = last - first <= _MOST * self.made or (last - first) * max(1.0, self.shrink) * across <= _SMALL
        return (first, last) if few else None

    def _with(self, pair: tuple[Any, Any], value: Any) -> tuple[Any, Any]:
        """A pair of which the value along this axis is another."""
        return (pair[0], value) if self.axis else (value, pair[1])


def _checked_size(size: Pair) -> Pair:
    try:
        rows, columns = size
        whole = rows == int(rows) > 0 and columns == int(columns) > 0
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ConfigError(f"a size to resize to is a height and a width, positive ints, got {size!r}.")
    return int(rows), int(columns)


def _rows_first(given: Pair, wanted: Pair) -> bool:
    """Whether PIL makes fewer rows before it makes fewer columns: it rounds and clips between the two."""
    (height, width), (rows, columns) = given, wanted
    if _PIL >= (13, 0):
        return rows < height and height - rows > 2 * (width - columns)
    return _PIL >= (12, 2) and rows < height > 100 * width
