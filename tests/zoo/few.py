"""The few kinds of models that tests look at in depth: they differ in what the method meets most often."""

import transformers as tf

from tests.zoo.family import Family
from tests.zoo.pixels import clip, patches, square
from tests.zoo.tiny import TEXT, TOKENS, VISION

__all__ = ["FEW"]


def _llava(text: type, **settings: object) -> tf.LlavaConfig:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=42),
        text_config=text(**TEXT, **settings),
        image_token_id=TOKENS["image_token_id"],
    )


def _qwen2_5_vl() -> tf.Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "patch_size": 14,
    }
    return tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **TOKENS)


def _gemma3() -> tf.Gemma3Config:
    text = tf.Gemma3TextConfig(
        **TEXT,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=8,
        query_pre_attn_scalar=8,
    )
    return tf.Gemma3Config(
        text_config=text,
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=56),
        mm_tokens_per_image=4,
        image_token_id=TOKENS["image_token_id"],
        boi_token_index=TOKENS["vision_start_token_id"],
        eoi_token_index=TOKENS["vision_end_token_id"],
    )


FEW = (
    Family("llava", lambda: _llava(tf.LlamaConfig), square),
    Family("llava-qwen2", lambda: _llava(tf.Qwen2Config), square),
    Family("llava-mistral", lambda: _llava(tf.MistralConfig, sliding_window=16), square),
    Family("qwen2_5_vl", _qwen2_5_vl, patches, any_grid=True, video=clip),
    Family("gemma3", _gemma3, square, grid=(2, 2)),
)
