"""Sizes that make a model tiny, whatever its kind calls them."""

import copy
from typing import Any

import transformers as tf

from tests.zoo.family import END, IMAGE, PAD, START, VIDEO, VOCABULARY

TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
"""Sizes of a language model."""

VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14
)
"""Sizes of a vision tower."""

SAM: dict[str, Any] = dict(
    hidden_size=16,
    mlp_dim=24,
    output_channels=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=4,
    image_size=48,
    window_size=4,
    global_attn_indexes=[1],
)
"""Sizes of a SAM vision tower."""

PATCH_TOWER: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    depth=2,
    num_heads=2,
    out_hidden_size=TEXT["hidden_size"],
    patch_size=14,
)
"""Sizes of a vision tower that takes patches of images of any size."""

ROPE: dict[str, Any] = dict(rope_type="default", rope_theta=10000.0)
"""Rotary positions along the sequence."""

MROPE: dict[str, Any] = {**ROPE, "mrope_section": [1, 1, 2]}
"""Rotary positions with three axes: time, row, column."""

MOE: dict[str, Any] = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
"""Sizes of a mixture of experts."""

BART: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    d_model=TEXT["hidden_size"],
    encoder_layers=4,  # caches of a decoder alone are sized by it too
    decoder_layers=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    dropout=0.0,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
    forced_eos_token_id=None,
    decoder_start_token_id=1,
)
"""Sizes of an encoder and a decoder, as BART and its relatives call them."""

KOSMOS: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    embed_dim=TEXT["hidden_size"],
    layers=4,
    attention_heads=4,
    ffn_dim=48,
    dropout=0.0,
    attention_dropout=0.0,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
"""Sizes of a language model, as KOSMOS calls them."""

TOKENS: dict[str, Any] = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
)
"""Special tokens, as most kinds call them."""


def config(model_type: str, **settings: Any) -> tf.PreTrainedConfig:
    """The config of a model type; parts (``text_config``, ``vision_config``) are dicts of settings."""
    # Some configs write into the dicts that they are given; the grouped products of experts have no float64.
    return tf.CONFIG_MAPPING[model_type](**copy.deepcopy(settings), experts_implementation="eager")
