import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flexkit.errors import HighResInputError
from flexkit.processing import FlexProcessor
from tests.processing.pictures import noise, picture
from tests.tiny_processors import tiny_llava_processor


def truncated() -> Image.Image:
    data = io.BytesIO()
    picture(60, 60).save(data, "PNG")
    return Image.open(io.BytesIO(data.getvalue()[:4000]))


NOT_FINITE = np.full((20, 20, 3), np.nan, dtype=np.float32)
UNREADABLE = {
    "truncated": (truncated, "cannot be read: .*a PngImageFile"),
    "missing": (lambda: "nowhere.png", "cannot be read: .*'nowhere.png'"),
    "a number": (lambda: 3.5, "cannot be read: .*a float"),
    "nothing": (lambda: None, "cannot be read: .*a NoneType"),
    "no pixels": (lambda: np.zeros((0, 20, 3), np.uint8), r"has no pixels: its shape is \(0, 20, 3\)"),
    "not finite": (lambda: NOT_FINITE, "holds values that are not finite"),
    "not finite, a tensor": (lambda: torch.from_numpy(NOT_FINITE), "holds values that are not finite"),
}


@pytest.mark.parametrize(("make", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_image_is_named(make: Any, message: str) -> None:
    processor = FlexProcessor(tiny_llava_processor(), 2)
    with pytest.raises(HighResInputError, match=rf"images\[1\]\[0\] {message}"):
        processor(images=[[picture(20, 20)], [make()]], text=["<image>", "<image>"])


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(HighResInputError, match=r"images cannot be read: .*text\.png"):
        FlexProcessor(tiny_llava_processor(), 2)(images=str(path), text="<image>")


def test_an_unreadable_image_in_a_conversation() -> None:
    message = {"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}
    with pytest.raises(HighResInputError, match=r"'nowhere\.png'"):
        FlexProcessor(tiny_llava_processor(), 2).apply_chat_template([message], tokenize=True)


def test_every_way_to_give_an_image_is_read_alike(tmp_path: Path) -> None:
    array = noise(40, 60)
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    channels_first = np.ascontiguousarray(array.transpose(2, 0, 1))
    ways = [
        Image.fromarray(array),
        Image.open(path),
        str(path),
        array,
        array[::-1][::-1],
        channels_first,
        torch.from_numpy(channels_first),
        torch.from_numpy(array),
    ]
    processor = FlexProcessor(tiny_llava_processor(pad=True), 2)
    made = [processor(images=way, text="<image> w5", return_tensors="pt") for way in ways]
    for inputs in made[1:]:
        assert all(torch.equal(inputs[name], made[0][name]) for name in made[0])
    assert made[0]["hd_image_sizes"].tolist() == [[40, 60]]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_modes_are_converted_as_for_the_low_res_view(mode: str) -> None:
    image = picture(28, 28).convert(mode)
    processor = FlexProcessor(tiny_llava_processor(siglip=True), 1)
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    assert torch.equal(inputs["hd_pixel_values"], inputs["pixel_values"])
