"""Encoders of images, or of images and text, whose output a decoder reads by cross-attention."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, LEARNED_POSITIONS, START, Family, Grid, nothing
from tests.zoo.pixels import numbered_patches, picture, square
from tests.zoo.tiny import BART, SAM, TEXT, VISION, config

__all__ = ["BERT", "ENCODER_DECODER", "SWIN", "VIT", "vision_encoder_decoder"]

_TOWER: dict[str, Any] = {**VISION, "image_size": 42}
"""Three by three patches."""
_T5: dict[str, Any] = dict(d_kv=8, d_ff=48, num_heads=4, dropout_rate=0.0)
_START = 1
"""The token that a decoder starts with."""


def _florence2() -> tf.PreTrainedConfig:
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 5],
        "patch_stride": [4, 4],
        "patch_padding": [3, 2],
        "patch_prenorm": [False, True],
        "embed_dim": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 3,
        "drop_path_rate": 0.0,
        "projection_dim": TEXT["hidden_size"],
        "max_temporal_embeddings": 4,
    }
    return config("florence2", text_config={**BART, "model_type": "bart"}, vision_config=vision, image_token_id=IMAGE)


def _mean_before(grid: Grid) -> list[int]:
    """The mean of all cells, then each cell."""
    return [IMAGE] * (1 + grid[0] * grid[1])


def _t5gemma2() -> tf.PreTrainedConfig:
    text = {
        **TEXT,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
    }
    encoder = {
        "text_config": {**text, "num_hidden_layers": 2, "layer_types": text["layer_types"][:2]},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "image_size": 56},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    return config("t5gemma2", encoder=encoder, decoder=text, image_token_index=IMAGE, eoi_token_index=END)


def _four(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    return square(settings.encoder, grid, zoom)


def _udop() -> tf.PreTrainedConfig:
    return config(
        "udop",
        **_T5,
        d_model=TEXT["hidden_size"],
        vocab_size=TEXT["vocab_size"],
        num_layers=4,  # the cache of the decoder is sized by it
        num_decoder_layers=4,
        image_size=42,
        patch_size=14,
        max_2d_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=_START,
    )


def _pix2struct() -> tf.PreTrainedConfig:
    text = {**TEXT, **_T5, "num_layers": 4, "use_cache": True, "decoder_start_token_id": _START}
    vision = {
        **VISION,
        **_T5,
        "hidden_size": TEXT["hidden_size"],
        "num_attention_heads": 4,
        "patch_embed_hidden_size": 12,
        "seq_len": 64,
    }
    return config("pix2struct", text_config=text, vision_config=vision)


def _pp_formulanet() -> tf.PreTrainedConfig:
    vision = {
        **SAM,
        "post_conv_in_channels": SAM["output_channels"],
        "post_conv_mid_channels": 12,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": TEXT["hidden_size"],
    }
    return config("pp_formulanet", text_config=BART, vision_config=vision)


def vision_encoder_decoder(encoder: dict[str, Any], decoder: dict[str, Any]) -> tf.PreTrainedConfig:
    decoder = {**decoder, "is_decoder": True, "add_cross_attention": True}
    return config(
        "vision-encoder-decoder", encoder=encoder, decoder=decoder, decoder_start_token_id=_START, pad_token_id=0
    )


VIT: dict[str, Any] = {**_TOWER, "model_type": "vit"}
BERT: dict[str, Any] = {
    **TEXT,
    "model_type": "bert",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_GPT2: dict[str, Any] = {
    **TEXT,
    "model_type": "gpt2",
    "n_layer": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SWIN: dict[str, Any] = {
    "model_type": "donut-swin",
    "image_size": [32, 48],
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [2, 2, 2],
    "window_size": 2,
    "drop_path_rate": 0.0,
}
"""Eight by twelve patches, merged twice."""


def _to_decoder(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """The words of a prompt go to the decoder, behind the token it starts with: the encoder takes images alone."""
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    ids[(mask.cumsum(-1) == 1) & mask.bool()] = _START
    return inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def _whole_image(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    patches = inputs["flattened_patches"]
    return _to_decoder(settings, inputs, images) | {"attention_mask": patches[..., 0].ne(0).long()}


def _to_encoder(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """The words of a prompt go to the encoder; the decoder has begun with words that depend on them."""
    seed = inputs["input_ids"].sum(-1, keepdim=True)
    begun = torch.cat([torch.full_like(seed, _START), 3 + seed % 70, 3 + 2 * seed % 70], dim=1)
    return inputs | {"decoder_input_ids": begun}


def _on_page(settings: Any, inputs: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """The last word stands in the middle of the page, the others nowhere."""
    boxes = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.float64)
    last = inputs["attention_mask"].cumsum(-1).argmax(-1)
    boxes[torch.arange(len(boxes)), last] = torch.tensor([0.4, 0.4, 0.6, 0.6], dtype=torch.float64)
    return _to_encoder(settings, inputs, images) | {"bbox": boxes}


ENCODER_DECODER = (
    Family(
        "florence2",
        _florence2,
        picture(48, 48),
        tokens=_mean_before,
        finish=_to_encoder,
        stream="decoder_",
        right_padding=LEARNED_POSITIONS,
    ),
    Family("t5gemma2", _t5gemma2, _four, grid=(2, 2), finish=_to_encoder, stream="decoder_"),
    Family(
        "udop",
        _udop,
        picture(42, 42),
        tokens=nothing,
        finish=_on_page,
        one_image=True,
        stream="decoder_",
    ),
    Family(
        "pix2struct",
        _pix2struct,
        numbered_patches,
        grid=(2, 3),
        tokens=nothing,
        finish=_whole_image,
        one_image=True,
        stream="decoder_",
    ),
    Family(
        "pp_formulanet",
        _pp_formulanet,
        square,
        tokens=nothing,
        finish=_to_decoder,
        one_image=True,
        stream="decoder_",
        right_padding=LEARNED_POSITIONS,
    ),
    *(
        Family(
            name,
            lambda encoder=encoder, decoder=decoder: vision_encoder_decoder(encoder, decoder),
            pixels,
            grid=grid,
            tokens=nothing,
            finish=_to_decoder,
            one_image=True,
            stream="decoder_",
            right_padding=LEARNED_POSITIONS,
        )
        for name, encoder, decoder, pixels, grid in (
            ("vision-encoder-decoder", VIT, BERT, picture(42, 42), (3, 3)),
            ("vision-encoder-decoder-gpt2", VIT, _GPT2, picture(42, 42), (3, 3)),
            ("vision-encoder-decoder-trocr", VIT, {**BART, "model_type": "trocr"}, picture(42, 42), (3, 3)),
            ("vision-encoder-decoder-donut", SWIN, {**BART, "model_type": "mbart"}, picture(32, 48), (2, 3)),
        )
    ),
)
"""Sequence-to-sequence models."""
