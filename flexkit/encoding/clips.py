"""Videos whose frames are decoded when they are read, one after another, without ever being held as a whole."""

import bisect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flexkit.encoding.sources import loaded
from flexkit.errors import ConfigError, HighResInputError
from flexkit.grids import Pair

__all__ = ["BrokenVideoWarning", "FrameArray", "FramePictures", "FrameSource", "VideoFile", "open_video", "pyav"]

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class BrokenVideoWarning(UserWarning):
    """Some frames of a video cannot be decoded, and the last one before them stands for each."""


class FrameSource(ABC):
    """A video that gives frames of itself.

    A subclass says how many it has, how fast they follow one another and how large they are, and decodes some;
    :meth:`read` does the rest.

    Attributes
    ----------
    decoded : int
        How many frames have been decoded so far, those on the way to others included.

    Examples
    --------
    >>> import numpy as np
    >>> source = FrameArray(np.zeros((250, 90, 160, 3), dtype=np.uint8), fps=25)
    >>> len(source), source.seconds, [frame.shape for frame in source.read([0, 200])]
    (250, 10.0, [(90, 160, 3), (90, 160, 3)])
    """

    fps: float
    """Frames a second."""
    decoded: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames, evenly spread in time."""

    @property
    @abstractmethod
    def size(self) -> Pair:
        """Height and width in pixels."""

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decode frames.

        Parameters
        ----------
        indices : sequence of int
            Which, each once, ascending.

        Yields
        ------
        numpy.ndarray
            Each ``(height, width, 3)``, uint8, RGB.
        """

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self) / self.fps

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames, one at a time; each is decoded once, in the order of the video.

        Parameters
        ----------
        indices : sequence of int
            Ascending; a frame may be asked for several times.

        Yields
        ------
        numpy.ndarray
            Each ``(height, width, 3)``, uint8, RGB.

        Raises
        ------
        ConfigError
            If there is no such frame, they do not ascend, or :meth:`frames` of a source of your own gives something
            else than it should.
        HighResInputError
            If one cannot be decoded.
        """
        wanted = [int(index) for index in indices]
        if wanted != sorted(wanted) or (wanted and not 0 <= wanted[0] <= wanted[-1] < len(self)):
            raise ConfigError(f"frames {wanted} were asked for; expected ascending indices below {len(self)}.")
        each = sorted(set(wanted))
        shape = (*self.size, 3)
        for index, frame in zip(each, self.frames(each), strict=True):
            if not isinstance(frame, np.ndarray) or frame.shape != shape or frame.dtype != np.uint8:
                raise ConfigError(
                    f"{type(self).__name__}.frames gave {getattr(frame, 'dtype', type(frame).__name__)} of shape "
                    f"{getattr(frame, 'shape', None)} where a numpy array of uint8 and {shape} is expected."
                )
            yield from [frame] * wanted.count(index)


def _checked_fps(fps: float) -> float:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
        raise ConfigError(f"fps must be a positive number of frames a second, got {fps!r}.")
    return float(fps)


class FrameArray(FrameSource):
    """An array of frames, or a memory map of which only what is looked at is read from disk.

    Parameters
    ----------
    array : numpy.ndarray
        ``(frames, height, width, 3)``, uint8, RGB; an array of zarr will do.
    fps : float
        Frames a second.

    Raises
    ------
    ConfigError
        If it is of another shape or dtype, or empty, or ``fps`` is not positive.
    """

    def __init__(self, array: Any, fps: float) -> None:
        shape: tuple[int, ...] = getattr(array, "shape", ())
        if len(shape) != 4 or shape[-1] != 3 or 0 in shape or getattr(array, "dtype", None) != np.uint8:
            raise ConfigError(
                f"an array of frames is uint8 of shape (frames, height, width, 3), got {getattr(array, 'dtype', None)} "
                f"of shape {shape}."
            )
        self.array, self.fps = array, _checked_fps(fps)

    def __len__(self) -> int:
        return int(self.array.shape[0])

    @property
    def size(self) -> Pair:
        return int(self.array.shape[1]), int(self.array.shape[2])

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            try:
                frame = np.asarray(self.array[index])
            except Exception as error:  # whatever a decoder or a disk meets on the way
                raise HighResInputError(f"frame {index} of the array cannot be read: {error}") from error
            self.decoded += 1
            yield frame


class FramePictures(FrameSource):
    """Pictures of one size, as PIL images or files.

    Parameters
    ----------
    pictures : sequence of PIL.Image.Image or str or os.PathLike
        In the order of time.
    fps : float
        Frames a second.

    Raises
    ------
    ConfigError
        If there are none, or ``fps`` is not positive.
    HighResInputError
        If the first cannot be opened. Another that cannot, or has another size, is met when it is read.
    """

    def __init__(self, pictures: Sequence[Image.Image | str | PathLike[str]], fps: float) -> None:
        if not len(pictures):
            raise ConfigError("a video of pictures has at least one.")
        self.pictures, self.fps = list(pictures), _checked_fps(fps)
        self._size = self._open(0).size[::-1]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def size(self) -> Pair:
        return self._size

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            picture = self._open(index)
            if picture.size[::-1] != self._size:
                raise HighResInputError(
                    f"frame {index} is {picture.size[1]} x {picture.size[0]} pixels, the first one {self._size[0]} x "
                    f"{self._size[1]}: frames of a video have one size."
                )
            self.decoded += 1
            yield np.array(picture)

    def _open(self, index: int) -> Image.Image:
        picture = self.pictures[index]
        try:
            if isinstance(picture, Image.Image):
                return loaded(picture).convert("RGB")
            with Image.open(picture) as file:
                return loaded(file).convert("RGB")
        except Exception as error:  # whatever a decoder of PIL meets in a damaged file
            raise HighResInputError(f"frame {index}, {picture}, cannot be read: {error}") from error


class VideoFile(FrameSource):
    """A video file, decoded by PyAV from the key frame before what is asked for.

    Frames are counted in even steps of time, also where those of the file are not: each is the one that is shown then.
    They stand upright, as players show them. Of a file that breaks off, the last frame before the damage stands for
    those behind it.

    Parameters
    ----------
    path : str or os.PathLike
        The file. Reading it needs PyAV (``pip install 'flexkit-vlm[video]'``).

    Raises
    ------
    HighResInputError
        If there is no such file, or no video in it that can be decoded.
    ConfigError
        If PyAV is missing.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        av = pyav()
        try:
            if not self._path.is_file():  # a pipe would be waited for
                raise FileNotFoundError("there is no such file.")
            with av.open(str(self._path)) as container:
                stream = container.streams.video[0]
                self._index(container.demux(stream), stream, av.error.FFmpegError)
            first = next(self._decode([self._times[0]]))
        except Exception as error:  # whatever FFmpeg meets in a damaged file
            raise HighResInputError(f"{path} cannot be read as a video: {error}") from error
        self._size = first.shape[0], first.shape[1]

    def _index(self, packets: Any, stream: Any, broken: type[Exception]) -> None:
        """Note when frames are shown, without decoding any."""
        times, keys = set[int](), set[int]()
        try:
            for packet in packets:
                if packet.pts is not None:
                    times.add(packet.pts)
                    keys |= {packet.pts} if packet.is_keyframe else set()
        except broken:  # what was read so far is there
            pass
        if not times:
            raise ValueError("it holds no frame.")
        self._times, self._keys = sorted(times), sorted(keys) or [min(times)]
        base = float(stream.time_base)
        span = (self._times[-1] - self._times[0]) * base
        self.fps = (len(self._times) - 1) / span if span else float(stream.average_rate or 1)
        self._step = 1 / self.fps / base

    def __len__(self) -> int:
        return len(self._times)

    @property
    def size(self) -> Pair:
        return self._size

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        half = self._step / 2
        wanted = (self._times[0] + index * self._step + half for index in indices)
        shown = [self._times[bisect.bisect_right(self._times, time) - 1] for time in wanted]
        found = dict[int, np.ndarray]()
        rest = self._decode(sorted(set(shown)))
        for time in shown:
            if time not in found:
                found = {time: next(rest)}  # one at a time is held
            yield found[time]

    def _decode(self, times: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames that are shown from some times on."""
        av, last = pyav(), None
        with av.open(str(self._path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            place = 0
            while place < len(times):
                begin = place
                try:
                    container.seek(self._key(times[place]), stream=stream)
                    for frame in container.decode(stream):
                        self.decoded += 1
                        last = frame
                        if frame.pts is None or frame.pts < times[place]:
                            continue
                        while place < len(times) and times[place] <= frame.pts:
                            yield _upright(frame)
                            place += 1
                        if place == len(times) or self._key(times[place]) > frame.pts:
                            break  # it is nearer from another key frame
                except av.error.FFmpegError as error:
                    if last is None:
                        raise HighResInputError(f"no frame of {self._path} can be decoded: {error}") from error
                if place == begin:  # nothing came: the last one stands for it
                    if last is None:
                        raise HighResInputError(f"no frame of {self._path} can be decoded.")
                    warnings.warn(
                        f"{self._path} cannot be decoded at {times[place] * float(stream.time_base):.2f} s; the last "
                        "frame before stands for what is there.",
                        BrokenVideoWarning,
                        stacklevel=2,
                    )
                    yield _upright(last)
                    place += 1

    def _key(self, time: int) -> int:
        return self._keys[max(0, bisect.bisect_right(self._keys, time) - 1)]

    def __reduce__(self) -> tuple[Any, ...]:
        return VideoFile, (self._path,)


def open_video(path: str | PathLike[str], fps: float | None = None) -> FrameSource:
    """A video file, or a folder of pictures, of which only the frames are decoded that are looked at.

    Parameters
    ----------
    path : str or os.PathLike
        A file, which needs PyAV, or a folder, whose pictures are frames in the order of their names.
    fps : float, optional
        Frames a second of a folder; a file says its own.

    Returns
    -------
    FrameSource

    Raises
    ------
    HighResInputError
        If there is nothing to be read.
    ConfigError
        If a folder comes without ``fps``, or PyAV is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        return VideoFile(path)
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in _PICTURES)
    if not pictures:
        raise HighResInputError(f"{path} holds no pictures: expected files that end in one of {_PICTURES}.")
    if fps is None:
        raise ConfigError(f"{path} is a folder of pictures, which do not say how fast they follow: give fps.")
    return FramePictures(pictures, fps)


def pyav() -> Any:
    """The package, or :class:`~flexkit.errors.ConfigError` where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"video files need PyAV: pip install 'flexkit-vlm[video]' ({error}).") from error
    return av


def _upright(frame: Any) -> np.ndarray:
    """The pixels of a frame, turned as the file asks for."""
    turns = round(getattr(frame, "rotation", 0) / 90)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
