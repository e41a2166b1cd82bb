import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexkit import HighResInputError
from flexkit.demo.picture import read_picture

RED = Image.new("RGB", (6, 4), (200, 30, 30))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "PA"])
@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300), (7, 5)])
def test_any_mode_and_size(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / "picture.tiff"
    image = RED.resize(size).convert("LA" if mode == "PA" else mode).convert(mode)
    # PIL before 13 cannot read the YCbCr that it writes, unless it is compressed as JPEG.
    image.save(path, compression="jpeg" if mode == "YCbCr" else None)
    read = read_picture(path)
    assert read.mode == "RGB" and read.size == size
    expected = np.asarray(image.convert("RGB"), dtype=int)
    assert np.abs(np.asarray(read, dtype=int) - expected).max() <= 2


def test_transparent_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    image.save(tmp_path / "picture.png")
    assert np.asarray(read_picture(tmp_path / "picture.png")).tolist() == [[[0, 0, 255], [255, 255, 255]]]


def test_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    image.save(tmp_path / "picture.png", exif=exif)
    assert np.asarray(read_picture(tmp_path / "picture.png")).tolist() == [[[255, 0, 0]], [[0, 0, 255]]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_numbers_that_are_no_bytes_show_their_range(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.array([[1000, 3000, 5000]], dtype=dtype)).save(tmp_path / "picture.tiff")
    assert np.asarray(read_picture(tmp_path / "picture.tiff"))[0, :, 0].tolist() == [0, 127, 255]


def test_infinite_and_constant_numbers(tmp_path: Path) -> None:
    Image.fromarray(np.array([[np.nan, np.inf]], dtype=np.float32)).save(tmp_path / "picture.tiff")
    assert np.asarray(read_picture(tmp_path / "picture.tiff")).max() == 0


def test_large_pictures_shrink_in_proportion(tmp_path: Path) -> None:
    Image.new("1", (9000, 90)).save(tmp_path / "picture.png")
    assert read_picture(tmp_path / "picture.png").size == (4096, 41)


def _bomb() -> bytes:
    """A PNG that claims a billion pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def test_what_is_no_picture(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    RED.resize((64, 64)).save(whole)
    contents = {"empty": b"", "text": b"hello", "cut": whole.read_bytes()[:100], "bomb": _bomb()}
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(HighResInputError, match=f"{name}' cannot be read as a picture"):
            read_picture(path)
    for missing in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(HighResInputError, match="no file"):
            read_picture(missing)
