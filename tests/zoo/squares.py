"""Models with a tower of one input size, and one square grid of tokens for every image."""

import inspect
from collections.abc import Sequence
from typing import Any

import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, VIDEO, Family, Grid
from tests.zoo.pixels import frames, square
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["SQUARES"]

_TOWER: dict[str, Any] = {**VISION, "image_size": 42}
"""Three by three patches."""


def _llava(model_type: str, **settings: Any) -> tf.PreTrainedConfig:
    return config(model_type, text_config=TEXT, vision_config=_TOWER, image_token_index=IMAGE, **settings)


def _deepseek_vl() -> tf.PreTrainedConfig:
    return config("deepseek_vl", text_config=TEXT, vision_config=_TOWER, image_token_id=IMAGE)


def _janus() -> tf.PreTrainedConfig:
    width = TEXT["hidden_size"]
    codebook = {  # of the pictures that Janus draws, which nothing here looks at
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "projection_dim": width,
        "image_token_embed_dim": width,
    }
    return config(
        "janus",
        text_config=TEXT,
        vision_config={**_TOWER, "projection_dim": width, "num_image_tokens": 9},
        vq_config=codebook,
        image_token_id=IMAGE,
    )


def _paligemma(**text: Any) -> tf.PreTrainedConfig:
    width = TEXT["hidden_size"]
    return config(
        "paligemma",
        text_config=TEXT | text,
        vision_config=_TOWER,
        image_token_index=IMAGE,
        vocab_size=TEXT["vocab_size"],
        projection_dim=width,
        hidden_size=width,
    )


def _prefixed(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """Token type 0 up to the last image: a prefix, all of whose positions see each other; words behind it are 1."""
    shows = inputs["input_ids"] == IMAGE
    return inputs | {"token_type_ids": (shows.flip(-1).cumsum(-1).flip(-1) == 0).long()}


def _shieldgemma2() -> tf.PreTrainedConfig:
    text = {
        **TEXT,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
    }
    return config(
        "shieldgemma2",
        text_config=text,
        vision_config={**VISION, "image_size": 56},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _with_class_tokens(grid: Grid) -> list[int]:
    """The cells of every frame, behind a class token."""
    return [VIDEO] * (grid[0] * (1 + grid[1] * grid[2]))


def _images(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Pixels by the name that tells them from those of videos, in versions of transformers that have it."""
    (pixels,) = square(settings, grid, zoom).values()
    known = inspect.signature(tf.VideoLlavaForConditionalGeneration.forward).parameters
    return {"pixel_values" if "pixel_values" in known else "pixel_values_images": pixels}


CAPPED = Family(
    "paligemma-capped", lambda: _paligemma(model_type="gemma2", attn_logit_softcapping=0.5), square, finish=_prefixed
)
"""PaliGemma 2, which caps its attention logits; padding is NaN in the base model."""
SQUARES = (
    Family("vipllava", lambda: _llava("vipllava", vision_feature_layers=[-1, -2]), square),
    Family(
        "video_llava",
        lambda: _llava("video_llava", video_token_index=VIDEO),
        square,
        low_res=_images,
        video=frames,
        video_grid=(2, 3, 3),
        video_tokens=_with_class_tokens,
    ),
    Family("deepseek_vl", _deepseek_vl, square),
    Family("janus", _janus, square),
    Family("paligemma", _paligemma, square, finish=_prefixed),
    Family("shieldgemma2", _shieldgemma2, square, grid=(2, 2)),
)
