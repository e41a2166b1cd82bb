from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from hypothesis import given
from hypothesis import strategies as st
from transformers import JanusImageProcessorPil, SiglipImageProcessorPil

from flexkit.errors import UnsupportedModelError
from flexkit.processing import FlexProcessor
from flexkit.processing.views.fixed import fixed_view
from tests.processing.pictures import PROCESSORS, SIDES, ZOOMS, image_prompt, noise, picture, ramps
from tests.tiny_processors import tiny_gemma3_processor, tiny_llava_processor

SCALED = {
    "llava": lambda zoom: tiny_llava_processor(image_size=28 * zoom),
    "llava padded": lambda zoom: tiny_llava_processor(image_size=28 * zoom, pad=True),
    "llava siglip": lambda zoom: tiny_llava_processor(image_size=28 * zoom, siglip=True),
    "gemma3": lambda zoom: tiny_gemma3_processor(image_size=56 * zoom),
}
NAMES = sorted(SCALED)


def both_views(processor: Any, images: Any, zoom: Any, name: str = "llava", **kwargs: Any) -> Any:
    count = len(images) if isinstance(images, list) else 1
    text = " ".join([image_prompt(name)] * count)
    return FlexProcessor(processor, zoom)(images=images, text=text, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("name", NAMES)
@given(height=SIDES, width=SIDES, zoom=st.integers(1, 3))
def test_is_what_larger_sizes_make(name: str, height: int, width: int, zoom: int) -> None:
    image = picture(height, width)
    inputs = both_views(PROCESSORS[name](), image, zoom, name)
    larger = SCALED[name](zoom).image_processor(image, return_tensors="pt")
    assert torch.equal(inputs["hd_pixel_values"], larger["pixel_values"])


@pytest.mark.parametrize("name", NAMES)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), zoom=ZOOMS)
def test_is_zoom_times_as_large(name: str, sizes: list[tuple[int, int]], zoom: tuple[int, int]) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    inputs = both_views(PROCESSORS[name](), images, zoom, name)
    count, channels, height, width = inputs["pixel_values"].shape
    assert inputs["hd_pixel_values"].shape == (count, channels, zoom[0] * height, zoom[1] * width)
    assert inputs["hd_pixel_values"].dtype == inputs["pixel_values"].dtype


@pytest.mark.parametrize("zoom", [(2, 2), (3, 3), (2, 3), (3, 1)])
@pytest.mark.parametrize("size", [(300, 300), (300, 500), (450, 300)])
@pytest.mark.parametrize("name", NAMES)
def test_shows_the_same_region(name: str, size: tuple[int, int], zoom: tuple[int, int]) -> None:
    inputs = both_views(PROCESSORS[name](), ramps(*size), zoom, name)
    shrunk = reduce(inputs["hd_pixel_values"], "n c (h y) (w x) -> n c h w", "mean", y=zoom[0], x=zoom[1])
    inner = (shrunk - inputs["pixel_values"])[..., 3:-3, 3:-3]  # filters differ at the edge of the padding
    one_pixel = 255 / 28 / 255 / 0.26
    assert inner.abs().quantile(0.9) < one_pixel


def test_image_sizes_of_padded_images() -> None:
    inputs = both_views(tiny_llava_processor(pad=True), [picture(30, 50), picture(40, 20)], 2)
    assert torch.equal(inputs["hd_image_sizes"], torch.tensor([[30, 50], [40, 20]]))


@pytest.mark.parametrize("name", ["llava", "llava siglip", "gemma3"])
def test_no_image_sizes_without_padding(name: str) -> None:
    assert "hd_image_sizes" not in both_views(PROCESSORS[name](), picture(30, 50), 2, name)


def test_sizes_of_a_call_count() -> None:
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 56}}
    inputs = both_views(tiny_llava_processor(), picture(60, 80), (2, 3), images_kwargs=sizes)
    assert inputs["pixel_values"].shape[-2:] == (42, 56)
    assert inputs["hd_pixel_values"].shape[-2:] == (84, 168)


def test_padding_of_a_call_counts() -> None:
    processor = tiny_llava_processor(pad=True)
    assert "hd_image_sizes" not in both_views(processor, picture(60, 80), 2, do_pad=False)


@pytest.mark.parametrize("size", [35, [28, 42]])
def test_sizes_given_without_names(size: Any) -> None:
    processor = tiny_llava_processor(siglip=True)
    processor.image_processor.default_to_square = True
    inputs = both_views(processor, picture(60, 80), 2, size=size)
    assert inputs["hd_pixel_values"].shape[-2:] == tuple(2 * n for n in inputs["pixel_values"].shape[-2:])


def test_images_that_are_not_resized_are_enlarged() -> None:
    inputs = both_views(tiny_llava_processor(siglip=True), ramps(28, 42), (2, 3), do_resize=False)
    assert inputs["hd_pixel_values"].shape == (1, 3, 56, 126)
    corners = inputs["hd_pixel_values"][..., ::55, ::125]
    assert torch.allclose(corners, inputs["pixel_values"][..., ::27, ::41], atol=0.05)


def test_an_image_processor_that_pads_after_resizing() -> None:
    janus = JanusImageProcessorPil(size={"height": 28, "width": 28})
    image = noise(30, 50).transpose(2, 0, 1)
    options = {"return_tensors": "pt", "input_data_format": "channels_first"}
    high_res = fixed_view(janus, [image], janus.preprocess([image], **options), options, (2, 2))
    larger = JanusImageProcessorPil(size={"height": 56, "width": 56}).preprocess([image], **options)
    assert torch.equal(high_res["hd_pixel_values"], larger["pixel_values"])
    assert high_res["hd_image_sizes"].tolist() == [[30, 50]]


@pytest.mark.parametrize("zoom", [(1, 3), (3, 2)])
def test_of_two_zooms_the_smaller_one_is_shrunk(zoom: tuple[int, int]) -> None:
    processor = tiny_llava_processor(siglip=True)
    inputs, larger = (both_views(processor, ramps(300, 400), each) for each in (zoom, 3))
    rows, columns = (3 // side if 3 % side == 0 else 1 for side in zoom)
    expected = reduce(larger["hd_pixel_values"], "n c (h y) (w x) -> n c h w", "mean", y=rows, x=columns)
    if zoom == (1, 3):
        torch.testing.assert_close(inputs["hd_pixel_values"], expected, atol=0.1, rtol=0)
    assert inputs["hd_pixel_values"].shape[-2:] == (28 * zoom[0], 28 * zoom[1])


class Doubling(SiglipImageProcessorPil):
    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        return super().preprocess([*images, *images], **kwargs)


class Rigid(SiglipImageProcessorPil):
    def resize(self, image: np.ndarray, **kwargs: Any) -> np.ndarray:
        return image[:, :28, :28]


@pytest.mark.parametrize(
    ("image_processor", "message"),
    [
        (Doubling(), "made 2 pictures of one image"),
        (Rigid(), r"\(28, 28\) pixels where zoom \(2, 2\) asks for \[\(56, 56\)\]"),
    ],
)
def test_image_processors_of_another_kind_are_refused(image_processor: Any, message: str) -> None:
    image = noise(30, 50).transpose(2, 0, 1)
    with pytest.raises(UnsupportedModelError, match=message):
        fixed_view(image_processor, [image], image_processor.preprocess([image]), {}, (2, 2))


class Patched:
    """Gives the overview and a crop as flattened patches of 4 x 4 pixels."""

    overlap_margins, patch_size = (1, 1), 4

    def __init__(self) -> None:
        self.size = {"height": 8, "width": 8}

    def preprocess(self, images: Any, size: Any = None, **options: Any) -> dict[str, torch.Tensor]:
        side = (size or self.size)["height"]
        (image,) = torch.as_tensor(images[0])[None].float()
        overview = torch.nn.functional.interpolate(image[None], (side, side))[0]
        patches = rearrange(overview, "c (h p) (w q) -> (h w) (p q c)", p=4, q=4)
        return {"pixel_values": torch.stack([patches, torch.zeros_like(patches)])}


def test_pictures_that_come_in_patches() -> None:
    image = noise(16, 16).transpose(2, 0, 1)
    high_res = fixed_view(Patched(), [image], Patched().preprocess([image]), {}, (2, 2))
    assert torch.equal(high_res["hd_pixel_values"], torch.tensor(image)[None].float())
