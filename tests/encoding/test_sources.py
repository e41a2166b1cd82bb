"""A region read in another size is what is cut out of the whole picture in that size."""

import copy
import io
import math
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from flexkit import ConfigError, HighResInputError
from flexkit.encoding import ArraySource, PictureSource, TileSource, open_tiff

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=40)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    side=st.integers(8, 40),
    resample=st.sampled_from(FILTERS),
    of_array=st.booleans(),
)
def test_tiles_are_cut_from_the_whole(
    height: int, width: int, tiles: tuple[int, int], side: int, resample: int, of_array: bool
) -> None:
    rows, columns = tiles
    array = picture(height, width)
    source: TileSource = ArraySource(array) if of_array else PictureSource(Image.fromarray(array))
    assert source.size == (height, width)
    whole = np.asarray(Image.fromarray(array).resize((columns * side, rows * side), resample))
    for row in range(rows):
        for column in range(columns):
            box = (
                column * width / columns,
                row * height / rows,
                (column + 1) * width / columns,
                (row + 1) * height / rows,
            )
            tile = np.asarray(source.read(box, (side, side), resample))
            cut = whole[row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert np.array_equal(tile, cut)


@given(
    height=st.integers(20, 300),
    width=st.integers(20, 300),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    shrinks=st.tuples(st.floats(0.3, 8), st.floats(0.3, 8)),
    resample=st.sampled_from(FILTERS),
)
def test_regions_between_pixels_differ_by_rounding_alone(
    height: int, width: int, shares: list[float], shrinks: tuple[float, float], resample: int
) -> None:
    """PIL makes the same of them, but that its two passes may change places."""
    (left, right), (top, bottom) = sorted(shares[:2]), sorted(shares[2:])
    box = left * width, top * height, right * width, bottom * height
    size = round((box[3] - box[1]) / shrinks[0]), round((box[2] - box[0]) / shrinks[1])
    assume(min(size) > 0)
    array = picture(height, width) // 4 + 96  # so that no filter clips between the two passes
    own = np.asarray(ArraySource(array).read(box, size, resample)).astype(int)
    expected = np.asarray(Image.fromarray(array).resize(size[::-1], resample, box)).astype(int)
    assert np.abs(own - expected).max() <= 2


def test_memory_maps_and_tiffs_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    array = picture(700, 900)
    np.save(tmp_path / "picture.npy", array)
    tifffile.imwrite(tmp_path / "picture.tif", array, tile=(128, 128), photometric="rgb", compression="zlib")
    sources = (ArraySource(np.load(tmp_path / "picture.npy", mmap_mode="r")), open_tiff(tmp_path / "picture.tif"))
    expected = ArraySource(array).read((100, 50, 420, 300), (50, 64))
    for source in sources:
        assert source.size == (700, 900)
        assert np.array_equal(np.asarray(source.read((100, 50, 420, 300), (50, 64))), np.asarray(expected))


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 10), (-1, 0, 5, 5), (0, 0, 21, 5), (0, 0, 5, 11), (0, 0, math.nan, 5), (5, 5, 2, 2), (0, 0, 5, 0)]
)
def test_boxes_outside_are_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="no region of a picture of 10 x 20"):
        ArraySource(picture(10, 20)).read(box, (4, 4))


@pytest.mark.parametrize("box", [(0, 0, 5), "abcd", None, ("a", 0, 5, 5), (0, 0, 5j, 5), (0, 0, 10**400, 5)])
def test_boxes_that_are_none_are_refused(box: Any) -> None:
    with pytest.raises(ConfigError, match="is not four numbers"):
        ArraySource(picture(10, 20)).read(box, (4, 4))


@pytest.mark.parametrize(
    "size", [(0, 4), (4, 0), (-1, 4), (4, -1), (2.5, 4), (math.nan, 4), (math.inf, 4), (4,), 4, None, ("4", 4)]
)
def test_sizes_that_are_none_are_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="a height and a width, positive ints"):
        ArraySource(picture(10, 20)).read((0, 0, 5, 5), size)


@pytest.mark.parametrize("resample", [99, -1, "bicubic", 2.5])
def test_filters_that_are_none_are_refused(resample: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be resized"):
        ArraySource(picture(10, 20)).read((0, 0, 5, 5), (4, 4), resample)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 4, 0), (3, 4, 4), (4, 4, 3, 1), ()])
def test_arrays_without_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="uint8 of shape"):
        ArraySource(np.zeros(shape, np.uint8))


def test_pictures_without_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="no pixels"):
        PictureSource(Image.new("RGB", (0, 5)))
    with pytest.raises(ConfigError, match="made of a PIL image, got a ndarray"):
        PictureSource(picture(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("pixels", [None, [[1, 2, 3]], np.zeros((2, 2, 3)), np.zeros((2, 2, 1), np.uint8)])
def test_sources_of_ones_own_are_checked(pixels: Any) -> None:
    class Wrong(TileSource):
        size = (64, 64)

        def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
            return pixels

    with pytest.raises(ConfigError, match=r"Wrong.region gave .* where a numpy array of uint8"):
        Wrong().read((0, 0, 8, 8), (4, 4))


def test_arrays_must_be_pictures() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        ArraySource(picture(10, 20).astype(np.float32))
    with pytest.raises(ConfigError, match="shape"):
        ArraySource(picture(10, 20)[..., 0])


@pytest.mark.parametrize("shape", [(1000, 1500), (701, 333)])
def test_what_is_shrunk_a_lot_is_averaged_strip_by_strip(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = Image.fromarray(picture(40, 60)).resize(shape[::-1], Image.Resampling.BICUBIC)
    source, regions = ArraySource(np.asarray(smooth)), []
    monkeypatch.setattr("flexkit.encoding.sources._STRIP", 8192)
    monkeypatch.setattr(
        ArraySource,
        "region",
        lambda self, *box: regions.append(box) or np.ascontiguousarray(self.array[box[0] : box[2], box[1] : box[3]]),
    )
    size = shape[0] // 20, shape[1] // 20
    shrunk = np.asarray(source.read((0, 0, shape[1], shape[0]), size)).astype(int)
    expected = np.asarray(smooth.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3)).astype(int)
    assert np.abs(shrunk - expected).max() <= 2
    assert len(regions) > 3
    assert max((bottom - top) * (right - left) for top, left, bottom, right in regions) <= 2 * 8192


def test_overviews_are_the_whole_picture() -> None:
    array = picture(300, 600)
    overview = ArraySource(array).overview(150)
    assert overview.size == (150, 75)
    whole = Image.fromarray(array)
    assert np.array_equal(np.asarray(overview), np.asarray(whole.resize((150, 75), Image.Resampling.BICUBIC)))
    assert ArraySource(array).overview(9999).size == (600, 300)
    assert PictureSource(whole).overview(150) is whole


def test_sources_of_ones_own() -> None:
    class Checkers(TileSource):
        size = (64, 64)

        def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
            rows, columns = np.mgrid[top:bottom, left:right]
            return np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)

    assert np.asarray(Checkers().read((2, 1, 5, 3), (2, 3))).tolist() == [
        [[255] * 3, [0] * 3, [255] * 3],
        [[0] * 3, [255] * 3, [0] * 3],
    ]


def opened_png(folder: Path, array: np.ndarray) -> TileSource:
    Image.fromarray(array).save(folder / "picture.png")
    return PictureSource(Image.open(folder / "picture.png"))


def opened_tiff(folder: Path, array: np.ndarray) -> TileSource:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    tifffile.imwrite(folder / "picture.tif", array, tile=(64, 64), photometric="rgb", compression="zlib")
    return open_tiff(folder / "picture.tif")


def mapped(folder: Path, array: np.ndarray) -> TileSource:
    np.save(folder / "picture.npy", array)
    return ArraySource(np.load(folder / "picture.npy", mmap_mode="r"))


@pytest.mark.parametrize("opened", [opened_png, opened_tiff, mapped])
def test_threads_read_alike(tmp_path: Path, opened: Callable[[Path, np.ndarray], TileSource]) -> None:
    array = picture(500, 600)
    boxes = [(40 * step, 30 * step, 40 * step + 200, 30 * step + 200) for step in range(10)]
    expected = [np.asarray(ArraySource(array).read(box, (50, 50))) for box in boxes]
    for _ in range(3):
        source, start = opened(tmp_path, array), threading.Barrier(8)

        def read(source: TileSource = source, start: threading.Barrier = start) -> list[np.ndarray]:
            start.wait()
            return [np.asarray(source.read(box, (50, 50))) for box in boxes]

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(read) for _ in range(8)]:
                assert np.array_equal(np.stack(future.result()), np.stack(expected))


@pytest.mark.parametrize("opened", [opened_png, opened_tiff, mapped])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_copies_read_alike(tmp_path: Path, opened: Callable[[Path, np.ndarray], TileSource], copied: Any) -> None:
    array = picture(90, 80)
    box = (10, 5, 70, 60)
    source = copied(opened(tmp_path, array))
    assert np.array_equal(source.read(box, (20, 30)), ArraySource(array).read(box, (20, 30)))


def test_files_that_are_no_tiffs_are_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    (tmp_path / "empty.tif").touch()
    (tmp_path / "text.tif").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.tif")
    for path in ("missing.tif", ".", "empty.tif", "text.tif", "pipe.tif", "a\0b.tif"):
        with pytest.raises(HighResInputError, match="cannot be read as a TIFF"):
            open_tiff(tmp_path / path)
    with pytest.raises(HighResInputError, match="cannot be read as a TIFF"):
        open_tiff(None)  # type: ignore[arg-type]
    for name, array, options in (
        ("grey", picture(20, 30)[..., 0], {}),
        ("sixteen", picture(20, 30).astype(np.uint16), {"photometric": "rgb"}),
        ("planes", picture(20, 30).transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        ("inks", picture(20, 30)[..., [0, 1, 2, 0]], {"photometric": "separated"}),
        ("lab", picture(20, 30), {"photometric": "cielab"}),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", array, **options)
        with pytest.raises(ConfigError, match=r"uint8 of shape|convert it to RGB"):
            open_tiff(tmp_path / f"{name}.tif")
    Image.fromarray(picture(20, 30)).convert("YCbCr").save(tmp_path / "video.tif")
    with pytest.raises(ConfigError, match="holds colours as YCBCR"):
        open_tiff(tmp_path / "video.tif")


def test_damage_is_met_when_it_is_read(tmp_path: Path) -> None:
    opened_tiff(tmp_path, picture(200, 200))
    path = tmp_path / "picture.tif"
    path.write_bytes(path.read_bytes()[:-40_000])
    source = open_tiff(path)
    with pytest.raises(HighResInputError, match=r"rows .* cannot be read"):
        source.read((0, 0, 200, 200), (10, 10))
    file = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(file, "PNG")
    image = PictureSource(Image.open(io.BytesIO(file.getvalue()[:-40_000])))
    for _ in range(2):
        with pytest.raises(HighResInputError, match="the image cannot be read"):
            image.read((0, 0, 200, 200), (10, 10))
    with pytest.raises(HighResInputError, match="the image cannot be read"):
        image.overview(100)
