"""Models whose tower takes pictures of any size, given with their height and width."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, Family, Grid, bare
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["SIZED", "picture"]

_TOWER: dict[str, Any] = {**VISION, "patch_size": 4, "model_type": "pixtral"}
_LINE_BREAK = 94

_SPARSE_LATENT: dict[str, Any] = dict(
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    index_topk=12,
    index_head_dim=8,
    index_n_heads=8,  # with few, many keys score exactly 0, and ties are broken at random
    no_rope_layers=[1, 1, 0, 1],
    indexer_types=["full", "full", "shared", "full"],
)
"""Multi-head latent attention to the keys that an indexer picks."""


def picture(grid: Grid, zoom: Grid, cell: int) -> dict[str, Tensor]:
    """One picture and its size, ``cell`` pixels a side for every cell."""
    height, width = (side * factor * cell for side, factor in zip(grid, zoom, strict=True))
    return {"pixel_values": torch.randn(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}


def _picture(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    return picture(grid, zoom, settings.vision_config.patch_size * getattr(settings, "spatial_merge_size", 1))


def _lines(grid: Grid) -> list[int]:
    """A break behind every row but the last, which the end of the image follows."""
    rows, columns = grid
    return [*([*[IMAGE] * columns, _LINE_BREAK] * rows)[:-1], END]


def _family(
    name: str,
    build: Callable[[], tf.PreTrainedConfig],
    tokens: Callable[[Grid], list[int]] = _lines,
    grid: Sequence[int] = (2, 3),
) -> Family:
    return Family(name, build, _picture, grid=(grid[0], grid[1]), any_grid=True, tokens=tokens)


def _mistral3(model_type: str = "mistral3", **text: Any) -> tf.PreTrainedConfig:
    return config(model_type, text_config={**TEXT, **text}, vision_config=_TOWER, image_token_index=IMAGE)


def _llava() -> tf.PreTrainedConfig:
    return config(
        "llava",
        text_config={**TEXT, "model_type": "mistral"},
        vision_config=_TOWER,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _lighton_ocr() -> tf.PreTrainedConfig:
    return config("lighton_ocr", text_config=TEXT, vision_config=_TOWER, image_token_id=IMAGE)


SIZED = (
    _family("mistral3", _mistral3),
    _family("llava-pixtral", _llava),
    _family("lighton_ocr", _lighton_ocr, bare),
    _family("mistral_large4", lambda: _mistral3("mistral_large4", **_SPARSE_LATENT)),
    _family(
        "mistral_large4-shared", lambda: _mistral3("mistral_large4", **_SPARSE_LATENT, kv_source_layers=[0, 1, 2, 1])
    ),
)
