import copy
import gc
import json
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil

from flexkit import FlexConfig, PictureSource
from flexkit.errors import ConfigError, PatchError, UnsupportedModelError
from flexkit.processing import FlexProcessor, SmallImageWarning
from tests.processing.pictures import PROCESSORS, image_prompt, picture
from tests.tiny_processors import tiny_llava_processor, tiny_tokenizer

NAMES = sorted(PROCESSORS)
IMAGE_TOKEN = 300


class Embedding(CLIPImageProcessorPil):
    model_input_names: ClassVar = ["mask", "image_embeds"]


class Patched(nn.Module):
    def __init__(self, zoom: tuple[int, int] | None) -> None:
        super().__init__()
        self.zoom = zoom


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_patch(model: Patched) -> Any:
        if model.zoom is None:
            raise PatchError("not patched")
        return SimpleNamespace(config=FlexConfig(zoom=model.zoom))

    monkeypatch.setattr("flexkit.processing.processor.get_patch", get_patch)


def conversation(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": picture(*size, seed)} for seed, size in enumerate(sizes)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "w7 w8"}]}]


def low_res_tokens(name: str, inputs: Any) -> int:
    if name == "qwen":
        return int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    return 4 * len(inputs["pixel_values"])


def assert_adds_only(inputs: Any, plain: Any) -> None:
    assert {name for name in inputs if not name.startswith("hd_")} == set(plain)
    assert all(torch.equal(inputs[name], plain[name]) for name in plain)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@given(counts=st.lists(st.integers(0, 2), min_size=1, max_size=3), zoom=st.integers(1, 2))
def test_low_res_inputs_stay(name: str, padding_side: str, counts: list[int], zoom: int) -> None:
    assume(any(counts))
    images = [[picture(20 + 30 * row, 70, seed) for seed in range(count)] for row, count in enumerate(counts)]
    text = ["w4 " * row + (image_prompt(name) + " ") * count + "w5" for row, count in enumerate(counts)]
    processor = PROCESSORS[name]()
    processor.tokenizer.padding_side = padding_side
    plain = processor(images=images, text=text, padding=True, return_tensors="pt")
    inputs = FlexProcessor(processor, zoom)(images=images, text=text, padding=True, return_tensors="pt")
    assert type(inputs) is type(plain)
    assert_adds_only(inputs, plain)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == low_res_tokens(name, inputs)
    per_image = inputs["hd_image_grid_thw" if name == "qwen" else "hd_pixel_values"]
    assert len(per_image) == sum(counts)


@pytest.mark.parametrize("name", NAMES)
def test_images_stay_in_order(name: str) -> None:
    processor = FlexProcessor(PROCESSORS[name](), 2)
    images, prompt = [picture(60, 60, seed) for seed in range(3)], image_prompt(name)
    together = processor(images=[images[:1], images[1:]], text=[prompt, f"{prompt} {prompt}"], padding=True)
    alone = [processor(images=image, text=prompt)["hd_pixel_values"] for image in images]
    assert np.array_equal(np.concatenate(alone), np.asarray(together["hd_pixel_values"]))


@pytest.mark.parametrize("name", NAMES)
def test_text_without_images(name: str) -> None:
    processor = PROCESSORS[name]()
    inputs = FlexProcessor(processor, 2)(text=["w5 w6"], return_tensors="pt")
    assert set(inputs) == set(processor(text=["w5 w6"], return_tensors="pt"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_high_res_inputs_have_the_type_of_low_res_ones(name: str, return_tensors: str | None) -> None:
    processor = FlexProcessor(PROCESSORS[name](), 2)
    inputs = processor(images=picture(30, 40), text=image_prompt(name), return_tensors=return_tensors)
    assert type(inputs["hd_pixel_values"]) is type(inputs["pixel_values"])
    assert type(inputs["hd_pixel_values"][0]) is type(inputs["pixel_values"][0])


def test_tensors_asked_for_text_alone_are_tensors_for_images_too() -> None:
    processor = FlexProcessor(tiny_llava_processor(pad=True), 2)
    inputs = processor(images=picture(30, 40), text="<image>", text_kwargs={"return_tensors": "pt"})
    assert torch.is_tensor(inputs["pixel_values"])
    assert torch.is_tensor(inputs["hd_pixel_values"])
    assert torch.equal(inputs["hd_image_sizes"], torch.tensor([[30, 40]]))


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_gives_both_views(name: str) -> None:
    processor = PROCESSORS[name]()
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = FlexProcessor(processor, 2).apply_chat_template(conversation((30, 50), (60, 40)), **asked)
    assert_adds_only(inputs, processor.apply_chat_template(conversation((30, 50), (60, 40)), **asked))
    called = FlexProcessor(processor, 2)(
        images=[picture(30, 50, 0), picture(60, 40, 1)],
        text=image_prompt(name) + image_prompt(name),
        return_tensors="pt",
    )
    high_res = {name for name in called if name.startswith("hd_")}
    assert high_res == {name for name in inputs if name.startswith("hd_")}
    assert all(torch.equal(inputs[name], called[name]) for name in high_res)


def test_chat_template_of_a_batch() -> None:
    batch = [conversation((30, 50)), conversation(), conversation((20, 20), (40, 20))]
    inputs = FlexProcessor(tiny_llava_processor(), 2).apply_chat_template(
        batch, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    assert len(inputs["input_ids"]) == len(batch)
    assert len(inputs["hd_pixel_values"]) == 3


def test_chat_template_without_a_dict() -> None:
    processor = tiny_llava_processor()
    wrapped = FlexProcessor(processor, 2)
    for asked in ({"tokenize": False}, {"tokenize": True}):
        plain = processor.apply_chat_template(conversation((30, 50)), **asked)
        assert wrapped.apply_chat_template(conversation((30, 50)), **asked) == plain


def test_everything_else_is_the_wrapped_processors(tmp_path: Path) -> None:
    processor = tiny_llava_processor()
    wrapped = FlexProcessor(processor, 2)
    assert wrapped.batch_decode([[5, 6, 2]], skip_special_tokens=True) == ["w5 w6"]
    assert wrapped.tokenizer is processor.tokenizer
    wrapped.patch_size = 7
    assert processor.patch_size == 7
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapped.no_such_thing
    folders = tmp_path / "plain", tmp_path / "wrapped"
    processor.save_pretrained(folders[0])
    wrapped.save_pretrained(folders[1])
    plain, saved = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert saved.pop("processing_flexkit.py")
    settings, base = (json.loads(files.pop("processor_config.json")) for files in (saved, plain))
    assert plain and plain == saved
    code = {"AutoProcessor": "processing_flexkit.FlexProcessor"}
    assert settings == base | {"auto_map": code, "high_res": {"zoom": [2, 2], "levels": 1}}
    assert repr(wrapped) == "FlexProcessor(LlavaProcessor, zoom=(2, 2))"


def test_the_wrapped_processor_stays_as_it_is() -> None:
    processor = tiny_llava_processor()
    before, image_processor = dict(vars(processor)), dict(vars(processor.image_processor))
    FlexProcessor(processor, 2)(images=picture(30, 50), text="<image>")
    assert vars(processor) == before
    assert vars(processor.image_processor) == image_processor


def test_calls_from_threads_do_not_meet() -> None:
    processor = FlexProcessor(tiny_llava_processor(pad=True), 2)
    images = [picture(20 + n, 50, n) for n in range(16)]

    def process(image: Any) -> Any:
        return processor(images=image, text="<image>", return_tensors="pt")

    with ThreadPoolExecutor(4) as threads:
        threaded = list(threads.map(process, images))
    for inputs, image in zip(threaded, images, strict=True):
        alone = process(image)
        assert all(torch.equal(inputs[name], alone[name]) for name in alone)


def test_one_image_that_is_not_loaded_yet_is_read_by_threads(tmp_path: Path) -> None:
    picture(700, 600).save(tmp_path / "picture.png")
    processor = FlexProcessor(PROCESSORS["llava"](), 2)
    for _ in range(3):
        image, start = Image.open(tmp_path / "picture.png"), threading.Barrier(6)

        def read(shown: bool, image: Image.Image = image, start: threading.Barrier = start) -> torch.Tensor:
            start.wait()
            if shown:
                return torch.as_tensor(np.asarray(processor.shown(image)))
            return processor(images=image, text="<image>", return_tensors="pt")["hd_pixel_values"]

        with ThreadPoolExecutor(6) as pool:
            read_by = [future.result() for future in [pool.submit(read, index % 2 == 0) for index in range(6)]]
        assert all(torch.equal(each, read_by[index % 2]) for index, each in enumerate(read_by))
        assert np.array_equal(read_by[0], np.asarray(processor.shown(picture(700, 600))))


def test_zoom_comes_from_the_model_at_every_call() -> None:
    model = Patched((2, 3))
    processor = FlexProcessor(tiny_llava_processor(), model)
    for zoom in ((2, 3), (1, 2)):
        model.zoom = zoom
        assert processor.zoom == zoom
        inputs = processor(images=picture(30, 50), text="<image>", return_tensors="pt")
        assert inputs["hd_pixel_values"].shape[-2:] == (28 * zoom[0], 28 * zoom[1])


def test_a_model_that_is_not_patched_is_refused() -> None:
    with pytest.raises(PatchError, match="patch it again, or use the plain processor"):
        FlexProcessor(tiny_llava_processor(), Patched(None))


def test_a_model_that_was_unpatched_is_told() -> None:
    model = Patched((2, 2))
    processor = FlexProcessor(tiny_llava_processor(), model)
    model.zoom = None
    for call in (
        lambda: processor(images=picture(30, 50), text="<image>"),
        lambda: processor(text="w5"),
        lambda: processor.apply_chat_template(conversation((30, 50)), tokenize=True),
    ):
        with pytest.raises(PatchError, match="patch it again, or use the plain processor"):
            call()


def test_the_model_is_not_kept_alive() -> None:
    model = Patched((2, 2))
    processor = FlexProcessor(tiny_llava_processor(), model)
    del model
    gc.collect()
    with pytest.raises(PatchError, match="no longer exists"):
        processor(text="w5")
    assert repr(processor) == "FlexProcessor(LlavaProcessor, zoom=unknown)"


@pytest.mark.parametrize("zoom", [0, -1, (2,), (2, 0), 1.5])
def test_bad_zooms(zoom: Any) -> None:
    with pytest.raises(ConfigError, match="zoom"):
        FlexProcessor(tiny_llava_processor(), zoom)


@pytest.mark.parametrize("duplicate", [lambda p: pickle.loads(pickle.dumps(p)), copy.copy, copy.deepcopy])
def test_copies_carry_the_zoom_instead_of_the_model(duplicate: Any) -> None:
    model = Patched((2, 3))
    processor = FlexProcessor(tiny_llava_processor(), model)
    twin = duplicate(processor)
    model.zoom = None
    assert twin.zoom == (2, 3)
    assert len(twin(images=picture(30, 50), text="<image>")["hd_pixel_values"]) == 1


def test_processors_without_a_second_view() -> None:
    with pytest.raises(UnsupportedModelError, match="has no image processor"):
        FlexProcessor(tiny_tokenizer({"image_token": ("<image>", 300)}), 2)
    processor = tiny_llava_processor()
    processor.image_processor = Embedding()
    with pytest.raises(UnsupportedModelError, match="makes image_embeds, mask"):
        FlexProcessor(processor, 2)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_enlarged_is_told_once(name: str) -> None:
    processor = FlexProcessor(PROCESSORS[name](), 2)
    call = {"text": image_prompt(name), "return_tensors": "pt"}
    with warnings.catch_warnings(action="error"):
        processor(images=picture(300, 400), **call)
    with pytest.warns(SmallImageWarning, match=r"40 x 40 pixels is enlarged.*original size") as told:
        for side in (40, 40, 30):
            processor(images=picture(side, side), **call)
    assert len([each for each in told if each.category is SmallImageWarning]) == 1


def test_tiles_of_an_image_that_is_enlarged_are_told_too() -> None:
    processor = FlexProcessor(PROCESSORS["llava"](), 2)
    with pytest.warns(SmallImageWarning, match=r"40 x 30 pixels is enlarged to a high-res view of 56 x 56"):
        processor(images=PictureSource(picture(40, 30)), text="<image>", return_tensors="pt")


def test_a_processor_of_a_processor_is_refused() -> None:
    processor = FlexProcessor(PROCESSORS["llava"](), 2)
    with pytest.raises(ConfigError, match=r"high-res view of a high-res view: give.*\.processor"):
        FlexProcessor(processor, 2)
