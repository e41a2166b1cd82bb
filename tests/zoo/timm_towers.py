"""Models whose vision tower comes from timm, with a convolution in its place: timm is not needed to test them."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.zoo.family import END, IMAGE, START, VIDEO, Family, Grid
from tests.zoo.pixels import picture
from tests.zoo.tiny import TEXT, config

__all__ = ["TIMM"]

_PATCH, _WIDTH = 8, 16
_SMALL, _LARGER = picture(3 * _PATCH, 3 * _PATCH), picture(6 * _PATCH, 6 * _PATCH)


def _stand_in(kind: type[tf.PreTrainedConfig]) -> None:
    """Let AutoModel build a convolution for this kind of config, in place of timm's tower."""

    class Tower(tf.PreTrainedModel):
        config_class = kind
        main_input_name = "pixel_values"
        _supports_sdpa = True

        def __init__(self, config: tf.PreTrainedConfig) -> None:
            super().__init__(config)
            self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH)
            self.post_init()

        def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
            features = self.patches(pixel_values)
            if self.config.architecture.startswith("vit"):  # these give a class token and the patches, others a map
                features = features.flatten(2).transpose(1, 2)
                features = torch.cat([features.mean(1, keepdim=True), features], dim=1)
            return BaseModelOutputWithPooling(last_hidden_state=features)

    # What AutoModel.register does, which refuses configs of transformers itself in earlier versions.
    tf.AutoModel._model_mapping._extra_content[kind] = Tower


def _gemma3n() -> tf.PreTrainedConfig:
    _stand_in(tf.Gemma3nVisionConfig)
    text = {
        **TEXT,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 16,
        "num_kv_shared_layers": 1,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": TEXT["vocab_size"],
    }
    audio = {
        "hidden_size": 16,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": (4, 4),
    }
    return config(
        "gemma3n",
        text_config=text,
        vision_config={"hidden_size": _WIDTH, "vocab_offset": IMAGE, "vocab_size": 4},
        audio_config={**audio, "vocab_offset": IMAGE + 4, "vocab_size": 2},
        vision_soft_tokens_per_image=9,
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=IMAGE + 4,
    )


def _fast_vlm() -> tf.PreTrainedConfig:
    _stand_in(tf.TimmWrapperConfig)
    return config(
        "fast_vlm",
        text_config=TEXT,
        vision_config={"model_type": "timm_wrapper", "hidden_size": _WIDTH},
        image_token_index=IMAGE,
        image_seq_length=9,
    )


def _perception_lm() -> tf.PreTrainedConfig:
    _stand_in(tf.TimmWrapperConfig)
    return config(
        "perception_lm",
        text_config=TEXT,
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": f"vit_pe_core_large_patch{_PATCH}_{6 * _PATCH}",
            "model_args": {"embed_dim": _WIDTH, "img_size": [6 * _PATCH] * 2},
        },
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _tiles(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    """Tiles of every image, of which there is one."""
    return {"pixel_values": _LARGER(settings, grid, zoom)["pixel_values"][:, None]}


TIMM = (
    Family("gemma3n", _gemma3n, _SMALL),
    Family("fast_vlm", _fast_vlm, _SMALL),
    Family("perception_lm", _perception_lm, _LARGER, low_res=_tiles),
)
