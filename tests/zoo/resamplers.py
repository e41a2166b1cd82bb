"""Models whose image tokens are learned queries that have read the patches, and lie on no grid themselves."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.versions import before
from tests.zoo.family import END, IMAGE, START, VIDEO, Family, Grid
from tests.zoo.pixels import numbered_patches, square, stacked
from tests.zoo.tiny import KOSMOS, TEXT, VISION, config

__all__ = ["RESAMPLERS", "aria"]

_TOWER: dict[str, Any] = {**VISION, "image_size": 42}
"""Three by three patches."""
_QUERIES = 4
"""Learned queries of an image."""
_FRAMES = 2

_QFORMER: dict[str, Any] = {
    **VISION,
    "num_hidden_layers": 4,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": VISION["hidden_size"],
    "vocab_size": TEXT["vocab_size"],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_OPT: dict[str, Any] = {
    **TEXT,
    "model_type": "opt",
    "ffn_dim": TEXT["intermediate_size"],
    "word_embed_proj_dim": TEXT["hidden_size"],
    "dropout": 0.0,
}


def _blip(model_type: str, **tokens: int) -> tf.PreTrainedConfig:
    return config(
        model_type,
        vision_config=_TOWER,
        qformer_config=_QFORMER,
        text_config=_OPT,
        num_query_tokens=_QUERIES,
        image_text_hidden_size=16,
        **tokens,
    )


def _instructed(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """The Q-Former reads an instruction beside the image: here the same for all."""
    instruction = torch.tensor([[5, 6, 7]]).repeat(sum(images), 1)
    return inputs | {"qformer_input_ids": instruction, "qformer_attention_mask": torch.ones_like(instruction)}


def _frames(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    frames = [square(settings, grid, zoom)["pixel_values"] for _ in range(_FRAMES)]
    return {"pixel_values": torch.stack(frames, dim=1)}


def aria(image_size: int = 42, patch_size: int = 14) -> tf.PreTrainedConfig:
    text = {**TEXT, "model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return config(
        "aria",
        text_config=text,
        vision_config={**_TOWER, "image_size": image_size, "patch_size": patch_size},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={(image_size // patch_size) ** 2: _QUERIES},
    )


def _idefics2() -> tf.PreTrainedConfig:
    perceiver = {
        "hidden_size": TEXT["hidden_size"],
        "resampler_n_latents": _QUERIES,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    return config(
        "idefics2",
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config=_TOWER,
        perceiver_config=perceiver,
        image_token_id=IMAGE,
    )


def _by_row(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    if "pixel_values" not in inputs:
        return inputs
    return inputs | {"pixel_values": stacked(inputs["pixel_values"], images)}


def _kosmos2() -> tf.PreTrainedConfig:
    # With any other, earlier versions hide from every learned query all but the first patches.
    kernel = "eager" if before("5.23") else "sdpa"
    return config(
        "kosmos-2", text_config=KOSMOS, vision_config=_TOWER, latent_query_num=_QUERIES, attn_implementation=kernel
    )


def _masks_in_float64(model: tf.PreTrainedModel) -> None:
    """Its causal mask is made in the default dtype, which the lowest float64 overflows."""
    decoder: Any = model.text_model.model
    make = decoder._prepare_decoder_attention_mask

    def make_in_float64(*arguments: Any) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return make(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)

    decoder._prepare_decoder_attention_mask = make_in_float64


def _kosmos2_5() -> tf.PreTrainedConfig:
    vision = {**VISION, "head_dim": 8, "patch_embed_hidden_size": 12, "max_num_patches": 64}
    return config("kosmos-2.5", text_config=KOSMOS, vision_config=vision, latent_query_num=_QUERIES)


def _placed(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    return inputs | {"image_embeds_position_mask": inputs["input_ids"] == IMAGE}


def _queries(grid: Grid) -> list[int]:
    return [START, *[IMAGE] * _QUERIES, END]


def _queries_of_frames(grid: Grid) -> list[int]:
    return [VIDEO] * _QUERIES * _FRAMES


RESAMPLERS = (
    Family("aria", aria, square, tokens=_queries, learned_queries=True),
    Family(
        "blip-2",
        lambda: _blip("blip-2", image_token_index=IMAGE),
        square,
        tokens=_queries,
        learned_queries=True,
        needs_image=True,
    ),
    Family(
        "instructblip",
        lambda: _blip("instructblip", image_token_index=IMAGE),
        square,
        tokens=_queries,
        finish=_instructed,
        learned_queries=True,
        needs_image=True,
    ),
    Family(
        "instructblipvideo",
        lambda: _blip("instructblipvideo", video_token_index=VIDEO),
        _frames,
        tokens=_queries_of_frames,
        finish=_instructed,
        learned_queries=True,
        needs_image=True,
    ),
    Family("idefics2", _idefics2, square, tokens=_queries, finish=_by_row, learned_queries=True),
    Family(
        "kosmos-2",
        _kosmos2,
        square,
        tokens=_queries,
        finish=_placed,
        learned_queries=True,
        needs_image=True,
        prepare=_masks_in_float64,
    ),
    Family(
        "kosmos-2.5",
        _kosmos2_5,
        numbered_patches,
        grid=(2, 3),
        tokens=_queries,
        finish=_placed,
        learned_queries=True,
    ),
)
"""Q-Formers and perceivers."""
