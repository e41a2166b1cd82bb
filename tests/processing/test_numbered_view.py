"""Flattened patches with their row and column."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from flexkit.processing import FlexProcessor
from tests.processing.pictures import ZOOMS, picture, ramps
from tests.processors import PROCESSORS

NAMES = ("pix2struct", "kosmos-2.5")
SIDES = st.integers(4, 60)


def views(name: str, *pictures: Any, zoom: tuple[int, int] = (2, 2), **options: Any) -> Any:
    tiny = PROCESSORS[name]
    options = {"return_tensors": "pt", **tiny.call, **options}
    return FlexProcessor(tiny.build("pil"), zoom)(images=list(pictures), text=["w5"] * len(pictures), **options)


def real(patches: Any) -> torch.Tensor:
    patches = torch.as_tensor(np.asarray(patches))
    return patches[patches[:, 0] > 0]


@pytest.mark.parametrize("name", NAMES)
@given(height=SIDES, width=SIDES, zoom=ZOOMS, patches=st.integers(1, 40))
def test_rows_and_columns_are_exactly_zoom_times(
    name: str, height: int, width: int, zoom: tuple[int, int], patches: int
) -> None:
    inputs = views(name, picture(height, width), zoom=zoom, max_patches=patches)
    low, high = real(inputs["flattened_patches"][0]), real(inputs["hd_flattened_patches"][0])
    rows, columns = (times * int(count) for times, count in zip(zoom, low[:, :2].amax(0), strict=True))
    numbers = [[row, column] for row in range(1, rows + 1) for column in range(1, columns + 1)]
    assert high[:, :2].tolist() == numbers
    if zoom == (1, 1):
        torch.testing.assert_close(high, low)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_lie_in_their_patches(name: str) -> None:
    inputs = views(name, ramps(60, 40), zoom=(1, 2))
    patches = real(inputs["hd_flattened_patches"][0])
    rows, columns = patches[:, :2].amax(0).int().tolist()
    pixels = rearrange(patches[:, 2:], "(r q) (h w c) -> c (r h) (q w)", r=rows, q=columns, h=2, w=2)
    assert (pixels[0].diff(dim=0) > 0).all() and pixels[0].std(1).max() < 1e-5
    assert (pixels[1].diff(dim=1) > 0).all() and pixels[1].std(0).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_several_pictures_are_padded_to_the_most_patches(name: str) -> None:
    pictures = (picture(60, 20), picture(20, 60), picture(40, 40))
    together = views(name, *pictures, max_patches=30)["hd_flattened_patches"]
    alone = [views(name, each, max_patches=30)["hd_flattened_patches"][0] for each in pictures]
    assert together.shape[1] == max(map(len, alone))
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[: len(other)], other) and not one[len(other) :].any()


def test_a_header_stands_on_both_views() -> None:
    """A question for Pix2Struct is written on the picture, each on its own."""
    tiny = PROCESSORS["pix2struct"]
    processor = tiny.build("pil")
    processor.image_processor.is_vqa = True

    def render(self: Any, image: np.ndarray, header: str, **options: Any) -> np.ndarray:
        return np.concatenate([np.full_like(image, 255 * (header == "white")), image], axis=1)

    with mock.patch.object(type(processor.image_processor), "render_header", render):
        images, text = [picture(20, 40), picture(20, 40)], ["white", "black"]
        inputs = FlexProcessor(processor, 2)(images=images, text=text, return_tensors="pt", max_patches=32)
    for low, high in zip(inputs["flattened_patches"], inputs["hd_flattened_patches"], strict=True):
        low, high = real(low), real(high)
        for patches in (low, high):
            header = patches[patches[:, 0] <= patches[:, 0].max() / 4, 2:]
            assert header.std() < 1e-5
        torch.testing.assert_close(low[0, 2:].mean(), high[0, 2:].mean())
    assert inputs["hd_flattened_patches"][0, 0, 2:].mean() > inputs["hd_flattened_patches"][1, 0, 2:].mean()


def test_without_tensors() -> None:
    inputs = views("pix2struct", picture(60, 20), return_tensors=None)
    assert isinstance(inputs["hd_flattened_patches"][0], np.ndarray)
    tensors = views("pix2struct", picture(60, 20))
    assert np.array_equal(inputs["hd_flattened_patches"][0], tensors["hd_flattened_patches"][0])
