"""Processors that give pictures or patches of images of any size, and in other ways the size of each."""

from typing import Any

from tests.processors.kind import PLACEHOLDER, TinyProcessor
from tests.zoo import IMAGE

_TORCHVISION = ("torchvision",)
_UNSLICED = {"slice_mode": False}
_GEMMA: dict[str, Any] = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
_PIXTRAL: dict[str, Any] = {"size": {"longest_edge": 24}, "patch_size": {"height": 8, "width": 8}}
_BREAKS: dict[str, Any] = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<image_end>"}
_FOUR: dict[str, Any] = {"patch_size": 4, "spatial_merge_size": 2}


class _WithUnderscore:
    """A tokenizer that begins every text with a token of its own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(f"w4 {text}", **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _of_emu(processor: Any) -> None:
    processor.downsample_ratio = 4


def _of_fuyu(processor: Any) -> None:
    processor.tokenizer = _WithUnderscore(processor.tokenizer)


SIZED = (
    TinyProcessor("lighton_ocr", _PIXTRAL, _FOUR),
    TinyProcessor("mistral3", _PIXTRAL, {**_FOUR, **_BREAKS}, backends=_TORCHVISION),
    TinyProcessor("mistral_large4", _PIXTRAL, {**_FOUR, **_BREAKS}, backends=_TORCHVISION),
    TinyProcessor(
        "emu3", {"min_pixels": 8 * 8, "max_pixels": 12 * 16, "spatial_factor": 4}, finish=_of_emu, backends=("pil",)
    ),
    TinyProcessor("gemma4", _GEMMA),
    TinyProcessor("gemma4_unified", _GEMMA, backends=_TORCHVISION),
    TinyProcessor(
        "lfm2_vl",
        {
            "encoder_patch_size": 4,
            "tile_size": 16,
            "min_image_tokens": 4,
            "max_image_tokens": 9,
            "max_pixels_tolerance": 1.0,
        },
        tokens={PLACEHOLDER: "<|img_thumbnail|>"},
        overview={"do_image_splitting": False},
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "nemotron_h_omni", {"patch_size": 4, "min_num_patches": 16, "max_num_patches": 36}, backends=_TORCHVISION
    ),
    TinyProcessor("minicpmv4_6", {"patch_size": 4, "scale_resolution": 48, "use_image_id": False}, overview=_UNSLICED),
    TinyProcessor("minicpmv4_7", {"patch_size": 4, "scale_resolution": 48, "use_image_id": False}, overview=_UNSLICED),
    TinyProcessor(
        "minicpm_ocr",
        {"patch_size": 4, "scale_resolution": 24, "use_image_id": False},
        overview=_UNSLICED,
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "fuyu",
        {"size": {"height": 16, "width": 24}, "patch_size": {"height": 4, "width": 4}},
        tokens={IMAGE: "|SPEAKER|", 80: "|NEWLINE|", 81: "<0x04>"},
        prompt="",
        finish=_of_fuyu,
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "inkling_mm_model",
        {"size": {"height": 2, "width": 2}},
        tokens={80: "<|content_image|>", 81: "<|content_audio_input|>"},
        backends=_TORCHVISION,
    ),
)
