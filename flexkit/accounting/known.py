"""Shapes of models that people use, by the names under which they are known."""

from collections.abc import Callable

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

__all__ = ["KNOWN"]


def _llava() -> PretrainedConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
    )
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2)


def _siglip(layers: int, image_size: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )


def _qwen2_7b(vocabulary: int) -> dict[str, object]:
    return {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
    }


def _llava_onevision() -> PretrainedConfig:
    text = Qwen2Config(**_qwen2_7b(152000))
    return LlavaOnevisionConfig(vision_config=_siglip(26, 384), text_config=text, vision_feature_layer=-1)


def _qwen2_5_vl() -> PretrainedConfig:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    rotary = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=_qwen2_7b(152064) | {"rope_parameters": rotary})


def _qwen3_vl() -> PretrainedConfig:
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }
    return Qwen3VLConfig(vision_config=vision, text_config=text)


def _internvl3() -> PretrainedConfig:
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    text = Qwen2Config(**_qwen2_7b(151674))
    return InternVLConfig(
        vision_config=vision, text_config=text, downsample_ratio=0.5, image_seq_length=256, tie_word_embeddings=False
    )


def _gemma3() -> PretrainedConfig:
    text = {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "vocab_size": 262208,
    }
    return Gemma3Config(vision_config=_siglip(27, 896), text_config=text, mm_tokens_per_image=256)


KNOWN: dict[str, Callable[[], PretrainedConfig]] = {
    "llava-1.5-7b": _llava,
    "llava-onevision-7b": _llava_onevision,
    "qwen2.5-vl-7b": _qwen2_5_vl,
    "qwen3-vl-8b": _qwen3_vl,
    "internvl3-8b": _internvl3,
    "gemma3-12b": _gemma3,
}
"""What gives the config of each."""
