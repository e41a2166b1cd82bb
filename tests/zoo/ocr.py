"""Readers of documents with two towers in a row, the first of them SAM; their prompts here hold the overview alone."""

from typing import Any

import transformers as tf

from tests.zoo.family import IMAGE, Family, Grid
from tests.zoo.pixels import picture
from tests.zoo.tiny import MOE, SAM, TEXT, VISION, config

__all__ = ["DEEPSEEK_OCR2", "OCR"]

_SIZE: int = SAM["image_size"]
_WIDTH: int = VISION["hidden_size"]
_FIRST: dict[str, Any] = {**SAM, "downsample_channels": [8, _WIDTH]}
_QUERIES = 144
"""Of an image of at most so many patches, DeepSeek-OCR 2 has no other number."""

_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": MOE["moe_intermediate_size"],
    "n_routed_experts": MOE["num_experts"],
    "num_experts_per_tok": MOE["num_experts_per_tok"],
    "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"] * 2,
}


def _unlimited_ocr() -> tf.PreTrainedConfig:
    return config(
        "unlimited_ocr",
        # As many key heads as heads: its own eager kernel knows no other.
        text_config={**TEXT, **_EXPERTS, "num_key_value_heads": TEXT["num_attention_heads"], "sliding_window": 8},
        vision_config={"sam_config": _FIRST, "encoder_config": {**VISION, "image_size": 42}},
        image_token_id=IMAGE,
    )


def _with_newlines(grid: Grid) -> list[int]:
    """A newline token after every row, a separator after all."""
    return [IMAGE] * (grid[0] * (grid[1] + 1) + 1)


def _deepseek_ocr2() -> tf.PreTrainedConfig:
    second = {**TEXT, "hidden_size": _WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
    return config(
        "deepseek_ocr2",
        text_config={**TEXT, **_EXPERTS},
        vision_config={"sam_config": _FIRST, "encoder_config": {**second, "pad_token_id": None}},
        image_token_id=IMAGE,
    )


def _queries(grid: Grid) -> list[int]:
    return [IMAGE] * (_QUERIES + 1)


OCR = (Family("unlimited_ocr", _unlimited_ocr, picture(_SIZE, _SIZE), tokens=_with_newlines),)
DEEPSEEK_OCR2 = Family("deepseek_ocr2", _deepseek_ocr2, picture(_SIZE, _SIZE), tokens=_queries, learned_queries=True)
"""Its image tokens are learned queries that have read the patches, and lie on no grid themselves."""
