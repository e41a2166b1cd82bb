"""Processors that cut images into tiles, unless they are told not to."""

from typing import Any

from tests.processors.kind import BREAK, PLACEHOLDER, TinyProcessor
from tests.zoo import END, IMAGE, START

_TORCHVISION = ("torchvision",)
_UNCUT = {"crop_to_patches": False}
_SMALL: dict[str, Any] = {"size": {"height": 24, "width": 24}}
_MARKS = {80: "<fake_token_around_image>", 81: "<global-img>", 82: "<end_of_utterance>"}
_ANYRES: dict[str, Any] = {
    "size": {"shortest_edge": 42},
    "crop_size": {"height": 42, "width": 42},
    "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]],
}
_CLASS_TOKEN: dict[str, Any] = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def _of_molmo(processor: Any) -> None:
    processor.image_token, processor.image_token_id = "<|image|>", PLACEHOLDER


def _of_cohere(processor: Any) -> None:
    processor.patch_size = 3


TILES = (
    TinyProcessor("internvl", _SMALL, {"image_seq_length": 9}, overview=_UNCUT),
    TinyProcessor(
        "qianfan_ocr",
        _SMALL,
        {"image_seq_length": 9},
        {IMAGE: "<img_context>", PLACEHOLDER: "<image>"},
        overview=_UNCUT,
    ),
    TinyProcessor(
        "aya_vision",
        _SMALL,
        {"img_size": 24, "patch_size": 8},
        {
            IMAGE: "<|IMG_PATCH|>",
            START: "<|START_OF_IMG|>",
            END: "<|END_OF_IMG|>",
            80: "TILE",
            81: "TILE_GLOBAL",
            BREAK: "<|IMG_LINE_BREAK|>",
            PLACEHOLDER: "<image>",
        },
        overview=_UNCUT,
    ),
    TinyProcessor("cohere2_vision", _SMALL, finish=_of_cohere, overview=_UNCUT, backends=_TORCHVISION),
    TinyProcessor(
        "ovis2",
        _SMALL,
        {"image_seq_length": 9},
        {
            IMAGE: "<IMG_ATOM>",
            START: "<IMG_START>",
            80: "<IMG_GRID>",
            81: "<IMG_COL>",
            82: "<IMG_ROW>",
            END: "<IMG_END>",
            PLACEHOLDER: "<image>",
        },
        overview=_UNCUT,
    ),
    TinyProcessor(
        "got_ocr2",
        {"size": {"height": 48, "width": 48}},
        tokens={IMAGE: "<imgpad>", START: "<img>", END: "</img>"},
        prompt="<imgpad>",
        call={"num_image_tokens": 9},
        overview=_UNCUT,
        nested=False,
    ),
    TinyProcessor(
        "idefics3",
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
        {"image_seq_len": 9},
        _MARKS,
        overview={"do_image_splitting": False},
    ),
    TinyProcessor(
        "smolvlm",
        {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
        {"image_seq_len": 9},
        _MARKS,
        overview={"do_image_splitting": False},
        mocks={"transformers.models.smolvlm.processing_smolvlm.num2words": str},
    ),
    TinyProcessor(
        "granite_docling",
        {"size": {"height": 48, "width": 48}},
        {"image_seq_len": 9},
        _MARKS,
        overview=_UNCUT,
    ),
    TinyProcessor("llava_next", _ANYRES, _CLASS_TOKEN),
    TinyProcessor("llava_next_video", _ANYRES, _CLASS_TOKEN),
    TinyProcessor(
        "llava_onevision",
        {"size": {"height": 42, "width": 42}, "image_grid_pinpoints": _ANYRES["image_grid_pinpoints"]},
        {"num_image_tokens": 9, "vision_feature_select_strategy": "full"},
    ),
    TinyProcessor(
        "granite4_vision",
        {
            "size": {"shortest_edge": 24},
            "crop_size": {"height": 24, "width": 24},
            "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]],
        },
        {"patch_size": 4, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"},
    ),
    TinyProcessor(
        "llama4",
        _SMALL,
        {"patch_size": 4},
        {
            IMAGE: "<|patch|>",
            START: "<|image_start|>",
            END: "<|image_end|>",
            80: "<|tile_x_separator|>",
            81: "<|tile_y_separator|>",
            PLACEHOLDER: "<|image|>",
        },
        "<|image|>",
        overview={"max_patches": 1},
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "perception_lm",
        {"tile_size": 48, "size": {"height": 48, "width": 48}, "max_num_tiles": 4},
        {"patch_size": 8, "pooling_ratio": 2},
        overview={"vision_input_type": "vanilla"},
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "molmo2",
        {"size": {"height": 20, "width": 20}, "patch_size": 4, "overlap_margins": [1, 1], "max_crops": 4},
        tokens={
            IMAGE: "<im_patch>",
            START: "<im_start>",
            END: "<im_end>",
            80: "<im_col>",
            81: "<low_res_im_start>",
            82: "<frame_start>",
            83: "<frame_end>",
            84: "<im_low>",
            PLACEHOLDER: "<|image|>",
        },
        prompt="<|image|>",
        finish=_of_molmo,
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "step3p7",
        {"size": {"height": 48, "width": 48}, "patch_size": 32, "vision_patch_size": 4},
        tokens={IMAGE: "<im_patch>", START: "<im_start>", END: "<im_end>", 80: "<patch_start>", 81: "<patch_end>"},
        prompt="<im_patch>",
        backends=_TORCHVISION,
    ),
    TinyProcessor(
        "unlimited_ocr",
        {"size": {"height": 48, "width": 48}, "tile_size": 32, "maximum_pad_value": 32},
        {"patch_size": 4, "downsample_ratio": 4},
        overview=_UNCUT,
        backends=_TORCHVISION,
    ),
)
