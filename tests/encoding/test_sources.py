"""A region read in another size is what is cut out of the whole picture in that size."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from flexkit import ConfigError
from flexkit.encoding import ArraySource, PictureSource, TileSource, open_tiff

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=40)
@given(
    height=st.integers(20, 200),
    width=st.integers(20, 200),
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    side=st.integers(8, 40),
    resample=st.sampled_from(FILTERS),
    of_array=st.booleans(),
)
def test_tiles_are_cut_from_the_whole(
    height: int, width: int, tiles: tuple[int, int], side: int, resample: int, of_array: bool
) -> None:
    rows, columns = tiles
    assume(max(height / (rows * side), width / (columns * side)) < 6)
    array = picture(height, width) // 4 + 96  # so that no filter clips between PIL's two passes
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
            # PIL rounds between its two passes, and which comes first depends on the sizes.
            assert np.abs(tile.astype(int) - cut).max() <= 2


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


@pytest.mark.parametrize("box", [(0, 0, 0, 10), (-1, 0, 5, 5), (0, 0, 21, 5), (0, 0, 5, 11)])
def test_boxes_outside_are_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="no region of a picture of 10 x 20"):
        ArraySource(picture(10, 20)).read(box, (4, 4))


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
