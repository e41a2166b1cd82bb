"""Models with a vision tower of their own make; their prompts here hold the overview alone."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from einops import rearrange
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, Family, Grid
from tests.zoo.pixels import square
from tests.zoo.tiny import MOE, SAM, TEXT, VISION, config

__all__ = ["TOWERS"]

_SHUFFLED: dict[str, Any] = {**VISION, "patch_size": 4, "image_size": 24}
"""Six by six patches, of which four make one token."""
_COLUMN = 80
"""The word that Molmo2 puts after every row of image tokens."""


def _llama4() -> tf.PreTrainedConfig:
    vision = {
        **_SHUFFLED,
        "intermediate_size": 4 * VISION["hidden_size"],  # the shuffled patches pass through the same setting
        "projector_input_dim": 24,
        "projector_output_dim": 24,
        "vision_output_dim": 24,
    }
    text = {
        **TEXT,
        "intermediate_size_mlp": 48,
        "num_local_experts": MOE["num_experts"],
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 32,
    }
    return config(
        "llama4",
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _step3p7() -> tf.PreTrainedConfig:
    text = {
        **TEXT,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 16,
        "num_sliding_attention_heads": 8,
        "partial_rotary_factors": [0.5, 1.0] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "n_routed_experts": MOE["num_experts"],
        "num_experts_per_tok": MOE["num_experts_per_tok"],
        "moe_intermediate_size": MOE["moe_intermediate_size"],
        "share_expert_dim": 16,
    }
    vision = {**VISION, "patch_size": 4, "image_size": 48, "mlp_ratio": 1.5}
    return config("step3p7", text_config=text, vision_config=vision, image_token_id=IMAGE)


def _molmo2() -> tf.PreTrainedConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    text = {
        **TEXT,
        "additional_vocab_size": 8,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        "rope_scaling_layers": [0, 2],
    }
    return config(
        "molmo2",
        text_config=text,
        # Five by five patches, pooled by four: the last row and column pool fewer, as in the released models.
        vision_config={**VISION, **heads, "patch_size": 4, "image_size": [20, 20]},
        adapter_config={
            **heads,
            "hidden_size": VISION["hidden_size"],
            "intermediate_size": 24,
            "text_hidden_size": TEXT["hidden_size"],
            "vision_feature_layer": [1, 0],
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        low_res_image_start_token_id=START,
    )


def _crops(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """Patches of every crop, of which an image here has one, and which patches of all crops each token pools."""
    if "pixel_values" not in inputs:
        return inputs
    side = settings.vision_config.patch_size
    crops = rearrange(inputs["pixel_values"], "n c (h p) (w q) -> n (h w) (p q c)", p=side, q=side)
    places = torch.arange(len(crops) * crops.shape[1]).reshape(-1, 5, 5)
    places = torch.nn.functional.pad(places, (0, 1, 0, 1), value=-1)
    return inputs | {
        "pixel_values": crops,
        "image_token_pooling": rearrange(places, "n (r h) (c w) -> (n r c) (h w)", h=2, w=2),
        "image_grids": torch.tensor([[3, 3, 0, 0]] * len(crops)),
    }


def _with_columns(grid: Grid) -> list[int]:
    return [START, *([IMAGE] * grid[1] + [_COLUMN]) * grid[0], END]


def _deepseek_vl_hybrid() -> tf.PreTrainedConfig:
    return config(
        "deepseek_vl_hybrid",
        text_config=TEXT,
        vision_config={**VISION, "image_size": 42},
        high_res_vision_config=SAM,
        image_token_id=IMAGE,
    )


def _two_sizes(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """The same picture in the sizes of both towers."""
    size = settings.high_res_vision_config.image_size
    larger = torch.randn(1, 3, size * zoom[0], size * zoom[1])
    return square(settings, grid, zoom) | {"high_res_pixel_values": larger}


TOWERS = (
    Family("llama4", _llama4, square),
    Family("step3p7", _step3p7, square),
    Family("molmo2", _molmo2, square, tokens=_with_columns, finish=_crops),
    Family("deepseek_vl_hybrid", _deepseek_vl_hybrid, _two_sizes),
)
