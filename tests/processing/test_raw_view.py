"""Patches of images, with nothing that says how they lie."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import FuyuImageProcessorPil

from flexkit.processing.views import choose_view
from flexkit.processing.views.raw import fuyu_view, inkling_view
from tests.processing.pictures import ZOOMS, noise

SIDES = st.integers(3, 40)
OPTIONS = {"input_data_format": "channels_first"}


class Inkling:
    """Cuts a picture into patches of 4 x 4 pixels, one column more than it fills."""

    model_input_names = ("pixel_values",)
    do_resize, resample, rescale_image_frac = None, 2, None

    def __init__(self) -> None:
        self.size = {"height": 4, "width": 4}

    def preprocess(self, images: list[Any], **options: Any) -> dict[str, torch.Tensor]:
        (image,) = map(torch.as_tensor, images)
        height, width = image.shape[-2:]
        rows, columns = math.ceil(height / 4), width // 4 + 1
        image = torch.nn.functional.pad(image, (0, 4 * columns - width, 0, 4 * rows - height))
        return {"pixel_values": rearrange(image, "c (h p) (w q) -> (h w) p q c", p=4, q=4)}


def whole(patches: torch.Tensor, size: torch.Tensor, side: int) -> np.ndarray:
    pattern = "(h w) (p q c) -> c (h p) (w q)" if patches.ndim == 2 else "(h w) p q c -> c (h p) (w q)"
    return rearrange(patches.numpy(), pattern, h=int(size[0]) // side, p=side, q=side, c=3)


def enlarged(image: np.ndarray, zoom: tuple[int, int]) -> np.ndarray:
    height, width = (side * times for side, times in zip(image.shape[1:], zoom, strict=True))
    picture = Image.fromarray(image.transpose(1, 2, 0)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


@pytest.mark.parametrize("name", ["fuyu", "inkling"])
@given(height=SIDES, width=SIDES, zoom=ZOOMS)
def test_enlarged_pictures_in_whole_patches(name: str, height: int, width: int, zoom: tuple[int, int]) -> None:
    image = np.moveaxis(noise(height, width), -1, 0)
    if name == "fuyu":
        side, columns = 5, math.ceil(width / 5)
        plain = {"do_rescale": False, "do_normalize": False, "patch_size": {"height": side, "width": side}}
        processor: Any = FuyuImageProcessorPil(size={"height": 40, "width": 40}, **plain)
        low_res = {"image_sizes": torch.tensor([[height, width]])}
    else:
        side, columns, processor = 4, width // 4 + 1, Inkling()
        low_res = processor.preprocess([image])
    view = choose_view(processor)
    assert view is {"fuyu": fuyu_view, "inkling": inkling_view}[name]
    high_res = view(processor, [image, image], low_res, OPTIONS, zoom)
    rows = math.ceil(height / side)
    assert high_res["hd_image_sizes"].tolist() == [[zoom[0] * rows * side, zoom[1] * columns * side]] * 2
    patches = high_res["hd_pixel_values"]
    assert len(patches) == 2 * zoom[0] * rows * zoom[1] * columns
    expected = enlarged(image, zoom)
    for half in patches.chunk(2):
        picture = whole(half, high_res["hd_image_sizes"][0], side)
        shown = tuple(slice(length) for length in expected.shape)
        assert np.array_equal(picture[shown], expected)
        assert picture.sum() == expected.sum()


def test_fuyu_shrinks_large_pictures() -> None:
    side = {"height": 5, "width": 5}
    processor = FuyuImageProcessorPil(size={"height": 20, "width": 20}, patch_size=side, do_normalize=False)
    image = np.moveaxis(noise(40, 80), -1, 0)
    high_res = fuyu_view(processor, [image], {"image_sizes": [(40, 80)]}, OPTIONS, (2, 2))
    assert high_res["hd_image_sizes"] == [[20, 40]]
