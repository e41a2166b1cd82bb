from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers import Glm4vImageProcessorPil, Qwen2VLImageProcessorPil, VideoLlama3ImageProcessorPil

from flexkit.errors import HighResInputError, UnsupportedModelError
from flexkit.processing import FlexProcessor
from flexkit.processing.views.grid import _as_it_is, grid_view
from tests.processing.pictures import ZOOMS, image_prompt, noise, picture
from tests.processors import PROCESSORS
from tests.tiny_processors import tiny_qwen_processor

SIDES = st.integers(4, 200)


def both_views(processor: Any, images: list[Any], zoom: int | tuple[int, int], **kwargs: Any) -> Any:
    text = " ".join([image_prompt("qwen")] * len(images))
    return FlexProcessor(processor, zoom)(images=images, text=text, return_tensors="pt", **kwargs)


def unpatchified(patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    _, rows, columns = grid.tolist()
    return rearrange(
        patches,
        "(gh gw mh mw) (c t ph pw) -> t c (gh mh ph) (gw mw pw)",
        gh=rows // 2, gw=columns // 2, mh=2, mw=2, t=2, ph=14, pw=14,
    )  # fmt: skip


@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3), zoom=ZOOMS)
def test_grids_are_zoom_times_the_low_res_ones(sizes: list[tuple[int, int]], zoom: tuple[int, int]) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    inputs = both_views(tiny_qwen_processor(), images, zoom)
    assert torch.equal(inputs["hd_image_grid_thw"], inputs["image_grid_thw"] * torch.tensor([1, *zoom]))
    assert len(inputs["hd_pixel_values"]) == inputs["hd_image_grid_thw"].prod(-1).sum()
    assert inputs["hd_pixel_values"].shape[1:] == inputs["pixel_values"].shape[1:]
    assert inputs["hd_pixel_values"].dtype == inputs["pixel_values"].dtype
    assert inputs["hd_image_grid_thw"].dtype == torch.int64


@given(height=SIDES, width=SIDES)
def test_zoom_one_is_the_low_res_view(height: int, width: int) -> None:
    inputs = both_views(tiny_qwen_processor(), [picture(height, width)], 1)
    assert torch.equal(inputs["hd_pixel_values"], inputs["pixel_values"])


@given(height=SIDES, width=SIDES, zoom=ZOOMS)
def test_shows_the_original_resized_at_once(height: int, width: int, zoom: tuple[int, int]) -> None:
    assume(max(height, width) < 6 * min(height, width))
    image = picture(height, width)
    processor = tiny_qwen_processor()
    inputs = both_views(processor, [image], zoom)
    grid = inputs["hd_image_grid_thw"][0]
    size = (14 * int(grid[2]), 14 * int(grid[1]))
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    expected = torch.from_numpy((resized - mean) / std).permute(2, 0, 1).float()
    for frame in unpatchified(inputs["hd_pixel_values"], grid):
        torch.testing.assert_close(frame, expected, atol=1e-5, rtol=0)


def test_resample_of_a_call_counts() -> None:
    nearest = both_views(tiny_qwen_processor(), [picture(40, 40)], 2, images_kwargs={"resample": 0})
    default = both_views(tiny_qwen_processor(), [picture(40, 40)], 2)
    assert len(nearest["hd_pixel_values"].unique()) < len(default["hd_pixel_values"].unique())


def test_a_resample_that_pil_does_not_know() -> None:
    image_processor = Qwen2VLImageProcessorPil()
    image_processor.resample = "bicubic"
    image, options = noise(60, 60).transpose(2, 0, 1), {"input_data_format": "channels_first"}
    high_res = grid_view(image_processor, [image], image_processor.preprocess([image]), options, (2, 2))
    assert high_res["hd_image_grid_thw"].tolist() == [[1, 8, 8]]


KINDS = [Glm4vImageProcessorPil, Qwen2VLImageProcessorPil, VideoLlama3ImageProcessorPil]


@pytest.mark.parametrize("kind", KINDS)
def test_names_follow_the_image_processor(kind: Any) -> None:
    image_processor = kind()
    image = noise(60, 90).transpose(2, 0, 1)
    options = {"return_tensors": "pt", "input_data_format": "channels_first"}
    low_res = image_processor.preprocess([image], **options)
    high_res = grid_view(image_processor, [image], low_res, options, (1, 1))
    assert set(high_res) == {f"hd_{name}" for name in low_res}
    assert all(torch.equal(high_res[f"hd_{name}"], low_res[name]) for name in low_res)


OTHERS = {
    "glm4v": "image_grid_thw",
    "glm5_next": "image_grid_thw",
    "hunyuan_vl": "image_grid_thw",
    "emu3": "image_sizes",
    "lighton_ocr": "image_sizes",
    "minicpmv4_6": "target_sizes",
    "gemma4": "image_position_ids",
}


@pytest.mark.parametrize("name", [name for name in OTHERS if "pil" in PROCESSORS[name].runs_here()])
@given(sizes=st.lists(st.tuples(st.integers(20, 120), st.integers(20, 120)), min_size=1, max_size=2), zoom=ZOOMS)
def test_however_sizes_are_told(name: str, sizes: list[tuple[int, int]], zoom: tuple[int, int]) -> None:
    tiny = PROCESSORS[name]
    text, images = " w5 ".join([tiny.prompt] * len(sizes)), [[picture(*size) for size in sizes]]
    inputs = FlexProcessor(tiny.build("pil"), zoom)(images=images, text=text, return_tensors="pt", **tiny.call)
    low, high = ((inputs[prefix + OTHERS[name]]) for prefix in ("", "hd_"))
    if name == "gemma4":  # (column, row) of every patch, and -1 for padding
        low, high = (places.amax(1).flip(-1) + 1 for places in (low, high))
    assert torch.equal(high[:, -2:], low[:, -2:] * torch.tensor(zoom))
    assert inputs["hd_pixel_values"].dtype == inputs["pixel_values"].dtype


@pytest.mark.skipif("pil" not in PROCESSORS["emu3"].runs_here(), reason="this transformers has no such processor")
def test_rows_that_are_taken_for_channels() -> None:
    """Its image processor tells channels by their number, and three rows are as many."""
    tiny = PROCESSORS["emu3"]
    with pytest.raises(HighResInputError, match=r"takes the rows of images of \[\(3, 40\)\] pixels for their channels"):
        FlexProcessor(tiny.build("pil"), 2)(images=picture(3, 40), text=tiny.prompt, return_tensors="pt", **tiny.call)


class Stubborn(Qwen2VLImageProcessorPil):
    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        return super().preprocess(images, **{**kwargs, "do_resize": True})


def test_an_image_processor_that_always_resizes_is_refused() -> None:
    image_processor = Stubborn(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    image, options = noise(60, 60).transpose(2, 0, 1), {"input_data_format": "channels_first"}
    with pytest.raises(UnsupportedModelError, match=r"\[\(4, 4\)\], where zoom .* asks for \[\(8, 8\)\]"):
        grid_view(image_processor, [image], image_processor.preprocess([image], **options), options, (2, 2))


def test_budgets_that_leave_a_picture_as_it_is() -> None:
    """For image processors that resize to a number of tokens or patches, whatever they are told."""
    lfm = _as_it_is((64, 96), {"encoder_patch_size": 4, "downsample_factor": 2})
    assert lfm["min_image_tokens"] == lfm["max_image_tokens"] == 8 * 12
    nemotron = _as_it_is((64, 96), {"patch_size": 4, "min_num_patches": 1})
    assert nemotron["min_num_patches"] == nemotron["max_num_patches"] == 16 * 24
