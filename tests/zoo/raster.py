"""Towers that take the patches of an image row by row, and merge them after encoding."""

from typing import Any

from torch import Tensor

from tests.zoo.family import END, IMAGE, START, Grid
from tests.zoo.grids import grid_family, square_patches
from tests.zoo.pixels import clip, patches
from tests.zoo.tiny import MOE, MROPE, VISION

__all__ = ["RASTER"]

_MUSE_TEXT = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
_MUSE_TOWER = {"pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["window_attention", "full_attention"]}
_MUSE = {"out_hidden_size": 64, "projector_hidden_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_EXPERTS = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}


def _muse_patches(config: Any, grid: Grid, zoom: Grid) -> dict[str, Tensor]:
    views = patches(config, grid, zoom) if len(grid) == 2 else clip(config, grid, zoom)
    together = config.vision_config.patch_temporal
    return {name: value.repeat(1, together) if "pixel" in name else value for name, value in views.items()}


def _lines(grid: Grid) -> list[int]:
    """A token before the cells, one at the end of every line of cells, and one behind them."""
    return [START, *[IMAGE] * (grid[0] * (grid[1] + 1) + 2), END]


RASTER = (
    grid_family("paddleocr_vl", {"rope_parameters": MROPE}, tower=VISION, high_res=square_patches, video=None),
    grid_family(
        "kimi_k25",
        {**_LATENT, **_EXPERTS, "head_dim": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
        {"pos_emb_height": 4, "pos_emb_width": 4},
        tower=VISION,
        high_res=square_patches,
        video=None,
        projection_hidden_size=16,
    ),
    grid_family(
        "muse_glimmer", _MUSE_TEXT, _MUSE_TOWER, tower=VISION, high_res=_muse_patches, video=_muse_patches, **_MUSE
    ),
    grid_family(
        "muse_spark",
        {**_MUSE_TEXT, **MOE, "num_local_experts": 4, "moe_hidden_size": 16},
        _MUSE_TOWER,
        tower=VISION,
        high_res=_muse_patches,
        video=_muse_patches,
        audio_config={"out_hidden_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4},
        **_MUSE,
    ),
    grid_family(
        "hunyuan_vl",
        {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 1, 1]}},
        {"max_image_size": 56, "text_hidden_size": 32, "out_hidden_size": 32, "num_key_value_heads": 2},
        tower=VISION,
        sequence=_lines,
        video=None,
    ),
)
