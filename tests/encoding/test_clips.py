"""Videos read frame by frame: arrays, pictures, files that are whole, uneven, turned, broken."""

import pickle
import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flexkit.encoding import BrokenVideoWarning, FrameArray, FramePictures, FrameSource, VideoFile, open_video
from flexkit.errors import ConfigError, HighResInputError

av = pytest.importorskip("av")
LEVELS = 4 * np.arange(60)
"""Brightness of each frame of a file."""
CLOSE = 6
"""Levels by which the codec may change it."""


def frames_of(levels: Sequence[int], size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), *size, 3)).copy()


def written(path: Path, levels: Sequence[int] = LEVELS, times: Sequence[int] | None = None, gop: int = 12) -> Path:
    """A file whose frames, ten a second or shown at some milliseconds, have a brightness of their own."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=64, height=48, options={"g": str(gop), "qscale": "2"})
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        stream.bit_rate = 4_000_000
        for index, pixels in enumerate(frames_of(levels)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[index] if times else 100 * index, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("clips") / "whole.mp4")


def levels(source: FrameSource, indices: Sequence[int]) -> list[int]:
    return [round(float(frame.mean())) for frame in source.read(indices)]


def near(found: Sequence[int], expected: Sequence[int]) -> bool:
    return len(found) == len(expected) and max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= CLOSE


def test_arrays_and_pictures() -> None:
    array = frames_of(LEVELS[:9])
    for source in (FrameArray(array, 5), FramePictures([Image.fromarray(frame) for frame in array], 5)):
        assert (len(source), source.size, source.fps, source.seconds) == (9, (48, 64), 5.0, 1.8)
        assert levels(source, [0, 3, 3, 8]) == [0, 12, 12, 32]
        assert source.decoded == 3  # each once


def test_a_folder(tmp_path: Path) -> None:
    for index, frame in enumerate(frames_of([10, 200, 90])):
        Image.fromarray(frame).save(tmp_path / f"{index:03}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    source = open_video(tmp_path, fps=2)
    assert levels(source, [0, 1, 2]) == [10, 200, 90]
    assert levels(pickle.loads(pickle.dumps(source)), [1]) == [200]
    with pytest.raises(ConfigError, match="give fps"):
        open_video(tmp_path)
    Image.fromarray(frames_of([1], (10, 10))[0]).save(tmp_path / "003.png")
    (tmp_path / "004.png").write_bytes(b"no picture")
    source = open_video(tmp_path, fps=2)
    with pytest.raises(HighResInputError, match="frame 3 is 10 x 10 pixels, the first one 48 x 64"):
        list(source.read([3]))
    with pytest.raises(HighResInputError, match=r"frame 4, .*004.png, cannot be read"):
        list(source.read([4]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(HighResInputError, match="holds no pictures"):
        open_video(tmp_path / "empty", fps=1)


def test_a_file(file: Path) -> None:
    source = open_video(file)
    assert isinstance(source, VideoFile) and (len(source), source.size) == (60, (48, 64))
    assert source.fps == pytest.approx(10) and source.seconds == pytest.approx(6)
    assert near(levels(source, range(60)), LEVELS.tolist())
    before = source.decoded
    assert near(levels(source, [50]), [200])
    assert source.decoded - before <= 12  # from the key frame before
    assert near(levels(pickle.loads(pickle.dumps(source)), [7]), [28])


@given(indices=st.lists(st.integers(0, 59), max_size=6).map(sorted))
def test_any_frames(file: Path, indices: list[int]) -> None:
    assert near(levels(VideoFile(file), indices), LEVELS[indices].tolist()) if indices else True


def test_threads(file: Path) -> None:
    source, found = VideoFile(file), dict[int, list[int]]()

    def read(index: int) -> None:
        found[index] = levels(source, [index, 59 - index % 20])

    threads = [threading.Thread(target=read, args=(index,)) for index in range(0, 32, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(near(found[index], [4 * index, 4 * (59 - index % 20)]) for index in range(0, 32, 4))


def test_frames_that_are_unevenly_spread(tmp_path: Path) -> None:
    """Counted in even steps of time: what is shown long is many frames."""
    times = [*range(0, 1000, 100), *range(1000, 6000, 500)]
    source = VideoFile(written(tmp_path / "uneven.mkv", [10 * n for n in range(20)], times))
    assert source.seconds == pytest.approx(5.5 * 20 / 19, rel=0.05)
    found = levels(source, range(len(source)))
    middles = [(index + 0.5) * 1000 / source.fps for index in range(len(source))]
    expected = [10 * (sum(time <= middle for time in times) - 1) for middle in middles]
    assert near(found, expected)


def test_frames_stand_upright(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phones write the direction beside the pixels."""

    class Turned:
        rotation = 90

        def to_ndarray(self, format: str) -> np.ndarray:
            return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    from flexkit.encoding import clips

    upright = clips._upright(Turned())
    assert upright.shape == (3, 2, 3)
    assert np.array_equal(upright, np.rot90(Turned().to_ndarray("rgb24")))


def test_a_file_that_breaks_off(tmp_path: Path, file: Path) -> None:
    whole = written(tmp_path / "whole.mkv")
    content = whole.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(content[: len(content) // 2])
    source = VideoFile(cut)
    assert 20 < len(source) < 45
    assert near(levels(source, range(len(source) - 2)), LEVELS[: len(source) - 2].tolist())


def test_a_file_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Where decoding fails the last frame before stands for the others, and is said to."""
    source = VideoFile(file)
    decode = av.container.InputContainer.decode

    class Failing:
        def __init__(self, container: Any) -> None:
            self.container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()

        def decode(self, stream: Any) -> Any:
            for frame in decode(self.container, stream):
                if frame.time > 2.05:
                    raise av.error.InvalidDataError(1, "damaged")
                yield frame

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *given, **named: Failing(opened(*given, **named)))
    assert near(levels(source, [3, 20]), [12, 80])
    with pytest.warns(BrokenVideoWarning, match=r"cannot be decoded at 2.2\d* s"):
        assert near(levels(source, [20, 22]), [80, 80])
    with pytest.raises(HighResInputError, match=r"no frame .* can be decoded"):
        list(source.read([40]))


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "words.mp4").write_text("nothing to see")
    (tmp_path / "empty.mp4").touch()
    for name in ("words.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(HighResInputError, match=rf"{name} cannot be read as a video"):
            VideoFile(tmp_path / name)
    with av.open(str(tmp_path / "sound.wav"), "w") as sound:
        stream = sound.add_stream("pcm_s16le", rate=8000, layout="mono")
        assert stream is not None
    with pytest.raises(HighResInputError, match="cannot be read as a video"):
        VideoFile(tmp_path / "sound.wav")


def test_errors() -> None:
    for array in (np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3, 3, 3)), np.zeros((0, 3, 3, 3), np.uint8), None):
        with pytest.raises(ConfigError, match=r"uint8 of shape \(frames, height, width, 3\)"):
            FrameArray(array, 5)
    source = FrameArray(frames_of([1, 2, 3]), 5)
    for fps in (0, -1, float("nan"), "5", True):
        with pytest.raises(ConfigError, match="fps must be a positive number"):
            FrameArray(source.array, fps)  # type: ignore[arg-type]
    for indices in ([2, 1], [-1], [3]):
        with pytest.raises(ConfigError, match="expected ascending indices below 3"):
            list(source.read(indices))
    with pytest.raises(ConfigError, match="at least one"):
        FramePictures([], 1)

    class Wrong(FrameArray):
        def frames(self, indices: Sequence[int]) -> Any:
            return (np.zeros((1, 1, 3)) for _ in indices)

    with pytest.raises(ConfigError, match=r"Wrong.frames gave float64 of shape \(1, 1, 3\)"):
        list(Wrong(source.array, 5).read([0]))
