"""Both views of videos, by the video processors of transformers, which need torchvision."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexkit
from flexkit import FlexConfig, FlexProcessor, FrameArray, HighResInputError, TopK, UnsupportedModelError
from flexkit.patching import get_patch
from flexkit.processing.views.videos import frames_between, in_both_views
from tests.processing.pictures import picture
from tests.processors import TORCHVISION
from tests.tiny_processors import CHAT_TEMPLATE, tiny_llava_processor, tiny_tokenizer
from tests.zoo import END, IMAGE, START, VIDEO, VIDEOS, VOCABULARY, ZOO

_SIZES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84 * 8}, "patch_size": 14, "merge_size": 2}
_QWEN3 = {"size": {"shortest_edge": 64 * 64, "longest_edge": 96 * 96 * 8}, "patch_size": 16, "merge_size": 2}
_CROPPED = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLVideoProcessor", _SIZES),
    "qwen3_vl": ("Qwen3VLVideoProcessor", _QWEN3),
    "cohere_compass": ("CohereCompassVideoProcessor", _QWEN3),
    "cosmos3_edge": ("Cosmos3EdgeVideoProcessor", _QWEN3),
    "glm4v": ("Glm4vVideoProcessor", _SIZES),
    "glm46v": ("Glm46VVideoProcessor", _SIZES),
    "glmga": ("GlmgaVideoProcessor", _SIZES),
    "glm5_next": ("Glm5NextVideoProcessor", _SIZES),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeVideoProcessor", {**_SIZES, "draw_on_frames": False}),
    "minimax_m3_vl": ("MiniMaxM3VLVideoProcessor", _SIZES),
    "muse_glimmer": ("MuseGlimmerVideoProcessor", _SIZES),
    "video_llama_3": (
        "VideoLlama3VideoProcessor",
        {"min_pixels": 56 * 56, "max_pixels": 84 * 84 * 8, "patch_size": 14},
    ),
    "llava_onevision": ("LlavaOnevisionVideoProcessor", {"size": {"height": 42, "width": 42}}),
    "llava_next_video": ("LlavaNextVideoVideoProcessor", _CROPPED),
    "video_llava": ("VideoLlavaVideoProcessor", _CROPPED),
    "gemma4": ("Gemma4VideoProcessor", {"patch_size": 4, "pooling_kernel_size": 2}),
}
"""Video processors by a kind of model that takes what they make."""
needs_torchvision = pytest.mark.skipif(not TORCHVISION, reason="video processors need torchvision")
each = pytest.mark.parametrize("name", [name for name in KINDS if f"{name}-video" in VIDEOS])


def ramps(frames: int, height: int, width: int) -> Tensor:
    """A video whose colours say when, and how far down and across."""
    axes = [torch.linspace(0, 255, length) for length in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=1).byte()


CLIPS = (ramps(8, 90, 140), ramps(8, 120, 70))
METADATA = {"total_num_frames": 8, "fps": 8.0, "duration": 1.0}


def both_views(name: str, clips: Any, zoom: tuple[int, int, int], **options: Any) -> tuple[Any, dict[str, Any]]:
    """What a video processor makes, and the high-res inputs without their prefix."""
    kind, settings = KINDS[name]
    high: dict[str, Any] = {}
    processor = in_both_views(getattr(tf, kind)(**settings), zoom, high)
    low = processor.preprocess(list(clips), **{"return_tensors": "pt", "do_sample_frames": False} | options)
    return low, {key.removeprefix("hd_"): value for key, value in high.items()}


def sampled(name: str, clips: int = 1) -> dict[str, Any]:
    """Options that choose every other frame."""
    choice = {"num_frames": 4} if name == "gemma4" else {"fps": 4}
    return {"do_sample_frames": True, "video_metadata": [dict(METADATA) for _ in range(clips)], **choice}


@needs_torchvision
@each
@pytest.mark.parametrize("zoom", [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
def test_the_same_region_larger(name: str, zoom: tuple[int, int, int]) -> None:
    """The model's geometry finds a zoom of the low-res grid; values, which tell places, are as many of each."""
    low, views = both_views(name, CLIPS, zoom, **sampled(name, 2) if zoom[0] > 1 else {})
    model = VIDEOS[f"{name}-video"].model()
    flexkit.patch_model(model, FlexConfig(zoom=zoom), trained=True)
    geometry = [*get_patch(model).views][1]
    assert set(geometry.inputs) <= set(views)
    grids = geometry.grids(model, {key: low[key] for key in geometry.inputs}, (1, 1, 1))
    assert list(geometry.grids(model, views, zoom)) == list(grids)
    if zoom[0] > 1:  # other frames
        return
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)[2:-2]
    shown, closer = (own["pixel_values_videos"].double().flatten() for own in (low, views))
    spread = shown.max() - shown.min()
    torch.testing.assert_close(closer.quantile(levels), shown.quantile(levels), atol=float(0.08 * spread), rtol=0)


@needs_torchvision
@each
def test_low_res_inputs_are_those_of_the_wrapped_processor(name: str) -> None:
    kind, settings = KINDS[name]
    low, _ = both_views(name, CLIPS, (1, 2, 2))
    options = {"use_token_compression": False} if name == "video_llama_3" else {}
    plain = getattr(tf, kind)(**settings).preprocess(
        list(CLIPS), return_tensors="pt", do_sample_frames=False, **options
    )
    assert low.keys() == plain.keys()
    for key in low.keys() - {"video_metadata"}:
        assert torch.equal(torch.as_tensor(low[key]), torch.as_tensor(plain[key]))


@needs_torchvision
@pytest.mark.parametrize("name", ["llava_onevision", "video_llava"])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_which_frames_are_read(name: str, factor: int) -> None:
    """Each frame of this clip has a brightness of its own."""
    brightness = 10 * torch.arange(24)
    clip = brightness.byte()[:, None, None, None].expand(-1, 3, 50, 50)
    options = sampled(name) | {"video_metadata": [{"total_num_frames": 24, "fps": 24.0, "duration": 1.0}]}
    kind, settings = KINDS[name]
    processor = getattr(tf, kind)(**settings)
    indices = torch.as_tensor(processor.sample_frames(metadata=_as_metadata(options), fps=4))
    low, views = both_views(name, [clip], (factor, 1, 1), **options)
    of_frames = (torch.as_tensor(view["pixel_values_videos"])[0].double().mean((1, 2, 3)) for view in (low, views))
    chosen, read = of_frames
    step = (chosen[1] - chosen[0]) / (indices[1] - indices[0])
    found = indices[0] + (read - chosen[0]) / step
    torch.testing.assert_close(found.round().long(), frames_between(indices, factor, 1).clamp(0, 23))


def _as_metadata(options: dict[str, Any]) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(**options["video_metadata"][0])


@given(st.lists(st.integers(0, 100), min_size=1, max_size=9, unique=True), st.integers(1, 5), st.integers(1, 3))
def test_frames_between(chosen: list[int], factor: int, together: int) -> None:
    """Sampled so many times as often, in order, around the frames that were chosen."""
    indices = torch.tensor(sorted(chosen))
    found = frames_between(indices, factor, together)
    length = len(indices) + -len(indices) % together
    assert len(found) == length * factor and bool((found.diff() >= 0).all())
    if factor % 2:  # each is the one in the middle
        assert torch.equal(found[factor // 2 :: factor][: len(indices)], indices)
    if factor == 1:
        assert torch.equal(found[len(indices) :], indices[-1:].expand(length - len(indices)))
    groups, known = found.view(length, factor), torch.cat([indices, indices[-1:].expand(length - len(indices))])
    assert bool(((groups[1:] >= known[:-1, None]) & (groups[:-1] <= known[1:, None])).all())


def qwen() -> Any:
    special = {"image": IMAGE, "video": VIDEO, "vision_start": START, "vision_end": END}
    tokenizer = tiny_tokenizer({f"{name}_token": (f"<{name}>", index) for name, index in special.items()}, VOCABULARY)
    settings = {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}, "patch_size": 14, "merge_size": 2}
    template = CHAT_TEMPLATE.replace("IMAGE{% else", "<image>{% elif block.type == 'video' %}<video>{% else")
    return tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessorPil(**settings),
        tokenizer,
        tf.Qwen2VLVideoProcessor(**_SIZES, fps=4),
        chat_template=template,
    )


@needs_torchvision
@pytest.mark.parametrize("zoom", [2, (2, 1, 1), (2, 2, 2)])
def test_images_and_videos_through_a_model(zoom: Any) -> None:
    """What the processor makes is what the patched model takes; nothing selected is the base model."""
    model = ZOO["qwen2_5_vl"].model().float()
    processor = FlexProcessor(qwen(), flexkit.patch_model(model, FlexConfig(zoom=zoom, policy=TopK(2)), trained=True))
    inputs = processor(
        text=["w5 <image> w6 <video> w7", "w5 <video> w6"],
        images=[picture(60, 80)],
        videos=list(CLIPS),
        **sampled("qwen2_vl", 2),
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad(), flexkit.trace(model) as trace:
        found = model(**inputs).logits
        with flexkit.disabled(model):
            base = model(**inputs).logits
        flexkit.set_policy(model, flexkit.Nothing())
        assert torch.equal(model(**inputs).logits, base)
    assert bool(((found - base).abs().amax((1, 2)) > 1e-4).all())
    assert trace.mask(0, trace.layers[0], image=1).ndim == 4


@needs_torchvision
def test_a_conversation_about_a_video() -> None:
    """Videos in a chat are shown in both views."""
    content = [{"type": "video", "video": CLIPS[0].numpy()}, {"type": "text", "text": "w5 w6"}]
    inputs = FlexProcessor(qwen(), (2, 1, 2)).apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=sampled("qwen2_vl"),
    )
    factors = inputs["hd_video_grid_thw"] // inputs["video_grid_thw"]
    assert factors.tolist() == [[2, 1, 2]]


def _onevision() -> Any:
    special = {"image": IMAGE, "video": VIDEO}
    tokenizer = tiny_tokenizer({f"{name}_token": (f"<{name}>", index) for name, index in special.items()}, VOCABULARY)
    square = {"size": {"height": 42, "width": 42}}
    return tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(**square),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(**square),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
    )


@needs_torchvision
@pytest.mark.parametrize("zoom", [(1, 2, 2), (2, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("tiles", ["on_demand", "all"])
def test_frames_that_are_read_when_they_are_wanted(zoom: tuple[int, int, int], tiles: Any) -> None:
    """The same logits as of the whole video, of which few frames are decoded."""
    array = ramps(60, 50, 70).permute(0, 2, 3, 1).numpy()
    array[::7] = 255 - array[::7]
    model = ZOO["llava_onevision"].model().float()
    config = FlexConfig(zoom=zoom, policy=TopK(1).over_frames(), tiles=tiles)
    processor = FlexProcessor(_onevision(), flexkit.patch_model(model, config, trained=True))
    call = {"text": "w5 <video> w6", "do_sample_frames": True, "num_frames": 4, "return_tensors": "pt"}
    source = FrameArray(array, fps=10)
    lazy = processor(videos=[source], **call)
    assert source.decoded == 4 and "hd_pixel_values_videos" not in lazy
    metadata = [{"total_num_frames": 60, "fps": 10.0, "duration": 6.0}]
    whole = processor(videos=[torch.from_numpy(array).permute(0, 3, 1, 2)], video_metadata=metadata, **call)
    assert torch.equal(lazy["pixel_values_videos"], whole["pixel_values_videos"])
    with torch.no_grad(), flexkit.trace(model) as trace:
        found = model(**lazy).logits
        torch.testing.assert_close(found, model(**whole).logits, rtol=1e-6, atol=1e-6)
        with flexkit.disabled(model):
            assert not torch.allclose(model(**lazy).logits, found)
    if tiles == "on_demand":
        assert trace.steps[0].tiles == trace.steps[1].tiles
        assert 4 < source.decoded <= 4 + 4 * zoom[0]  # frames that were sampled are decoded anew, larger
    again = copy.deepcopy(lazy["hd_frames"][0])
    assert again.source is source


@needs_torchvision
def test_frames_that_do_not_fit() -> None:
    model = ZOO["llava_onevision"].model().float()
    flexkit.patch_model(model, FlexConfig(zoom=(2, 2, 2)), trained=True)
    source = FrameArray(ramps(60, 50, 70).permute(0, 2, 3, 1).numpy(), fps=10)
    call = {"text": "w5 <video> w6", "do_sample_frames": True, "num_frames": 4, "return_tensors": "pt"}
    other = FlexProcessor(_onevision(), (1, 3, 3))(videos=[source], **call)
    with pytest.raises(HighResInputError, match=r"hd_frames holds zooms \(\(3, 3\),\); .*\(\(2, 2\),\) for each video"):
        model(**other)
    odd = FlexProcessor(_onevision(), (1, 2, 2))(videos=[source], **call | {"num_frames": 3})
    with pytest.raises(HighResInputError, match="a video of 3 frames; expected a number divisible by 2"):
        model(**odd)
    with pytest.raises(HighResInputError, match=r"some videos of a call are flexkit\.FrameSource"):
        FlexProcessor(_onevision(), 2)(videos=[source, CLIPS[0]], text=["<video>"] * 2)
    qwen = ZOO["qwen2_5_vl"].model().float()
    flexkit.patch_model(qwen, FlexConfig(zoom=2), trained=True)
    with pytest.raises(HighResInputError, match="encodes a high-res view as a whole and takes no hd_frames"):
        qwen(input_ids=odd["input_ids"], hd_frames=odd["hd_frames"])


@needs_torchvision
def test_a_chat_about_a_source() -> None:
    source = FrameArray(ramps(40, 90, 140).permute(0, 2, 3, 1).numpy(), fps=10)
    content = [{"type": "video", "video": source}, {"type": "text", "text": "w5 w6"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = FlexProcessor(qwen(), (2, 1, 2)).apply_chat_template(
        [{"role": "user", "content": content}], processor_kwargs={"do_sample_frames": True, "fps": 4}, **options
    )
    assert inputs["video_grid_thw"].tolist()[0][0] == 8  # 16 frames, in pairs
    assert (inputs["hd_video_grid_thw"] // inputs["video_grid_thw"]).tolist() == [[2, 1, 2]]


@needs_torchvision
def test_what_cannot_be_shown() -> None:
    with pytest.raises(HighResInputError, match=r"zoom of 2 in time .* do_sample_frames=True"):
        both_views("qwen2_vl", CLIPS, (2, 1, 1))
    with pytest.raises(UnsupportedModelError, match="by their shorter side"):
        both_views("video_llava", CLIPS, (1, 1, 2))
    with pytest.raises(UnsupportedModelError, match="cuts 1 videos into 5 parts"):
        both_views("minimax_m3_vl", [ramps(40, 90, 140)], (1, 2, 2))
    with pytest.raises(HighResInputError, match=r"makes nothing of these videos: .*'fps'"):
        both_views("minimax_m3_vl", CLIPS, (1, 2, 2), fps="fast")
    with pytest.raises(UnsupportedModelError, match=r"no view \(1, 3, 3\) times as large"):
        both_views("gemma4", CLIPS, (1, 3, 3))


def test_a_zoom_in_time_is_kept(tmp_path: Path) -> None:
    processor = FlexProcessor(tiny_llava_processor(), (3, 1, 2))
    assert processor.zoom == (1, 2) and processor.video_zoom == (3, 1, 2)
    processor.save_pretrained(tmp_path)
    again = FlexProcessor.from_pretrained(tmp_path)
    assert again.video_zoom == (3, 1, 2)
    assert pickle.loads(pickle.dumps(processor)).video_zoom == (3, 1, 2)
    assert FlexProcessor(tiny_llava_processor(), 2).video_zoom == (1, 2, 2)
