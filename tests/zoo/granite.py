"""Granite with a vision tower: embeddings scaled on their way in, image features added at several layers."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.anyres import overview, with_newline
from tests.zoo.family import IMAGE, Family, Grid
from tests.zoo.pixels import square
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["GRANITE"]

_SCALED: dict[str, Any] = dict(
    embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0
)


def _granite_docling() -> tf.PreTrainedConfig:
    vision = {**VISION, "patch_size": 4, "image_size": 48, "out_hidden_size": TEXT["hidden_size"]}
    return config(
        "granite_docling",
        text_config={**TEXT, **_SCALED},
        vision_config={**vision, "scale_factor": 4, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE,
        pad_token_id=TEXT["pad_token_id"],
    )


def _page_of_one_tile(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Tiles of every page, and which of them are no padding."""
    pixels = square(settings, grid, zoom)["pixel_values"]
    return {"pixel_values": pixels[:, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def _granite4_vision() -> tf.PreTrainedConfig:
    former = {
        "hidden_size": 64,
        "encoder_hidden_size": 64,
        "num_attention_heads": 1,
        "intermediate_size": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return config(
        "granite4_vision",
        text_config={**TEXT, **_SCALED},
        vision_config={**VISION, "hidden_size": 64, "patch_size": 4, "image_size": 24},
        qformer_config={**former, "num_hidden_layers": 1, "cross_attention_frequency": 1, "vocab_size": 96},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[0, 0]],  # no size for tiles: the overview alone
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2, 3],
    )


GRANITE = (
    Family("granite_docling", _granite_docling, square, low_res=_page_of_one_tile),
    Family("granite4_vision", _granite4_vision, square, low_res=overview, tokens=with_newline),
)
