"""Whatever a video is like, it goes through a patched model, or is refused in flexkit's words."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import flexkit
from flexkit import FlexConfig, FlexProcessor, FrameArray, HighResInputError, UnsupportedModelError
from tests.processing.test_videos import qwen
from tests.processors import TORCHVISION
from tests.tiny_processors import tiny_llava_processor, tiny_onevision_processor
from tests.zoo import IMAGE, VIDEO, VOCABULARY, ZOO

TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vocab_size": VOCABULARY}
BUILT: dict[str, tuple[str, Callable[[], Any]]] = {
    "by torch": ("llava_onevision", lambda: tiny_onevision_processor(**TOKENS)),
    "by torchvision": (
        "llava_onevision",
        lambda: tiny_onevision_processor(tf.LlavaOnevisionVideoProcessor(size={"height": 42, "width": 42}), **TOKENS),
    ),
    "qwen2_5_vl": ("qwen2_5_vl", qwen),
}
SAMPLING: dict[str, dict[str, Any]] = {
    "all": {"do_sample_frames": False},
    "two": {"do_sample_frames": True, "num_frames": 2, "fps": None},
    "five": {"do_sample_frames": True, "num_frames": 5, "fps": None},
    "by time": {"do_sample_frames": True, "fps": 2.5, "num_frames": None},
}


each = pytest.mark.parametrize("name", [name for name in BUILT if TORCHVISION or name == "by torch"])


@cache
def built(name: str, zoom: tuple[int, int, int]) -> tuple[Any, FlexProcessor]:
    kind, processor = BUILT[name]
    config = FlexConfig(zoom=zoom, policy=flexkit.TopK(2), start_layer=0, select_from="same")
    model = flexkit.patch_model(ZOO[kind].model().float(), config, trained=True)
    return model, FlexProcessor(processor(), model)


@pytest.mark.filterwarnings("ignore")
@each
@given(
    frames=st.integers(1, 7),
    height=st.integers(1, 60),
    width=st.integers(1, 400),
    sampling=st.sampled_from(list(SAMPLING)),
    zoom=st.sampled_from([(1, 2, 2), (2, 1, 1), (3, 2, 1)]),
    lazily=st.booleans(),
)
@example(frames=1, height=1, width=1, sampling="all", zoom=(1, 2, 2), lazily=True)
@example(frames=1, height=41, width=67, sampling="by time", zoom=(3, 2, 1), lazily=True)
@example(frames=3, height=2, width=399, sampling="two", zoom=(2, 1, 1), lazily=True)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_video(
    name: str, frames: int, height: int, width: int, sampling: str, zoom: tuple[int, int, int], lazily: bool
) -> None:
    model, processor = built(name, zoom)
    array = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    clip = FrameArray(array, fps=5)
    known = {"video_metadata": [{"total_num_frames": frames, "fps": 5.0, "duration": frames / 5}]}
    videos: dict[str, Any] = {"videos": [clip]} if lazily else {"videos": [array], **known}
    try:
        inputs = processor(text="w5 <video> w6", **videos, **SAMPLING[sampling], return_tensors="pt")
        with torch.no_grad(), flexkit.trace(model) as trace:
            found = model(**inputs).logits
    except HighResInputError:
        return
    assert bool(found.isfinite().all())
    if lazily:
        shown = processor.shown(clip, **SAMPLING[sampling])
        assert len(shown) == len(trace.scores(0, trace.layers[0])[0])
        assert {picture.size for picture in shown} == {(width, height)}  # nothing is cut off


@each
def test_one_frame(name: str) -> None:
    """Taken as it is, it is read; chosen by time, it may be too little for who merges two."""
    model, processor = built(name, (1, 2, 2))
    clip = FrameArray(np.full((1, 90, 120, 3), 99, np.uint8), fps=5)
    inputs = processor(text="w5 <video> w6", videos=[clip], do_sample_frames=False, return_tensors="pt")
    with torch.no_grad(), flexkit.trace(model) as trace:
        model(**inputs)
    assert trace.scores(0, trace.layers[0]).shape[1] == 1
    with pytest.raises(
        HighResInputError, match=r"cannot choose from 1 frames by \{'num_frames': 5, .*do_sample_frames"
    ):
        processor(text="<video>", videos=[clip], **SAMPLING["five"])


@each
@pytest.mark.parametrize(
    ("video", "told"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "has no frames"),
        (np.zeros((4, 40, 40), np.uint8), r"makes nothing of these videos: .* Expected arrays of uint8"),
        ("none.mp4", r"makes nothing of these videos: .* flexkit\.open_video"),
    ],
    ids=["empty", "grey", "a path"],
)
def test_what_is_no_video(name: str, video: Any, told: str) -> None:
    _, processor = built(name, (1, 2, 2))
    with pytest.raises(HighResInputError, match=told):
        processor(text="w5 <video> w6", videos=[video], do_sample_frames=False, return_tensors="pt")


@pytest.mark.skipif(not TORCHVISION, reason="video processors need torchvision")
def test_what_is_too_thin() -> None:
    _, processor = built("qwen2_5_vl", (1, 2, 2))
    with pytest.raises(HighResInputError, match="aspect ratio must be smaller than 200"):
        processor(text="<video>", videos=[FrameArray(np.zeros((2, 2, 900, 3), np.uint8), 1)], do_sample_frames=False)


@pytest.mark.skipif(not TORCHVISION, reason="video processors need torchvision")
@pytest.mark.parametrize("kind", ["LlavaNextVideoVideoProcessor", "VideoLlavaVideoProcessor"])
def test_what_is_cropped_is_not_shown(kind: str) -> None:
    """Of frames that are longer than high, the square in their middle."""
    own = getattr(tf, kind)(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    processor = FlexProcessor(tiny_onevision_processor(own, **TOKENS), 2)
    array = np.zeros((3, 60, 140, 3), np.uint8)
    array[:, :, 40:100] = np.array([50, 100, 150])[:, None, None, None]
    shown = processor.shown(FrameArray(array, 5), do_sample_frames=True, num_frames=2)
    assert [picture.size for picture in shown] == [(60, 60)] * 2
    assert [int(np.asarray(picture).min()) for picture in shown] == [50, 100]


def test_more_tokens_than_positions() -> None:
    """Rotary positions go on behind those that a model was trained for: it answers as the base model does there."""
    model = ZOO["llava_onevision"].model().float()
    model.config.text_config.max_position_embeddings = 32
    flexkit.patch_model(model, FlexConfig(zoom=2, policy=flexkit.Everything()), trained=True)
    processor = FlexProcessor(tiny_onevision_processor(**TOKENS), model)
    clip = FrameArray(np.random.default_rng(0).integers(0, 256, (20, 90, 90, 3), dtype=np.uint8), 5)
    inputs = processor(text="w5 <video> w6", videos=[clip], do_sample_frames=False, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 80
    with torch.no_grad():
        found = model(**inputs).logits
        with flexkit.using_policy(model, flexkit.Nothing()):
            nothing = model(**inputs).logits
        with flexkit.disabled(model):
            base = model(**inputs).logits
    assert torch.equal(nothing, base) and bool(found.isfinite().all()) and not torch.allclose(found, base)


def test_no_video_processor() -> None:
    processor = FlexProcessor(tiny_llava_processor(), 2)
    with pytest.raises(UnsupportedModelError, match=r"LlavaProcessor has no video processor; .* need torchvision"):
        processor.shown(FrameArray(np.zeros((2, 8, 8, 3), np.uint8), 1))
