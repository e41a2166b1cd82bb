"""MiniCPM-V: patches in a strip, four or sixteen of them to a cell, and a language model with linear attention."""

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo.family import END, IMAGE, START, VIDEO, Family, Grid, Views
from tests.zoo.grids import HYBRID, INTERLEAVED
from tests.zoo.tiny import TEXT, VISION, config

__all__ = ["MINICPM"]

_MARKS = {"image_start_id": START, "image_end_id": END, "slice_start_id": 80, "slice_end_id": 81, "newline_id": 82}


def _minicpm(model_type: str, **settings: Any) -> tf.PreTrainedConfig:
    rope = {**INTERLEAVED, "partial_rotary_factor": 0.5}
    return config(
        model_type,
        text_config={**TEXT, **HYBRID, "model_type": "qwen3_5_text", "head_dim": 16, "rope_parameters": rope},
        vision_config={**VISION, "patch_size": 4, "image_size": 24},
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **settings,
    )


def _strip(merge: int) -> Views:
    """Patches side by side, ``(1, 3, side, patches * side)``, and their rows and columns."""

    def view(settings: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
        side = settings.vision_config.patch_size
        sizes = torch.tensor([[merge * cells * factor for cells, factor in zip(grid, zoom, strict=True)]])
        return {"pixel_values": torch.randn(1, 3, side, int(sizes.prod()) * side), "target_sizes": sizes}

    return view


MINICPM = tuple(
    Family(model_type, make, _strip(merge), grid=(2, 3), any_grid=True, strips=("pixel_values",))
    for model_type, merge, make in (
        ("minicpmv4_6", 4, lambda: _minicpm("minicpmv4_6")),
        ("minicpmv4_7", 4, lambda: _minicpm("minicpmv4_7", **_MARKS)),
        ("minicpm_ocr", 2, lambda: _minicpm("minicpm_ocr")),
    )
)
