"""Processors that give flattened patches of images of any size, and the time, rows and columns of each."""

from typing import Any

from tests.processors.kind import PLACEHOLDER, TinyProcessor
from tests.zoo import END, IMAGE, START, VIDEO

_TORCHVISION = ("torchvision",)
_QWEN = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}


def _sizes(patch: int, *, frames: int = 1) -> dict[str, Any]:
    """Of images with 4 to 9 cells of four patches."""
    cell = (2 * patch) ** 2
    return {"patch_size": patch, "size": {"shortest_edge": 4 * cell * frames, "longest_edge": 9 * cell * frames}}


def _grid(model_type: str, patch: int = 14, *, frames: int = 1, **settings: Any) -> TinyProcessor:
    return TinyProcessor(model_type, _sizes(patch, frames=frames), **settings)


def _qwen(model_type: str, patch: int = 14, **settings: Any) -> TinyProcessor:
    return _grid(model_type, patch, tokens=_QWEN, prompt="<|vision_start|> <|image_pad|> <|vision_end|>", **settings)


def _glm(model_type: str, **settings: Any) -> TinyProcessor:
    tokens = {IMAGE: "<|image|>", VIDEO: "<|video|>", 80: "<|begin_of_video|>", 81: "<|end_of_video|>"}
    return _grid(model_type, tokens=tokens, prompt="<image_start> <|image|> <image_end>", frames=2, **settings)


GRIDS = (
    _qwen("qwen2_vl"),
    _qwen("qwen2_5_vl"),
    _qwen("qwen3_vl", 16),
    _qwen("qwen3_vl_moe", 16, image_processor="Qwen2VLImageProcessor"),
    _qwen("qwen3_5", 16),
    _qwen("qwen3_5_moe", 16),
    _qwen("qwen4_exp", 16),
    _qwen("cosmos3_omni", 16, processor="Qwen3VLProcessor"),
    _qwen("cosmos3_edge", 16, call={"return_mm_token_type_ids": True}),
    _qwen("exaone4_5"),
    _qwen("hyperclovax_vision_v2"),
    _qwen("lfm3_vl", 16),
    _qwen("qwen2_5_omni_thinker", processor="Qwen2_5OmniProcessor", image_processor="Qwen2VLImageProcessor"),
    _qwen("qwen3_omni_moe_thinker", 16, processor="Qwen3OmniMoeProcessor", image_processor="Qwen2VLImageProcessor"),
    TinyProcessor("video_llama_3", {**_sizes(14), "merge_size": 2}, tokens=_QWEN, prompt="<|image_pad|>"),
    _grid(
        "cohere_compass",
        16,
        tokens={IMAGE: "<|IMAGE_PAD|>", VIDEO: "<|VIDEO_PAD|>", START: "<|VISION_START|>", END: "<|VISION_END|>"},
        prompt="<|VISION_START|> <|IMAGE_PAD|> <|VISION_END|>",
    ),
    TinyProcessor(
        "dots3_note",
        {**_sizes(14), "temporal_patch_size": 1},
        tokens={IMAGE: "<|imgpad|>", VIDEO: "<|video_pad|>", PLACEHOLDER: "<|audio_comp_pad|>"},
        prompt="<|imgpad|>",
    ),
    _grid("ernie4_5_vl_moe", prompt="<image_start> <image> <image_end>"),
    _grid("paddleocr_vl", prompt="<image_start> <image> <image_end>"),
    _grid("hunyuan_vl", prompt="<image_start><image><image_end>"),
    _glm("glm4v"),
    _glm("glm4v_moe", image_processor="Glm4vImageProcessor"),
    _glm("glm46v"),
    _glm("glm_ocr", processor="Glm46VProcessor", image_processor="Glm46VImageProcessor"),
    _glm("glmga", processor="Glm46VProcessor"),
    TinyProcessor(
        "glm5_next",
        {"patch_size": 14, "min_image_tokens": 4, "max_image_tokens": 9},
        tokens={IMAGE: "<|image|>", VIDEO: "<|video|>", 80: "<|begin_of_video|>", 81: "<|end_of_video|>"},
        prompt="<|image|>",
    ),
    TinyProcessor(
        "kimi_k25",
        {"patch_size": 14, "max_patches": 36, "size": {"max_height": 8, "max_width": 8}},
        backends=_TORCHVISION,
    ),
    _grid(
        "minimax_m3_vl",
        tokens={IMAGE: "]<]image[>[", VIDEO: "]<]video[>["},
        prompt="]<]image[>[",
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "muse_glimmer",
        {"patch_size": 14, "max_image_tokens": 9},
        tokens={IMAGE: "<|patch|>", START: "<|image_start|>", END: "<|image_end|>"},
        prompt="<|patch|>",
        backends=_TORCHVISION,
    ),
    TinyProcessor("muse_spark", {"patch_size": 14, "max_image_tokens": 9}, backends=_TORCHVISION),
    TinyProcessor("inkling2", {"size": {"height": 8, "width": 8}}, backends=_TORCHVISION),
)
