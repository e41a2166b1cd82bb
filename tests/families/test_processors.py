"""The processor of every model type, made to prepare both views."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from packaging import version
from PIL import Image
from torch import Tensor

import flexkit
from flexkit import FlexConfig, FlexProcessor, HighResInputError, UnsupportedModelError
from flexkit.patching import get_patch
from tests.processing.pictures import ramps
from tests.processors import PROCESSORS, TORCHVISION, TinyProcessor
from tests.zoo import ZOO

RUNNING = [(tiny, backend) for tiny in PROCESSORS.values() if tiny.model_type in ZOO for backend in tiny.runs_here()]
each = pytest.mark.parametrize(
    ("tiny", "backend"), RUNNING, ids=[f"{tiny.model_type}-{backend}" for tiny, backend in RUNNING]
)
REFUSED = [tiny for tiny in PROCESSORS.values() if tiny.refused]
PICTURES = (ramps(37, 61), ramps(80, 50))
STUBBORN = {"granite4_vision", "llava_next", "llava_next_video", "llava_onevision", "molmo2", "step3p7"}
"""Without an option that turns tiles off."""
SLOTTED = {"fuyu", "mllama"}
"""With other names for the pictures, or, Mllama, fewer slots for tiles than the model has when they are turned off."""


def call(processor: Any, tiny: TinyProcessor, pictures: Sequence[Image.Image] = PICTURES, **options: Any) -> Any:
    """A batch with one picture in each row, of texts that differ in length."""
    texts = [f"w5 {tiny.prompt} w7{' w8' * row}" for row in range(len(pictures))]
    images = [[picture] for picture in pictures] if tiny.nested else list(pictures)
    options = {"padding": True, "return_tensors": "pt", **tiny.call, **options}
    return processor(images=images, **tiny.given(texts), **options)


def values(views: dict[str, Tensor], name: str) -> Tensor:
    """All values of the pixels, without padding."""
    pixels = next(views[key] for key in (name, "image_patches", "pixel_values_images") if key in views)
    if name == "flattened_patches":
        pixels = pixels[pixels[..., 0] > 0][:, 2:]
    if pixels.ndim == 6:  # the first of the slots for tiles
        pixels = pixels[:, :, 0]
    if "image_position_ids" in views:
        pixels = pixels[(views["image_position_ids"] >= 0).all(-1)]
    if "spatial_shapes" in views:
        pixels = pixels[views["pixel_attention_mask"].bool()]
    return pixels.double().flatten()


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def same(value: Any, other: Any) -> bool:
    return torch.equal(value, other) if isinstance(value, Tensor) else value == other


def high_res(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("hd_"): value for name, value in inputs.items() if name.startswith("hd_")}


def for_the_model(inputs: dict[str, Any], model: Any, tiny: TinyProcessor) -> dict[str, Any]:
    """In float64; a decoder begins with what the processor calls labels, or with one token."""
    inputs = {key: value.double() if is_floating(value) else value for key, value in inputs.items()}
    labels = inputs.pop("labels", None)  # PaliGemma's processor gives some, here none that counts
    if ZOO[tiny.model_type].stream and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = torch.ones(len(PICTURES), 1, dtype=torch.long) if labels is None else labels
        if "input_ids" not in inspect.signature(model.forward).parameters:  # labels once more
            inputs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return inputs


def test_every_model_type_has_one() -> None:
    assert set(flexkit.supported_models()) <= set(PROCESSORS)


@pytest.mark.parametrize("tiny", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_what_a_processor_needs(tiny: TinyProcessor, fact: Any) -> None:
    needs = f"no: {tiny.refused}" if tiny.refused else "runs" if "pil" in tiny.backends else "needs torchvision"
    if tiny.model_type in flexkit.supported_models():
        fact(tiny.model_type, {"processor": needs})
    if version.parse(tf.__version__) < version.parse("5.23"):
        pytest.skip("earlier ones need torchvision for more, and do not know all types")
    assert tiny.has_classes("pil") or "pil" not in tiny.backends
    if (
        tiny.has_classes("pil") and "pil" not in tiny.backends and not TORCHVISION
    ):  # Fuyu's gives a tensor where arrays are expected
        with pytest.raises(TypeError, match="transpose"):
            call(tiny.build("pil"), tiny)


@pytest.mark.parametrize("tiny", REFUSED, ids=[tiny.model_type for tiny in REFUSED])
def test_a_processor_that_is_refused(tiny: TinyProcessor) -> None:
    with pytest.raises(UnsupportedModelError, match=tiny.refused):
        FlexProcessor(tiny.build("pil"), 2)


@each
def test_both_views_of_a_batch(tiny: TinyProcessor, backend: str) -> None:
    """The model takes them as they come, and reads what the high-res view shows."""
    model = tiny.model()
    flexkit.patch_model(model, FlexConfig(zoom=2, policy=flexkit.TopK(3)), trained=True)
    inputs = for_the_model(call(FlexProcessor(tiny.build(backend), model), tiny), model, tiny)
    assert set(high_res(inputs)) >= set(get_patch(model).geometry.inputs)
    generation = {"max_new_tokens": 2, "do_sample": False}
    with torch.no_grad():
        both = model(**inputs).logits
        with flexkit.disabled(model):
            low, plain = model(**inputs).logits, model.generate(**inputs, **generation)
    assert not torch.allclose(both[:, -1], low[:, -1])
    assert model.generate(**inputs, **generation).shape == plain.shape


@each
@pytest.mark.parametrize("zoom", [(1, 1), (2, 3)])
def test_shows_the_same_region(tiny: TinyProcessor, backend: str, zoom: tuple[int, int]) -> None:
    """On a picture of ramps, values tell places: as many of each are in both views."""
    inputs = call(FlexProcessor(tiny.build(backend), zoom), tiny, PICTURES[:1])
    views = high_res(inputs)
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)[2:-2]
    for name in [name for name in views if "pixel_values" in name or name == "flattened_patches"]:
        low, high = values(inputs, name), values(views, name)
        assert len(high) == zoom[0] * zoom[1] * len(low)
        spread = low.max() - low.min()
        torch.testing.assert_close(high.quantile(levels), low.quantile(levels), atol=float(0.05 * spread), rtol=0)


@each
def test_low_res_inputs_are_those_of_the_wrapped_processor(tiny: TinyProcessor, backend: str) -> None:
    if tiny.model_type in STUBBORN | SLOTTED:
        pytest.skip("its processor has no option that turns tiles off")
    plain = call(tiny.build(backend), tiny, images_kwargs=tiny.overview)
    inputs = call(FlexProcessor(tiny.build(backend), 2), tiny)
    low = {name: value for name, value in inputs.items() if not name.startswith("hd_")}
    assert low.keys() == plain.keys()
    assert all(same(low[name], plain[name]) for name in low)


@each
def test_text_without_images(tiny: TinyProcessor, backend: str) -> None:
    processor = tiny.build(backend)
    options = {**tiny.given(["w5 w6"]), "return_tensors": "pt", **tiny.call}
    try:
        plain = processor(**options)
    except (TypeError, ValueError) as error:
        pytest.skip(f"it asks for images: {error}")
    assert set(FlexProcessor(processor, 2)(**options)) == set(plain)


CUTTING = [(tiny, backend) for tiny, backend in RUNNING if tiny.overview]


@pytest.mark.parametrize(
    ("tiny", "backend"), CUTTING, ids=[f"{tiny.model_type}-{backend}" for tiny, backend in CUTTING]
)
def test_tiles_that_are_asked_for(tiny: TinyProcessor, backend: str) -> None:
    ((name, value),) = tiny.overview.items()
    other = {False: True, 1: 4, "vanilla": "thumb+tile"}[value]
    processor = FlexProcessor(tiny.build(backend), 2)
    for options in ({name: other}, {"images_kwargs": {name: other}}):
        with pytest.raises(HighResInputError, match=re.escape(f"{name}={other!r} cuts images")):
            call(processor, tiny, **options)
    assert "hd_pixel_values" in call(processor, tiny, images_kwargs={name: value})
