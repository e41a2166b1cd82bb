"""Processors of pictures of one size, for models without tiles of their own."""

from typing import Any

from tests.processors.kind import TinyProcessor
from tests.zoo import START

_CROPPED: dict[str, Any] = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
_SQUARE: dict[str, Any] = {"size": {"height": 42, "width": 42}}
_CLASS_TOKEN: dict[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_BOI = {START: "<start_of_image>"}


SQUARES = (
    TinyProcessor("llava", _CROPPED, _CLASS_TOKEN),
    TinyProcessor("vipllava", _CROPPED, _CLASS_TOKEN),
    TinyProcessor("video_llava", _CROPPED, _CLASS_TOKEN, backends=("pil",)),
    TinyProcessor("deepseek_vl", _SQUARE, {"num_image_tokens": 9}),
    TinyProcessor("janus", _SQUARE, {"num_image_tokens": 9}),
    TinyProcessor("paligemma", {**_SQUARE, "image_seq_length": 9}),
    TinyProcessor(
        "deepseek_vl_hybrid",
        {**_SQUARE, "high_res_size": {"height": 48, "width": 48}},
        {"num_image_tokens": 9},
    ),
    TinyProcessor(
        "gemma3",
        {"size": {"height": 56, "width": 56}},
        {"image_seq_length": 4},
        _BOI,
        "<start_of_image>",
    ),
    TinyProcessor(
        "shieldgemma2",
        {"size": {"height": 56, "width": 56}},
        {"image_seq_length": 4},
        _BOI,
        "<start_of_image>",
        processor="Gemma3Processor",
    ),
    TinyProcessor("gemma3n", {"size": {"height": 24, "width": 24}}, {"image_seq_length": 9}),
    TinyProcessor(
        "fast_vlm",
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        {"patch_size": 8, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
        processor="LlavaProcessor",
        image_processor="CLIPImageProcessor",
    ),
    TinyProcessor(
        "chameleon",
        {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}},
        {"image_seq_length": 9},
    ),
    TinyProcessor("pp_chart2table", {"size": {"height": 48, "width": 48}}, prompt="<image>" * 9),
)
