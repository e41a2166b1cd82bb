"""A model of each way in which images enter a language model: random weights, and towers that cost next to nothing."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from benchmarks.models import IMAGE_TOKEN, NARROW, ONE_LAYER, PATCH, language_model

__all__ = ["FAMILIES", "Family"]

_WORD = 5
"""The first id that is a word."""
_TOWER = NARROW | ONE_LAYER


@dataclass(frozen=True)
class Family:
    """A kind of model, and how it is shown one picture."""

    config: Callable[[dict[str, Any]], PretrainedConfig]
    """From the settings of a language model to those of the whole."""
    side: int
    """Cells along a side of the low-res view."""
    cell: int
    """Pixels along a side of a cell."""
    view: Callable[["Family", int], dict[str, Tensor]]
    """The picture at a zoom: what the model takes, before ``hd_`` is put in front of the names."""
    overview: Callable[["Family", int], dict[str, Tensor]] | None = None
    """What the base model takes of it and of so many words, where that is not the view at zoom 1."""
    is_in_sequence: bool = True
    """Whether the image's tokens stand among the words."""

    def build(self, options: argparse.Namespace) -> PreTrainedModel:
        """The model that was asked for."""
        torch.manual_seed(0)
        text = language_model(options.width, options.layers, kv_heads=options.kv_heads)
        text |= {"head_dim": options.width // text["num_attention_heads"], "pad_token_id": 0}
        with torch.device(options.device):
            model = AutoModelForImageTextToText.from_config(self.config(text))
        built: PreTrainedModel = model.to(getattr(torch, options.dtype)).eval()
        return built

    def question(self, model: PreTrainedModel, words: int, zoom: int, batch: int) -> dict[str, Tensor]:
        """Prompts of one image and some words, the same in every row, and both views of the image."""
        torch.manual_seed(1)
        image = torch.full((self.side**2 if self.is_in_sequence else 1,), IMAGE_TOKEN)
        text = torch.randint(_WORD, 1000, (words,))
        low = self.overview(self, words) if self.overview else self.view(self, 1)
        inputs = {"input_ids": torch.cat([image, text])[None], **low}
        inputs |= {f"hd_{name}": value for name, value in self.view(self, zoom).items()}
        return {
            name: (value.to(model.dtype) if value.is_floating_point() else value)
            .repeat(batch, *[1] * (value.ndim - 1))
            .to(model.device)
            for name, value in inputs.items()
        }


def _llava(text: dict[str, Any]) -> PretrainedConfig:
    tower = CLIPVisionConfig(**_TOWER, image_size=336, patch_size=PATCH)
    return LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**text), image_token_id=IMAGE_TOKEN, vision_feature_layer=-1
    )


def _qwen2_5_vl(text: dict[str, Any]) -> PretrainedConfig:
    tower = {
        **NARROW,
        "depth": 1,
        "num_heads": 1,
        "out_hidden_size": text["hidden_size"],
        "patch_size": PATCH,
        "fullatt_block_indexes": [],
    }
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        vision_config=tower, text_config={**text, "rope_parameters": rotary}, image_token_id=IMAGE_TOKEN
    )


def _gemma3(text: dict[str, Any]) -> PretrainedConfig:
    tower = SiglipVisionConfig(**_TOWER, image_size=896, patch_size=PATCH, vision_use_head=False)
    return Gemma3Config(
        vision_config=tower,
        text_config=Gemma3TextConfig(**text, sliding_window=1024, query_pre_attn_scalar=text["head_dim"]),
        mm_tokens_per_image=256,
        image_token_id=IMAGE_TOKEN,
    )


def _internvl(text: dict[str, Any]) -> PretrainedConfig:
    tower = InternVLVisionConfig(**_TOWER, image_size=[448, 448], patch_size=[PATCH, PATCH])
    return InternVLConfig(vision_config=tower, text_config=Qwen2Config(**text), image_token_id=IMAGE_TOKEN)


def _mllama(text: dict[str, Any]) -> PretrainedConfig:
    tower = {
        **NARROW,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 128,
        "image_size": 336,
        "patch_size": PATCH,
        "max_num_tiles": 4,
    }
    cross = {"cross_attention_layers": list(range(1, text["num_hidden_layers"], 3))}
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    return MllamaConfig(vision_config=tower, text_config=text | cross | ends, image_token_index=IMAGE_TOKEN)


def _pixels(family: Family, zoom: int) -> dict[str, Tensor]:
    side = zoom * family.side * family.cell
    return {"pixel_values": torch.randn(1, 3, side, side)}


def _patches(family: Family, zoom: int) -> dict[str, Tensor]:
    """Flattened, of two frames; four make one cell."""
    side = zoom * family.side * family.cell // PATCH
    return {
        "pixel_values": torch.randn(side**2, 3 * 2 * PATCH**2),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def _first_of_four_tiles(family: Family, words: int) -> dict[str, Tensor]:
    side = family.side * family.cell
    pixels = torch.zeros(1, 1, 4, 3, side, side)
    pixels[:, :, 0] = torch.randn(3, side, side)
    first = torch.tensor([1, 0, 0, 0])
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": first[None, None],
        "cross_attention_mask": first.repeat(1, 1 + words, 1, 1),
    }


FAMILIES = {
    "llava": Family(_llava, 24, 14, _pixels),
    "qwen2_5_vl": Family(_qwen2_5_vl, 24, 28, _patches),
    "gemma3": Family(_gemma3, 16, 56, _pixels),
    "internvl": Family(_internvl, 16, 28, _pixels),
    "mllama": Family(_mllama, 24, 14, _pixels, _first_of_four_tiles, is_in_sequence=False),
}
"""By model type: tiles of one size; pictures of any size; sliding windows; four patches a token; cross-attention."""
