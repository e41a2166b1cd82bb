"""Models that cut a large image into tiles and add an overview; their prompts here hold the overview alone."""

from typing import Any

import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, Family, Grid
from tests.zoo.pixels import square
from tests.zoo.tiny import SAM, TEXT, VISION, config

__all__ = ["TILES"]

_SHUFFLED: dict[str, Any] = {**VISION, "patch_size": 4, "image_size": 24}
"""Six by six patches, of which four make one token."""
_IMAGE: dict[str, Any] = {"image_token_id": IMAGE}
_OVIS_INDICATORS = (START, 80, 81, 82, END)


def _internvl(model_type: str) -> tf.PreTrainedConfig:
    return config(model_type, text_config=TEXT, vision_config=_SHUFFLED, **_IMAGE)


def _cohere(model_type: str, **settings: Any) -> tf.PreTrainedConfig:
    text = {**TEXT, "layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8}
    return config(model_type, text_config=text, vision_config=_SHUFFLED, **settings)


def _ovis2() -> tf.PreTrainedConfig:
    return config(
        "ovis2",
        text_config=TEXT,
        vision_config={**_SHUFFLED, "hidden_stride": 2, "vocab_size": 32},
        visual_indicator_token_ids=_OVIS_INDICATORS,
        hidden_size=TEXT["hidden_size"],
        vocab_size=TEXT["vocab_size"],
        **_IMAGE,
    )


def _between_indicators(grid: Grid) -> list[int]:
    """An image of one tile: where it starts, the tile, that a grid of tiles would follow, where it ends."""
    start, separator, *_, end = _OVIS_INDICATORS
    return [start, *[IMAGE] * (grid[0] * grid[1]), separator, end]


def _got_ocr2(model_type: str) -> tf.PreTrainedConfig:
    return config(model_type, text_config=TEXT, vision_config=SAM, image_token_index=IMAGE, image_seq_length=9)


def _idefics3(model_type: str) -> tf.PreTrainedConfig:
    return config(model_type, text_config=TEXT, vision_config=_SHUFFLED, pad_token_id=TEXT["pad_token_id"], **_IMAGE)


def _sample_of_one(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Tiles in lists, one list a sample."""
    return {name: value[:, None] for name, value in square(settings, grid, zoom).items()}


TILES = (
    Family("internvl", lambda: _internvl("internvl"), square),
    Family("qianfan_ocr", lambda: _internvl("qianfan_ocr"), square),
    Family("aya_vision", lambda: _cohere("aya_vision", image_token_index=IMAGE), square),
    Family("cohere2_vision", lambda: _cohere("cohere2_vision", alignment_intermediate_size=24, **_IMAGE), square),
    Family("ovis2", _ovis2, square, tokens=_between_indicators),
    Family("got_ocr2", lambda: _got_ocr2("got_ocr2"), square),
    Family("pp_chart2table", lambda: _got_ocr2("pp_chart2table"), square),
    Family("idefics3", lambda: _idefics3("idefics3"), square, low_res=_sample_of_one),
    Family("smolvlm", lambda: _idefics3("smolvlm"), square, low_res=_sample_of_one),
)
