"""Processors that cut images into tiles, and give overviews alone when they are wrapped."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flexkit.errors import HighResInputError
from flexkit.processing import FlexProcessor
from flexkit.processing.overviews import check_options, keep_overviews, to_one_tile, to_square, without_tiles
from tests.processing.pictures import picture, ramps
from tests.processors import PROCESSORS
from tests.tiny_processors import tiny_gemma3_processor

needs_idefics2 = pytest.mark.skipif(not PROCESSORS["idefics2"].runs_here(), reason="needs torchvision")
ANYRES = ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")


def tokens(inputs: Any) -> int:
    return int((inputs["input_ids"] == 90).sum())


@pytest.mark.parametrize("name", ANYRES)
@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_the_first_tile_is_the_overview(name: str, return_tensors: str) -> None:
    tiny = PROCESSORS[name]
    options = {"images": [ramps(40, 70), ramps(60, 30)], "text": "<image> w5 <image>", "return_tensors": return_tensors}
    plain, inputs = tiny.build("pil")(**options), FlexProcessor(tiny.build("pil"), 2)(**options)
    assert inputs["pixel_values"].shape == (2, 1, *plain["pixel_values"].shape[2:])
    assert (inputs["pixel_values"][:, 0] == plain["pixel_values"][:, 0]).all()
    assert (inputs["image_sizes"] == plain["image_sizes"]).all()
    assert tokens(inputs) == 2 * 10 < tokens(plain)


def test_several_images_of_a_row_are_treated_like_one() -> None:
    """LLaVA-OneVision would pad them to squares."""
    processor = FlexProcessor(PROCESSORS["llava_onevision"].build("pil"), 2)
    images = [ramps(40, 70), ramps(60, 30)]
    together = processor(images=[images], text="<image> <image>", return_tensors="pt")
    for index, image in enumerate(images):
        alone = processor(images=image, text="<image>", return_tensors="pt")
        for name in ("pixel_values", "hd_pixel_values"):
            assert torch.equal(together[name][index], alone[name][0])


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_without_tensors(name: str) -> None:
    tiny = PROCESSORS[name]
    asked = {"images": [ramps(40, 70)], "text": tiny.prompt}
    inputs = FlexProcessor(tiny.build("pil"), 2)(**asked)
    tensors = FlexProcessor(tiny.build("pil"), 2)(**asked, return_tensors="pt")
    assert type(inputs["hd_pixel_values"]) is type(inputs["pixel_values"])
    assert torch.equal(torch.as_tensor(inputs["hd_pixel_values"][0]), tensors["hd_pixel_values"][0])


def test_chat_template() -> None:
    tiny = PROCESSORS["internvl"]
    processor = tiny.build("pil")
    processor.chat_template = (
        "{% for block in messages[0].content %}{% if block.type == 'image' %}<image>{% endif %}{% endfor %}"
    )
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    content = [{"type": "image", "image": ramps(40, 90)}]
    inputs = FlexProcessor(processor, 2).apply_chat_template([{"role": "user", "content": content}], **asked)
    assert tokens(inputs) == 9
    assert inputs["hd_pixel_values"].shape == (1, 3, 48, 48)


def test_tiles_that_a_processor_was_saved_with_are_turned_off() -> None:
    processor = tiny_gemma3_processor()
    processor.image_processor.do_pan_and_scan = True
    inputs = FlexProcessor(processor, 2)(images=picture(30, 90), text="<start_of_image>", return_tensors="pt")
    assert len(inputs["pixel_values"]) == len(inputs["hd_pixel_values"]) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_pan_and_scan": True},
        {"images_kwargs": {"do_pan_and_scan": True}},
        {"processor_kwargs": {"images_kwargs": {"do_pan_and_scan": True}}},
    ],
)
def test_tiles_that_are_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(HighResInputError, match=r"do_pan_and_scan=True cuts images .*=False is set for you"):
        check_options(options, tiny_gemma3_processor().image_processor)
    check_options({"do_pan_and_scan": None, "images_kwargs": {"size": {}}}, tiny_gemma3_processor().image_processor)


def test_tiles_that_are_asked_for_in_a_conversation() -> None:
    processor = FlexProcessor(tiny_gemma3_processor(), 2)
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture(30, 90)}]}]
    with pytest.raises(HighResInputError, match="do_pan_and_scan=True"):
        processor.apply_chat_template(
            conversation, tokenize=True, processor_kwargs={"images_kwargs": {"do_pan_and_scan": True}}
        )


def test_first_crops_and_what_they_pool() -> None:
    """Two images in crops of four patches, pooled by two: the first in three crops, the second in two."""
    low_res = {
        "pixel_values": torch.arange(5.0).view(5, 1, 1).expand(5, 4, 2),
        "image_num_crops": torch.tensor([3, 2]),
        "image_grids": torch.tensor([[1, 2, 3, 4], [1, 2, 1, 3]]),
        "image_token_pooling": torch.tensor([[0, 1], [2, -1], *[[4, 5]] * 12, [12, 13], [14, -1], *[[16, 17]] * 3]),
    }
    keep_overviews(SimpleNamespace(), low_res)
    kept = low_res
    assert kept["pixel_values"][:, 0, 0].tolist() == [0.0, 3.0]
    assert kept["image_num_crops"].tolist() == [1, 1]
    assert kept["image_grids"].tolist() == [[1, 2, 0, 0], [1, 2, 0, 0]]
    assert kept["image_token_pooling"].tolist() == [[0, 1], [2, -1], [4, 5], [6, -1]]


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_one_tile_in_as_many_slots_as_the_model_has(return_tensors: str) -> None:
    tiny = PROCESSORS["mllama"]
    options = {"images": [[ramps(40, 70)], [ramps(60, 30)]], "text": ["<image> w5", "<image>"], "padding": True}
    options |= {"return_tensors": return_tensors}
    plain, inputs = tiny.build("pil")(**options, max_image_tiles=1), FlexProcessor(tiny.build("pil"), 2)(**options)
    assert inputs["pixel_values"].shape == (2, 1, 4, 3, 42, 42)
    assert (inputs["pixel_values"][:, :, :1] == plain["pixel_values"]).all()
    assert not inputs["pixel_values"][:, :, 1:].any()
    assert inputs["aspect_ratio_mask"].tolist() == [[[1, 0, 0, 0]]] * 2
    for name in ("aspect_ratio_ids", "cross_attention_mask", "input_ids"):
        assert (inputs[name] == plain[name]).all()


def test_the_overview_has_the_size_that_its_tokens_are_counted_by() -> None:
    """DeepSeek-OCR 2 would make it as small as a tile, where there are none."""
    tiny = dataclasses.replace(PROCESSORS["deepseek_ocr2"], images={"size": {"height": 64, "width": 64}})
    tiny.images["tile_size"] = 32
    processor = FlexProcessor(tiny.build("pil"), (2, 3))
    inputs = processor(images=ramps(100, 60), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs["hd_pixel_values"].shape == (1, 3, 128, 192)
    assert tokens(inputs) == 16 * 16 + 1
    assert "pixel_values_local" not in inputs
    size = {"height": 48, "width": 48}
    inputs = processor(images=ramps(100, 60), text="<image>", return_tensors="pt", size=size)
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)


@needs_idefics2
def test_a_processor_that_was_saved_with_splitting() -> None:
    """Idefics 2 counts what its image processor has been saved with, whatever it is told."""
    options = {"images": [ramps(40, 70)], "text": "<image> w5", "return_tensors": "pt"}
    tiny = PROCESSORS["idefics2"]
    splitting = tiny.build("pil")
    splitting.image_processor.do_image_splitting = True
    wrapped, plain = FlexProcessor(splitting, 2)(**options), tiny.build("pil")(**options)
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)
    assert splitting.image_processor.do_image_splitting


def test_pictures_in_the_size_of_the_tower_are_not_cut() -> None:
    step, image = SimpleNamespace(downsampler_stride=4, size={"height": 8, "width": 8}, resample=2), picture(20, 90)
    pixels = np.moveaxis(np.asarray(image), -1, 0)
    (shown,) = to_one_tile(step, [image], [pixels])
    assert shown.shape == (3, 8, 8)
    assert to_square(step, pixels, 3).shape == (3, 24, 24)
    images = [image]
    assert to_one_tile(SimpleNamespace(), images, [pixels]) is images


@pytest.mark.skipif(not PROCESSORS["step3p7"].runs_here(), reason="needs torchvision")
def test_step_shows_the_whole_of_a_long_picture() -> None:
    processor = FlexProcessor(PROCESSORS["step3p7"].build("torchvision"), 2)
    inputs = processor(images=ramps(20, 90), text="<im_patch>", return_tensors="pt")
    shrunk = torch.nn.functional.avg_pool2d(inputs["hd_pixel_values"], 2)
    torch.testing.assert_close(shrunk, inputs["pixel_values"], atol=0.15, rtol=0)


def test_what_turns_tiles_off() -> None:
    assert without_tiles(SimpleNamespace(max_patches=9, resize_to_max_canvas=False)) == {"max_patches": 1}
    assert without_tiles(SimpleNamespace(max_patches=9, merge_size=2)) == {}
    assert without_tiles(SimpleNamespace(overlap_margins=[4, 4], max_crops=8)) == {"max_crops": 1}
    assert without_tiles(SimpleNamespace(slice_mode=True)) == {"slice_mode": False}
