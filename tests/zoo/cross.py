"""Decoders that read images elsewhere than among their own tokens, or with attention code of their own."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, LEARNED_POSITIONS, START, Family, Grid, nothing
from tests.zoo.pixels import positions_of_images, square, stacked
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["CROSS"]

_TOWER: dict[str, Any] = {**VISION, "image_size": 42}
"""Three by three patches, behind a class token."""


def _mllama() -> tf.PreTrainedConfig:
    vision = {
        **_TOWER,
        "attention_heads": VISION["num_attention_heads"],
        "num_global_layers": 1,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 3 * VISION["hidden_size"],
        "max_num_tiles": 4,
    }
    text = {**TEXT, "cross_attention_layers": [1, 3]}
    return config("mllama", text_config=text, vision_config=vision, image_token_index=IMAGE)


def _one_tile(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """An image that fits one tile, in the first of four slots."""
    vision = settings.vision_config
    slots = torch.zeros(1, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
    slots[:, :1] = square(settings, grid, zoom)["pixel_values"][:, None]
    return {
        "pixel_values": slots,
        "aspect_ratio_ids": torch.tensor([1]),
        "aspect_ratio_mask": torch.eye(vision.max_num_tiles, dtype=torch.long)[:1],
    }


def _from_image_on(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """Images by batch row; a text token sees the images before it, and of each the first tile."""
    if "pixel_values" not in inputs:
        return inputs
    ratios = stacked(inputs["aspect_ratio_ids"], images)
    tiles = stacked(inputs["aspect_ratio_mask"], images)
    tiles[..., 0] = 1  # also where there is no image, or its softmax would be empty
    seen = _seen(inputs["input_ids"], images)[..., None] * torch.eye(tiles.shape[-1], dtype=torch.long)[0]
    return inputs | {
        "pixel_values": stacked(inputs["pixel_values"], images),
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }


def _idefics(**settings: Any) -> tf.PreTrainedConfig:
    vision = {**_TOWER, "embed_dim": VISION["hidden_size"]}
    del vision["hidden_size"]
    perceiver = dict(resampler_n_latents=4, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=8)
    return config(
        "idefics",
        **TEXT,
        cross_layer_interval=2,
        alpha_initializer="ones",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config=vision,
        perceiver_config=perceiver,
        **settings,
    )


def _with_mask(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """Images by batch row, and which of them a text token sees; without any, one black image that none sees."""
    size = settings.vision_config.image_size
    pixels = inputs.get("pixel_values", torch.zeros(0, 3, size, size, dtype=torch.float64))
    pixels = stacked(pixels, images)
    mask = _seen(inputs["input_ids"], images)
    if not pixels.shape[1]:
        pixels, mask = pixels.new_zeros(len(images), 1, 3, size, size), mask.new_zeros(*mask.shape[:2], 1)
    return inputs | {"pixel_values": pixels, "image_attention_mask": mask}


def _seen(ids: Tensor, images: Sequence[int]) -> Tensor:
    """``(batch, length, images of the row with most)``: 1 from the placeholder of an image on."""
    seen = torch.zeros(*ids.shape, max(images), dtype=torch.long)
    for row, starts in enumerate(positions_of_images(ids)):
        for image, start in enumerate(starts):
            seen[row, start:, image] = 1
    return seen


def _git() -> tf.PreTrainedConfig:
    return config("git", **TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vision_config=_TOWER)


def _blip() -> tf.PreTrainedConfig:
    text = {**TEXT, "encoder_hidden_size": VISION["hidden_size"], "sep_token_id": None}
    return config("blip", text_config=text, vision_config=_TOWER, image_text_hidden_size=16)


def _mark(grid: Grid) -> list[int]:
    return [IMAGE]


def _between_marks(grid: Grid) -> list[int]:
    return [START, IMAGE, END]


CROSS = (
    Family("mllama", _mllama, square, _one_tile, tokens=_mark, finish=_from_image_on),
    Family("idefics", _idefics, square, tokens=_between_marks, finish=_with_mask),
    Family(
        "idefics-resampler",
        lambda: _idefics(use_resampler=True),
        square,
        tokens=_between_marks,
        finish=_with_mask,
        learned_queries=True,
    ),
    Family("git", _git, square, tokens=nothing, one_image=True, right_padding=LEARNED_POSITIONS),
    Family("blip", _blip, square, tokens=nothing, one_image=True, right_padding=LEARNED_POSITIONS),
)
"""Cross-attention layers in the decoder, or image tokens in front of a text without placeholders for them."""
