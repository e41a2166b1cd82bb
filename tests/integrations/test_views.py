from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexkit
from flexkit.errors import ConfigError, UnsupportedModelError
from flexkit.integrations.views import VIEWS, Viewer, limit_pixels
from flexkit.visual_search import draw_scene, load_model
from flexkit.visual_search.data import overview_and_tiles
from tests.processors import PROCESSORS

ZOOM = 2
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8))


def about(picture: Image.Image, text: str = "w7") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def view(name: str, kind: str) -> Any:
    return Viewer(PROCESSORS[name].build("pil"), kind, ZOOM)([about(PICTURE)])


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3", "qwen2_vl", "lighton_ocr"])
def test_low_and_flexkit_show_the_same_but_for_the_high_res_view(name: str) -> None:
    low, both = view(name, "low"), view(name, "flexkit")
    added = both.keys() - low.keys()
    assert added and all(key.startswith("hd_") for key in added)
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(both[key])) for key, value in low.items())


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "internvl", "deepseek_ocr2"])
def test_all_is_what_the_processor_makes_of_large_pictures(name: str) -> None:
    tiny = PROCESSORS[name]
    plain = tiny.build("pil")(images=[[PICTURE]], text=[f"{tiny.prompt} w7"], return_tensors="pt")
    assert torch.equal(view(name, "all")["pixel_values"], plain["pixel_values"])
    assert torch.equal(view(name, "all")["input_ids"], plain["input_ids"])
    assert view(name, "low")["input_ids"].shape[1] < plain["input_ids"].shape[1]


def test_all_of_a_tower_of_one_size_is_the_picture_and_its_tiles() -> None:
    model, processor = load_model("in_sequence")
    image, question = draw_scene(3).image, "Which digit is on the object that is yellow?"
    expected = processor(images=overview_and_tiles(image), return_tensors="pt")["pixel_values"]
    inputs = Viewer(processor, "all", 3)([about(image, question)])
    assert torch.equal(inputs["pixel_values"], expected)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 10 * 64


def test_tiles_cover_what_is_shown_of_a_picture() -> None:
    processor = PROCESSORS["llava"].build("pil")
    inputs = Viewer(processor, "all", (1, 3))([about(PICTURE)])
    shown = flexkit.FlexProcessor(processor, (1, 3)).shown(PICTURE)
    width = shown.width / 3
    boxes = [(round(column * width), 0, round((column + 1) * width), shown.height) for column in range(3)]
    tiles = processor.image_processor([PICTURE, *(shown.crop(box) for box in boxes)], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], tiles["pixel_values"])


@pytest.mark.parametrize(("name", "sizes"), [("qwen2_vl", "image_grid_thw"), ("lighton_ocr", "image_sizes")])
def test_pictures_of_any_size_become_larger(name: str, sizes: str) -> None:
    low, all_ = (torch.as_tensor(view(name, kind)[sizes])[0, -2:] for kind in ("low", "all"))
    # Each side is that many times as long, but for rounding to whole cells: a cell of the low-res view, and one more.
    assert ((all_ / low).round(decimals=1) > 1).all() and (all_ <= ZOOM * (low + 4)).all()
    assert view(name, "all")["input_ids"].shape > view(name, "low")["input_ids"].shape


def test_the_bound_of_the_low_res_view() -> None:
    processor = PROCESSORS["qwen2_vl"].build("pil")
    image_processor = processor.image_processor
    before = Viewer(processor, "low")([about(PICTURE)])["image_grid_thw"].prod()
    limit_pixels(image_processor, image_processor.size["longest_edge"] // 4)
    assert Viewer(processor, "low")([about(PICTURE)])["image_grid_thw"].prod() < before
    with pytest.raises(UnsupportedModelError, match="has sizes of its own"):
        limit_pixels(PROCESSORS["llava"].build("pil").image_processor, 100)


def test_a_batch_is_padded() -> None:
    _, processor = load_model()
    asked = ["Which digit is on the object that is red?", "In which row is the object that is red?"]
    inputs = Viewer(processor.processor, "flexkit", 3)(
        [about(draw_scene(index).image, asked[index]) for index in (0, 1)]
    )
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape and len(inputs["hd_pixel_values"]) == 2


def test_what_cannot_be_shown() -> None:
    with pytest.raises(ConfigError, match="view is one of low, flexkit, all, got 'high'"):
        Viewer(PROCESSORS["llava"].build("pil"), "high")
    with pytest.raises(
        ConfigError, match="not patched has no zoom: patch it, which a preset does, or look at the view low"
    ):
        Viewer(PROCESSORS["llava"].build("pil"), "flexkit")
    with pytest.raises(ConfigError, match="which a preset does, or give a zoom"):
        Viewer(PROCESSORS["llava"].build("pil"), "all")
    for name in ("gemma4", "idefics2"):
        with pytest.raises(UnsupportedModelError, match="not known to show larger pictures"):
            Viewer(PROCESSORS[name].build("pil"), "all", ZOOM)
    assert VIEWS == ("low", "flexkit", "all")
