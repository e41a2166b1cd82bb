"""Whatever is given as a picture, flexkit reads it or says in an error of its own why not."""

import contextlib
import io
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from flexkit import ArraySource, FlexkitError, FlexProcessor, PictureSource, TileSource, open_tiff
from tests.tiny_processors import tiny_llava_processor

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.floats(-1, 70),
    st.sampled_from([float("nan"), float("inf"), 10**30, 1e-300, None, "1", True]),
)
BOXES = st.one_of(st.tuples(*[st.floats(0, 60)] * 4), st.lists(NUMBERS, max_size=5).map(tuple), NUMBERS)
SIZES = st.one_of(st.tuples(*[st.integers(1, 40)] * 2), st.lists(st.integers(-2, 40), max_size=3).map(tuple), NUMBERS)
FILTERS = st.one_of(st.integers(-1, 9), st.none(), st.just("bicubic"))
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)


def file_of(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form, **options)
    return file.getvalue()


FILES = {form: file_of(form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP")}
FILES["TIFF"] = file_of("TIFF", compression="tiff_lzw")


def damaged(content: bytes, damage: list[tuple[float, int]], kept: float) -> bytes:
    """Some bytes changed, most of them where a file says what is in it, and the end cut off."""
    changed = bytearray(content)
    for place, value in damage:
        changed[int(place**3 * len(changed))] = value
    return bytes(changed[: int(kept * len(changed))])


@cache
def tiffs() -> list[bytes]:
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    files = []
    for options in ({"tile": (16, 16), "compression": "zlib"}, {"rowsperstrip": 7}, {"subifds": 1, "tile": (32, 32)}):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            writer.write(PIXELS, photometric="rgb", **options)
            if "subifds" in options:
                writer.write(PIXELS[::2, ::2], photometric="rgb", subfiletype=1)
        files.append(file.getvalue())
    return files


def read(source: TileSource, box: Any = (3, 2, 30, 20), size: Any = (9, 7), resample: Any = 3) -> None:
    with contextlib.suppress(FlexkitError):
        made = source.read(box, size, resample)
        assert made.mode == "RGB" and made.size == tuple(size)[::-1]


@given(box=BOXES, size=SIZES, resample=FILTERS)
def test_any_region_of_any_size(box: Any, size: Any, resample: Any) -> None:
    read(ArraySource(PIXELS), box, size, resample)
    read(PictureSource(Image.fromarray(PIXELS)), box, size, resample)


@given(
    array=st.one_of(
        npst.arrays(
            st.one_of(npst.integer_dtypes(), npst.floating_dtypes(), st.just(np.uint8), st.just(np.bool_)),
            npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        ),
        st.sampled_from([None, 3, "array", [[[1, 2, 3]]]]),
    )
)
def test_any_array(array: Any) -> None:
    with contextlib.suppress(FlexkitError):
        source = ArraySource(array)
        height, width = source.size
        read(source, (0, 0, width, height))
        read(source, (0, 0, width / 3, height / 2))
        source.overview(3)


@given(form=st.sampled_from(sorted(FILES)), damage=DAMAGE, kept=st.floats(0, 1))
def test_any_damaged_picture(form: str, damage: list[tuple[float, int]], kept: float) -> None:
    with warnings.catch_warnings(action="ignore"):
        try:
            image = Image.open(io.BytesIO(damaged(FILES[form], damage, kept)))
        except Exception:  # PIL's own, which nobody has given to flexkit yet
            return
        if image.width * image.height > 2**20:
            return
        with contextlib.suppress(FlexkitError):
            source = PictureSource(image)
            read(source)
            inputs = FlexProcessor(tiny_llava_processor(), 2)(images=source, text="<image>", return_tensors="pt")
            (view,) = inputs["hd_tiles"]
            assert view.read(0, [0, 3])[0].isfinite().all()


@given(index=st.integers(0, 2), damage=DAMAGE, kept=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]))
def test_any_damaged_tiff(index: int, damage: list[tuple[float, int]], kept: float) -> None:
    content = tiffs()[index]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FlexkitError):
        path = Path(folder) / "picture.tif"
        path.write_bytes(damaged(content, damage, kept))
        source = open_tiff(path)
        read(source)
