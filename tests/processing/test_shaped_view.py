"""Image processors that keep the shape of an image, and pad."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AriaImageProcessorPil

from flexkit.processing import FlexProcessor
from flexkit.processing.views import choose_view
from flexkit.processing.views.shaped import shaped_view
from tests.processing.pictures import ZOOMS, noise, picture, ramps
from tests.processors import PROCESSORS

SIDES = st.integers(4, 90)
OPTIONS = {"input_data_format": "channels_first"}


def made(processor: Any, images: list[Any], zoom: tuple[int, int]) -> tuple[Any, torch.Tensor]:
    low = processor.preprocess(images, return_tensors="pt", **OPTIONS)
    return low, choose_view(processor)(processor, images, low, OPTIONS, zoom)["hd_pixel_values"]


@pytest.mark.skipif(not PROCESSORS["idefics2"].runs_here(), reason="needs torchvision")
@given(height=SIDES, width=SIDES, zoom=ZOOMS)
def test_idefics2(height: int, width: int, zoom: tuple[int, int]) -> None:
    """Exactly zoom times the pixels of the low-res view, whatever it was rounded to."""
    from transformers import Idefics2ImageProcessorPil

    processor = Idefics2ImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 50})
    low, view = made(processor, [noise(height, width).transpose(2, 0, 1)], zoom)
    shape = low["pixel_values"].shape[-2:]
    assert view.shape == (1, 3, zoom[0] * shape[0], zoom[1] * shape[1])
    if zoom == (1, 1):
        torch.testing.assert_close(view[0], low["pixel_values"][0, 0])


@pytest.mark.skipif(not PROCESSORS["idefics2"].runs_here(), reason="needs torchvision")
def test_images_of_several_shapes_are_padded_to_the_largest() -> None:
    tiny = PROCESSORS["idefics2"]
    processor = tiny.build("pil")
    processor.image_processor.size = {"shortest_edge": 20, "longest_edge": 50}
    pictures = [[ramps(80, 40)], [ramps(30, 80)]]
    inputs = FlexProcessor(processor, (2, 1))(images=pictures, text=["<image>"] * 2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 1, 3, 50, 50)
    mask = inputs["pixel_attention_mask"][:, 0].repeat_interleave(2, 1).bool()
    for view, inside in zip(inputs["hd_pixel_values"], mask, strict=True):
        assert view[:, inside].any(0).all() and not view[:, ~inside].any()


@pytest.mark.parametrize("zoom", [(1, 1), (2, 3), (3, 1)])
def test_aria(zoom: tuple[int, int]) -> None:
    """Sizes beyond its two are made of tiles."""
    processor = AriaImageProcessorPil(max_image_size=490)
    assert choose_view(processor) is shaped_view
    low, view = made(processor, [noise(50, 90).transpose(2, 0, 1)], zoom)
    assert view.shape == (1, 3, zoom[0] * 490, zoom[1] * 490)
    mask = low["pixel_mask"].repeat_interleave(zoom[0], 1).repeat_interleave(zoom[1], 2)
    (padding,) = view[:, :, ~mask[0]].unbind()
    assert (padding == padding[:, :1]).all()
    if zoom == (1, 1):
        torch.testing.assert_close(view, low["pixel_values"])


def test_pictures_of_one_text_after_the_other() -> None:
    """IDEFICS processes the images of every text on their own, and gives nothing but pixels."""
    processor = FlexProcessor(PROCESSORS["idefics"].build("pil"), 2)
    one, two, three = picture(30, 50), picture(50, 30), picture(20, 20)
    together = processor(images=[[one], [two, three]], text=["w5", "w6"])
    alone = torch.cat([processor(images=[[each]], text=["w5"])["hd_pixel_values"] for each in (one, two, three)])
    assert torch.equal(together["hd_pixel_values"], alone)
    assert together["pixel_values"].shape[:2] == (2, 2)
