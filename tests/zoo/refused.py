"""Models listed as image-text-to-text to which a second view means nothing."""

from typing import Any

import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, Family, Grid
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["REFUSED"]

_TOWER: dict[str, Any] = {**VISION, "image_size": 42}


def _mistral4() -> tf.PreTrainedConfig:
    latent = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return config("mistral4", **{**TEXT, "num_key_value_heads": 4}, **latent, **experts)


def _diffusion_gemma() -> tf.PreTrainedConfig:
    text = {
        **TEXT,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
    }
    vision = {**VISION, "model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2}
    tokens = dict(image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END)
    return config("diffusion_gemma", text_config=text, vision_config=vision, canvas_length=8, **tokens)


def _pi0() -> tf.PreTrainedConfig:
    expert = {**TEXT, "model_type": "gemma"}
    vlm = {
        "model_type": "paligemma",
        "text_config": expert,
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model", "projection_dim": TEXT["hidden_size"]},
        "projection_dim": TEXT["hidden_size"],
        "image_token_index": IMAGE,
    }
    return config("pi0", vlm_config=vlm, dit_config=expert, chunk_size=4, max_state_dim=4, max_action_dim=4)


def _evolla() -> tf.PreTrainedConfig:
    protein = {**VISION, "vocab_size": 32, "max_position_embeddings": 64}
    resampler = dict(resampler_depth=1, resampler_dim_head=8, resampler_heads=2, resampler_num_latents=4)
    return config("evolla", **TEXT, **resampler, aligner_num_add_layers=2, protein_encoder_config=protein)


def _no_view(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    return {}


REFUSED = tuple(
    Family(model_type, make, _no_view)
    for model_type, make in (
        ("diffusion_gemma", _diffusion_gemma),
        ("evolla", _evolla),
        ("mistral4", _mistral4),
        ("pi0", _pi0),
    )
)
"""Text alone, proteins, actions of a robot, and a decoder that denoises whole blocks."""
