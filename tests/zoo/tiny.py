"""Sizes that make a model tiny, whatever its kind calls them."""

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

TOKENS: dict[str, Any] = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
)
"""Special tokens, as most kinds call them."""


def config(model_type: str, **settings: Any) -> tf.PreTrainedConfig:
    """The config of a model type; parts (``text_config``, ``vision_config``) are dicts of settings."""
    return tf.CONFIG_MAPPING[model_type](**settings)
