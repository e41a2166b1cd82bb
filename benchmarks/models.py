"""Models with random weights: a tower that costs next to nothing, and a language model of any size."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

import flexkit
from flexkit.encoding import pyramid

__all__ = [
    "IMAGE_TOKEN",
    "NARROW",
    "ONE_LAYER",
    "PATCH",
    "NoiseTiles",
    "build",
    "build_as",
    "language_model",
    "low_res",
    "question",
]

IMAGE_TOKEN = 1
PATCH = 14
NARROW = {"hidden_size": 64, "intermediate_size": 128}
ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 1}
"""Sizes of a tower that costs next to nothing."""


def language_model(width: int, layers: int, *, heads: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    """Settings of a language model, as for :func:`build`."""
    heads = heads or max(1, width // 128)
    return {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": 1024,
        "max_position_embeddings": 2**17,
    }


def build(
    width: int,
    layers: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    image_size: int = 336,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build a LLaVA whose tower has one narrow layer.

    Parameters
    ----------
    width, layers : int
        Of the language model.
    heads, kv_heads : int, optional
        By default heads of 128 channels, and as many for keys.
    image_size : int
        Side of the low-res view in pixels; a patch has 14.
    device : str
        Where the weights are.
    dtype : torch.dtype
        Of the weights.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**NARROW, **ONE_LAYER, image_size=image_size, patch_size=PATCH)
    text = LlamaConfig(**language_model(width, layers, heads=heads, kv_heads=kv_heads))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1, dtype=dtype
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.to(dtype).eval()


def build_as(options: argparse.Namespace) -> PreTrainedModel:
    """The model that was asked for."""
    dtype = getattr(torch, options.dtype)
    return build(options.width, options.layers, kv_heads=options.kv_heads, device=options.device, dtype=dtype)


def question(model: PreTrainedModel, words: int, zoom: int) -> dict[str, torch.Tensor]:
    """A prompt of one image and some words, and both views of the image.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From :func:`build`.
    words : int
        Behind the image.
    zoom : int
        Of the high-res view.
    """
    side = model.config.vision_config.image_size
    image = torch.full(((side // PATCH) ** 2,), IMAGE_TOKEN)
    text = torch.randint(3, 1000, (words,), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "input_ids": torch.cat([image, text])[None],
        "pixel_values": torch.randn(1, 3, side, side, generator=generator).to(model.dtype),
        "hd_pixel_values": torch.randn(1, 3, zoom * side, zoom * side, generator=generator).to(model.dtype),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def low_res(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the base model among those of both views."""
    return {name: value for name, value in inputs.items() if not name.startswith("hd_")}


class NoiseTiles(flexkit.TileView):
    """An image of any size, of which no more than the tiles that are read ever exist.

    Parameters
    ----------
    side : int
        Of a tile in pixels.
    zoom, levels : int
        Of the view.
    """

    def __init__(self, side: int, zoom: int, levels: int = 1) -> None:
        self.side = side
        self.zooms = pyramid((zoom, zoom), levels)

    def read(self, level: int, tiles: Sequence[int]) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(level)
        return (torch.randn(len(tiles), 3, self.side, self.side, generator=generator),)
